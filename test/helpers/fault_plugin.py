"""A plugin for SGLang that makes a server fail when a test asks for it.

A server that finds it on its ``PYTHONPATH`` loads it into each of its processes, as any
plugin. A file in the folder of ``SGLANG_DLLM_FAULTS`` asks for a fault.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = "SGLANG_DLLM_FAULTS"
READ_FORMS = "sglang_dllm.serving.forms.read_forms"
MODEL_FORWARD = "sglang.srt.model_executor.model_runner.ModelRunner.forward"


@dataclass(frozen=True)
class Faults:
    """The faults of the servers that are started with ``env``."""

    folder: Path

    @classmethod
    def new(cls, folder: Path) -> Faults:
        """A folder with the metadata by which SGLang finds the plugin."""
        info = folder / "soak_faults-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: soak-faults\nVersion: 1.0\n"
        )
        (info / "entry_points.txt").write_text(
            f"[sglang.srt.plugins]\nsoak_faults = {__name__}:register\n"
        )
        return cls(folder)

    @property
    def env(self) -> dict[str, str]:
        test = Path(__file__).parents[1]
        return {
            FOLDER: str(self.folder),
            "PYTHONPATH": os.pathsep.join([str(self.folder), str(test)]),
        }

    def out_of_memory(self) -> None:
        """The next forward finds no memory."""
        (self.folder / "memory").touch()

    @property
    def is_memory_due(self) -> bool:
        """True until a forward has met the fault."""
        return (self.folder / "memory").exists()

    @contextlib.contextmanager
    def unread_forms(self) -> Iterator[Callable[[], None]]:
        """No form is read during the block: requests with one stay at the door.

        Yields:
            A function that waits until a request is there.
        """
        (self.folder / "forms").touch()
        there = self.folder / "there"

        def wait() -> None:
            deadline = time.monotonic() + 30
            while not there.exists():
                assert time.monotonic() < deadline, "no form is read"
                time.sleep(0.01)

        try:
            yield wait
        finally:
            there.unlink(missing_ok=True)
            (self.folder / "forms").unlink()

    def shift_clocks(self, seconds: float) -> None:
        """``time.time`` of all processes differs by so many seconds from now on."""
        draft = self.folder / "draft"
        draft.write_text(str(seconds))
        draft.rename(self.folder / "clock")


def register() -> None:
    """The plugin's entry point."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(MODEL_FORWARD, _forward_of(folder), HookType.AROUND)
    HookRegistry.register(READ_FORMS, _reading_of(folder), HookType.AROUND)
    true_time, clock = time.time, os.path.join(folder, "clock")

    def shifted() -> float:
        with contextlib.suppress(OSError, ValueError), open(clock) as file:
            return true_time() + float(file.read())
        return true_time()

    time.time = shifted


def _forward_of(folder: str) -> Callable[..., Any]:
    asked = os.path.join(folder, "memory")

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(asked)
            import torch

            raise torch.OutOfMemoryError("CUDA out of memory. A test asked for this.")
        return original(*args, **kwargs)

    return forward


def _reading_of(folder: str) -> Callable[..., Awaitable[None]]:
    asked, there = Path(folder, "forms"), Path(folder, "there")

    async def read(
        original: Callable[..., Awaitable[None]], forms: Any, *args: Any, **more: Any
    ) -> None:
        while forms and asked.exists():
            there.touch()
            await asyncio.sleep(0.01)
        await original(forms, *args, **more)

    return read
