"""The folder of a run: its record, its settings for going on, sweeps and progress."""
