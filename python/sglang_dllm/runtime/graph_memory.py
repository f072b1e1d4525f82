"""The memory of the CUDA graphs, taken from the budget before the KV pool is sized.

``--mem-fraction-static`` is the share of weights and KV pool. Graphs live in the rest,
as SGLang's own do, and SGLang reserves nothing for ours. So where the flag is not
given, SGLang's default is lowered where its rest does not hold them. A given share is
kept. If its rest does not hold the graphs, one warning says so.

**No GPU has checked the estimate yet.** It is made to be rather too high.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sglang_dllm.attention.backends import BACKENDS
from sglang_dllm.config.server import load_decode_config
from sglang_dllm.decoding.static_group import StepShape
from sglang_dllm.decoding.statistics import HEAD_ELEMENTS
from sglang_dllm.models.facts import FAMILIES
from sglang_dllm.runtime.graph_grid import Bucket, GraphGrid
from sglang_dllm.runtime.step_grid import step_shapes

logger = logging.getLogger(__name__)

MIB = 2**20

GRAPH_BYTES = 8 * MIB
"""The driver's share of one captured forward, of some ten kernels a layer. SGLang
reserves as much for one of its own."""

INT_WORKSPACE = {"flashinfer": 8 * MIB}
"""By attention backend, what each bucket takes: FlashInfer's schedule."""

EAGER_BYTES = 1024 * MIB
"""Eager forwards take this beside activations: the logits that are held at once, and
the work spaces of kernels."""

LOGIT_BYTES = 12
"""A logit at its peak: in the dtype of the head, in float32, and one more copy."""


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

    def activation_bytes(self, num_tokens: int) -> int:
        """The bytes of a forward, one layer at a time: residual, normed input, queries,
        keys, values and the output, then both halves of the MLP and their product."""
        numbers = 8 * self.hidden_size + 3 * self.mlp_size
        return num_tokens * numbers * self.bytes_per_number


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
    most_windows = max(num for num, _ in buckets)
    each = INT_WORKSPACE.get(attention_backend, 0)
    # Slots are int32. A window's four numbers in int64 for each token are small change.
    attention = sum(
        each + num * (4 * max_canvas_len + 32 * length) for num, length in buckets
    )
    if steps:
        # The prompts and the slots of the canvases whose steps are captured.
        attention += 16 * most_windows * max_canvas_len
    most = max(num * length for num, length in buckets)
    kept = sum(num * length for num, length in forwards)
    candidates = max((step.num_candidates for step in steps), default=0)
    return GraphMemory(
        attention=attention,
        activations=size.activation_bytes(most),
        outputs=kept * size.hidden_size * size.bytes_per_number,
        logits=min(candidates * size.vocab_size, HEAD_ELEMENTS) * LOGIT_BYTES,
        graphs=GRAPH_BYTES * (len(forwards) + len(steps)),
    )


def declared(
    flags: Any, model_config: Any
) -> tuple[Sequence[Bucket], Sequence[StepShape]]:
    """The forwards and the steps that a server with these flags would capture.

    The longest canvas is that of the model: how many tokens the KV pool has is not
    known yet. Steps that Python has to see are listed, too.

    Args:
        flags: SGLang's, as far as they are resolved.
        model_config: SGLang's ``ModelConfig``.
    """
    backend = next(
        (one for one in BACKENDS if one.flag == flags.attention_backend), None
    )
    if (
        flags.device != "cuda"
        or flags.tp_size > 1
        or backend is None
        or not backend.attention_class.can_be_captured
    ):
        return (), ()
    family = FAMILIES[model_config.hf_config.architectures[0]]
    config = load_decode_config(
        flags.dllm_algorithm, family, flags.dllm_algorithm_config
    )
    grid = GraphGrid.declared(
        flags,
        family,
        block_size=getattr(config.resolve({}).options, "block_size", None),
        max_canvas_len=model_config.context_len,
    )
    return grid.buckets, step_shapes(grid.buckets)


def reserve(
    flags: Any, model_config: Any, given: float | None, device_bytes: int
) -> None:
    """Let the graphs of a server have their memory, before SGLang sizes the KV pool.

    Args:
        flags: SGLang's; its resolved ``mem_fraction_static`` is written.
        model_config: SGLang's ``ModelConfig``.
        given: the share that the user asked for; None where SGLang chose it.
        device_bytes: of the whole device.
    """
    forwards, steps = declared(flags, model_config)
    size = ModelSize.of_model_config(model_config, flags.tp_size)
    memory = estimate_graph_memory(
        size,
        forwards,
        steps,
        model_config.context_len,
        flags.attention_backend,
    )
    eager = EAGER_BYTES + size.activation_bytes(flags.max_prefill_tokens)
    settle_fraction(flags, given, memory.total, eager, device_bytes)


def settle_fraction(
    flags: Any, given: float | None, needed: int, eager: int, device_bytes: int
) -> None:
    """Lower a share that SGLang chose, or warn of one that is too large.

    SGLang's choice leaves a rest for activations that is larger than ours need. Only
    what graphs and eager forwards need beyond that rest is taken from the pool.

    Args:
        needed: bytes of the graphs. The others are those of ``reserve``.
        eager: bytes of the largest eager forward.
    """
    if not needed:
        return
    if given is None:
        most = round(1 - (needed + eager) / device_bytes, 3)
        flags.mem_fraction_static = min(flags.mem_fraction_static, most)
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
