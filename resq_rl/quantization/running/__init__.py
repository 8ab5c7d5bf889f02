"""The model that runs: calibration, steps with their state, and the files that a calibrated model is kept in."""
