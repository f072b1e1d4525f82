"""Autoregressive models that the ``dllm`` toolkit has made bidirectional (A2D).

Their logits have no shift: a training with masks follows the change of the attention.
A checkpoint of the toolkit's block diffusion (BD3LM) has the same architecture in its
config.json, and its attention is causal between blocks. It is not such a model.
"""

from __future__ import annotations

from sglang_dllm.models.llama_layout import LlamaLayoutLM


class A2DQwen3LMHeadModel(LlamaLayoutLM):
    """A Qwen3 with full attention."""

    qk_norm = True


class A2DQwen2LMHeadModel(LlamaLayoutLM):
    """A Qwen2 or Qwen2.5 with full attention."""

    qkv_bias = True


class A2DLlamaLMHeadModel(LlamaLayoutLM):
    """A Llama with full attention."""
