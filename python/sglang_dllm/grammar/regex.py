"""A regular expression as parts of a grammar, by Python's own parser.

The parts match what ``re.fullmatch`` matches, less a few characters: ``\\d`` and
``\\w`` stand for those of ASCII.
"""

from __future__ import annotations

import re
from functools import cache
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from sglang_dllm.grammar.ebnf import (
    LAST_CHARACTER,
    Characters,
    Choice,
    Node,
    Repeat,
    Sequence,
    Text,
    complement,
)
from sglang_dllm.grammar.errors import FormError
from sglang_dllm.grammar.work import Work

Ranges = list[tuple[int, int]]

_ASCII: dict[Any, Ranges] = {
    sre.CATEGORY_DIGIT: [(48, 57)],
    sre.CATEGORY_WORD: [(48, 57), (65, 90), (95, 95), (97, 122)],
    sre.CATEGORY_SPACE: [(9, 13), (32, 32)],
}
_INVERSE = {
    sre.CATEGORY_NOT_DIGIT: sre.CATEGORY_DIGIT,
    sre.CATEGORY_NOT_WORD: sre.CATEGORY_WORD,
    sre.CATEGORY_NOT_SPACE: sre.CATEGORY_SPACE,
}
_FLAGS = re.DOTALL | re.VERBOSE
_STARTS = (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING)
_ENDS = (sre.AT_END, sre.AT_END_STRING)


def read_regex(pattern: str, work: Work) -> Node:
    """The parts of a regular expression that has to match a whole text.

    Raises:
        FormError: it is no expression of Python's ``re``, it has a construct that no
            automaton has, or it takes too much work.
    """
    work.spend(4 * len(pattern))
    try:
        found = parser.parse(pattern)
    except RecursionError:
        raise FormError("it is nested too deeply") from None
    except (re.error, OverflowError) as error:
        raise FormError(f"it is no regular expression: {error}") from None
    flags = found.state.flags & ~re.UNICODE
    if flags & ~_FLAGS:
        raise FormError("flags other than s and x are not served in an expression")
    reader = _Reader(bool(flags & re.DOTALL), work)
    return reader.sequence(found, is_first=True, is_last=True)


class _Reader:
    def __init__(self, dot_takes_newline: bool, work: Work) -> None:
        self._work = work
        self._dot = [(0, LAST_CHARACTER)]
        if not dot_takes_newline:
            self._dot = complement([(10, 10)])

    def sequence(self, items: Any, is_first: bool, is_last: bool) -> Node:
        """
        Args:
            is_first, is_last: whether nothing is in front of it, or behind it.
        """
        parts, num = [], len(items)
        for index, (kind, value) in enumerate(items):
            first, last = is_first and not index, is_last and index == num - 1
            node = self.single(kind, value, first, last)
            parts.append(node)
        return parts[0] if num == 1 else Sequence(tuple(parts))

    def single(self, kind: Any, value: Any, is_first: bool, is_last: bool) -> Node:
        if kind is sre.LITERAL:
            return Text(chr(value))
        if kind is sre.NOT_LITERAL:
            return Characters(tuple(complement([(value, value)])))
        if kind is sre.ANY:
            return Characters(tuple(self._dot))
        if kind is sre.IN:
            return Characters(tuple(self.members(value)))
        if kind is sre.BRANCH:
            options = [self.sequence(one, is_first, is_last) for one in value[1]]
            return Choice(tuple(options))
        if kind is sre.SUBPATTERN:
            if value[1] or value[2]:
                raise FormError("flags inside of an expression are not served")
            return self.sequence(value[-1], is_first, is_last)
        if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            least, most, part = value
            node = self.sequence(part, False, False)
            return Repeat(node, least, None if most is sre.MAXREPEAT else most)
        is_edge = kind is sre.AT and (
            (is_first and value in _STARTS) or (is_last and value in _ENDS)
        )
        if is_edge:
            return Text("")
        name = str(value if kind is sre.AT else kind).lower()
        raise FormError(f"an expression with {name} is not served")

    def members(self, items: Any) -> Ranges:
        """The ranges of a set such as ``[^a-z]``."""
        found: Ranges = []
        negated = False
        for kind, value in items:
            if kind is sre.NEGATE:
                negated = True
            elif kind is sre.LITERAL:
                found.append((value, value))
            elif kind is sre.RANGE:
                found.append(value)
            elif value in _INVERSE:
                found += complement(_members_of(_INVERSE[value]))
            else:
                # In a negated set nothing may be missing, so it is Unicode's there.
                found += _members_of(value) if negated else _ASCII[value]
        # Three for a set in a JSON string, which compares them with the escapes.
        self._work.spend(3 * len(found))
        return complement(found) if negated else found


@cache
def _members_of(category: Any) -> Ranges:
    """All characters of a category, as ``re`` knows them."""
    named = {
        sre.CATEGORY_DIGIT: r"\d+",
        sre.CATEGORY_SPACE: r"\s+",
        sre.CATEGORY_WORD: r"\w+",
    }
    every = "".join(map(chr, range(LAST_CHARACTER + 1)))
    found = re.finditer(named[category], every)
    return [(one.start(), one.end() - 1) for one in found]
