"""Free text as states that remember how much of a word its last bytes are.

It is Aho's and Corasick's automaton (CACM 18, 1975): all words are found at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from sglang_dllm.grammar.errors import FormError
from sglang_dllm.grammar.utf8 import Range
from sglang_dllm.grammar.work import Work


@dataclass(frozen=True)
class Seen:
    """A state: the longest beginning of a word with which the text ends.

    Attributes:
        word: the place of the word that is complete; None for no word.
        ways: ranges of bytes, all 256 together, and the state behind each of them.
    """

    word: int | None = None
    ways: list[tuple[Range, int]] = field(default_factory=list)


def states_of(words: Sequence[bytes], work: Work) -> list[Seen]:
    """The states of a text in which some words are looked for; it begins in the first.

    Args:
        words: none is empty, and none is inside of another.

    Raises:
        FormError: a word is empty or inside of another; or it takes too much work.
    """
    for i, word in enumerate(words):
        work.spend(len(words))
        if any(word in other for other in [*words[:i], *words[i + 1 :]]) or not word:
            raise FormError(f"{word.decode()!r} is inside of another such text")
    children: list[dict[int, int]] = [{}]
    complete: dict[int, int] = {}
    for i, word in enumerate(words):
        at = 0
        for byte in word:
            if byte not in children[at]:
                work.spend(16)
                children[at][byte] = len(children)
                children.append({})
            at = children[at][byte]
        complete[at] = i
    rows = np.zeros((len(children), 256), dtype=np.int32)
    waiting = deque([(0, 0)])
    while waiting:
        at, shorter = waiting.popleft()
        # The text goes on as behind the next shorter beginning, or by a byte more.
        behind = rows[shorter].copy()
        waiting += [(child, int(behind[byte])) for byte, child in children[at].items()]
        for byte, child in children[at].items():
            behind[byte] = child
        rows[at] = behind
    return [Seen(complete.get(at), _ways(row)) for at, row in enumerate(rows)]


def _ways(row: np.ndarray) -> list[tuple[Range, int]]:
    starts = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), len(row)]
    return [((low, high - 1), int(row[low])) for low, high in pairwise(starts)]
