"""Readers of published datasets, as their authors arranged them on disk."""
