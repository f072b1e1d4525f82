"""The embedded demo model: its checkpoint, its tokenizer and its problems."""

from __future__ import annotations

from pathlib import Path


def demo_path() -> Path:
    """Folder of the shipped checkpoint, in the Hugging Face LLaDA layout."""
    return Path(__file__).parent / "checkpoint"
