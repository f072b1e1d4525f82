"""A LLaDA for transformers, as remote code of the generated checkpoint.

Engines that run a repository's own code load this file. It is as plain as the published
one: full attention by torch, logits at every position, and no cache.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class LLaDAConfig(PretrainedConfig):
    model_type = "llada"


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotate(x, cos, sin):
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (wide * cos + turned * sin).to(x.dtype)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        size, ff = config.d_model, config.mlp_hidden_size
        self.num_heads = config.n_heads
        self.attn_norm = RMSNorm(size, config.rms_norm_eps)
        self.ff_norm = RMSNorm(size, config.rms_norm_eps)
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.attn_out = nn.Linear(size, size, bias=False)
        self.ff_proj = nn.Linear(size, ff, bias=False)
        self.up_proj = nn.Linear(size, ff, bias=False)
        self.ff_out = nn.Linear(ff, size, bias=False)

    def forward(self, x, cos, sin, bias):
        normed = self.attn_norm(x)
        q, k, v = (
            project(normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, attn_mask=bias
        )
        x = x + self.attn_out(out.transpose(1, 2).flatten(-2))
        normed = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(normed)) * self.up_proj(normed))


class LLaDAModelLM(PreTrainedModel):
    config_class = LLaDAConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        table = (config.embedding_size, config.d_model)
        transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(*table),
                "blocks": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
                "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
                "ff_out": nn.Linear(*reversed(table), bias=False),
            }
        )
        self.model = nn.ModuleDict({"transformer": transformer})
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **others):
        parts = self.model["transformer"]
        x = parts["wte"](input_ids)
        half = self.config.d_model // self.config.n_heads // 2
        exponents = torch.arange(half, device=x.device).float() / half
        steps = torch.arange(input_ids.shape[1], device=x.device).float()
        angles = torch.outer(steps, self.config.rope_theta**-exponents).repeat(1, 2)
        bias = None
        if attention_mask is not None and not bool(attention_mask.all()):
            bias = attention_mask[:, None, None].bool()
        for block in parts["blocks"]:
            x = block(x, angles.cos(), angles.sin(), bias)
        return CausalLMOutput(logits=parts["ff_out"](parts["ln_f"](x)))
