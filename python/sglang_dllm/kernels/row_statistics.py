"""The best token of every row of logits and its statistics, in one pass.

The published decoding rules compare float64 softmax probabilities with thresholds.
``logits.double().softmax(-1)`` writes the whole vocabulary in float64 to memory, four
times the size of bf16 logits. The kernels read the logits in their own dtype and
convert them to float64 in registers only.

The formulas are those of ``decoding/statistics.py``. At 152k logits the results equal
the plain form's to about 1e-14 relative, which is the error of its long sums. The
kernels add in a tree. Their sums, interpreted, are some 3e-16 from 80-bit sums.

Cost: one float64 ``exp`` per logit. The negative entropy needs a second reading with
another ``exp`` and a ``log``, because ``eps`` is added after the division by the
softmax's divisor. The A100, H100 and H200 run float64 at half their float32 rate,
consumer GPUs (RTX 30, 40, 50) at 1/64. A count of instructions, not a measurement,
gives some hundredths of a millisecond for 32 rows of 152k logits on the former, and
some tenths on the latter.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# The import needs no guard: SGLang imports Triton on machines without a GPU too.

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of logits for the kernel. Guidance and Credit make float64 logits, which take
the plain form."""

_PLAIN_ELEMENTS = 2**19
"""The most float64 elements (4 MiB) of a temporary of the plain form, if a row is no
longer. More would not stay in a processor's cache from one pass to the next."""

_SPLIT = 4096
"""Logits of one program, all in its registers. The cuts of a row depend on V alone. If
they depended on the number of rows, a row's result would have other bits in another
batch.
32 rows of 152k are 1216 programs, enough for the 132 multiprocessors of an H200."""

_NO_TOKEN = tl.constexpr(2**31 - 1)
"""Above every id, so that any candidate wins a minimum against it."""


class Want(enum.Flag):
    """The statistics to compute beside the tokens. ``Want(0)`` is tokens alone."""

    PROBABILITY = enum.auto()
    MARGIN = enum.auto()
    NEGATIVE_ENTROPY = enum.auto()


@dataclass(frozen=True)
class RowStatistics:
    """The tokens and statistics of N rows. A statistic that was not wanted is None.

    The best row has the greatest value. A row has no softmax if it has a NaN or plus
    infinity, or minus infinity alone. All its statistics are minus infinity.

    Attributes:
        tokens: (N,) int64, the id of the greatest logit, the first one of equals. It is
            never the mask token. For a row with a NaN it is any other id.
        probability: (N,) float64, of ``tokens`` in the softmax of the whole row.
        margin: (N,) float64, between the two greatest probabilities. The mask token
            is none of the two, but it is in the softmax.
        negative_entropy: (N,) float64, ``sum p ln(p + eps)`` over the whole row, in
            nats.
    """

    tokens: torch.Tensor
    probability: torch.Tensor | None
    margin: torch.Tensor | None
    negative_entropy: torch.Tensor | None


def row_statistics(
    logits: torch.Tensor, mask_id: int, eps: float, want: Want
) -> RowStatistics:
    """Tokens and statistics of each row. The kernel computes them on a GPU.

    Args:
        logits: (N, V) float, V at least 2. The rows need not be contiguous. The kernel
            takes bf16, fp16 and fp32.
        mask_id: the token that no position may become.
        eps: added to the probability in the logarithm of the entropy. It must be above
            0, or a probability of 0 would give NaN. The kernel is compiled for its
            value.
        want: the statistics to compute.

    Raises:
        ValueError: a shape, an id or ``eps`` is out of range.
    """
    on_gpu = logits.is_cuda and logits.dtype in KERNEL_DTYPES
    compute = triton_row_statistics if on_gpu else plain_row_statistics
    return compute(logits, mask_id, eps, want)


def plain_row_statistics(
    logits: torch.Tensor, mask_id: int, eps: float, want: Want
) -> RowStatistics:
    """``row_statistics`` in torch, some rows at a time, for CPUs and as an oracle."""
    _check(logits, mask_id, eps, want)
    chunks = logits.split(max(1, _PLAIN_ELEMENTS // logits.shape[1]))
    parts = [_plain_chunk(chunk, mask_id, eps, want) for chunk in chunks]
    if len(parts) == 1:
        return parts[0]

    def joined(name: str) -> torch.Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return RowStatistics(
        torch.cat([part.tokens for part in parts]),
        joined("probability"),
        joined("margin"),
        joined("negative_entropy"),
    )


def _plain_chunk(
    logits: torch.Tensor, mask_id: int, eps: float, want: Want
) -> RowStatistics:
    choosable = logits.clone()
    choosable[:, mask_id] = -torch.inf
    # max gives the first one of equals, as argmax does. For bf16 on a CPU argmax takes
    # four times as long.
    tokens = choosable.max(dim=-1).indices
    if mask_id == 0:  # a row of -inf alone would give the mask token
        tokens.clamp_(min=1)
    probability = margin = entropy = None
    if Want.PROBABILITY in want:
        probability = _no_nan(_share(logits, tokens))
    if want & ~Want.PROBABILITY:
        p = torch.softmax(logits, dim=-1, dtype=torch.float64)
    if Want.NEGATIVE_ENTROPY in want:
        entropy = _no_nan(torch.add(p, eps).log_().mul_(p).sum(dim=-1))
    if Want.MARGIN in want:
        p[:, mask_id] = 0.0  # last, since the other statistics read this probability
        two = p.topk(2, dim=-1).values
        margin = _no_nan(two[:, 0] - two[:, 1])
    return RowStatistics(tokens, probability, margin, entropy)


def _share(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The softmax ``(N,)`` float64 of logits ``(N, V)`` at one token of each row.

    The softmax of whole rows takes three times as long on a CPU.
    """
    wide = logits.to(torch.float64, copy=True)
    powers = wide.sub_(wide.amax(dim=-1, keepdim=True)).exp_()
    return powers.gather(1, tokens[:, None])[:, 0] / powers.sum(dim=-1)


def _no_nan(value: torch.Tensor) -> torch.Tensor:
    return value.nan_to_num_(nan=-torch.inf, neginf=-torch.inf)


def triton_row_statistics(
    logits: torch.Tensor, mask_id: int, eps: float, want: Want
) -> RowStatistics:
    """``row_statistics`` in Triton: two launches, or four with the entropy.

    It is deterministic, and a row's result does not depend on the other rows. Nothing
    waits for the GPU. The first run with given flags and dtype compiles the kernel, so
    it must not be in the capture of a CUDA graph.

    Raises:
        TypeError: the kernel does not take this dtype.
        ValueError: a shape, an id or ``eps`` is out of range.
    """
    _check(logits, mask_id, eps, want)
    if logits.dtype not in KERNEL_DTYPES:
        raise TypeError(f"logits must be bf16, fp16 or fp32, not {logits.dtype}")
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    num_rows, vocab_size = logits.shape
    split = min(_SPLIT, triton.next_power_of_2(vocab_size))
    num_splits = triton.cdiv(vocab_size, split)

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float64, device=logits.device)

    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    probability = floats(num_rows) if Want.PROBABILITY in want else None
    margin = floats(num_rows) if Want.MARGIN in want else None
    entropy = floats(num_rows) if Want.NEGATIVE_ENTROPY in want else None
    found = RowStatistics(tokens, probability, margin, entropy)
    if num_rows == 0:  # the driver refuses an empty grid
        return found
    extrema = torch.empty(
        (num_rows, 3, num_splits), dtype=torch.float32, device=logits.device
    )
    first = torch.empty((num_rows, num_splits), dtype=torch.int32, device=logits.device)
    totals = floats(num_rows, num_splits) if want else None
    softmax = floats(num_rows, 2) if entropy is not None else None
    grid, warps = (num_rows, num_splits), 8 if split == _SPLIT else 4
    # Triton launches on the current device, which may be another GPU.
    with torch.cuda.device_of(logits):
        _split_kernel[grid](
            logits, extrema, first, totals,
            logits.stride(0), vocab_size, mask_id,
            NUM_SPLITS=num_splits, SPLIT=split, MARGIN=margin is not None,
            num_warps=warps,
        )  # fmt: skip
        _combine_kernel[(num_rows,)](
            extrema, first, totals, tokens, probability, margin, softmax,
            NUM_SPLITS=num_splits, PADDED=triton.next_power_of_2(num_splits),
            num_warps=1,
        )  # fmt: skip
        if entropy is not None:
            parts = floats(num_rows, num_splits)
            _entropy_kernel[grid](
                logits, softmax, parts,
                logits.stride(0), vocab_size,
                NUM_SPLITS=num_splits, SPLIT=split, EPS=eps, num_warps=warps,
            )  # fmt: skip
            torch.sum(parts, dim=1, out=entropy)
    return found


@triton.jit
def _load_split(logits, stride, vocab_size, SPLIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's ids (SPLIT,) int32 and logits (SPLIT,) fp32, -inf past the end.

    fp32 holds every bf16 and fp16 value exactly.
    """
    ids = tl.program_id(1) * SPLIT + tl.arange(0, SPLIT)
    row = logits + tl.program_id(0).to(tl.int64) * stride
    x = tl.load(row + ids, mask=ids < vocab_size, other=float("-inf"))
    return ids, x.to(tl.float32)


@triton.jit(do_not_specialize=["mask_id"])
def _split_kernel(  # type: ignore[no-untyped-def]
    logits,  # (N, V) bf16, fp16 or fp32
    extrema,  # out: (N, 3, S) fp32: greatest, second and, with the mask token, greatest
    first,  # out: (N, S) int32: id of the greatest
    totals,  # out: (N, S) fp64: sum exp(x - peak), or None for tokens alone
    stride,
    vocab_size,
    mask_id,
    NUM_SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
    MARGIN: tl.constexpr,
):
    """One part of one row. A NaN reaches ``totals`` alone."""
    ids, x = _load_split(logits, stride, vocab_size, SPLIT)
    slot = tl.program_id(0).to(tl.int64) * NUM_SPLITS + tl.program_id(1)
    three = tl.program_id(0).to(tl.int64) * 3 * NUM_SPLITS + tl.program_id(1)
    # The maximum of a NaN depends on the backend, so no NaN may reach it.
    comparable = tl.where(x == x, x, float("-inf"))
    is_candidate = (ids < vocab_size) & (ids != mask_id)
    candidates = tl.where(is_candidate, comparable, float("-inf"))
    best = tl.max(candidates, axis=0)
    # argmax may return any of equals. The least id is the first one by definition.
    best_id = tl.min(tl.where(is_candidate & (candidates == best), ids, _NO_TOKEN))
    tl.store(first + slot, best_id)
    tl.store(extrema + three, best)
    if MARGIN:
        others = tl.where(ids == best_id, float("-inf"), candidates)
        tl.store(extrema + three + NUM_SPLITS, tl.max(others, axis=0))
    if totals is not None:
        peak = tl.max(comparable, axis=0)
        # A part of -inf alone must sum to 0. exp(-inf - -inf) would be NaN.
        shift = tl.where(peak == float("-inf"), 0.0, peak).to(tl.float64)
        total = tl.sum(tl.exp(x.to(tl.float64) - shift), axis=0)
        tl.store(extrema + three + 2 * NUM_SPLITS, peak)
        tl.store(totals + slot, total)


@triton.jit
def _combine_kernel(  # type: ignore[no-untyped-def]
    extrema,  # (N, 3, S) fp32, first, totals: of _split_kernel
    first,
    totals,
    tokens,  # out: (N,) int64
    probability,  # out: (N,) fp64 or None
    margin,  # out: (N,) fp64 or None
    softmax,  # out: (N, 2) fp64: greatest logit, and the softmax's divisor; or None
    NUM_SPLITS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """One row from its parts."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PADDED)
    inside = part < NUM_SPLITS
    extrema += row * 3 * NUM_SPLITS + part
    first += row * NUM_SPLITS + part
    bests = tl.load(extrema, mask=inside, other=float("-inf"))
    best_ids = tl.load(first, mask=inside, other=_NO_TOKEN)
    best = tl.max(bests, axis=0)
    best_id = tl.min(tl.where(bests == best, best_ids, _NO_TOKEN), axis=0)
    tl.store(tokens + row, best_id.to(tl.int64))
    if totals is not None:
        peaks = tl.load(extrema + 2 * NUM_SPLITS, mask=inside, other=float("-inf"))
        sums = tl.load(totals + row * NUM_SPLITS + part, mask=inside, other=0.0)
        # The total is NaN if a sum is, if a peak is +inf or if all peaks are -inf. The
        # row then has no softmax.
        peak = tl.max(peaks, axis=0).to(tl.float64)
        total = tl.sum(tl.exp(peaks.to(tl.float64) - peak) * sums, axis=0)
        p = tl.exp(best.to(tl.float64) - peak) / total
        if probability is not None:
            tl.store(probability + row, tl.where(total == total, p, float("-inf")))
        if margin is not None:
            seconds = tl.load(extrema + NUM_SPLITS, mask=inside, other=float("-inf"))
            # The second one is in the winner's own part or the best of another part.
            contenders = tl.where(best_ids == best_id, seconds, bests)
            second = tl.max(contenders, axis=0).to(tl.float64)
            gap = p - tl.exp(second - peak) / total
            tl.store(margin + row, tl.where(total == total, gap, float("-inf")))
        if softmax is not None:
            tl.store(softmax + 2 * row, peak)
            tl.store(softmax + 2 * row + 1, total)


@triton.jit
def _entropy_kernel(  # type: ignore[no-untyped-def]
    logits,  # (N, V) bf16, fp16 or fp32
    softmax,  # (N, 2) fp64, of _combine_kernel
    parts,  # out: (N, S) fp64
    stride,
    vocab_size,
    NUM_SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
    EPS: tl.constexpr,  # a run-time argument would be rounded to fp32
):
    """``sum p ln(p + eps)`` of one part of one row, -inf for a row without softmax."""
    _, x = _load_split(logits, stride, vocab_size, SPLIT)
    row = tl.program_id(0).to(tl.int64)
    peak = tl.load(softmax + 2 * row)
    total = tl.load(softmax + 2 * row + 1)
    p = tl.exp(x.to(tl.float64) - peak) / total
    entropy = tl.sum(p * tl.log(p + EPS), axis=0)  # past the end 0 ln(eps) = 0
    entropy = tl.where(total == total, entropy, float("-inf"))
    tl.store(parts + row * NUM_SPLITS + tl.program_id(1), entropy)


def _check(logits: torch.Tensor, mask_id: int, eps: float, want: Want) -> None:
    """Refuse bad arguments. It reads no value from the GPU, which would wait."""
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must be (N, V), V > 1, not {tuple(logits.shape)}")
    if not 0 <= mask_id < logits.shape[1]:
        raise ValueError(f"mask_id {mask_id} is no id of {logits.shape[1]}")
    if Want.NEGATIVE_ENTROPY in want and not eps > 0:
        raise ValueError(f"eps must be above 0, not {eps}")
