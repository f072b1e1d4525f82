"""The demo model: LLaDA's architecture (arXiv:2502.09992) in plain torch.

Training and the plain decoding loop of `evaluate.py` use it. It knows nothing of
SGLang. Its modules have the names of the published checkpoints, so that a state dict
needs no name map to be saved in the Hugging Face layout.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a LLaDA checkpoint, under the names of its config.json."""

    vocab_size: int
    d_model: int = 256
    n_layers: int = 6
    n_heads: int = 4
    mlp_hidden_size: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    @classmethod
    def from_config(cls, folder: Path) -> ModelShape:
        config = json.loads((folder / "config.json").read_text())
        return cls(**{name: config[name] for name in cls.__dataclass_fields__})


class RMSNorm(nn.Module):
    """RMS norm in float32, cast back to the input's dtype, then times the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * wide.to(x.dtype)


def rope_table(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the half-split rotation, each `(length, D)` float32."""
    inverse = theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(length).float(), inverse)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x: (B, H, L, D)` in float32 and cast back (rope_full_precision)."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (wide * cos + turned * sin).to(x.dtype)


class Block(nn.Module):
    """Pre-norm attention without a causal mask, then a gated SiLU MLP."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        width, hidden = shape.d_model, shape.mlp_hidden_size
        self.n_heads = shape.n_heads
        self.attn_norm = RMSNorm(width, shape.rms_norm_eps)
        self.ff_norm = RMSNorm(width, shape.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.ff_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, length, self.n_heads, -1).transpose(1, 2)

        h = self.attn_norm(x)
        q = rotate(heads(self.q_proj(h)), cos, sin)
        k = rotate(heads(self.k_proj(h)), cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, heads(self.v_proj(h)))
        x = x + self.attn_out(mixed.transpose(1, 2).reshape(batch, length, width))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


class DemoModel(nn.Module):
    """Token ids `(B, L)` int64 to logits `(B, L, V)`. Row i predicts token i."""

    def __init__(self, shape: ModelShape, max_length: int = 1024) -> None:
        super().__init__()
        self.shape = shape
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(shape.vocab_size, shape.d_model),
                "blocks": nn.ModuleList(Block(shape) for _ in range(shape.n_layers)),
                "ln_f": RMSNorm(shape.d_model, shape.rms_norm_eps),
                "ff_out": nn.Linear(shape.d_model, shape.vocab_size, bias=False),
            }
        )
        head_dim = shape.d_model // shape.n_heads
        cos, sin = rope_table(max_length, head_dim, shape.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor, wanted: Tensor | None = None) -> Tensor:
        """All logits, or `(N, V)` of the positions in `wanted: (B, L)` bool."""
        x = self.transformer["wte"](ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for block in self.transformer["blocks"]:
            x = block(x, cos, sin)
        if wanted is not None:
            x = x[wanted]
        return self.transformer["ff_out"](self.transformer["ln_f"](x))
