"""Does the suite notice when an algorithm is broken?

    .venv/bin/python test/mutation.py [--only TEXT] [--list]

Applies the mutations of `test/mutations` one at a time to a copy of the package in a
temporary folder and runs the tests that each names against that copy. The working tree
is only read. Exit status 0: all killed; 1: one survived or crashed; 2: the table is
stale, or the copy is not green to begin with.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

# The slow imports happen here, once: each mutation is tested in a fork.
import hypothesis
import pytest
import torch
from hypothesis.configuration import set_hypothesis_home_dir
from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "sglang_dllm"
UNIT = ROOT / "test" / "unit"
SECONDS_A_TEST = 120
ASSERTION = "AssertionError"


class StaleTable(Exception):
    """The table does not fit the code any more."""


@dataclass
class Outcome:
    """What pytest said in the fork.

    Attributes:
        status: pytest's exit status; None if the fork died.
        passed: node ids, from below test/unit.
        failed: node id to the name of the exception.
        strangers: modules of the package that did not come from the copy.
    """

    status: int | None = None
    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    strangers: list[str] = field(default_factory=list)


class Recorder:
    """A pytest plugin that notes what passes and why what fails does."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        name = item.nodeid.rpartition("unit/")[2]
        if call.excinfo is not None:
            self.outcome.failed.setdefault(name, call.excinfo.typename)
        elif report.when == "call" and report.passed:
            self.outcome.passed.append(name)
        return report


def mutated(mutation: Mutation) -> str:
    """The text of its file with the mutation.

    Raises:
        StaleTable: the old text is not there exactly once.
    """
    text = (PACKAGE / mutation.file).read_text(encoding="utf-8")
    found = text.count(mutation.old)
    if found != 1:
        raise StaleTable(
            f"{mutation.name}: {mutation.file} has the old text {found} times, not once"
        )
    return text.replace(mutation.old, mutation.new)


def copy_package(folder: Path, mutation: Mutation | None) -> None:
    """The package in a folder, mutated or as it is; without the demo's weights."""
    ignore = shutil.ignore_patterns("__pycache__", "checkpoint")
    copied = shutil.copytree(PACKAGE, folder / "sglang_dllm", ignore=ignore)
    shutil.copytree(ROOT / "patches", copied / "patches", ignore=ignore)
    if mutation is not None:
        file = copied / mutation.file
        file.write_text(mutated(mutation), encoding="utf-8")


def run_tests(folder: Path, tests: Sequence[str], sender: Connection) -> None:
    """In the fork: run tests on the copy in a folder and send the outcome."""
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = str(folder)
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    set_hypothesis_home_dir(folder)
    # The first counterexample will do, and none is kept: every run is the same.
    hypothesis.settings.register_profile(
        "mutation",
        database=None,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        report_multiple_bugs=False,
    )
    outcome = Outcome()
    with open(folder / "log", "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        outcome.status = pytest.main(
            [
                *("-q", "-p", "no:cacheprovider", f"--timeout={SECONDS_A_TEST}"),
                *("--hypothesis-profile=mutation", "--hypothesis-seed=0"),
                *("--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")),
                *(str(UNIT / test) for test in tests),
            ],
            plugins=[Recorder(outcome)],
        )
    outcome.strangers = [
        name
        for name, module in sys.modules.items()
        if name.partition(".")[0] == "sglang_dllm"
        and not Path(module.__file__ or "").is_relative_to(folder)
    ]
    sender.send(outcome)


def outcome_of(mutation: Mutation | None, tests: Sequence[str]) -> Outcome:
    """Run tests on a copy of the package with a mutation, or without.

    Raises:
        StaleTable: the tests could not be run on the copy.
    """
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copy_package(folder, mutation)
        process = fork.Process(
            target=run_tests, args=(folder, tests, sender), daemon=True
        )
        process.start()
        sender.close()
        try:
            outcome: Outcome = receiver.recv()
        except EOFError:
            outcome = Outcome()
        process.join()
        label = mutation.name if mutation else "no mutation"
        if outcome.status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            log = (folder / "log").read_text(encoding="utf-8")
            raise StaleTable(f"{label}: pytest ended with {outcome.status}\n{log}")
        if outcome.strangers:
            raise StaleTable(f"{label}: imported from elsewhere: {outcome.strangers}")
    return outcome


def of_test(test: str, names: Iterable[str]) -> list[str]:
    """Which node ids are a test, or its cases."""
    return [name for name in names if name == test or name.startswith(f"{test}[")]


def verdict(mutation: Mutation, outcome: Outcome) -> tuple[bool, list[str]]:
    """Whether it was killed, and lines that say by what.

    Each named test has to fail, by an assertion: a crash says nothing about what the
    tests see.
    """
    killed, lines = True, []
    for test in mutation.tests:
        failed = of_test(test, outcome.failed)
        by = [name for name in failed if outcome.failed[name] == ASSERTION]
        if by:
            lines.append(by[0])
        else:
            killed = False
            crash = f" crashed: {outcome.failed[failed[0]]}" if failed else " PASSED"
            lines.append(test + crash)
    return killed, lines


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="TEXT", help="those with TEXT in their name")
    parser.add_argument("--list", action="store_true", help="print the table and end")
    given = parser.parse_args(args)
    wanted = (given.only or "").lower()
    chosen = [m for m in MUTATIONS if wanted in m.name.lower()]
    if not chosen:
        parser.error(f"no mutation has {given.only!r} in its name")
    if given.list:
        for mutation in chosen:
            print(f"{mutation.name}\n    {mutation.file}: {mutation.notice}")
            print(f"    breaks {', '.join(mutation.algorithms)}")
        return 0
    try:
        return check(chosen)
    except StaleTable as error:
        print(error, file=sys.stderr)
        return 2


def check(chosen: Sequence[Mutation]) -> int:
    """Run the mutations and print a line for each; the exit status."""
    for mutation in chosen:
        mutated(mutation)
    tests = list(dict.fromkeys(test for m in chosen for test in m.tests))
    start = time.perf_counter()
    unbroken = outcome_of(None, tests)
    if unbroken.failed:
        raise StaleTable(f"without a mutation: failed {sorted(unbroken.failed)}")
    seconds = time.perf_counter() - start
    print(f"no mutation: {len(unbroken.passed)} tests pass, {seconds:.1f} s\n")
    width = max(len(mutation.name) for mutation in chosen)
    num_killed = 0
    for mutation in chosen:
        start = time.perf_counter()
        killed, lines = verdict(mutation, outcome_of(mutation, mutation.tests))
        seconds = time.perf_counter() - start
        num_killed += killed
        word = "killed by" if killed else "SURVIVED "
        # All of a survivor's tests; of the others the first says enough.
        shown = [lines[0]] if killed else lines
        more = f" and {len(lines) - 1} more" if killed and len(lines) > 1 else ""
        print(
            f"{mutation.name:{width}}  {seconds:5.1f} s  {word}  "
            f"{'; '.join(shown)}{more}",
            flush=True,
        )
    print(f"\n{num_killed} of {len(chosen)} mutations killed")
    return 0 if num_killed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
