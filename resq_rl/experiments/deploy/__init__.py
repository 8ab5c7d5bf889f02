"""Trained policies outside of experiments: running on video and exporting."""
