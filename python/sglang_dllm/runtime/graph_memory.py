"""The memory of the CUDA graphs, taken from the budget before the KV pool is sized.

``--mem-fraction-static`` is the share of weights and KV pool. Graphs live in the rest,
as SGLang's own do, and SGLang reserves nothing for ours. So where the flag is not
given, SGLang's default is lowered by the estimate of this module. A given share is kept;
if its rest does not hold the graphs, one warning says so.

**No GPU has checked the estimate yet.** It is made to be rather too high.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sglang_dllm.decoding.static_group import StepShape
from sglang_dllm.decoding.statistics import HEAD_ELEMENTS

logger = logging.getLogger(__name__)

MIB = 2**20

GRAPH_BYTES = 8 * MIB
"""What the driver keeps of one captured forward: some ten kernels a layer. SGLang
reserves as much for one of its own."""

INT_WORKSPACE = {"flashinfer": 8 * MIB}
"""By attention backend, what a bucket takes whatever its size: FlashInfer's schedule."""

LOGIT_BYTES = 12
"""Of a logit at its peak: in the dtype of the head, in float32, and one more copy."""


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model on one rank, as far as graphs depend on them.

    Attributes:
        mlp_size: numbers of a token between the two halves of a layer's MLP, of all
            the experts that a token takes.
        bytes_per_number: of the model's dtype.
    """

    hidden_size: int
    mlp_size: int
    vocab_size: int
    bytes_per_number: int

    @classmethod
    def of_model_config(cls, config: Any, tp_size: int = 1) -> ModelSize:
        """The sizes in SGLang's ``ModelConfig``.

        Args:
            tp_size: ranks that share the width of the MLP and the vocabulary.
        """
        hf_config, hidden = config.hf_config, config.hidden_size
        experts = getattr(hf_config, "num_experts_per_tok", None)
        if experts:
            width = experts * hf_config.expert_intermediate_size
        else:
            width = getattr(hf_config, "intermediate_size", None) or 4 * hidden
        return cls(
            hidden,
            -(-width // tp_size),
            -(-config.vocab_size // tp_size),
            config.dtype.itemsize,
        )


class GraphMemory(NamedTuple):
    """Estimated bytes of all graphs of a grid.

    Attributes:
        attention: fixed buffers of the buckets: slots of canvases, schedules.
        activations: the graphs' shared pool, at the peak of the largest forward.
        outputs: hidden states that graphs of forwards keep between two replays.
        logits: of the largest step at its peak.
        graphs: the driver's.
    """

    attention: int = 0
    activations: int = 0
    outputs: int = 0
    logits: int = 0
    graphs: int = 0

    @property
    def total(self) -> int:
        return sum(self)


def estimate_graph_memory(
    size: ModelSize,
    forwards: Sequence[tuple[int, int]],
    steps: Sequence[StepShape],
    max_canvas_len: int,
    attention_backend: str,
) -> GraphMemory:
    """The memory that a grid takes.

    Args:
        forwards: windows, and tokens of each, of the captured forwards.
        steps: the captured steps. Buffers of attention are shared with the forwards.
        max_canvas_len: the longest canvas of a graph, in tokens.
        attention_backend: the flag's name for it.
    """
    buckets = {*forwards, *((step.num_canvases, step.length) for step in steps)}
    if not buckets:
        return GraphMemory()
    each = INT_WORKSPACE.get(attention_backend, 0)
    # Slots are int32. A window's four numbers in int64 for each token are small change.
    attention = sum(
        each + num * (4 * max_canvas_len + 32 * length) for num, length in buckets
    )
    # Of one layer at a time: the residual, the normed input, queries, keys, values and
    # the output, then both halves of the MLP and their product.
    per_token = (8 * size.hidden_size + 3 * size.mlp_size) * size.bytes_per_number
    most = max(num * length for num, length in buckets)
    kept = sum(num * length for num, length in forwards)
    candidates = max((step.num_candidates for step in steps), default=0)
    return GraphMemory(
        attention=attention,
        activations=most * per_token,
        outputs=kept * size.hidden_size * size.bytes_per_number,
        logits=min(candidates * size.vocab_size, HEAD_ELEMENTS) * LOGIT_BYTES,
        graphs=GRAPH_BYTES * (len(forwards) + len(steps)),
    )


def settle_fraction(
    flags: Any, given: float | None, needed: int, device_bytes: int
) -> None:
    """Let the graphs have their memory, before SGLang sizes the KV pool.

    Args:
        flags: with SGLang's resolved ``mem_fraction_static``, which is written.
        given: the share that the user asked for; None where SGLang chose it.
        needed: bytes of the graphs.
        device_bytes: of the whole device.
    """
    if not needed:
        return
    if given is None:
        share = flags.mem_fraction_static - needed / device_bytes
        flags.mem_fraction_static = max(round(share, 3), 0.0)
        logger.info(
            "CUDA graphs take about %d MiB: --mem-fraction-static is %.3f",
            needed // MIB,
            flags.mem_fraction_static,
        )
        return
    rest = int((1 - given) * device_bytes)
    if needed > rest:
        logger.warning(
            "--mem-fraction-static=%s leaves %d MiB, and CUDA graphs take about %d MiB "
            "besides activations: lower it, or --cuda-graph-max-bs-decode",
            given,
            rest // MIB,
            needed // MIB,
        )
