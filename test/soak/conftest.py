"""How long a soak lasts, and the table that it fills."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest

from helpers.soak_table import Budget, Table


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """In the short run one server meets all faults, and none is started to end it."""
    if not budget_of(config).is_short:
        return
    left_out = [
        item
        for item in items
        if item.path.parent == Path(__file__).parent
        and (item.path.name == "test_ends.py" or "prelaunch=true" in item.name)
        and "storm_changes" not in item.name
    ]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def budget_of(config: pytest.Config) -> Budget:
    """The budget that the command asks for."""
    return Budget(config.getoption("--soak-minutes"), config.getoption("--soak-seed"))


@pytest.fixture(scope="session")
def budget(pytestconfig: pytest.Config) -> Budget:
    return budget_of(pytestconfig)


@pytest.fixture(scope="session")
def table(budget: Budget, pytestconfig: pytest.Config) -> Iterator[Table]:
    """Printed at the end, and written where ``--soak-report`` names a folder."""
    table = Table(f"make soak SOAK_MINUTES={budget.minutes:g}")
    yield table
    today = date.today().isoformat()
    print("\n\n" + table.markdown(today))
    folder = pytestconfig.getoption("--soak-report")
    if folder is not None:
        table.write(Path(folder), today)
