"""Words of several tokens that an answer does not have, on positions in any order.

A canvas is filled in any order: any token of a word may be the last one to come. Two
rules keep a word out:

- The one token that a word still lacks is minus infinity at its position.
- A forward that commits two or more tokens of a word together commits all but the last
  of them. The position stays masked, and the first rule holds there from then on. The
  first commit of a canvas is never taken back, so each forward commits something. The
  last forward of ``max_forwards`` has to fill the position: it gets its best token that
  is in no word.

Only the answer counts, not the prompt. It counts up to an EOS that ends it, because the
tokens behind are nobody's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.canvas_batch import CanvasBatch
from sglang_dllm.decoding.decision import Decision, StepInputs
from sglang_dllm.decoding.forward_limit import is_last_forward
from sglang_dllm.decoding.logits import Candidates, Edit, Logits
from sglang_dllm.decoding.statistics import row_chunks, without_token
from sglang_dllm.decoding.tensor_rows import indices

Batch: TypeAlias = CanvasBatch[Any, Any]
Inputs: TypeAlias = StepInputs[Any, Any]
Word: TypeAlias = tuple[int, ...]

_UNKNOWN, _ANY = -1, -2
"""A position without a token, and the rest of a word that is shorter than others."""


class _Words(NamedTuple):
    """The P words of a batch's canvases, of at most L tokens.

    Attributes:
        tokens: ``(P, L)`` int64.
        canvas: ``(P,)`` int64: whose word it is.
        gone: ``(R, L - 1)`` int64: the end of the answer in front of the part that is
            decoded.
    """

    tokens: torch.Tensor
    canvas: torch.Tensor
    gone: torch.Tensor


class _Places(NamedTuple):
    """The S places at which each of P words could be; a word may reach over an end.

    Attributes:
        num_missing: ``(P, S)`` int64: tokens of the word that are not there.
        at: ``(P, S, L)`` is too large, so: ``(P, S)`` int64: the sum of the indices of
            the missing tokens. That is the index, where one is missing.
    """

    num_missing: torch.Tensor
    at: torch.Tensor


def words_edit(inputs: Inputs) -> Edit | None:
    """The edit that bans the last missing token of each word."""
    words = _words_of(inputs.batch)
    if words is None:
        return None
    rows, length = inputs.batch.rows, words.tokens.shape[1]
    known = _answers(inputs.batch, words, rows.ids, ~rows.masked)
    places = _places(words, known)
    at = places.at.clamp(max=length - 1)
    tokens = words.tokens.gather(1, at)
    position = _first_positions(words, places) + at
    candidate = _candidate_at(inputs, words, position)
    is_banned = (places.num_missing == 1) & (candidate >= 0)
    candidate = candidate.masked_fill(~is_banned, inputs.num_candidates).flatten()
    tokens = tokens.clamp(min=0).flatten()

    def edit(logits: torch.Tensor, some: Candidates) -> torch.Tensor:
        num, size = logits.shape
        if not num:
            return logits
        none = candidate.new_full((inputs.num_candidates + 1,), -1)
        none[some] = indices(num, logits.device)
        row = none[candidate]
        # The others change the first logit by nothing.
        flat = torch.where(row >= 0, row * size + tokens, 0)
        value = logits.new_full(flat.shape, torch.inf)
        value = value.masked_fill(row >= 0, -torch.inf)
        return logits.flatten().scatter_reduce(0, flat, value, "amin").view(num, size)

    return edit


def without_words(
    inputs: Inputs, accepted: torch.Tensor, decision: Decision
) -> tuple[torch.Tensor, Decision]:
    """The accepted ones of N candidates, and tokens, so that no word is committed.

    Args:
        accepted: ``(N,)`` bool.
    """
    words = _words_of(inputs.batch)
    if words is None or not inputs.num_candidates:
        return accepted, decision
    completes = _completes(inputs, words, accepted, decision.tokens)
    last = is_last_forward(inputs.batch)
    some = inputs.candidates_of(
        [bool(_words(c)) and c.max_forwards is not None for c in inputs.batch.records]
    )
    if last is None or some is None:
        return accepted & ~completes, decision
    is_last = inputs.per_candidate(last)
    logits = decision.logits or inputs.logits
    found = _tokens_in_no_word(inputs, logits, words, some)
    others = decision.tokens.index_put((some,), found)
    tokens = torch.where(completes & is_last, others, decision.tokens)
    return accepted & (is_last | ~completes), replace(decision, tokens=tokens)


def _words(canvas: Canvas) -> tuple[Word, ...]:
    return () if canvas.edits is None else canvas.edits.words


def _words_of(batch: Batch) -> _Words | None:
    def make() -> _Words | None:
        found = [(w, i) for i, c in enumerate(batch.records) for w in _words(c)]
        if not found:
            return None
        length = max(len(word) for word, _ in found)
        tokens = np.full((len(found), length), _ANY)
        for row, (word, _) in zip(tokens, found, strict=True):
            row[: len(word)] = word
        gone = np.full((len(batch), length - 1), _UNKNOWN)
        for row, canvas in zip(gone, batch.records, strict=True):
            end = canvas.prompt_len
            ids = canvas.ids[max(canvas.answer_start, end - length + 1) : end]
            row[len(row) - len(ids) :] = ids
        whose = np.array([i for _, i in found])
        return _Words(
            *(
                torch.from_numpy(values).to(batch.device, non_blocking=True)
                for values in (tokens, whose, gone)
            )
        )

    found: _Words | None = batch.memo("bad words", make)
    return found


def _answers(
    batch: Batch, words: _Words, ids: torch.Tensor, known: torch.Tensor
) -> torch.Tensor:
    """``(P, L - 1 + A + L - 1)`` int64: the answer of each word's canvas.

    Args:
        ids, known: ``(R, A)``.
    """
    ids = ids.masked_fill(~known | ~batch.inside, _UNKNOWN)
    behind = torch.full_like(words.gone, _UNKNOWN)
    return torch.cat([words.gone, ids, behind], dim=1)[words.canvas]


def _places(words: _Words, answers: torch.Tensor) -> _Places:
    length = words.tokens.shape[1]
    num = answers.shape[1] - length + 1
    missing = answers.new_zeros((len(answers), num))
    at = torch.zeros_like(missing)
    for i in range(length):
        token = words.tokens[:, i, None]
        differs = (answers[:, i : i + num] != token) & (token != _ANY)
        missing, at = missing + differs, at + i * differs
    return _Places(missing, at)


def _first_positions(words: _Words, places: _Places) -> torch.Tensor:
    """``(S,)`` int64: the position of a word's first token at each place."""
    num, before = places.at.shape[1], words.gone.shape[1]
    return indices(num, places.at.device) - before


def _candidate_at(
    inputs: Inputs, words: _Words, positions: torch.Tensor
) -> torch.Tensor:
    """``(P, S)`` int64: the candidate at positions ``(P, S)`` of each word's canvas,
    -1 where none is."""
    rows, width = inputs.batch.rows, inputs.batch.max_answer_len
    grid = torch.full_like(rows.ids, -1).index_put(
        (inputs.canvas_index, inputs.positions),
        indices(inputs.num_candidates, inputs.device),
    )
    found = grid[words.canvas].gather(1, positions.clamp(0, width - 1))
    return found.masked_fill((positions < 0) | (positions >= width), -1)


def _completes(
    inputs: Inputs, words: _Words, accepted: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """``(N,)`` bool: the accepted candidates that are the last ones of a word."""
    batch, rows = inputs.batch, inputs.batch.rows
    where = inputs.canvas_index, inputs.positions
    # A candidate may be there already, where an algorithm reads its masks early.
    is_new = torch.zeros_like(rows.masked).index_put(where, accepted)
    ids = rows.ids.index_put(where, torch.where(accepted, tokens, rows.ids[where]))
    known = _answers(batch, words, ids, ~rows.masked | is_new)
    new = _answers(batch, words, is_new.long(), batch.inside)
    places = _places(words, known)
    length, num = words.tokens.shape[1], known.shape[1] - words.tokens.shape[1] + 1
    last = torch.full_like(places.at, -1)
    for i in range(length):
        is_here = (new[:, i : i + num] == 1) & (words.tokens[:, i, None] != _ANY)
        last = last.masked_fill(is_here, i)
    candidate = _candidate_at(inputs, words, _first_positions(words, places) + last)
    is_word = (places.num_missing == 0) & (last >= 0)
    nobody = inputs.num_candidates
    found = accepted.new_zeros(nobody + 1)
    found[candidate.masked_fill(~is_word, nobody).flatten()] = True
    return found[:nobody]


def _tokens_in_no_word(
    inputs: Inputs, all_logits: Logits, words: _Words, some: torch.Tensor
) -> torch.Tensor:
    """``(K,)`` int64: the best token of candidates ``(K,)`` that no word has."""
    facts = inputs.facts
    size = facts.vocab_size
    is_in_word = torch.zeros((len(inputs.batch), size), device=inputs.device)
    at = words.canvas[:, None].expand_as(words.tokens)
    # A shorter word's rest stands for its first token.
    tokens = torch.where(words.tokens == _ANY, words.tokens[:, :1], words.tokens)
    is_in_word = is_in_word.index_put((at, tokens), is_in_word.new_tensor(-torch.inf))
    found = some.new_zeros(0)
    for part in row_chunks(len(some), size):
        row = inputs.per_candidate(is_in_word)[some[part]]
        logits = without_token(all_logits(some[part]), facts.mask_id) + row
        found = torch.cat([found, logits.argmax(dim=-1)])
    return found
