"""Attention over whole canvases: one base, and one file for each backend."""
