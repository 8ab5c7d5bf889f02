"""Recording of runs in MLflow."""
