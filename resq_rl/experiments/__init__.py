"""Experiments: the command line, settings, tracking, statistics and results. Import from the modules themselves.

Nothing is imported here, so that `resq-rl --help` is quick.
"""

__all__: list[str] = []
