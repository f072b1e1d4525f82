"""A folder that this user can write to, where the home may be none.

Containers run with a home that does not exist, or as a user without one.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def home_cache() -> Path | None:
    """The user's cache folder, made if it is not there; None if it is not writable."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(base).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no permission; a user without a home
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


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


def choose_compiler_folder() -> None:
    """Give FlashInfer another folder where there is no home.

    It makes its folder when it is imported, and an error there ends the launch of any
    model. SGLang 0.5.23 chooses the folder before it loads a plugin.
    """
    if "FLASHINFER_WORKSPACE_BASE" not in os.environ and not _has_home():
        os.environ["FLASHINFER_WORKSPACE_BASE"] = str(temporary_folder())


def _has_home() -> bool:
    try:
        cache = Path.home() / ".cache"
        cache.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return False
    return os.access(cache, os.W_OK | os.X_OK)
