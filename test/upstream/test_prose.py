"""The prose of code and documents: no sentence hides its subject in a clause."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("python", "patches", "benchmark", "tools", "test", "docs")
OPENERS = ("What", "Who", "Whose", "Where", "Of", "Those", "Which")
_SENTENCE = re.compile(rf"(?:^|[.!?:]\s+|\n\s*[-*|]\s+)({'|'.join(OPENERS)})\b")


def prose_of(file: Path) -> Iterator[str]:
    """The docstrings and comments of a module, the paragraphs of a document."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        without_code = re.sub(r"```.*?```", "", text, flags=re.S)
        yield from re.split(r"\n\s*\n", without_code)
        return
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(docstring))):
                yield from re.split(r"\n\s*\n", docstring)
    comment = ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comment += token.string.lstrip("# ") + " "
        elif token.type != tokenize.NL:
            yield comment
            comment = ""


def hidden_subjects(file: Path) -> list[str]:
    found = []
    for paragraph in prose_of(file):
        for match in _SENTENCE.finditer(paragraph.strip()):
            sentence = paragraph.strip()[match.start(1) :].split("\n")[0]
            if not sentence.rstrip().endswith("?"):
                found.append(f"{file.relative_to(ROOT)}: {sentence[:60]}")
    return found


def test_no_sentence_opens_with_a_clause_for_a_subject() -> None:
    """Say who does what. A reader who is not a native speaker gets lost otherwise."""
    files = [ROOT / "README.md"]
    for folder in FOLDERS:
        files += sorted((ROOT / folder).rglob("*.py"))
        files += sorted((ROOT / folder).rglob("*.md"))
    found = [line for file in files for line in hidden_subjects(file)]
    assert found == []
