"""The CPU image without a container: its steps are executed, its command is served."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import requests

from benchmark.server import free_port
from helpers.dockerfile import Build, Stage, without_powers_of_root

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """The built image; all but /tmp of it is read-only."""
    build = Build(
        ROOT / "deploy" / "cpu.Dockerfile",
        ROOT,
        tmp_path_factory.mktemp("image"),
        {"SGLANG_VERSION": version("sglang")},
    )
    found = build.image
    kept = [path for path in found.root.rglob("*") if not path.is_symlink()]
    change_modes([found.root, *kept], found.root / "tmp", lambda mode: mode & ~0o222)
    yield found
    change_modes([found.root, *kept], None, lambda mode: mode | stat.S_IWUSR)


def change_modes(paths: list[Path], but: Path | None, change: object) -> None:
    for path in paths:
        if path != but:
            path.chmod(change(stat.S_IMODE(path.stat().st_mode)))  # type: ignore[operator]


def state_of(image: Stage) -> dict[str, int]:
    """Each file outside of /tmp with the time of its last change."""
    return {
        str(path): path.lstat().st_mtime_ns
        for path in image.root.rglob("*")
        if path.relative_to(image.root).parts[0] != "tmp"
    }


def test_the_command_of_the_image_serves_the_demo(image: Stage, tmp_path: Path) -> None:
    assert image.user.split(":")[0].isdigit() and image.user.split(":")[0] != "0"
    env = {**image.environment(), "OMP_NUM_THREADS": "1"}
    run = without_powers_of_root([])

    site = image.root / "site"
    code = (
        "import sglang_dllm as s; print(s.__file__, flush=True); open(s.__file__, 'a')"
    )
    tried = subprocess.run(
        [*run, sys.executable, "-c", code], env=env, capture_output=True, text=True
    )
    assert tried.stdout.strip() == str(site / "sglang_dllm" / "__init__.py")
    assert "PermissionError" in tried.stderr

    before = state_of(image)
    port = free_port()
    command = [image.moved(word) for word in (*image.entrypoint, *image.cmd)]
    command[command.index("--port") + 1] = str(port)
    url = f"http://127.0.0.1:{port}"
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*run, str(image.root / ".tools" / command[0]), *command[1:]],
            cwd=image.at(""),
            env=env,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until_healthy(process, url, log)
            answer = requests.post(
                f"{url}/v1/chat/completions",
                json={
                    "model": "demo",
                    "max_tokens": 64,
                    "messages": [{"role": "user", "content": QUESTION}],
                },
                timeout=120,
            )
            assert answer.status_code == 200, answer.text
            assert "38" in answer.json()["choices"][0]["message"]["content"]
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, log.read_text(errors="replace")[-2000:]
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    assert state_of(image) == before
    assert "Traceback" not in log.read_text(errors="replace")


QUESTION = "Tom has 23 apples. He buys 15 more. How many apples does Tom have?"


def wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 450
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        try:
            if requests.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except requests.RequestException:
            pass
        time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    raise AssertionError(log.read_text(errors="replace")[-3000:])
