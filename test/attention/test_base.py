"""Every backend that plans ahead: right answers, plans made once, graphs replayed.

Without a GPU, FlashInfer's wrappers are shadowed and Triton's kernel is plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch

from helpers.attention_batches import (
    MAX_LEN,
    WINDOWS,
    Batch,
    assert_right,
    expected,
    graph_windows,
    moved,
    plain_canvas_attention,
    plan_bucket,
    plan_of,
    pool_size,
    random_batch,
)
from helpers.flashinfer_shadows import attention_for, half_batch
from helpers.sync_detector import SyncDetector
from sglang_dllm.attention import triton as triton_module
from sglang_dllm.attention.base import CanvasAttention, LayerPool
from sglang_dllm.attention.plan import AttentionPlan, KVWrites
from sglang_dllm.attention.sdpa import SDPACanvasAttention
from sglang_dllm.attention.triton import TritonCanvasAttention

HEADS = pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=["mha", "gqa"])
Make = Callable[[Batch], CanvasAttention[Any]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], torch.Tensor]]:
    """The launches of Triton's kernel, which is replaced by torch."""
    calls: list[Callable[[], torch.Tensor]] = []

    def launch(*args: Any) -> torch.Tensor:
        calls.append(partial(plain_canvas_attention, *args))
        return calls[-1]()

    monkeypatch.setattr(triton_module, "triton_canvas_attention", launch)
    return calls


@pytest.fixture(params=["flashinfer", "triton"])
def make(request: pytest.FixtureRequest, launches: list) -> Make:
    if request.param == "triton":
        return lambda batch: TritonCanvasAttention("cpu")
    return attention_for


@HEADS
@pytest.mark.parametrize("name", WINDOWS)
def test_equals_the_oracle(name: str, heads: tuple[int, int], make: Make) -> None:
    batch = half_batch(name, heads)
    attention = make(batch)
    attention.plan(batch.plan)
    assert_right(attention, batch)
    assert_right(attention, batch)  # the next layer


@pytest.mark.parametrize("name", WINDOWS)
def test_the_same_windows_are_planned_once(
    name: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = half_batch(name, (4, 2))
    attention, planned = make(batch), []
    plan_windows = attention.plan_windows

    def counted(plan: AttentionPlan) -> Any:
        planned.append(plan)
        return plan_windows(plan)

    monkeypatch.setattr(attention, "plan_windows", counted)
    attention.plan(batch.plan)
    # Every forward has a new plan of new windows; the slots are the canvas's own.
    windows = [replace(window) for window in batch.plan.windows]
    again = replace(batch, plan=AttentionPlan(windows, torch.tensor([0])))
    attention.plan(again.plan)
    assert planned == [batch.plan]
    assert_right(attention, again)


def test_a_window_that_moves_is_written_elsewhere(make: Make) -> None:
    batch = half_batch("interleaved", (4, 2))
    attention = make(batch)
    attention.plan(batch.plan)
    other = replace(batch, plan=moved(batch.plan))
    attention.plan(other.plan)
    assert_right(attention, other)


@pytest.mark.parametrize("name", WINDOWS)
def test_a_plan_asks_the_device_for_nothing(name: str, launches: list) -> None:
    """FlashInfer is missing here: its shadows look at what they are given."""
    plan = plan_of(WINDOWS[name])
    for attention in (
        TritonCanvasAttention("cpu"),
        SDPACanvasAttention("cpu"),
    ):
        with SyncDetector():
            attention.plan(AttentionPlan(plan.windows, plan.logits_indices))


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.to("cpu"),
        lambda x: x.to(x),
        lambda x: x.to(device="cpu"),
        lambda x: x.cpu(),
        lambda x: torch.tensor([1, 2], device="cpu"),
        lambda x: torch.as_tensor([1, 2], device=x.device),
    ],
)
def test_the_sync_detector_finds_what_waits(waits: Callable[..., Any]) -> None:
    x = torch.ones(2)
    with pytest.raises(RuntimeError), SyncDetector():
        waits(x)
    with SyncDetector():
        x.to(torch.float64)
        x.to("cpu", non_blocking=True)
        x.to("cpu", torch.float64, True)
        torch.tensor([1, 2])
        torch.zeros(2, device="cpu")


@dataclass(frozen=True)
class LoggedPool(LayerPool):
    """Notes every write with the tensors that it reads."""

    writes: list[tuple[torch.Tensor, ...]] = field(default_factory=list)

    def write(self, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.writes.append((slots, k, v))
        super().write(slots, k, v)


class RecordedLayer:
    """The writes and the kernel of one layer, held by address as a CUDA graph does."""

    def __init__(
        self, attention: CanvasAttention[Any], batch: Batch, launches: list
    ) -> None:
        self.batch = batch
        self.pool = LoggedPool(*batch.pools)
        self.out = attention.run(batch.q, batch.k, batch.v, self.pool, batch.scale)
        if not launches:
            launches = attention._forward.paged.wrapper.calls  # type: ignore[union-attr]
        (self.kernel,) = launches

    def replay(self, batch: Batch) -> torch.Tensor:
        """With the numbers of another batch."""
        for name in ("q", "k", "v", "k_pool", "v_pool"):
            getattr(self.batch, name).copy_(getattr(batch, name))
        for write in self.pool.writes:
            LayerPool.write(self.pool, *write)
        return self.kernel()


@HEADS
def test_a_graph_is_replayed_for_other_canvases(
    heads: tuple[int, int], make: Make, launches: list
) -> None:
    """The buffers of a capture hold the next plan of its bucket. Plans of another
    bucket and eager ones do not touch them."""
    size, dtype = 200, torch.bfloat16
    first = random_batch(plan_of(graph_windows(9, 40, 12)), size, heads, dtype=dtype)
    attention = make(first)
    plan_bucket(attention, first.plan)
    # FlashInfer's wrappers would get a contiguous copy of q, which no replay fills.
    static = replace(first, q=first.q.contiguous()).copy()
    recorded = RecordedLayer(attention, static, launches)
    torch.testing.assert_close(
        recorded.out.float(), expected(first)[0], atol=1e-2, rtol=1e-2
    )
    other_bucket = plan_of(graph_windows(30, 31, length=8))
    # A window that is its whole canvas reads the pool, too, with the same result.
    for seed, lens in enumerate([(70, 5, 33), (4, 4, 4), (20, 20, 150)]):
        plan = plan_of(graph_windows(*lens), seed + 1)
        batch = random_batch(plan, size, heads, dtype=dtype, seed=seed + 1)
        attention.plan(plan_of(WINDOWS["interleaved"]))
        plan_bucket(attention, plan)
        plan_bucket(attention, other_bucket)
        out = recorded.replay(batch)
        wanted, *pools = expected(batch)
        torch.testing.assert_close(out.float(), wanted, atol=1e-2, rtol=1e-2)
        assert torch.equal(static.k_pool, pools[0])
        assert torch.equal(static.v_pool, pools[1])


def test_padding_of_a_graph_leaves_real_tokens_and_slots_alone(make: Make) -> None:
    """Windows of 4 and 3 tokens in a bucket of 3 windows of 4."""
    plan = plan_of([(3, 7, 9, True), (13, 16, 40, True)])
    batch = random_batch(plan, 60, (4, 2), dtype=torch.bfloat16)
    last = replace(plan.windows[1], padding=1)
    padded = AttentionPlan([plan.windows[0], last, last], plan.logits_indices, 1)
    sources = torch.tensor([0, 1, 2, 3, 4, 5, 6, 6, 4, 5, 6, 6])
    assert padded.num_tokens == len(sources)
    qkv = {name: getattr(batch, name)[sources] for name in ("q", "k", "v")}
    # Whatever padding computes may differ from what it repeats.
    for name in ("k", "v"):
        qkv[name][7:] += 1.0
    attention = make(batch)
    plan_bucket(attention, padded)
    own = replace(batch.copy(), plan=padded, **qkv)
    out = attention.run(own.q, own.k, own.v, own.layer_pool, own.scale)
    wanted, *pools = expected(batch)
    torch.testing.assert_close(out[:7].float(), wanted, atol=1e-2, rtol=1e-2)
    assert torch.equal(own.k_pool[1:], pools[0][1:])
    assert torch.equal(own.v_pool[1:], pools[1][1:])


def test_a_bucket_refuses_a_window_without_slots(make: Make) -> None:
    attention = make(half_batch("windows", (4, 2)))
    plan = plan_of([(0, 4, 9, True), (0, 4, 4, False)])
    bucket = attention.new_bucket(2, 4, MAX_LEN, KVWrites(slice(None), torch.zeros(8)))
    with pytest.raises(ValueError, match="a window needs"):
        attention.fill_bucket(bucket, plan)


def test_a_backend_without_fixed_buffers_says_so() -> None:
    attention = SDPACanvasAttention("cpu")
    assert not attention.can_be_captured
    with pytest.raises(NotImplementedError, match="SDPACanvasAttention"):
        plan_bucket(attention, plan_of(graph_windows(9)))


def on_gpu(backend: str, batch: Batch, **settings: Any) -> CanvasAttention[Any]:
    if backend == "triton":
        return TritonCanvasAttention("cuda")
    return attention_for(batch, shadows=False, **settings)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "heads", "num_windows", "settings"),
    [
        ("flashinfer", (8, 8), 1, {}),
        ("flashinfer", (8, 8), 3, {}),
        ("flashinfer", (8, 8), 32, {}),
        ("flashinfer", (8, 8), 3, {"is_deterministic": True}),
        ("triton", (32, 32), 3, {}),
        ("triton", (28, 4), 3, {}),
    ],
)
def test_a_cuda_graph_is_replayed_for_other_canvases(
    backend: str, heads: tuple[int, int], num_windows: int, settings: dict[str, Any]
) -> None:
    def batch_of(seed: int) -> Batch:
        lens = [40 + (37 * i * seed) % 120 for i in range(num_windows)]
        windows = graph_windows(*lens, length=32)
        size = (MAX_LEN * num_windows) + 5
        assert pool_size(windows) <= size
        plan = plan_of(windows, seed)
        made = random_batch(plan, size, heads, 128, torch.bfloat16, seed=seed)
        return made.to("cuda")

    static = batch_of(0)
    static = replace(static, q=static.q.contiguous())
    attention = on_gpu(backend, static, **settings)

    def forward() -> torch.Tensor:
        return attention.run(
            static.q, static.k, static.v, static.layer_pool, static.scale
        )

    plan_bucket(attention, static.plan)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()
    for seed in (1, 2, 3):
        batch = batch_of(seed)
        for name in ("q", "k", "v", "k_pool", "v_pool"):
            getattr(static, name).copy_(getattr(batch, name))
        attention.plan(batch_of(4).plan)
        plan_bucket(attention, batch.plan)
        graph.replay()
        wanted, *pools = expected(batch.to("cpu"))
        torch.testing.assert_close(out.float().cpu(), wanted, atol=1e-2, rtol=1e-2)
        assert torch.equal(static.k_pool.cpu(), pools[0])
        assert torch.equal(static.v_pool.cpu(), pools[1])
