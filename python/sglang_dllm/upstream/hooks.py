"""The hook value and its life: check all, register all, verify all.

SGLang's plugin loader swallows every error (import, run, apply), so nothing here
relies on an exception at load: ``HookSet.verify`` is asked again where
``--dllm-algorithm`` is resolved, and that is where a launch ends.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from sglang_dllm import SUPPORTED_SGLANG
from sglang_dllm.errors import UpstreamContractError


@dataclass(frozen=True)
class Hook:
    """One change of one upstream function.

    Attributes:
        target: dotted name of the function or method, in the class that defines it.
        fn: ``fn(original, *args, **kwargs)``; its first lines hand every call that
            is not about a full-attention dLLM to ``original`` unchanged.
        why: what upstream does there and why that does not serve us.
        contract: the parameter names upstream must still have, in order.
        remove_when: what would let us delete the hook.
        kind: the plugin framework's hook type.
    """

    target: str
    fn: Callable[..., Any]
    why: str
    contract: tuple[str, ...]
    remove_when: str
    kind: str = "around"


def _resolve(target: str) -> Any:
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        raise UpstreamContractError(
            f"SGLang has no {target} ({error}); "
            f"sglang-dllm is written for SGLang {SUPPORTED_SGLANG}"
        ) from None


def check_contract(hook: Hook) -> Any:
    """The object the hook's target resolves to.

    Raises:
        UpstreamContractError: it is missing or its parameters changed.
    """
    original = _resolve(hook.target)
    found = tuple(inspect.signature(original).parameters)
    if found != hook.contract:
        raise UpstreamContractError(
            f"SGLang's {hook.target} takes ({', '.join(found)}), expected "
            f"({', '.join(hook.contract)}); "
            f"sglang-dllm is written for SGLang {SUPPORTED_SGLANG}"
        )
    return original


@dataclass
class HookSet:
    """All hooks of the package and what became of them in this process."""

    hooks: tuple[Hook, ...]
    gate: Hook
    originals: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None

    def install(self) -> None:
        """Check every contract, then register every hook.

        After a failed check only the gate is registered, so that starting one of
        our models ends with the reason and everything else runs untouched.
        """
        from importlib.metadata import version

        found = version("sglang")
        try:
            if found != SUPPORTED_SGLANG:
                raise UpstreamContractError(
                    f"found SGLang {found}, sglang-dllm supports {SUPPORTED_SGLANG}"
                )
            self.originals = {h.target: check_contract(h) for h in self.hooks}
        except UpstreamContractError as error:
            self.problem = str(error)
            _register([self.gate])
            return
        _register(self.hooks)

    def verify(self) -> None:
        """Raise unless every hook is in place in this process.

        Raises:
            UpstreamContractError: naming the first hook that is not.
        """
        if self.problem is not None:
            raise UpstreamContractError(self.problem)
        for hook in self.hooks:
            original = self.originals.get(hook.target)
            if original is None or not _wraps(_resolve(hook.target), original):
                raise UpstreamContractError(
                    f"the sglang-dllm hook on {hook.target} is not applied; "
                    "the log above says why SGLang skipped it"
                )


def _wraps(found: Any, original: Any) -> bool:
    while found is not original:
        found = getattr(found, "__wrapped__", None)
        if found is None:
            return False
        if found is original:
            return True
    return False


def _register(hooks: Iterable[Hook]) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in hooks:
        HookRegistry.register(hook.target, hook.fn, HookType(hook.kind))
