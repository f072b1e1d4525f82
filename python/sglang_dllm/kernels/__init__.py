"""Fused kernels, each with its plain torch form beside it."""
