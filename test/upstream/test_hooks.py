"""Every hook: its contract holds, a broken one is named, off means off."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.off_arguments import llama_manager, off_arguments
from sglang_dllm import SUPPORTED_SGLANG
from sglang_dllm.errors import UpstreamContractError
from sglang_dllm.patches import HOOKS
from sglang_dllm.upstream import hooks as hooks_module
from sglang_dllm.upstream.contract import Contract
from sglang_dllm.upstream.extensions import EXTENSION_POINTS
from sglang_dllm.upstream.hooks import Hook, HookSet, check_contract
from sglang_dllm.upstream.versions import installed

NEEDED = tuple(hook for hook in HOOKS.hooks if hook.is_needed)
"""The hooks that the installed SGLang needs."""

ALWAYS = [hook.target for hook in NEEDED if hook.always]

ALL = pytest.mark.parametrize("hook", NEEDED, ids=lambda h: h.target)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Targets that ``install`` registers, while SGLang's registry stays untouched."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    targets: list[str] = []

    def register(target: str, hook: Any, kind: HookType) -> None:
        assert isinstance(kind, HookType)
        targets.append(target)

    monkeypatch.setattr(HookRegistry, "register", register)
    # test_contract.py has the tests of the rest of the contract.
    monkeypatch.setattr(Contract, "load", lambda: Contract([], {}))
    return targets


def altered(hook: Hook, **changes: Any) -> HookSet:
    """All hooks, one of them with another target or contract."""
    other = dataclasses.replace(hook, **changes)
    return HookSet(tuple(other if h is hook else h for h in HOOKS.hooks))


def always_but(hook: Hook) -> list[str]:
    """The hooks that stay where the contract of one is broken."""
    return [target for target in ALWAYS if target != hook.target]


def test_targets_are_unique_and_every_field_says_something() -> None:
    targets = [hook.target for hook in HOOKS.hooks]
    assert len(set(targets)) == len(targets)
    assert ALWAYS
    for hook in HOOKS.hooks:
        assert hook.why and hook.remove_when, hook.target
        assert bool(hook.replaced_by) == (hook.unless is not None), hook.target
        assert hook.replaced_by.keys() < set(SUPPORTED_SGLANG), hook.target


@pytest.mark.parametrize("hook", HOOKS.hooks, ids=lambda h: h.target)
def test_the_ledgers_column_is_the_installed_sglang(hook: Hook) -> None:
    if installed() not in SUPPORTED_SGLANG:
        pytest.skip("the ledger has no column for this version")
    assert hook.is_needed == (installed() not in hook.replaced_by)


def test_the_extension_points_of_the_ledger_are_there() -> None:
    for point in EXTENSION_POINTS:
        assert set(point.versions) <= set(SUPPORTED_SGLANG)
        if installed() in point.versions:
            resolve_name(point.name)


@ALL
def test_the_installed_sglang_keeps_the_contract(hook: Hook) -> None:
    original = check_contract(hook)
    assert callable(original)
    # The target names the class that defines the method, not one that inherits it.
    *_, owner, name = hook.target.split(".")
    if owner[0].isupper():
        assert original.__qualname__ == f"{owner}.{name}"


@ALL
def test_a_hook_takes_what_its_target_takes(hook: Hook) -> None:
    """The framework calls fn(original, *args): names may differ, places may not."""
    wanted = inspect.signature(check_contract(hook)).parameters.values()
    found = list(inspect.signature(hook.fn).parameters.values())[1:]
    # A hook with ``*args`` hands the others on, whatever they are.
    named = [p for p in found if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert len(found) == len(list(wanted)) or len(named) == len(found) - 2
    for ours, theirs in zip(named, wanted, strict=False):
        if theirs.default is not inspect.Parameter.empty:
            assert ours.name == theirs.name, "callers may pass it by keyword"
            assert ours.default == theirs.default


@ALL
def test_a_changed_contract_leaves_the_hooks_that_tell(
    hook: Hook, registered: list[str]
) -> None:
    if hook.contract is None:
        pytest.skip("the hook hands all arguments on, whatever they are")
    hooks = altered(hook, contract=(*hook.contract, "brand_new"))
    hooks.install()
    assert registered == always_but(hook)
    with pytest.raises(UpstreamContractError) as caught:
        hooks.verify()
    for word in (hook.target, "brand_new", installed(), *SUPPORTED_SGLANG):
        assert word in str(caught.value)


@ALL
def test_a_missing_target_leaves_the_hooks_that_tell(
    hook: Hook, registered: list[str]
) -> None:
    hooks = altered(hook, target=hook.target + "_gone")
    hooks.install()
    assert registered == always_but(hook)
    with pytest.raises(UpstreamContractError, match=f"{hook.target}_gone"):
        hooks.verify()


def test_an_attribute_that_is_gone_ends_the_launch(
    registered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Contract(["sglang.srt.managers.schedule_batch:Req.finished_gone()"], {})
    monkeypatch.setattr(Contract, "load", lambda: gone)
    hooks = HookSet(HOOKS.hooks)
    # Only the source says that a method sets it on ``self``; it is read at launch.
    hooks.install()
    assert registered == [hook.target for hook in NEEDED]
    put_in_place(hooks, monkeypatch)
    with pytest.raises(UpstreamContractError, match=r"no .*Req\.finished_gone; .*"):
        hooks.verify()
    # A second look must not pass: SGLang may catch the first error.
    with pytest.raises(UpstreamContractError, match=r"no .*Req\.finished_gone; .*"):
        hooks.verify()


def test_an_import_that_is_gone_leaves_the_hooks_that_tell(
    registered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Contract(["sglang.srt.managers.schedule_batch:Req_gone"], {})
    monkeypatch.setattr(Contract, "load", lambda: gone)
    hooks = HookSet(HOOKS.hooks)
    hooks.install()
    assert registered == ALWAYS
    with pytest.raises(UpstreamContractError, match="Req_gone"):
        hooks.verify()


@pytest.mark.parametrize(
    ("number", "words"),
    [
        ("0.5.20", "untested: between 0.5.17 and 0.5.23"),
        ("0.5.17.post1", "untested: between"),
        ("0.5.23.dev12+g0123abc", "untested: between"),
        ("0.9.9", "untested: outside of the supported 0.5.17 to 0.5.23"),
        ("0.5.16", "untested: outside"),
        ("main", "untested: outside"),
        ("0.5.17", None),
        ("0.5.23+cu130", None),
    ],
)
def test_an_untested_version_is_logged_once_and_goes_on(
    number: str,
    words: str | None,
    registered: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("sglang_dllm.upstream.versions.version", lambda name: number)
    hooks = HookSet(HOOKS.hooks)
    hooks.install()
    assert registered == [hook.target for hook in NEEDED]
    put_in_place(hooks, monkeypatch)
    hooks.verify()
    hooks.verify()
    logged = [record.message for record in caplog.records]
    if words is None:
        assert logged == []
    else:
        (line,) = logged
        assert f"SGLang {number}, {words}" in line


def put_in_place(hooks: HookSet, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let every hook of a set look as if SGLang had applied it."""
    applied: dict[str, Any] = {
        target: SimpleNamespace(__wrapped__=original)
        for target, original in hooks.originals.items()
    }
    monkeypatch.setattr(hooks_module, "_resolve", applied.__getitem__)
    return applied


@ALL
def test_a_hook_that_was_not_applied_is_named(
    hook: Hook, registered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other hook is in place; SGLang only logs the one that failed."""
    hooks = HookSet(HOOKS.hooks)
    hooks.install()
    applied = put_in_place(hooks, monkeypatch)
    applied[hook.target] = hooks.originals[hook.target]
    with pytest.raises(UpstreamContractError) as caught:
        hooks.verify()
    assert f"the sglang-dllm hook on {hook.target} is not applied" in str(caught.value)
    applied[hook.target] = SimpleNamespace(__wrapped__=hooks.originals[hook.target])
    hooks.verify()


def test_a_step_that_sglang_refuses_is_a_broken_contract() -> None:
    """SGLang's plugin loader would log the error and go on."""

    def refused() -> None:
        raise ValueError("no step 'x'")

    hooks = HookSet(HOOKS.hooks)
    hooks.use(refused)
    with pytest.raises(UpstreamContractError, match="no step 'x'"):
        hooks.verify()


def test_verify_looks_through_another_plugins_wrapper(
    registered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = HookSet(HOOKS.hooks)
    hooks.install()
    applied = put_in_place(hooks, monkeypatch)
    for target, ours in applied.items():
        applied[target] = SimpleNamespace(__wrapped__=ours)
    hooks.verify()


def test_verify_before_install_is_an_error() -> None:
    with pytest.raises(UpstreamContractError, match="is not applied"):
        HookSet(HOOKS.hooks).verify()


def test_sglangs_loader_applies_all_of_them() -> None:
    """In a process of its own: loading plugins patches SGLang for good."""
    script = (
        "from sglang.srt.plugins import load_plugins; load_plugins();"
        "from sglang_dllm.patches import HOOKS; HOOKS.verify(); print('all applied')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.endswith("all applied\n"), done.stdout + done.stderr


@pytest.fixture(autouse=True)
def a_llama_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state that hooks look up: the checkpoint's config and the server's state."""
    monkeypatch.setattr(
        "sglang_dllm.upstream.launch.architecture_of",
        lambda args: args.hf_config.architectures[0],
    )
    monkeypatch.setattr(
        "sglang_dllm.upstream.launch.fields_of",
        lambda args: {"architectures": args.hf_config.architectures},
    )
    state = SimpleNamespace(tokenizer_manager=llama_manager())
    monkeypatch.setattr(
        "sglang.srt.entrypoints.http_server.get_global_state", lambda: state
    )


def call(hook: Hook, act: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
    """The values that a hook returns or yields around an original of its kind."""

    async def coroutine(*args: Any) -> Any:
        return act(*args)

    async def generator(*args: Any) -> AsyncIterator[Any]:
        yield act(*args)
        yield "last"

    async def collect() -> list[Any]:
        return [item async for item in hook.fn(generator, *arguments)]

    if inspect.isasyncgenfunction(hook.fn):
        *items, last = asyncio.run(collect())
        assert last == "last"
        return items
    if inspect.iscoroutinefunction(hook.fn):
        return [asyncio.run(hook.fn(coroutine, *arguments))]
    return [hook.fn(act, *arguments)]


@ALL
def test_off_means_off(hook: Hook) -> None:
    """The original gets the same objects, once, and its result comes back as it is."""
    for arguments in off_arguments(hook):
        seen: list[tuple[Any, ...]] = []
        answer = SimpleNamespace()

        def act(*args: Any, **named: Any) -> Any:
            seen.append((*args, *named.values()))  # noqa: B023
            return answer  # noqa: B023

        (found,) = call(hook, act, arguments)
        assert found is answer
        assert len(seen) == 1
        assert len(seen[0]) == len(arguments)
        assert all(a is b for a, b in zip(seen[0], arguments, strict=True))


@ALL
def test_errors_of_others_pass_through(hook: Hook) -> None:
    """Only our own error types may turn into one line and exit status 2."""

    def act(*args: Any, **named: Any) -> Any:
        raise ValueError("theirs")

    for arguments in off_arguments(hook):
        with pytest.raises(ValueError, match=r"^theirs$"):
            call(hook, act, arguments)
