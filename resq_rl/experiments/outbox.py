"""Delivery of records to an MLflow store, in order, through times in which the store does not answer.

Every record is an operation in a queue. A delivery that fails because the store cannot be reached leaves the queue as it is and
writes it to a file of JSON lines; it is tried again later, ever less often. A record that the store refuses would be refused
again, so it goes to a second file and the queue moves on.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

__all__ = ["Operation", "Outbox", "quick_requests"]
