"""The `pip` of an image's steps: wheels are built and unpacked, registries not asked.

A requirement is met by the present environment, or the step fails.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

from packaging.requirements import Requirement
from packaging.version import Version

VALUES = ("--extra-index-url", "--index-url", "--wheel-dir")


def main(root: str, command: str, *words: str) -> int:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", command]
    if command == "wheel":
        # Otherwise pip fetches setuptools; pyproject.toml says how old it may be.
        if Version(version("setuptools")) >= Version("77"):
            pip.append("--no-build-isolation")
        return subprocess.call([*pip, *words])
    assert command == "install", command
    flags, files = [], []
    given = iter(words)
    for word in given:
        if word in VALUES:
            next(given)
        elif word.startswith("-"):
            flags.append(word)
        elif word.endswith(".whl"):
            files.append(word)
        else:
            wanted = Requirement(word)
            assert version(wanted.name) in wanted.specifier, word
    if not files:
        return 0
    assert "--no-deps" in flags, "the wheel's dependencies would come twice"
    pip += ["--no-deps", "--no-index", "--no-compile", "--target", f"{root}/site"]
    return subprocess.call([*pip, *files])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
