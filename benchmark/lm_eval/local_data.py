"""The data of the lm-eval tasks in this folder: word problems of a local JSONL file.

    lm-eval run … --metadata '{"data": "FILE.jsonl"}'

The environment variable GSM8K_DATA names the file too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from datasets import Dataset


def problems(data: str | None = None, **_: Any) -> dict[str, Dataset]:
    """The test split: rows of ``question`` and ``answer``."""
    return _split(data, "question", "answer")


def choices(data: str | None = None, **_: Any) -> dict[str, Dataset]:
    """The test split: rows of ``question``, ``choices`` and the right ``label``."""
    return _split(data, "question", "choices", "label")


def _split(data: str | None, *keys: str) -> dict[str, Dataset]:
    file = data or os.environ.get("GSM8K_DATA")
    if not file:
        raise SystemExit(
            'which problems? --metadata \'{"data": "FILE.jsonl"}\' or GSM8K_DATA=FILE'
        )
    text = Path(file).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    kept = [{key: row[key] for key in keys} for row in rows]
    return {"test": Dataset.from_list(kept)}
