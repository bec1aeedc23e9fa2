"""The order of the contract's tests."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One row after the other: what a process has compiled for a row serves its other promises too."""
    places = [i for i, item in enumerate(items) if HERE in item.path.parents]
    for i, item in zip(places, sorted((items[i] for i in places), key=_row)):
        items[i] = item


def _row(item: pytest.Item) -> str:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return f"{params['row']} {params.get('settings')}" if "row" in params else ""
