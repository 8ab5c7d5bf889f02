"""Clips made by the program: generated scenes, and single labelled frames with a camera moved through them."""
