"""How much work one form may make until its automaton is there.

Work is counted, not timed. So a form is served or refused on every machine and by every
rank alike, however busy they are.
"""

from __future__ import annotations

from sglang_dllm.grammar.errors import FormError

MAX_WORK = 700_000
"""Units of work of one form. A unit takes one to two microseconds."""


class Work:
    """The work that is left for one form."""

    def __init__(self, left: int = MAX_WORK) -> None:
        self.left = left

    def spend(self, units: int) -> None:
        """Count work that is about to be done.

        Raises:
            FormError: nothing is left.
        """
        self.left -= units
        if self.left < 0:
            raise FormError("it is too large: it takes too much work to read")
