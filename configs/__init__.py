"""Hydra configuration groups of the `resq-rl` commands, as YAML files."""
