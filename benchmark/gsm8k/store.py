"""A file of answers. A rerun asks only for the answers that it lacks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmark.gsm8k.figures import Answer


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store:
    """A JSONL file of answers by settings, index and problem.

    Without a path the store forgets its answers at the end.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._rows: dict[tuple[str, int, str], dict[str, Any]] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        # A killed run may leave half a line. The next answer must not join it.
        if lines and not lines[-1].endswith("\n"):
            with path.open("a", encoding="utf-8") as out:
                out.write("\n")
        for line in lines:
            try:
                row = json.loads(line)
                key = (row["settings"], row["answer"]["index"], row["problem"])
                Answer(**row["answer"])
            except (ValueError, KeyError, TypeError):
                continue
            self._rows[key] = row

    def get(self, settings: str, index: int, problem: str) -> Answer | None:
        row = self._rows.get((settings, index, problem))
        return Answer(**row["answer"]) if row else None

    def effective(self, settings: str) -> dict[str, Any] | None:
        """The ``dllm`` values in any answer to these settings."""
        for (of, _, _), row in self._rows.items():
            if of == settings and row.get("dllm"):
                return dict(row["dllm"])
        return None

    def add(
        self,
        settings: str,
        problem: str,
        answer: Answer,
        dllm: Mapping[str, Any] | None = None,
    ) -> None:
        row = {
            "settings": settings,
            "problem": problem,
            "dllm": dict(dllm) if dllm else None,
            "answer": asdict(replace(answer, warmup=False)),
        }
        self._rows[settings, answer.index, problem] = row
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
