"""SGLang changes something that we use: our launches end with its name, others go on.

Each case changes SGLang in a process of its own before the plugins are loaded, as a
newer version would have changed it, and then resolves the flags of two launches.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.launch_probe import run
from helpers.upstream_shapes import RESOLVES_LATER, SDAR
from sglang_dllm import SUPPORTED_SGLANG
from sglang_dllm.demo import demo_path
from sglang_dllm.upstream.versions import installed

_RENAME = """
from pathlib import Path
read = Path.read_text
def renamed(self, *args, **named):
    return read(self, *args, **named).replace({old!r}, {new!r})
Path.read_text = renamed
"""
"""Another text of SGLang's source files, for attributes that no class declares."""

CHANGES = {
    "an imported function": (
        "import sglang.srt.mem_cache.allocation as module\ndel module.alloc_req_slots",
        "SGLang has no sglang.srt.mem_cache.allocation.alloc_req_slots",
    ),
    "an imported class": (
        "import sglang.srt.managers.schedule_batch as module\ndel module.FINISH_LENGTH",
        "SGLang has no sglang.srt.managers.schedule_batch.FINISH_LENGTH",
    ),
    "a class that compat imports": (
        "import sglang.srt.managers.schedule_batch as module\ndel module.ReqKvInfo",
        "SGLang has no sglang.srt.managers.schedule_batch.ReqKvInfo",
    ),
    "a module": (
        "import sys\nsys.modules['sglang.srt.model_executor.forward_context'] = None",
        "SGLang has no sglang.srt.model_executor.forward_context.",
    ),
    "a parameter of a function": (
        "import sglang.srt.mem_cache.allocation as module\n"
        "module.alloc_req_slots = lambda pool, reqs: None",
        "alloc_req_slots takes (pool, reqs), called with (_, _, _)",
    ),
    "a parameter of a method": (
        "from sglang.srt.managers.schedule_batch import Req\n"
        "Req.update_finish_state = lambda self: None",
        "Req.update_finish_state takes (), called with (_)",
    ),
    "a method": (
        "from sglang.srt.managers.scheduler import Scheduler\n"
        "del Scheduler.get_num_allocatable_reqs",
        "SGLang has no sglang.srt.managers.scheduler.Scheduler."
        "get_num_allocatable_reqs",
    ),
    "an attribute of self": (
        _RENAME.format(old="self.waiting_queue", new="self.waiting_line"),
        "SGLang has no sglang.srt.managers.scheduler.Scheduler.waiting_queue",
    ),
    "a field": (
        "from sglang.srt.sampling.sampling_params import SamplingParams\n"
        "type.__delattr__(SamplingParams, 'ignore_eos')\n"
        "del SamplingParams.__annotations__['ignore_eos']\n"
        + _RENAME.format(old="self.ignore_eos", new="self.goes_on"),
        "SGLang has no sglang.srt.sampling.sampling_params.SamplingParams.ignore_eos",
    ),
    "what both ways of compat use": (
        "import sglang.srt.mem_cache.common as module\n"
        "module.release_kv_cache = lambda req: None",
        "SGLang has no shape that compat.release_slots knows: ",
    ),
    "an attribute of an attention backend": (
        _RENAME.format(old="self.prefill_backend", new="self.kernels"),
        "FlashInferAttnBackend.prefill_backend",
    ),
    "the target of a hook": (
        "from sglang.srt.managers.scheduler import Scheduler\n"
        "del Scheduler.pause_generation",
        "SGLang has no sglang.srt.managers.scheduler.Scheduler.pause_generation",
    ),
    "a parameter of a hook's target": (
        "from sglang.srt.managers.scheduler import Scheduler\n"
        "Scheduler.pause_generation = lambda self, request: None",
        "pause_generation takes (self, request), expected (self, recv_req)",
    ),
}
"""Code that changes SGLang, and the words of the message."""

if RESOLVES_LATER:
    CHANGES["an extension point"] = (
        "import sglang.srt.arg_groups.resolution_hooks as module\n"
        "del module.register_resolution_hook",
        "SGLang has no sglang.srt.arg_groups.resolution_hooks.register_resolution_hook",
    )

Launches = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """Launches of our demo and of SGLang's own SDAR, for each change."""
    sdar = tmp_path_factory.mktemp("sdar")
    (sdar / "config.json").write_text(json.dumps(SDAR))

    def launch(path: Path, algorithm: str) -> list[str]:
        model = ["--model-path", str(path), "--dllm-algorithm", algorithm]
        return ["launch", *model, "--device", "cpu"]

    models = {
        "ours": launch(demo_path(), "FullAttnMultiBlock"),
        "theirs": launch(sdar, "LowConfidence"),
    }
    changes = {name: change for name, (change, _) in CHANGES.items()} | {"nothing": ""}
    asked = [(name, model) for name in changes for model in models]
    found = run(
        {"arguments": models[model], "plugins": None, "change": changes[name]}
        for name, model in asked
    )
    return dict(zip(asked, found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["ours", "theirs"])
def test_an_unchanged_sglang_resolves_the_flags(model: str, launches: Launches) -> None:
    found = launches["nothing", model]
    assert found["error"] is None
    assert bool(found["ours"]) == (model == "ours")


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_launch_of_ours_ends_with_one_line(change: str, launches: Launches) -> None:
    found = launches[change, "ours"]
    assert found["error"] == "SystemExit: 2", found["stderr"]
    lines = [line for line in found["stderr"].splitlines() if "sglang-dllm" in line]
    assert len(lines) == 1, found["stderr"]
    assert lines[0].startswith("sglang-dllm: error: ")
    for words in (CHANGES[change][1], installed(), *SUPPORTED_SGLANG):
        assert words in lines[0]
    assert "AttributeError" not in found["stderr"]


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_other_launches_go_on(change: str, launches: Launches) -> None:
    found = launches[change, "theirs"]
    assert found["error"] is None, found["stderr"]
    assert found["ours"] == []
