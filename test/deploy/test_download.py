"""Downloads from a mirror on this machine that breaks connections and files."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from helpers.http_stub import StubHandler, StubServer
from sglang_dllm import download as module
from sglang_dllm.__main__ import main
from sglang_dllm.download import DownloadError, download

WEIGHTS = bytes(range(256)) * 1200
FILES = {
    "config.json": b'{"model_type": "llada"}',
    "modeling_llada.py": b"raise SystemExit('remote code')",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"a pickle",
}
WANTED = {"config.json", "model.safetensors"}
COMMIT = "0123456789012345678901234567890123456789"


class Mirror(StubServer):
    """A hub with one repository ``a/b``, and a plain folder ``/plain``.

    Attributes:
        cuts: answers with weights that still end in the middle.
        spoils: answers with weights that still have a wrong byte.
        ranges: the Range header of each GET of the weights; "" for none.
    """

    def __init__(self) -> None:
        super().__init__(Answer)
        self.cuts = self.spoils = 0
        self.ranges: list[str] = []
        self.sums = "".join(
            f"{hashlib.sha256(data).hexdigest()}  {name}\n"
            for name, data in FILES.items()
        )


class Answer(StubHandler):
    server: Mirror

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        name = path.rsplit("/", 1)[1]
        if path.startswith(f"/api/models/a/b/tree/{COMMIT}"):
            self.reply(200, self._tree())
        elif path.startswith("/api/models/a/b"):
            self.reply(200, self._info())
        elif path == "/plain/SHA256SUMS":
            self.reply(200, self.server.sums.encode())
        elif name in FILES and ("/a/b/resolve/" in path or "/plain/" in path):
            self._send_file(name)
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def _info(self) -> dict[str, object]:
        siblings = []
        for name, data in FILES.items():
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            one: dict[str, object] = {"rfilename": name, "size": len(data)}
            one["blobId"] = blob
            if name == "model.safetensors":
                digest = hashlib.sha256(data).hexdigest()
                one["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
            siblings.append(one)
        return {"id": "a/b", "sha": COMMIT, "siblings": siblings}

    def _tree(self) -> list[dict[str, object]]:
        found = []
        for one in self._info()["siblings"]:  # type: ignore[attr-defined]
            entry = {"type": "file", "path": one["rfilename"], "size": one["size"]}
            entry["oid"] = one["blobId"]
            if "lfs" in one:
                entry["lfs"] = {**one["lfs"], "oid": one["lfs"]["sha256"]}
            found.append(entry)
        return found

    def _send_file(self, name: str) -> None:
        data = FILES[name]
        start = 0
        asked = self.headers.get("Range", "")
        if asked and self.command == "GET":
            start = int(asked.removeprefix("bytes=").split("-")[0])
        sent = data[start:]
        if name == "model.safetensors" and self.command == "GET":
            self.server.ranges.append(asked)
            if self.server.spoils:
                self.server.spoils -= 1
                sent = b"X" + sent[1:]
            if self.server.cuts:
                self.server.cuts -= 1
                self._head(len(sent), start, len(data), name)
                self.wfile.write(sent[: len(sent) // 2])
                self.close_connection = True
                return
        self._head(len(sent), start, len(data), name)
        if self.command == "GET":
            self.wfile.write(sent)

    def _head(self, length: int, start: int, whole: int, name: str) -> None:
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(length))
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(FILES[name]).hexdigest()}"')
        self.end_headers()


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    # Less than a chunk is lost when a connection ends.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 512)
    with Mirror() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.base_url)
        yield server


@pytest.fixture(params=["hub", "plain"])
def source(request: pytest.FixtureRequest, mirror: Mirror) -> str:
    return "a/b" if request.param == "hub" else f"{mirror.base_url}/plain"


def names_in(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


def test_a_connection_that_is_cut_continues_where_it_ended(
    source: str, mirror: Mirror, tmp_path: Path
) -> None:
    mirror.cuts = 2
    download(source, tmp_path, "main", io.StringIO())
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS
    assert names_in(tmp_path) == WANTED
    half = len(WEIGHTS) // 2
    starts = [int((asked or "bytes=0-")[6:].split("-")[0]) for asked in mirror.ranges]
    assert starts == [0, half, half + half // 2]


def test_a_spoiled_file_is_fetched_again(
    source: str, mirror: Mirror, tmp_path: Path
) -> None:
    mirror.spoils = 1
    out = io.StringIO()
    download(source, tmp_path, "main", out)
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS
    assert "model.safetensors: the hash is wrong" in out.getvalue()


def test_a_file_that_is_always_wrong_does_not_stay(
    source: str, mirror: Mirror, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror.spoils = 100
    assert main(["download-model", source, str(tmp_path)]) == 1
    assert "wrong content, twice: model.safetensors" in capsys.readouterr().err
    assert names_in(tmp_path) == WANTED - {"model.safetensors"}


def test_a_whole_folder_is_only_checked(
    source: str, mirror: Mirror, tmp_path: Path
) -> None:
    download(source, tmp_path, "main", io.StringIO())
    mirror.ranges.clear()
    download(source, tmp_path, "main", io.StringIO())
    assert mirror.ranges == []
    (tmp_path / "model.safetensors").write_bytes(b"X" + WEIGHTS[1:])
    download(source, tmp_path, "main", io.StringIO())
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_later_command_continues_an_earlier_one(
    mirror: Mirror, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors.incomplete").write_bytes(WEIGHTS[:1000])
    download(f"{mirror.base_url}/plain", tmp_path, "main", io.StringIO())
    assert mirror.ranges == ["bytes=1000-"]
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a/../../up"])
def test_no_file_leaves_the_folder(mirror: Mirror, tmp_path: Path, name: str) -> None:
    mirror.sums = f"{'0' * 64}  {name}\n"
    with pytest.raises(DownloadError, match="no line of sha256sum"):
        download(f"{mirror.base_url}/plain", tmp_path / "in", "main", io.StringIO())


@pytest.mark.parametrize("wrong", ["nobody/nothing", "URL/nothing"])
def test_a_source_that_is_not_there_is_one_line(
    mirror: Mirror, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    source = wrong.replace("URL", mirror.base_url)
    assert main(["download-model", source, str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sglang-dllm: error: ") and "nothing" in line
