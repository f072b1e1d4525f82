"""Why a server ends: one line, from the process that fails to the launching one.

SGLang tells its launching process by a signal that some child has failed, and the
reason stays in the middle of the log. A child of ours leaves the reason in a file,
which the launching process reads when it ends.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from sglang_dllm.errors import ConfigError, UpstreamContractError

logger = logging.getLogger(__name__)

VARIABLE = "SGLANG_DLLM_END_NOTE"
"""Environment variable with the note's file; only the processes of a server have it."""

_MAX_CHARS = 600

_MEMORY_FLAG = "--mem-fraction-static"
"""SGLang's errors about a KV pool without room name this flag."""


@dataclass(frozen=True)
class End:
    """The end of a server.

    Attributes:
        status: the exit status of the launching process.
        reason: one line for the terminal; empty for an end that was asked for.
    """

    status: int
    reason: str = ""

    def tell(self) -> None:
        """Print the line if there is room: a full disk must not stop the end."""
        if self.reason:
            with contextlib.suppress(OSError):
                print(f"sglang-dllm: error: {self.reason}", file=sys.stderr, flush=True)


WRONG_INPUT = 2
"""Exit status of a wrong flag or a wrong checkpoint."""
FAILURE = 1
"""Exit status of a server whose process failed or was killed."""
INTERRUPTED = 130
"""Exit status of a launch that Ctrl-C ended, as shells have it."""


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, cut after 600 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MAX_CHARS else text[:_MAX_CHARS] + " ..."


class EndNote:
    """The file with the end of a server. The first process that fails writes it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def create(cls) -> EndNote:
        """A note for the processes that this process starts from now on."""
        folder = Path(tempfile.mkdtemp(prefix="sglang-dllm-"))
        os.environ[VARIABLE] = str(folder / "end")
        return cls(folder / "end")

    @classmethod
    def of_this_server(cls) -> EndNote | None:
        """The note of the server of this process; None in any other process."""
        path = os.environ.get(VARIABLE)
        return None if path is None else cls(Path(path))

    def write(self, end: End) -> None:
        """Keep an end, unless there is one: later failures follow from the first."""
        # A link appears at once and only if there is none; a reader never meets half
        # a file.
        draft = self._path.with_name(f"draft-{os.getpid()}")
        with contextlib.suppress(OSError):
            draft.write_text(json.dumps(asdict(end)), encoding="utf-8")
            try:
                os.link(draft, self._path)
            finally:
                draft.unlink()

    def read(self) -> End | None:
        """The end, None as long as nobody has written one."""
        try:
            return End(**json.loads(self._path.read_text(encoding="utf-8")))
        except OSError:
            return None

    def remove(self) -> None:
        """Remove the file. Processes that start from now on leave no note."""
        os.environ.pop(VARIABLE, None)
        shutil.rmtree(self._path.parent, ignore_errors=True)


@contextmanager
def reported(process: str) -> Iterator[None]:
    """Leave a note about an error of this process, if it belongs to a server of ours.

    Args:
        process: its name in the line.

    Raises:
        SystemExit: for an error of ours, and for a KV pool that does not fit. SGLang
            would log a traceback of any other class. ``--log-level debug`` shows it.
    """
    note = EndNote.of_this_server()
    if note is None:
        yield
        return
    try:
        yield
    except Exception as error:
        is_ours = isinstance(error, ConfigError | UpstreamContractError)
        if is_ours or _MEMORY_FLAG in str(error):
            logger.debug("%s ends", process, exc_info=True)
            note.write(End(WRONG_INPUT, one_line(error)))
            raise SystemExit(WRONG_INPUT) from None
        kind = type(error).__name__
        reason = f"{process} (pid {os.getpid()}) failed: {kind}: {one_line(error)}"
        note.write(End(FAILURE, reason))
        raise


@contextmanager
def bad_input(subject: str, *kinds: type[Exception]) -> Iterator[None]:
    """Take errors of other libraries as errors of what the user gave.

    Args:
        subject: the first words of the line; empty where the library's say it all.
        kinds: classes of such errors.

    Raises:
        ConfigError: one line with the subject and the library's message.
    """
    try:
        yield
    except (ConfigError, UpstreamContractError):
        raise
    except kinds as error:
        message = one_line(error)
        raise ConfigError(f"{subject}: {message}" if subject else message) from error
