"""The CUDA graph of one forward: the windows of a batch, padded to a bucket."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_dllm.decoding.packing import PackedForward
from sglang_dllm.decoding.static_group import StepTokens
from sglang_dllm.decoding.window import DUMMY_SLOT
from sglang_dllm.runtime.graph_capture import Capture
from sglang_dllm.runtime.window_forward import WindowForward


class ForwardGraph:
    """A captured forward of R windows of L tokens, of any canvases.

    A short window repeats its last token, and windows that fill the bucket hold any
    token. Nobody reads the outputs of this padding, and its keys and values go to a
    slot that no canvas owns. Two equal tokens of one batch may get keys that differ in
    the last bit, so a second write to a real slot would make a run depend on which of
    the two comes last.
    """

    def __init__(self, forward: WindowForward, capture: Capture) -> None:
        """Captures the forward. No canvas is touched: all its windows are fillers.

        Raises:
            RuntimeError: the capture failed; there may be no memory left.
        """
        num_tokens = forward.num_windows * forward.length

        def zeros() -> torch.Tensor:
            return torch.zeros(num_tokens, dtype=torch.int64, device=forward.device)

        every = torch.arange(num_tokens, device=forward.device)
        self._forward = forward
        self._tokens = StepTokens(forward.num_windows, zeros(), zeros(), zeros(), every)
        forward.place([])
        self._replay = capture(lambda: (forward.hidden(self._tokens),))
        self._packed: PackedForward | None = None
        self._sources = self._places = every

    def run(self, packed: PackedForward) -> torch.Tensor:
        """The hidden states ``(N, H)`` of ``packed.logits_indices``.

        The host does not wait. Later runs may overwrite nothing of the result.
        """
        if self._packed is not packed:
            self._place(packed)
        self._forward.place(packed.canvases)
        self._tokens.ids.copy_(packed.input_ids[self._sources])
        (hidden,) = self._replay()
        return hidden[self._places[packed.logits_indices]]

    def _place(self, packed: PackedForward) -> None:
        """Write everything but the ids: it stays the same for the same windows."""
        sources, places = padding_indices(
            packed.lens, self._forward.num_windows, self._forward.length
        )
        device = self._forward.device
        self._sources = sources.to(device, non_blocking=True)
        self._places = places.to(device, non_blocking=True)
        self._tokens.positions.copy_(packed.positions[self._sources])
        self._tokens.kv_slots.fill_(DUMMY_SLOT)
        self._tokens.kv_slots[self._places] = packed.token_slots()
        self._packed = packed


def padding_indices(
    lens: Sequence[int], num_windows: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """How windows of some lengths lie in a bucket, on the CPU.

    Returns:
        ``(num_windows * length,)`` int64: the packed token that each padded one
        repeats. ``(sum(lens),)`` int64: where each packed token is among the padded.
    """
    sources, places, first = [], [], 0
    for index, num_tokens in enumerate(lens):
        sources.append(first + torch.arange(length).clamp(max=num_tokens - 1))
        places.append(index * length + torch.arange(num_tokens))
        first += num_tokens
    sources += [torch.zeros(length, dtype=torch.int64)] * (num_windows - len(lens))
    return torch.cat(sources), torch.cat(places)
