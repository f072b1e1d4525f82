"""The package's shape: imports point one way, files stay small, the ledger is fresh."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_dllm.patches import HOOKS
from sglang_dllm.patches.__main__ import render

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "python" / "sglang_dllm"
MAX_LINES = 420

# What the modules of a room may import of ours; a name covers what is below it.
_BASE = ("sglang_dllm.models.facts", "sglang_dllm.errors")
_LEAF = ("sglang_dllm.config", *_BASE)
ROOMS: dict[str, tuple[str, ...]] = {
    "config": (
        *("sglang_dllm.config", *_BASE, "sglang_dllm.decoding"),
        "sglang_dllm.models.tokenizers",
    ),
    "models/facts.py": _BASE,
    "errors.py": (),
    "decoding": (*_BASE, "sglang_dllm.decoding", "sglang_dllm.kernels"),
    "kernels": (),
    "attention": (*_LEAF, "sglang_dllm.attention", "sglang_dllm.kernels"),
    "models": (*_LEAF, "sglang_dllm.models", "sglang_dllm.attention"),
    "platform": (*_LEAF, "sglang_dllm.platform"),
    "serving": (*_LEAF, "sglang_dllm.serving"),
    "upstream": (*_BASE, "sglang_dllm.upstream"),
}
WITHOUT_SGLANG = ("config", "models/facts.py", "errors.py")
WITHOUT_SGLANG += ("decoding", "kernels", "attention", "demo")
MAY_IMPORT_PATCHES = ("plugin.py", "__main__.py", "doctor.py")


def imports(file: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_below(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


def files_of(room: str) -> list[Path]:
    path = PACKAGE / room
    found = [path] if path.suffix else sorted(path.rglob("*.py"))
    assert found, f"no such room: {room}"
    return found


def offenders(files: list[Path], *forbidden: str, but: tuple[str, ...] = ()) -> list:
    return [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in imports(file)
        if is_below(name, *forbidden)
        and not is_below(name, *but)
        # ``from sglang_dllm import NAME`` reads the version table of __init__.py.
        and not (name == "sglang_dllm" or name.rsplit(".", 1)[1].isupper())
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room: str) -> None:
    assert offenders(files_of(room), "sglang_dllm", but=ROOMS[room]) == []


@pytest.mark.parametrize("room", WITHOUT_SGLANG)
def test_it_knows_nothing_of_sglang(room: str) -> None:
    found = [n for file in files_of(room) for n in imports(file)]
    assert [n for n in found if is_below(n, "sglang")] == []


def test_only_the_entry_points_import_patches() -> None:
    files = [f for f in PACKAGE.rglob("*.py") if f.name not in MAY_IMPORT_PATCHES]
    assert offenders(files, "sglang_dllm.patches") == []


def test_the_package_imports_no_test_helper() -> None:
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "patches").rglob("*.py")]
    helpers = {p.stem for p in (ROOT / "test").glob("*")} - {"__pycache__"}
    found = [(f.name, n) for f in files for n in imports(f)]
    assert [x for x in found if x[1].split(".")[0] in helpers | {"reference"}] == []


def test_every_package_is_in_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = {
        ".".join(file.parent.relative_to(ROOT / "python").parts)
        for file in PACKAGE.rglob("__init__.py")
    }
    packages = set(listed["tool"]["setuptools"]["packages"])
    assert packages == {*found, "sglang_dllm.patches"}


@pytest.mark.parametrize("folder", ["python", "patches", "benchmark", "test"])
def test_no_file_is_long(folder: str) -> None:
    long = {
        str(file.relative_to(ROOT)): lines
        for file in (ROOT / folder).rglob("*.py")
        if (lines := len(file.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert long == {}


def test_the_ledger_is_what_the_hooks_say() -> None:
    readme = (ROOT / "patches" / "README.md").read_text(encoding="utf-8")
    assert readme == render(), "run: python -m sglang_dllm.patches"
    for hook in HOOKS.hooks:
        assert hook.target in readme


def test_every_patch_module_is_in_the_ledger() -> None:
    modules = {f.stem for f in (ROOT / "patches").glob("*.py")}
    hooked = {hook.fn.__module__.rsplit(".", 1)[1] for hook in HOOKS.hooks}
    assert modules - hooked == {"__init__", "__main__"}
