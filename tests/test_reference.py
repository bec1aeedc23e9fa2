"""The reference is made of the docstrings alone: every public name has one, with an example that runs as a doctest."""

import inspect
from types import ModuleType

import pytest

import gdx


def public(module: ModuleType, prefix: str = "gdx.") -> dict[str, object]:
    """Every public function and class by the name that users reach it by."""
    found: dict[str, object] = {}
    for name in getattr(module, "__all__", vars(module)):
        value = getattr(module, name)
        if isinstance(value, ModuleType) and name in gdx.__all__:
            found |= public(value, f"{prefix}{name}.")
        elif inspect.isroutine(value) or inspect.isclass(value):
            is_its_own = hasattr(module, "__all__") or value.__module__ == module.__name__
            if is_its_own and not name.startswith("_"):
                found[f"{prefix}{name}"] = value
    return found


NAMES = public(gdx)
every_name = pytest.mark.parametrize("name", NAMES)


def is_record(value: object) -> bool:
    """Whether it is what a function returns or raises, whose example is that function's."""
    return inspect.isclass(value) and (value.__bases__ == (tuple,) or issubclass(value, Exception))


@every_name
def test_has_an_example_or_says_what_is_in_it(name):
    text = inspect.getdoc(NAMES[name]) or ""
    assert (">>> " in text) or (
        is_record(NAMES[name]) and (issubclass(NAMES[name], Exception) or "Attributes:" in text)
    )


@every_name
def test_every_argument_is_explained(name):
    value, text = NAMES[name], inspect.getdoc(NAMES[name]) or ""
    if is_record(value):
        listed = text.partition("Attributes:")[2]
        assert all(field in listed for field in getattr(value, "_fields", ()))
    elif "Args:" in text:
        for argument in inspect.signature(value).parameters:
            assert argument.lstrip("*") in text.partition("Args:")[2]


def test_a_name_is_reached_in_one_place_only():
    values = list(map(id, NAMES.values()))
    assert len(values) == len(set(values))
