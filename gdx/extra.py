"""Packages that gdx itself does without: each comes with an extra of the distribution, imported where it is used."""

import contextlib
from collections.abc import Iterator


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
