"""Decoding: canvases, statistics, sampling, unmasking. Torch only, no SGLang."""
