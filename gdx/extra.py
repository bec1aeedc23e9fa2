"""The packages that only the demo and the pictures need: matplotlib, rich and scikit-learn."""

import contextlib
from collections.abc import Iterator


class MissingExtra(ImportError):
    """A package of the demo extra cannot be imported."""


@contextlib.contextmanager
def demo_extra() -> Iterator[None]:
    """Around the import of such a package: if it is missing, says how to install it.

    Raises:
      MissingExtra: an import inside failed.
    """
    try:
        yield
    except ImportError as error:
        raise MissingExtra(f"{error}; install it with: python -m pip install 'gdx-jax[demo]'") from error
