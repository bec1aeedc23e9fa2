"""Packages that gdx itself does without: each comes with an extra of the distribution, imported where it is used."""

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec

PACKAGES = {
    "checkpoint": ("orbax.checkpoint",),
    "demo": ("matplotlib", "rich", "sklearn"),
    "plot": ("matplotlib",),
}


class MissingExtra(ImportError):
    """A package of an extra cannot be imported."""


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around the import of a package of this extra: if it is missing, says how to install it.

    Raises:
      MissingExtra: an import inside failed.
    """
    try:
        yield
    except ImportError as error:
        raise MissingExtra(f"{error}; install it with: python -m pip install 'gdx-jax[{extra}]'") from error


def require(*extras: str) -> None:
    """Before any work: the packages of these extras are there.

    Raises:
      MissingExtra: one is not installed; the command given brings all of these extras.
    """
    with needs(",".join(extras)):
        for package in [package for extra in extras for package in PACKAGES[extra]]:
            if find_spec(package) is None:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
