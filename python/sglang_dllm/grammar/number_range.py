"""Numbers between two limits, and multiples of an integer, as parts of a grammar.

A limit is compared as a decimal with few digits, so that a number that the parts
produce is on the same side of it after a validator has rounded both to floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from sglang_dllm.grammar.ebnf import (
    Characters,
    Choice,
    Node,
    Repeat,
    Rule,
    Rules,
    Sequence,
    Text,
)
from sglang_dllm.grammar.errors import FormError
from sglang_dllm.grammar.json_text import DIGIT, MINUS

MAX_DIGITS = 15
"""Digits of a number, in front of the point and behind it together."""

MAX_MULTIPLE = 64
"""The largest ``multipleOf``: each remainder is a rule."""

_USUAL_PLACES = 2
_MAX_PLACES = 9
_NOTHING = Text("")


def numbers_in_range(limits: Mapping[str, int | float], is_integer: bool) -> Node:
    """All numbers with few places that keep to the limits.

    Args:
        limits: by the keywords ``minimum``, ``maximum``, ``exclusiveMinimum`` and
            ``exclusiveMaximum``.

    Raises:
        FormError: a limit has too many digits, or no number keeps to them.
    """
    exact = {key: Decimal(str(limit)) for key, limit in limits.items()}
    places = 0
    for limit in exact.values():
        digits = limit.normalize().as_tuple()
        if not isinstance(digits.exponent, int):
            raise FormError("expected a finite number")
        places = max(places, -digits.exponent)
        num_before = len(digits.digits) + digits.exponent
        if max(num_before, 0) > MAX_DIGITS - _MAX_PLACES or places > _MAX_PLACES:
            raise FormError(
                f"expected a limit below 1e{MAX_DIGITS - _MAX_PLACES} in size, with "
                f"{_MAX_PLACES} decimal places at most"
            )
    most = 0 if is_integer else max(places, _USUAL_PLACES)
    options = [
        node for point in range(most + 1) if (node := _with_places(exact, point))
    ]
    if not options:
        raise FormError("no number has this form")
    return Choice(tuple(options))


def multiples(of: int, prefix: str, rules: Rules) -> Node:
    """The multiples of an integer, by a rule for each remainder.

    Args:
        rules: takes the new rules, whose names begin with ``prefix``.
    """

    def digits(remainder: int, first: int) -> Choice:
        return Choice(
            tuple(
                Sequence((Text(str(digit)), Rule(f"{prefix} {rest}")))
                for digit in range(first, 10)
                for rest in [(10 * remainder + digit) % of]
            )
        )

    for remainder in range(of):
        more = digits(remainder, 0).parts
        end = () if remainder else (_NOTHING,)
        rules[f"{prefix} {remainder}"] = Choice((*end, *more))
    return Choice((Text("0"), Sequence((MINUS, digits(0, 1)))))


def _with_places(limits: Mapping[str, Decimal], point: int) -> Node | None:
    """The numbers with ``point`` digits behind the point, None where there is none."""
    high = 10**MAX_DIGITS - 1
    low = -high
    for key, limit in limits.items():
        scaled = limit.scaleb(point)
        if key.endswith("inimum"):
            least = int(scaled.to_integral_value(ROUND_CEILING))
            low = max(low, least + (key[0] == "e" and least == scaled))
        else:
            most = int(scaled.to_integral_value(ROUND_FLOOR))
            high = min(high, most - (key[0] == "e" and most == scaled))
    options = list(_sizes(max(low, 0), high, point))
    options += [
        Sequence((Text("-"), node)) for node in _sizes(max(1, -high), -low, point)
    ]
    return Choice(tuple(options)) if options else None


def _sizes(low: int, high: int, point: int) -> list[Node]:
    """The numbers from ``low`` to ``high``, by their number of digits."""
    found = []
    for num in range(point + 1, MAX_DIGITS + 1):
        least = max(low, 10 ** (num - 1) if num > point + 1 else 0)
        most = min(high, 10**num - 1)
        if least <= most:
            found.append(_between(str(least).zfill(num), str(most).zfill(num), point))
    return found


def _between(low: str, high: str, point: int) -> Node:
    """Digits from ``low`` to ``high``, which are equally long."""
    num = len(low)
    if not num:
        return _NOTHING
    dot = Text("." if num == point else "")
    if low == "0" * num and high == "9" * num:
        if num > point > 0:
            behind = Sequence((Text("."), Repeat(DIGIT, point, point)))
            return Sequence((Repeat(DIGIT, num - point, num - point), behind))
        return Sequence((dot, Repeat(DIGIT, num, num)))
    first, last = ord(low[0]), ord(high[0])
    if first == last:
        rest = _between(low[1:], high[1:], point)
        return Sequence((dot, Text(low[0]), rest))
    zeros, nines = "0" * (num - 1), "9" * (num - 1)
    options: list[Node] = [
        Sequence((Text(low[0]), _between(low[1:], nines, point))),
        Sequence((Text(high[0]), _between(zeros, high[1:], point))),
    ]
    if last - first > 1:
        inner = Characters(((first + 1, last - 1),))
        options.append(Sequence((inner, _between(zeros, nines, point))))
    return Sequence((dot, Choice(tuple(options))))
