"""The bidirectional transformer that all supported architectures share.

Its blocks are pre-norm: RMSNorm, rotary grouped-query attention without a causal mask,
and a gated SiLU MLP, in SGLang's tensor-parallel layers. The architectures differ in
biases, norms, MLP and tensor names, and each has a file for these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.runtime_context import get_exec, get_parallel
from sglang.srt.utils import add_prefix
from torch import nn

from sglang_dllm.attention.plan import plan_of
from sglang_dllm.errors import ConfigError
from sglang_dllm.models.configs import published_size, rope_of_config
from sglang_dllm.models.linear import (
    gated_mlp,
    padded_weights,
    use_padded_products,
)
from sglang_dllm.models.rope import Rope
from sglang_dllm.models.tied_head import TiedHead
from sglang_dllm.models.weights import ExpertPiece, load_tensors


@dataclass(frozen=True)
class DenseShape:
    """Sizes of the transformer, under one set of names for all configs.

    Attributes:
        head_dim: of a query, key or value head; ``num_heads * head_dim`` may differ
            from ``hidden_size``.
        tie_embeddings: whether the head is the embedding; None where the checkpoint's
            tensors decide.
        qk_norm: each query and key head has an RMSNorm before its rotation.
    """

    hidden_size: int
    head_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    rope: Rope
    rms_norm_eps: float
    qkv_bias: bool
    tie_embeddings: bool | None
    qk_norm: bool = False

    @classmethod
    def from_llama_config(
        cls, config: Any, *, qkv_bias: bool, **others: Any
    ) -> DenseShape:
        """The sizes in a config with the field names of Llama and Qwen2.

        Args:
            others: fields with another name in the config, or with none.
        """
        num_heads = published_size(config, "num_attention_heads")
        sizes = {
            "hidden_size": config.hidden_size,
            "head_dim": getattr(config, "head_dim", None)
            or config.hidden_size // num_heads,
            "num_layers": config.num_hidden_layers,
            "num_heads": num_heads,
            "num_kv_heads": published_size(config, "num_key_value_heads"),
            "vocab_size": config.vocab_size,
            "max_positions": config.max_position_embeddings,
            "rms_norm_eps": config.rms_norm_eps,
            "rope": rope_of_config(config),
            "tie_embeddings": config.tie_word_embeddings,
        }
        return cls(**sizes | others, qkv_bias=qkv_bias)


class Attention(nn.Module):
    """Rotary attention from every token of a window to its whole canvas."""

    def __init__(
        self,
        shape: DenseShape,
        layer_id: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        tp_size = get_parallel().tp_size
        self.num_heads = shape.num_heads // tp_size
        self.num_kv_heads = max(1, shape.num_kv_heads // tp_size)
        self.head_dim = head_dim = shape.head_dim
        self.qkv_proj = QKVParallelLinear(
            shape.hidden_size,
            head_dim,
            shape.num_heads,
            shape.num_kv_heads,
            bias=shape.qkv_bias,
            quant_config=quant_config,
            prefix=add_prefix("qkv_proj", prefix),
        )
        self.o_proj = RowParallelLinear(
            shape.num_heads * head_dim,
            shape.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("o_proj", prefix),
        )
        self.q_norm = _norm(shape, head_dim) if shape.qk_norm else None
        self.k_norm = _norm(shape, head_dim) if shape.qk_norm else None
        self.rotary_emb = get_rope(
            head_dim,
            rotary_dim=head_dim,
            max_position=shape.max_positions,
            base=shape.rope.theta,
            rope_scaling=shape.rope.for_sglang(),
        )
        self.attn = RadixAttention(
            self.num_heads,
            head_dim,
            head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            layer_id=layer_id,
            attn_type=AttentionType.ENCODER_ONLY,
            quant_config=quant_config,
            prefix=add_prefix("attn", prefix),
        )
        self.split_sizes = [
            self.num_heads * head_dim,
            self.num_kv_heads * head_dim,
            self.num_kv_heads * head_dim,
        ]

    def forward(
        self,
        positions: torch.Tensor,
        x: torch.Tensor,
        forward_batch: ForwardBatch,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            wanted: the tokens whose output is computed; None for all.
        """
        qkv, _ = self.qkv_proj(x)
        q, k, v = qkv.split(self.split_sizes, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q.reshape(-1, self.head_dim)).view(q.shape)
            k = self.k_norm(k.reshape(-1, self.head_dim)).view(k.shape)
        q, k = self.rotary_emb(positions, q, k)
        out = self.attn(q, k, v, forward_batch)
        out, _ = self.o_proj(out if wanted is None else out[wanted])
        return out


class GatedMLP(nn.Module):
    """``down(silu(gate x) * up x)``."""

    def __init__(
        self, shape: DenseShape, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            shape.hidden_size,
            [shape.intermediate_size] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("gate_up_proj", prefix),
        )
        self.down_proj = RowParallelLinear(
            shape.intermediate_size,
            shape.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("down_proj", prefix),
        )
        self.act_fn = SiluAndMul()
        # Ranks that have a part of the layers each must add their results.
        self.is_whole = get_parallel().tp_size == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = padded_weights(self.gate_up_proj, self.down_proj)
        if weights is not None and self.is_whole:
            return gated_mlp(x, *weights)
        gate_up, _ = self.gate_up_proj(x)
        out, _ = self.down_proj(self.act_fn(gate_up))
        return out


class Block(nn.Module):
    """One pre-norm transformer block. The residual travels beside ``x``."""

    def __init__(
        self,
        shape: DenseShape,
        layer_id: int,
        mlp: nn.Module,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.input_layernorm = _norm(shape, shape.hidden_size)
        self.self_attn = Attention(
            shape, layer_id, quant_config, add_prefix("self_attn", prefix)
        )
        self.post_attention_layernorm = _norm(shape, shape.hidden_size)
        self.mlp = mlp

    def forward(
        self,
        positions: torch.Tensor,
        x: torch.Tensor,
        forward_batch: ForwardBatch,
        residual: torch.Tensor | None,
        wanted: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            wanted: the tokens whose output is computed; None for all.
        """
        if residual is None:
            residual, x = x, self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(positions, x, forward_batch, wanted)
        residual = residual if wanted is None else residual[wanted]
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual


def _norm(shape: DenseShape, size: int) -> RMSNorm:
    # All families cast to the model's dtype before they multiply by the weight. The
    # other order gives other logits in bf16.
    return RMSNorm(size, eps=shape.rms_norm_eps, cast_x_before_out_mul=True)


_LAYERS = "model.layers"
"""The name of the blocks in the lists of quantized checkpoints.

Such a list names the layers that are not quantized.
"""


class DenseDiffusionLM(nn.Module):
    """Token embedding, blocks, final norm and head of a full-attention dLLM."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    """Our fused layers and the names of their parts, for the same lists."""

    def __init__(
        self,
        config: Any,
        shape: DenseShape,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        if get_exec().dllm.dllm_algorithm is None:
            # An Engine of a hub repository comes here without another check. SGLang
            # would decode from left to right and answer with nonsense.
            raise ConfigError(
                f"{config.architectures[0]} is a diffusion model: add --dllm-algorithm"
            )
        self.config = config
        self.quant_config = quant_config
        self.embed_tokens = VocabParallelEmbedding(
            shape.vocab_size,
            shape.hidden_size,
            quant_config=quant_config,
            prefix=add_prefix("model.embed_tokens", prefix),
        )
        self.layers = nn.ModuleList(
            self._make_block(
                shape, i, quant_config, add_prefix(f"{_LAYERS}.{i}", prefix)
            )
            for i in range(shape.num_layers)
        )
        self.norm = _norm(shape, shape.hidden_size)
        self._tie_by_weights = shape.tie_embeddings is None
        if shape.tie_embeddings:
            self.lm_head = self.embed_tokens
        else:
            self.lm_head = ParallelLMHead(
                shape.vocab_size,
                shape.hidden_size,
                quant_config=quant_config,
                prefix=add_prefix("lm_head", prefix),
            )
        self.logits_processor = LogitsProcessor(config, return_full_logits=True)
        use_padded_products(self.layers)
        if not self.logits_processor.use_fp32_lm_head:  # --enable-fp32-lm-head
            use_padded_products(nn.ModuleList([self.embed_tokens, self.lm_head]))

    def _make_block(
        self,
        shape: DenseShape,
        layer_id: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> Block:
        mlp = self.make_mlp(shape, layer_id, quant_config, add_prefix("mlp", prefix))
        return Block(shape, layer_id, mlp, quant_config, prefix)

    def make_mlp(
        self,
        shape: DenseShape,
        layer_id: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> nn.Module:
        """A block's MLP, from ``(T, H)`` to ``(T, H)``.

        The constructor calls it. ``self.config`` is already set then.
        """
        return GatedMLP(shape, quant_config, prefix)

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
    ) -> LogitsProcessorOutput:
        """Hidden states of the tokens that the batch's plan asks for.

        Args:
            input_ids, positions: ``(T,)``, the windows of the batch back to back.

        Returns:
            ``hidden_states``: ``(N, H)``, normed, of the plan's ``logits_indices``.
            Without a plan, which is SGLang's warm-up, the logits of all T tokens.
        """
        x = self.embed_tokens(input_ids) if input_embeds is None else input_embeds
        residual = None
        plan = plan_of(forward_batch)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            # After the last attention no token depends on another one.
            wanted = plan.logits_indices if plan is not None and index == last else None
            x, residual = layer(positions, x, forward_batch, residual, wanted)
        x, _ = self.norm(x, residual)
        if plan is None:
            return self.logits_processor(input_ids, x, self.lm_head, forward_batch)
        return LogitsProcessorOutput(None, hidden_states=x)

    @torch.no_grad()
    def logits(self, x: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """The head, from hidden states ``(n, H)`` to logits ``(n, V)`` float32."""
        found = self.logits_processor(None, x, self.lm_head, forward_batch)
        logits: torch.Tensor = found.full_logits
        return logits

    def load_weights(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        rename: Callable[[str], str | None],
        experts: Sequence[ExpertPiece] = (),
    ) -> None:
        """Load a checkpoint with ``weights.load_tensors``.

        A checkpoint without a head is tied if config.json does not say that it is not.
        """
        is_tied = self.lm_head is self.embed_tokens
        lacking = load_tensors(
            self,
            weights,
            rename,
            experts,
            tied=TiedHead(self.embed_tokens) if is_tied else None,
            may_lack="lm_head" if self._tie_by_weights else "",
        )
        if lacking:
            self.lm_head = self.embed_tokens
