"""Experiments: what the command line runs.

Only the command line is offered here, since nothing slow may be imported before it knows what to run; import the rest
from its modules.
"""

from resq_rl.experiments.cli.app import main
from resq_rl.experiments.cli.commands import COMMANDS, Command

__all__ = ["COMMANDS", "Command", "main"]
