"""The embedded demo model: where its checkpoint lies, and how it was made."""

from __future__ import annotations

from pathlib import Path


def demo_path() -> Path:
    """Folder of the shipped checkpoint, in the Hugging Face LLaDA layout."""
    return Path(__file__).parent / "checkpoint"
