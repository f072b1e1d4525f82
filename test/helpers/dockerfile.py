"""Executes the steps of a Dockerfile in a plain folder, without a container.

Absolute paths of the image become paths below the folder. Base images are not pulled:
the present Python environment stands for what they and `pip install` from a registry
would bring. All other steps run as they are written.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmark.server import SGLANG

PIP = Path(__file__).parent / "image_pip.py"
OF_BASE = ("lscpu",)
"""Programs of the base images that a server runs. Debian's essential packages have
them. A compiler is not among them."""
_PATH = re.compile(r"(?<![\w$}/.:-])/(?=[a-z])")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """The instructions of a Dockerfile with their arguments, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            yield name.upper(), rest.strip()


@dataclass
class Stage:
    """One stage: a folder that stands for its file system, and what it sets."""

    root: Path
    base: str
    workdir: str = "/"
    user: str = "root"
    env: dict[str, str] = field(default_factory=dict)
    entrypoint: list[str] = field(default_factory=list)
    cmd: list[str] = field(default_factory=list)

    def at(self, path: str) -> Path:
        """The place of a path of the image."""
        return self.root / os.path.join(self.workdir, path).lstrip("/")

    def moved(self, text: str) -> str:
        """A text with its absolute paths below the folder."""
        return _PATH.sub(f"{self.root}/", text)

    def environment(self) -> dict[str, str]:
        """The variables of a process of the image, and none of the machine's own."""
        env = {name: self.moved(value) for name, value in self.env.items()}
        return {
            "PATH": f"{self.root}/.tools:{Path(sys.executable).parent}",
            "PYTHONPATH": str(self.root / "site"),
            "TMPDIR": str(self.root / "tmp"),
            **env,
        }


class Build:
    """`docker build` of one Dockerfile.

    Attributes:
        stages: all of them; the last is the image.
    """

    def __init__(
        self, dockerfile: Path, context: Path, folder: Path, args: Mapping[str, str]
    ) -> None:
        self._context = context
        self._folder = folder
        self._args = dict(args)
        self._names: dict[str, Stage] = {}
        self.stages: list[Stage] = []
        values: dict[str, str] = {}
        for name, rest in instructions(dockerfile.read_text(encoding="utf-8")):
            if name == "ARG":
                key, _, default = rest.partition("=")
                values[key] = self._args.get(key, default)
                continue
            if name != "RUN":  # the shell does it
                rest = _VARIABLE.sub(lambda m: values.get(m[1] or m[2], m[0]), rest)
            step = getattr(self, f"_do_{name.lower()}")
            step(rest, values) if name == "RUN" else step(rest)

    @property
    def image(self) -> Stage:
        return self.stages[-1]

    def _do_from(self, rest: str) -> None:
        base, *alias = rest.split()
        root = self._folder / str(len(self.stages))
        for name in ("opt", "tmp", "site", ".tools"):
            (root / name).mkdir(parents=True)
        for name, call in (
            ("pip", f'"{PIP}" "{root}"'),
            # An environment may have moved, and its scripts then name another Python.
            ("sglang", f'-c "{SGLANG}"'),
        ):
            tool = root / ".tools" / name
            tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" {call} "$@"\n')
            tool.chmod(0o755)
        for name in OF_BASE:
            found = shutil.which(name)
            assert found, f"this machine has no {name}"
            (root / ".tools" / name).symlink_to(found)
        stage = Stage(root, base)
        self.stages.append(stage)
        if alias:
            self._names[alias[1]] = stage

    def _do_workdir(self, rest: str) -> None:
        self.image.workdir = os.path.join(self.image.workdir, rest)
        self.image.at("").mkdir(parents=True, exist_ok=True)

    def _do_copy(self, rest: str) -> None:
        *sources, target = rest.split()
        other = None
        if sources[0].startswith("--from="):
            other = self._names[sources.pop(0).removeprefix("--from=")]
        place = self.image.at(target)
        for source in sources:
            path = other.at(source) if other else self._in_context(source)
            if path.is_dir():
                shutil.copytree(
                    path,
                    place,
                    dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"),
                )
            else:
                into = place / path.name if target.endswith("/") else place
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, into)

    def _in_context(self, source: str) -> Path:
        kept = (self._context / ".dockerignore").read_text().splitlines()
        assert f"!{source}" in kept, f".dockerignore leaves {source} out"
        return self._context / source

    def _do_run(self, rest: str, values: Mapping[str, str]) -> None:
        environment = self.image.environment()
        environment["PATH"] += ":/usr/bin:/bin"
        done = subprocess.run(
            ["/bin/sh", "-ec", self.image.moved(rest)],
            cwd=self.image.at(""),
            env={**values, **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"RUN {rest}\n{done.stdout}{done.stderr}"

    def _do_env(self, rest: str) -> None:
        self.image.env.update(part.split("=", 1) for part in shlex.split(rest))

    def _do_user(self, rest: str) -> None:
        self.image.user = rest

    def _do_expose(self, rest: str) -> None:
        assert rest.isdigit()

    def _do_entrypoint(self, rest: str) -> None:
        self.image.entrypoint = json.loads(rest)

    def _do_cmd(self, rest: str) -> None:
        self.image.cmd = json.loads(rest)


def without_powers_of_root(command: Sequence[str]) -> list[str]:
    """A command that file modes hold for, whoever runs it.

    Root may write to read-only files. A process without these capabilities may not.
    """
    if os.geteuid() != 0:
        return list(command)
    powers = "-dac_override,-dac_read_search,-fowner,-chown"
    tool = shutil.which("setpriv")
    assert tool, "util-linux brings setpriv"
    return [tool, f"--bounding-set={powers}", "--", *command]
