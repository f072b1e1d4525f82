"""The contract with SGLang is what our code uses, and a use that is gone is named."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from sglang_dllm.patches.__main__ import render_contract
from sglang_dllm.upstream import contract
from sglang_dllm.upstream.code import Code
from sglang_dllm.upstream.contract import Contract, Upstream
from sglang_dllm.upstream.objects import CLASSES, FIELDS, NAMES, NAMES_IN
from sglang_dllm.upstream.shapes import COMPAT, contract_of

CONTRACT = Contract.load()


def test_the_file_is_what_our_code_uses() -> None:
    text = contract.FILE.read_text(encoding="utf-8")
    assert text == render_contract(), "run: python -m sglang_dllm.patches"


@pytest.mark.parametrize("reads_source", [False, True])
def test_the_installed_sglang_keeps_it(reads_source: bool) -> None:
    assert CONTRACT.first_broken(reads_source) is None


def test_it_covers_more_than_the_names_that_are_imported() -> None:
    """Guards against a reader that finds nothing."""
    kinds = [
        sum(re.fullmatch(pattern, use) is not None for use in CONTRACT.always)
        for pattern in (r"[\w.]+:\w+", r"[\w.]+:\w+\.\w+", r".*\(.*\)")
    ]
    assert min(kinds) > 40, kinds


def gone(use: str) -> str:
    """The same use of a name that SGLang does not have."""
    symbol, bracket, rest = use.partition("(")
    return f"{symbol}_gone{bracket}{rest}"


def symbol_of(use: str) -> str:
    return use.partition("(")[0].replace(":", ".")


def test_each_use_is_missed_when_it_is_gone() -> None:
    """As if SGLang had renamed it; a class with ``__getattr__`` has every name."""
    upstream = Upstream()
    unnoticed = []
    for use in CONTRACT.always:
        problem = upstream.problem(gone(use))
        if problem is None:
            unnoticed.append(use)
        else:
            assert symbol_of(gone(use)) in problem
            assert "\n" not in problem
    assert {symbol_of(use).rpartition(".")[0] for use in unnoticed} <= {
        "sglang.srt.runtime_context.ParallelContext"
    }


def test_a_parameter_that_is_gone_is_missed() -> None:
    upstream = Upstream()
    named = [use for use in CONTRACT.always if "=" in use]
    assert len(named) > 20
    noticed = [use for use in named if upstream.problem(use.replace("=", "_gone=", 1))]
    # Functions with ``**kwargs`` take every name.
    assert len(noticed) > 0.8 * len(named)


def contract_in(folder: Path, **files: str) -> Contract:
    """The contract of some files; ``__`` in a name stands for a folder."""
    for name, text in files.items():
        file = folder / (name.replace("__", "/") + ".py")
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return contract_of(Code.of({"": folder}))


_BATCH = "sglang.srt.managers.schedule_batch"


def test_uses_are_found_wherever_an_object_comes_from(tmp_path: Path) -> None:
    found = contract_in(
        tmp_path,
        some="""
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

class OurBatch(ScheduleBatch):
    mine = 1
    @classmethod
    def new(cls, reqs: list[Req]):
        batch = cls.init_new(reqs)
        return batch
    def run(self):
        self.theirs = self.mine + self.own()
        super().copy()
        return [r.of_an_element for r in self.reqs]
    def own(self): ...

class Holder:
    def __init__(self, req):
        self.req = req
        self.canvas = 1
    def use(self):
        return self.req.of_an_attribute + self.canvas.nothing

def by_name(req, other):
    from sglang.srt.mem_cache.common import release_kv_cache
    def inner():
        return req.of_a_closure
    params, x = req.sampling_params, other.nothing
    release_kv_cache(req, *other, is_insert=False)
    if getattr(req, "optional", None) or hasattr(req, "asked"):
        return params.top_p
    return getattr(req, "by_string")

def by_annotation(x: Req | None, y: "Req", batch: OurBatch):
    return x.of_a_union, y.of_a_string, batch.mine, batch.of_a_subclass

def written(req):
    req.is_written = 1
""",
    )
    req = f"{_BATCH}:Req"
    assert found.always == sorted(
        [
            req,
            *(f"{req}.of_{a}" for a in ("a_closure", "a_string", "a_union")),
            *(f"{req}.of_an_{a}" for a in ("attribute", "element")),
            *(f"{req}.{a}" for a in ("by_string", "is_written", "sampling_params")),
            f"{_BATCH}:ScheduleBatch",
            f"{_BATCH}:ScheduleBatch.copy()",
            f"{_BATCH}:ScheduleBatch.init_new(_)",
            f"{_BATCH}:ScheduleBatch.of_a_subclass",
            f"{_BATCH}:ScheduleBatch.reqs",
            f"{_BATCH}:ScheduleBatch.theirs",
            "sglang.srt.mem_cache.common:release_kv_cache",
            "sglang.srt.mem_cache.common:release_kv_cache(_, *, is_insert=)",
            "sglang.srt.sampling.sampling_params:SamplingParams.top_p",
        ]
    )
    assert found.one_of == {}


def test_a_function_of_compat_is_a_choice(tmp_path: Path) -> None:
    found = contract_in(
        tmp_path,
        upstream__compat="""
try:
    from sglang.srt.new import here
except ImportError:
    here = None
IS_NEW = here is not None

def is_new(req) -> bool:
    return hasattr(req, "kv")

def by_attribute(req):
    if hasattr(req, "kv"):
        return req.kv.req_pool_idx
    return req.req_pool_idx

def by_import(req):
    return here(req) if here is not None else req.old

def by_constant(req):
    if not IS_NEW:
        req.set_extend_range(0, 1)
        return
    req.extend_end = 1

def by_function(req):
    if is_new(req) and req.rid:
        req.new
    elif not is_new(req):
        req.old

def inside(req):
    try:
        from sglang.srt.a import b
    except ImportError:
        from sglang.srt.c import b
    return b(req)

def takes(function, name) -> bool:
    return name in inspect.signature(function).parameters

def by_parameter(req):
    return req.rid if takes(req.finished, "now") else None

def same_everywhere(req):
    return req.rid
""",
    )
    req = f"{_BATCH}:Req"
    assert found.always == [f"{req}.rid"]
    kv, here, inner = f"{req}.kv", "sglang.srt.new:here", "sglang.srt.a:b"
    assert found.one_of == {
        "compat.by_attribute": [
            [f"no {kv}", f"{req}.req_pool_idx"],
            [kv, f"{_BATCH}:ReqKvInfo.req_pool_idx"],
        ],
        "compat.by_constant": [
            [f"no {here}", f"{req}.set_extend_range(_, _)"],
            [f"{req}.extend_end", here],
        ],
        "compat.by_function": [
            [f"no {kv}", f"{req}.old"],
            [kv, f"{req}.new", f"{req}.rid"],
        ],
        "compat.by_import": [[f"no {here}", f"{req}.old"], [here, f"{here}(_)"]],
        "compat.by_parameter": [
            [f"no {req}.finished(*, now=)", f"{req}.finished"],
            [f"{req}.finished", f"{req}.finished(*, now=)", f"{req}.rid"],
        ],
        "compat.here": [[f"no {here}"], [here]],
        "compat.inside": [
            [f"no {inner}", "sglang.srt.c:b", "sglang.srt.c:b(_)"],
            [inner, f"{inner}(_)"],
        ],
    }


def test_one_shape_is_enough_and_none_is_named() -> None:
    there, not_there = f"{_BATCH}:Req.rid", f"{_BATCH}:Req.rid_gone"
    assert Contract([], {"compat.f": [[not_there], [there]]}).first_broken() is None
    broken = Contract([], {"compat.f": [[not_there], [there, not_there]]})
    problem = broken.first_broken()
    assert problem is not None
    assert "compat.f" in problem and "Req.rid_gone" in problem


def test_the_tables_name_nothing_twice_and_nothing_unknown() -> None:
    named = {name.strip("[") for text in FIELDS.values() for name in text.split()}
    named |= {name for text in NAMES.values() for name in text.split()}
    for table in NAMES_IN.values():
        named |= {name for text in table.values() for name in text.split()}
    assert named <= CLASSES.keys()
    files = Code.of({"": Path(contract.__file__).parents[1]}).files
    files |= dict.fromkeys(["patches/attention_backends.py"], ast.Module([], []))
    assert NAMES_IN.keys() <= files.keys()
    assert COMPAT in files
