"""Tuning on validation clips: measure many settings, keep those that no other beats."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np

from resq_rl.envs import Measurement, Policy

__all__ = ["Measured", "best_of", "best_policies", "thinned"]

P = TypeVar("P", bound=Policy)

Measured = tuple[Policy, Measurement]
"""A policy and its measurement."""


def best_policies(policies: Iterable[P], evaluate: Callable[[P], Measurement]) -> list[tuple[P, Measurement]]:
    """The policies on the envelope of (BOPs, accuracy): none of the others is as accurate for no more BOPs.

    Args:
        policies: what to try.
        evaluate: measures one of them, on validation clips.

    Returns:
        The envelope from few BOPs to many, each with its measurement.
    """
    return best_of([(policy, evaluate(policy)) for policy in policies])


def best_of(measured: Iterable[tuple[P, Measurement]]) -> list[tuple[P, Measurement]]:
    """The same for policies measured already."""
    front: list[tuple[P, Measurement]] = []
    for policy, result in sorted(measured, key=lambda pair: (pair[1].bops, -pair[1].accuracy)):
        if not front or result.accuracy > front[-1][1].accuracy:
            front.append((policy, result))
    return front


def thinned(front: Sequence[tuple[P, Measurement]], most: int) -> list[tuple[P, Measurement]]:
    """At most `most` points of an envelope, both ends among them, spread evenly over the logarithm of BOPs."""
    if len(front) <= most:
        return list(front)
    place = np.log([result.bops for _, result in front])
    wanted = np.linspace(place[0], place[-1], most)
    return [front[i] for i in sorted({int(np.abs(place - at).argmin()) for at in wanted})]
