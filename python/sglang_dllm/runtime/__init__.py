"""Requests to canvases to forward batches, and back."""
