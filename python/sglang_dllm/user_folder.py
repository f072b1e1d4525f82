"""A folder that this user can write to, where the home may be none.

Containers run with a home that does not exist, or as a user without one.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

_CACHE = "~/.cache"

_FOLDERS = (
    "SGLANG_CACHE_DIR",
    "FLASHINFER_WORKSPACE_BASE",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "TILELANG_CACHE_DIR",
    "CUDA_CACHE_PATH",
)
"""The variables that name folders of compilers."""


def home_cache() -> Path | None:
    """The user's cache folder, made if it is not there; None if it is not writable."""
    return _writable(os.environ.get("XDG_CACHE_HOME") or _CACHE)


def temporary_folder() -> Path:
    """A folder for temporary files that belongs to this user alone.

    The next launch finds it again. A folder of this name that others can write to is
    never used: they could plant files.
    """
    folder = Path(tempfile.gettempdir()) / f"sglang-dllm-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if is_ours and not found.st_mode & 0o077:
        return folder
    return Path(tempfile.mkdtemp(prefix="sglang-dllm-"))


def choose_compiler_folders() -> None:
    """``torch.backends``: give compilers other folders where there is no home.

    They make their folders when they are imported, and an error there ends the launch
    of any model. torch calls this at the end of its import, before any of them. No
    plugin of SGLang comes early enough: SGLang 0.5.23 names folders below the home in
    its first lines, and imports a compiler in the next. Folders elsewhere stay.
    """
    if _writable(_CACHE) is not None:
        return
    try:
        folder = temporary_folder()
    except OSError:
        return
    cache = Path(os.path.expanduser(_CACHE))
    for name in _FOLDERS:
        given = Path(os.environ.get(name) or cache / "sglang")
        if given.is_relative_to(cache):
            os.environ[name] = str(folder / given.relative_to(cache))


def _writable(base: str) -> Path | None:
    """A folder, made if it is not there; None if this user cannot write to it."""
    try:
        folder = Path(base).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no permission; a user without a home
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None
