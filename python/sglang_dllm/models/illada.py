"""iLLaDA-8B Base and Instruct (arXiv 2606.25331), with Llama's tensor names.

The successor of LLaDA has fewer heads of keys and values, and the head is the
embedding.
"""

from __future__ import annotations

from sglang_dllm.models.llama_layout import LlamaLayoutLM


class ILLaDAForCausalLM(LlamaLayoutLM):
    """iLLaDA: a Llama block without the causal mask, trained from scratch."""
