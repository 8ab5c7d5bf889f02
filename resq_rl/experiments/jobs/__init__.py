"""The jobs behind `train`, `evaluate`, `compare` and `pretrain`."""
