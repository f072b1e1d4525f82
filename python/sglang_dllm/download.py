"""``python -m sglang_dllm download-model``: a checkpoint's files, each with its hash.

A hub or a mirror of it is asked through huggingface_hub, which resumes files but trusts
what it has received. A plain folder over HTTP needs a file ``SHA256SUMS``, as
``sha256sum`` writes it.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TextIO

_HUB = "https://huggingface.co"
_SUMS = "SHA256SUMS"
_UNWANTED = ("*.py", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.tflite", ".git*")
"""Remote code is never loaded, and the rest is of other engines."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
"""Left out where there are safetensors."""
_CHUNK = 2**20
_TRIES = 5
"""Connections in a row that brought no byte, before the download ends."""


class DownloadError(Exception):
    """A checkpoint could not be fetched. The message is one line for a person."""


@dataclass(frozen=True)
class RemoteFile:
    """A file and how its content is checked.

    Attributes:
        name: path in the checkpoint's folder, with ``/``.
        digest: in hexadecimal digits; None where the source tells none.
        is_git: whether it is git's SHA-1 of a blob. Otherwise it is a SHA-256.
    """

    name: str
    digest: str | None
    is_git: bool = False

    def is_whole_in(self, folder: Path) -> bool:
        """True if the folder has the file with the right content."""
        path = folder / self.name
        if not path.is_file():
            return False
        if self.digest is None:
            return True
        found = hashlib.sha1() if self.is_git else hashlib.sha256()
        if self.is_git:
            found.update(b"blob %d\0" % path.stat().st_size)
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                found.update(chunk)
        return found.hexdigest() == self.digest


def download(source: str, folder: Path, revision: str, out: TextIO) -> None:
    """Bring a checkpoint into a folder. A second call continues a broken one.

    Args:
        source: a repository of the hub (``HF_ENDPOINT`` names a mirror), or the address
            of a folder that has ``SHA256SUMS``.
        folder: is made if it is not there. Files that are whole are kept.
        revision: branch, tag or commit of a repository.
        out: gets one line for each file.

    Raises:
        DownloadError: the source cannot be read, or a file is wrong twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files, fetch = (
        _of_address(source, folder)
        if "://" in source
        else _of_hub(source, folder, revision)
    )
    wanted = _wanted(files)
    for is_last in (False, True):
        missing = [file for file in wanted if not file.is_whole_in(folder)]
        if missing:
            fetch([file.name for file in missing])
        wrong = [file for file in missing if not file.is_whole_in(folder)]
        if not wrong:
            break
        for file in wrong:
            # A file that stays would be taken for a whole one by whoever looks next.
            (folder / file.name).unlink(missing_ok=True)
            print(f"{file.name}: the hash is wrong", file=out)
        if is_last:
            names = ", ".join(file.name for file in wrong)
            raise DownloadError(f"{source}: wrong content, twice: {names}")
    for file in wanted:
        print(f"{file.name}: {'whole' if file.digest else 'no hash known'}", file=out)


def _wanted(files: list[RemoteFile]) -> list[RemoteFile]:
    has_safetensors = any(file.name.endswith(".safetensors") for file in files)
    unwanted = _UNWANTED + (_PICKLES if has_safetensors else ())
    return [
        file
        for file in files
        if not any(fnmatch(PurePosixPath(file.name).name, kind) for kind in unwanted)
    ]


def _of_address(
    source: str, folder: Path
) -> tuple[list[RemoteFile], Callable[[list[str]], None]]:
    """The files of a folder over HTTP, and how they are fetched."""
    base = source.rstrip("/") + "/"

    def fetch(names: list[str]) -> None:
        for name in names:
            _fetch(base + urllib.parse.quote(name), folder / name)

    return _listed(base), fetch


def _of_hub(
    repository: str, folder: Path, revision: str
) -> tuple[list[RemoteFile], Callable[[list[str]], None]]:
    """The files of a repository at one commit, and how they are fetched."""
    from huggingface_hub import HfApi, snapshot_download

    endpoint = os.environ.get("HF_ENDPOINT") or _HUB
    try:
        info = HfApi(endpoint=endpoint).model_info(
            repository, revision=revision, files_metadata=True
        )
    except Exception as error:  # each version of the library has other classes
        raise DownloadError(
            f"{repository} at {endpoint}: {_first_line(error)}"
        ) from error
    files = [
        RemoteFile(one.rfilename, one.lfs.sha256)
        if one.lfs
        else RemoteFile(one.rfilename, one.blob_id, is_git=True)
        for one in info.siblings or ()
    ]

    def fetch(names: list[str]) -> None:
        try:
            snapshot_download(
                repository,
                # The branch may move on between the list and the files.
                revision=info.sha,
                local_dir=folder,
                allow_patterns=names,
                endpoint=endpoint,
            )
        except Exception as error:
            raise DownloadError(
                f"{repository} at {endpoint}: {_first_line(error)}; the same command "
                "continues"
            ) from error

    return files, fetch


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _listed(base: str) -> list[RemoteFile]:
    try:
        with urllib.request.urlopen(base + _SUMS, timeout=30) as answer:
            lines = answer.read().decode().splitlines()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DownloadError(f"{base}{_SUMS}: {_first_line(error)}") from error
    files = []
    for line in filter(None, lines):
        digest, _, name = line.partition(" ")
        name = name.lstrip(" *").removeprefix("./")
        path = PurePosixPath(name)
        if len(digest) != 64 or not name or path.is_absolute() or ".." in path.parts:
            raise DownloadError(
                f"{base}{_SUMS}: {line[:100]!r} is no line of sha256sum with a file "
                "below the folder"
            )
        files.append(RemoteFile(name, digest.lower()))
    return files


def _fetch(url: str, path: Path) -> None:
    """Fetch a file, from where a broken connection ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".incomplete")
    idle = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _continue(url, part, before):
                part.replace(path)
                return
            reason = "the connection was cut"
        except (OSError, http.client.HTTPException) as error:
            status = getattr(error, "code", None)
            reason = _first_line(error)
            if status == 416:
                # The part is the whole file, or longer; the hash will say it.
                part.replace(path)
                return
            if status is not None and status < 500 and status != 429:
                raise DownloadError(f"{url}: {reason}") from error
        gained = part.exists() and part.stat().st_size > before
        idle = 0 if gained else idle + 1
        if idle == _TRIES:
            raise DownloadError(f"{url}: {reason}; the same command continues")
        time.sleep(idle)


def _continue(url: str, part: Path, before: int) -> bool:
    """Append what is missing. True if all the bytes that were promised have come."""
    headers = {"Range": f"bytes={before}-"} if before else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        # A server that knows no ranges begins anew.
        with part.open("ab" if answer.status == 206 else "wb") as stream:
            num = 0
            while chunk := answer.read(_CHUNK):
                num += stream.write(chunk)
        promised = answer.headers.get("Content-Length")
        return promised is None or num >= int(promised)
