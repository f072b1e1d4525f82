"""A head that is the embedding, and a checkpoint that has it nevertheless.

Tools for tuning keep the head's tensor in a checkpoint whose config.json ties it. A
copy of the embedding is dropped. Another tensor is an error: the config or the file is
wrong.
"""

from __future__ import annotations

import torch
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

from sglang_dllm.errors import ConfigError

EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"
_ROWS = 4096
"""Rows that are compared at once: a cast needs no copy of the whole."""


class TiedHead:
    """Compares the heads of one checkpoint with the embedding of the model."""

    def __init__(self, embedding: VocabParallelEmbedding) -> None:
        self._embedding = embedding
        self._waiting: tuple[str, torch.Tensor] | None = None

    def compare(self, their_name: str, head: torch.Tensor, is_loaded: bool) -> None:
        """Drop a head that equals the embedding.

        Args:
            their_name: the checkpoint's name of the head.
            head: ``(V, H)``. It is kept until the embedding is there.
            is_loaded: whether the embedding is there.

        Raises:
            ConfigError: the two differ.
        """
        if not is_loaded:
            self._waiting = their_name, head
        elif not self._is_embedding(head):
            raise ConfigError(
                f"config.json ties the head to the embedding, but the checkpoint has "
                f"another tensor {their_name!r}; set tie_word_embeddings "
                "(weight_tying for LLaDA) to false, or remove the tensor"
            )

    def embedding_is_loaded(self) -> None:
        """Compare the head that waits, if one does.

        Raises:
            ConfigError: as ``compare``.
        """
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self.compare(*waiting, True)

    def _is_embedding(self, head: torch.Tensor) -> bool:
        embedding = self._embedding
        if tuple(head.shape) != (embedding.org_vocab_size, embedding.embedding_dim):
            return False
        first = embedding.shard_indices.org_vocab_start_index
        last = embedding.shard_indices.org_vocab_end_index
        ours = embedding.weight
        for row in range(first, last, _ROWS):
            theirs = head[row : min(row + _ROWS, last)].to(ours)
            start = row - first
            if not torch.equal(ours[start : start + len(theirs)], theirs):
                return False
        return True
