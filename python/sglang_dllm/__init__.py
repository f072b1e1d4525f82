"""Full-attention diffusion LLMs on SGLang."""

__version__ = "0.1.0"
SUPPORTED_SGLANG = ("0.5.17", "0.5.23")
"""The oldest and the newest SGLang that the tests run with."""
