"""DiffuLLaMA (arXiv 2410.17891): Llama-2 weights adapted to full attention.

Its config.json says ``LlamaForCausalLM``, and that name stays SGLang's autoregressive
model. The launch line names this class and the mask id (``docs/models.md``). The shift
of its logits is ``models.facts.Family.shift``.
"""

from __future__ import annotations

from sglang_dllm.models.llama_layout import LlamaLayoutLM


class DiffuLlamaModel(LlamaLayoutLM):
    """DiffuLLaMA: a Llama block without the causal mask."""
