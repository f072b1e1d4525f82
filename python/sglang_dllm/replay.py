"""``python -m sglang_dllm replay trace.json``: a denoising in the terminal."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import TextIO

from sglang_dllm.trace import Canvas, Cell, Trace, TraceError, canvases, load_trace

MASK = "░"
_CLEAR, _PLAIN = "\x1b[2J\x1b[H", "\x1b[0m"
_FRESH, _BY_RULE, _MASKED = "\x1b[30;42m", "\x1b[90m", "\x1b[90m"
_UNSURE = "\x1b[33m"
_SPECIAL = re.compile(r"<\|?[\w-]+\|?>")
SURE = 0.9
"""A token below this probability is shown as unsure."""


def replay(path: Path, out: TextIO, *, speed: float, by_key: bool) -> int:
    """Show a trace, forward by forward; the exit status.

    Each forward is two lines without colors, where ``out`` is no terminal.

    Args:
        speed: forwards a second.
        by_key: wait for Enter behind each forward instead.
    """
    try:
        trace = load_trace(path)
        frames = canvases(trace)
    except TraceError as error:
        print(f"replay: {error}", file=sys.stderr)
        return 1
    is_terminal = out.isatty()
    try:
        for number, (step, canvas) in enumerate(frames):
            forward = step.forward if step else 0
            fresh = len(step.committed) if step else 0
            masks = canvas.count(None)
            news = f"{fresh} committed"
            if step and step.resized:
                news = f"resized to {len(canvas)} positions"
            head = f"forward {forward}: {news}, {masks} masks left"
            if is_terminal:
                line = "".join(_colored(cell, forward) for cell in canvas)
                out.write(f"{_CLEAR}{head}\n\n{line}\n")
            else:
                out.write(f"{head}\n{_text(canvas)}\n")
            out.flush()
            if number + 1 < len(frames):
                _wait(is_terminal, speed, by_key)
        out.write(f"\n{_summary(trace)}\n")
    except (KeyboardInterrupt, BrokenPipeError, EOFError):
        return 130
    return 0


def _wait(is_terminal: bool, speed: float, by_key: bool) -> None:
    if by_key:
        input()
    elif is_terminal:
        time.sleep(1 / speed)


def _summary(trace: Trace) -> str:
    committed = [one for step in trace.steps for one in step.committed]
    by_rule = sum(one.confidence is None for one in committed)
    forwards = trace.steps[-1].forward if trace.steps else 0
    decided = len(committed) - by_rule
    rate = f"{decided / forwards:.2f} a forward" if forwards else "no forward"
    more = f", {by_rule} filled by a rule" if by_rule else ""
    algorithm = trace.dllm.get("algorithm", "an unknown algorithm")
    return f"{algorithm}: {forwards} forwards, {decided} tokens ({rate}){more}"


def _text(canvas: Canvas) -> str:
    return "".join(MASK if cell is None else _printable(cell.text) for cell in canvas)


def _colored(cell: Cell | None, forward: int) -> str:
    if cell is None:
        return f"{_MASKED}{MASK}{_PLAIN}"
    text = _printable(cell.text)
    if cell.forward == forward and forward:
        return f"{_FRESH}{text}{_PLAIN}"
    if cell.confidence is None:
        return f"{_BY_RULE}{text}{_PLAIN}"
    return f"{_UNSURE}{text}{_PLAIN}" if cell.confidence < SURE else text


def _printable(text: str) -> str:
    """Token text on one line. A control character would steer the terminal.

    A token such as <|endoftext|> is one sign.
    """
    if _SPECIAL.fullmatch(text):
        return "∎"
    text = text.replace("\n", "↵").replace("\t", "⇥")
    return "".join(char if char.isprintable() else "�" for char in text)
