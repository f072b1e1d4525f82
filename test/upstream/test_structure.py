"""The shape of the package: imports point one way, files stay small, the ledger is
up to date."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.written_attributes import FOLDERS, written_elsewhere
from sglang_dllm.patches import HOOKS
from sglang_dllm.patches.__main__ import render
from sglang_dllm.upstream.versions import REQUIREMENT

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "python" / "sglang_dllm"
TEST = ROOT / "test"
MAX_LINES = 400

# The modules of ours that each room may import; a name covers all that is below it.
# docs/structure.md draws the same arrows.
_BASE = ("errors", "models.facts")
_CORE = ("decoding", "kernels", *_BASE)
ROOMS: dict[str, tuple[str, ...]] = {
    "errors.py": (),
    "kernels": (),
    "models/facts.py": ("errors",),
    "decoding": _CORE,
    "attention": ("attention", "decoding.window", "kernels", "errors"),
    "models": ("models", "attention.plan", "user_folder", "errors"),
    "config": (
        *("config", "attention.backends", "models.config_check", "models.tokenizers"),
        *("models.stored_dtype", *_CORE),
    ),
    "launching": ("launching", "errors"),
    "grammar": ("grammar", "decoding.structure.automaton", "errors"),
    "serving": (
        *("serving", "config", "grammar", "models.tokenizers", "upstream.compat"),
        *_CORE,
    ),
    "runtime": (
        *("runtime", "attention", "config", "grammar", "models.tokenizers"),
        *("upstream.compat", *_CORE),
    ),
    "platform": ("platform", "models.linear", "upstream.compat", "errors"),
    "upstream": ("upstream", *_BASE),
}
WITHOUT_SGLANG = ("config", "models/facts.py", "errors.py")
WITHOUT_SGLANG += ("decoding", "grammar", "kernels", "attention")
MAY_IMPORT_PATCHES = ("plugin.py", "__main__.py", "doctor.py")
# Folders of test/ whose modules are no tests.
HELPERS = ("helpers", "reference")


def imports(file: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, inside functions too."""
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
    allowed = tuple(f"sglang_dllm.{name}" for name in ROOMS[room])
    assert offenders(files_of(room), "sglang_dllm", but=allowed) == []


@pytest.mark.parametrize("room", WITHOUT_SGLANG)
def test_it_knows_nothing_of_sglang(room: str) -> None:
    found = [n for file in files_of(room) for n in imports(file)]
    assert [n for n in found if is_below(n, "sglang")] == []


def test_only_the_entry_points_import_patches() -> None:
    files = [f for f in PACKAGE.rglob("*.py") if f.name not in MAY_IMPORT_PATCHES]
    assert offenders(files, "sglang_dllm.patches") == []


@pytest.mark.parametrize("folder", ["python", "patches", "benchmark", "tools"])
def test_nothing_else_imports_tests_or_their_helpers(folder: str) -> None:
    # benchmark/ is a package of the root, which test/benchmark is named after, and
    # test/platform has the name of a module of Python.
    of_tests = {p.stem for p in TEST.iterdir()} - {"benchmark", "platform"}
    files = (ROOT / folder).rglob("*.py")
    found = [f"{f.relative_to(ROOT)} imports {n}" for f in files for n in imports(f)]
    assert [x for x in found if x.split()[-1].split(".")[0] in of_tests] == []


def test_helpers_are_in_their_folders() -> None:
    others = [
        str(path)
        for file in TEST.rglob("*.py")
        if (path := file.relative_to(TEST)).parts[0] not in HELPERS
        and not path.name.startswith("test_")
        and path.name != "conftest.py"
    ]
    assert others == []


def test_no_test_changes_the_import_path() -> None:
    """pyproject.toml sets it; a test that adds to it hides what it depends on."""
    changes = {
        str(file.relative_to(ROOT))
        for file in TEST.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("sys.path.")
    }
    assert changes == set()


def test_no_module_writes_an_attribute_of_another_modules_object() -> None:
    assert written_elsewhere(*FOLDERS) == []


def test_a_written_attribute_is_found_whatever_writes_it(tmp_path: Path) -> None:
    """Guards the test above against a search that finds nothing."""
    (tmp_path / "owner.py").write_text(
        "class Owner:\n"
        "    left: int\n"
        "    def __init__(self):\n"
        "        self.made = self.kept = 0\n"
        "class Child(Owner): ...\n"
    )
    (tmp_path / "writer.py").write_text(
        "class Writer:\n"
        "    def run(self, owner, req, other: Writer):\n"
        "        self.mine = other.mine = owner.unknown = 1\n"
        "        owner.made, x = 1, owner.kept\n"
        "        self.owner.left += 1\n"
        "        setattr(owner, 'kept', 2)\n"
        "        del owner.made\n"
        "        req.made = other.made = 1\n"
        "    @classmethod\n"
        "    def new(cls, child: Child):\n"
        "        found = cls()\n"
        "        found.made = child.made = 1\n"
    )
    found = [text.split(": ")[1] for text in written_elsewhere(tmp_path)]
    assert found == [
        "owner.made, of Owner",
        "self.owner.left, of Owner",
        "owner.kept, of Owner",
        "owner.made, of Owner",
        "child.made, of Owner",
    ]


def test_every_package_is_in_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = {
        ".".join(file.parent.relative_to(ROOT / "python").parts)
        for file in PACKAGE.rglob("__init__.py")
    }
    packages = set(listed["tool"]["setuptools"]["packages"])
    assert packages == {*found, "sglang_dllm.patches"}


def test_the_metadata_accept_the_supported_sglang() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert REQUIREMENT in project["dependencies"]


def test_no_file_is_long() -> None:
    folders = [f for f in ROOT.iterdir() if f.is_dir() and f.name[0] not in "._"]
    long = {
        str(file.relative_to(ROOT)): lines
        for folder in folders
        for file in folder.rglob("*.py")
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
