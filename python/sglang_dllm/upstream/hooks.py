"""Hooks on SGLang: the contract is checked, the hooks registered, then verified.

SGLang's plugin loader logs every error and goes on, whether a plugin fails at import,
when it runs or when its hooks are applied. An exception at load would therefore go
unnoticed. ``HookSet.verify`` runs again where SGLang resolves ``--dllm-algorithm``, and
a launch with a broken contract ends there.
"""

from __future__ import annotations

import inspect
import logging
import multiprocessing
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang_dllm.errors import UpstreamContractError
from sglang_dllm.upstream import versions
from sglang_dllm.upstream.contract import Contract

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hook:
    """One change of one upstream function.

    Attributes:
        target: dotted name of the function or method, in the class that defines it.
        fn: ``fn(original, *args, **kwargs)``. Its first lines pass every call that is
            not about a full-attention model to ``original``, unchanged.
        why: the behavior of SGLang that the hook changes, and the reason.
        contract: names of the target's parameters, in order. None: the hook hands all
            of them on, whatever they are.
        remove_when: the change in SGLang that makes the hook unnecessary.
        kind: the hook type of SGLang's plugin framework.
        unless: dotted name of the function of SGLang that makes the hook unnecessary.
            A version that has it gets no hook. None: every version needs the hook.
        replaced_by: by tested version without the hook, the text of the ledger about
            what does its work there.
        always: register the hook even where the contract is broken: it decides which
            launch ends, or how the reason is told.
    """

    target: str
    fn: Callable[..., Any]
    why: str
    contract: tuple[str, ...] | None
    remove_when: str
    kind: str = "around"
    unless: str | None = None
    replaced_by: Mapping[str, str] = field(default_factory=dict)
    always: bool = False

    @property
    def is_needed(self) -> bool:
        """True if the installed SGLang needs the hook."""
        return self.unless is None or not _exists(self.unless)


def _exists(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def _resolve(target: str) -> Any:
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        raise UpstreamContractError(f"SGLang has no {target} ({error})") from None


def check_contract(hook: Hook) -> Any:
    """The object that the hook's target names.

    Raises:
        UpstreamContractError: it is missing or its parameters changed.
    """
    original = _resolve(hook.target)
    found = tuple(inspect.signature(original).parameters)
    if hook.contract is not None and found != hook.contract:
        raise UpstreamContractError(
            f"SGLang's {hook.target} takes ({', '.join(found)}), expected "
            f"({', '.join(hook.contract)})"
        )
    return original


@dataclass
class HookSet:
    """All hooks of the package, and their state in this process.

    Attributes:
        originals: the targets before the hooks were applied.
        problem: the broken part of the contract, None where all holds.
        is_verified: ``verify`` has found nothing broken.
    """

    hooks: tuple[Hook, ...]
    originals: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    is_verified: bool = False

    def install(self) -> None:
        """Check the contract as far as no source is read, then register every hook.

        After a failed check only the hooks that are ``always`` there are registered.
        The launch of one of our models then ends with the reason, and every other
        model runs unchanged.
        """
        try:
            _require(Contract.load().first_broken(reads_source=False))
            needed = [hook for hook in self.hooks if hook.is_needed]
            self.originals = {hook.target: check_contract(hook) for hook in needed}
        except UpstreamContractError as error:
            self._break(error)
            needed = [hook for hook in self.hooks if hook.always and _holds(hook)]
        _register(needed)

    def verify(self) -> None:
        """Raise unless the contract holds and every hook is in place in this process.

        A version of SGLang that is not tested is logged, once a launch.

        Raises:
            UpstreamContractError: one line that names the first broken symbol.
        """
        if self.problem is not None:
            raise UpstreamContractError(self.problem)
        self._require_applied()
        if self.is_verified:
            return
        try:
            _require(Contract.load().first_broken())
        except UpstreamContractError as error:
            self._break(error)
            raise UpstreamContractError(self.problem) from None
        self.is_verified = True
        found = versions.installed()
        if versions.standing(found) != "tested" and _is_launching_process():
            logger.warning(
                "SGLang %s; it has all that sglang-dllm uses of it",
                versions.describe(found),
            )

    def use(self, register: Callable[[], None]) -> None:
        """Put something of ours at an extension point of SGLang.

        SGLang's plugin loader would log the refusal and go on without it.
        """
        try:
            register()
        except ValueError as error:
            self._break(
                UpstreamContractError(f"SGLang refuses a step of ours: {error}")
            )

    def _break(self, error: UpstreamContractError) -> None:
        oldest, newest = versions.OLDEST, versions.NEWEST
        self.problem = (
            f"{error}; SGLang {versions.installed()} is installed, and sglang-dllm is "
            f"tested with {oldest} and {newest}"
        )

    def _require_applied(self) -> None:
        for hook in self.hooks:
            original = self.originals.get(hook.target)
            if original is None and self.originals and not hook.is_needed:
                continue
            if original is None or not _wraps(_resolve(hook.target), original):
                raise UpstreamContractError(
                    f"the sglang-dllm hook on {hook.target} is not applied; "
                    "the log above says why SGLang skipped it"
                )


def _require(problem: str | None) -> None:
    if problem is not None:
        raise UpstreamContractError(problem)


def _holds(hook: Hook) -> bool:
    try:
        check_contract(hook)
    except UpstreamContractError:
        return False
    return hook.is_needed


def _is_launching_process() -> bool:
    return multiprocessing.parent_process() is None


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
