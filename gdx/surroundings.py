"""What functions use of the code around them, by which a compiled program of theirs is still right."""

import functools
import inspect
import operator
import types
from collections.abc import Iterable, Iterator
from typing import Any


class Surroundings:
    """What functions use of the code around them, compared by identity.

    A program that is found again by its functions alone would go on with what that was when it was compiled.
    """

    def __init__(self, *functions: Any):
        self.found = list[Any]()  # kept, so that nothing else gets their addresses
        self._follow(functions, {})

    def _follow(self, inside: Iterable[Any], seen: dict[int, Any]) -> None:
        for x in inside:
            if id(x) in seen or isinstance(x, types.ModuleType | type | types.BuiltinFunctionType):
                continue
            seen[id(x)] = x
            x = inspect.unwrap(x) if callable(x) else x
            if isinstance(x, types.FunctionType):
                cells = [y for cell in x.__closure__ or () for y in _contents(cell)]
                names = [name for code in _codes(x.__code__) for name in code.co_names]
                used = [x.__globals__[name] for name in names if name in x.__globals__]
                # another module's functions are not followed: libraries do not change
                used = [y for y in used if getattr(y, "__globals__", x.__globals__) is x.__globals__]
                self._follow((*cells, *used, *(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()), seen)
            elif isinstance(x, types.MethodType):
                self._follow((x.__func__, *getattr(x.__self__, "__dict__", {}).values()), seen)
            elif isinstance(x, functools.partial):
                self._follow((x.func, *x.args, *x.keywords.values()), seen)
            elif isinstance(x, tuple | list | dict):
                self._follow(x.values() if isinstance(x, dict) else x, seen)
            else:
                self.found.append(x)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Surroundings)
            and len(self.found) == len(other.found)
            and all(map(operator.is_, self.found, other.found))
        )

    def __hash__(self) -> int:
        return hash(tuple(map(id, self.found)))


def _contents(cell: types.CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # it is empty
        return []


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Code and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)
