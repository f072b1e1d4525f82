"""``length: fixed``: the length that was asked for, as in the published loops."""

from __future__ import annotations

from sglang_dllm.decoding.lengths.base import LengthOptions, LengthRule


class Fixed(LengthRule[LengthOptions]):
    """The canvas keeps its length."""

    name = "fixed"
    keeps_length = True

    def first_len(self, options: LengthOptions, cap: int, block_size: int) -> int:
        return cap

    def plan(self, options: LengthOptions, cap: int, block_size: int) -> None:
        return None


FIXED = Fixed()
