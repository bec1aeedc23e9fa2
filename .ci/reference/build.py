"""Writes the reference of gdx: `python .ci/reference/build.py FOLDER`, with the extra docs. It needs no network."""

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import latex2mathml.converter
import markupsafe
import optax
import pdoc

import gdx
from gdx.curvature.spectrum import Progress as CurvatureProgress
from gdx.progress import Progress
from gdx.schedules import Number
from gdx.training import Loss

FOLDER = Path(__file__).parent
# annotations by the names that they have where they are written
NAMES = [
    (gdx.Scalar, "Scalar"),
    (Number, "Number"),
    (optax.Schedule, "Schedule"),
    (Loss, "Loss"),
    (Progress, "Progress"),
    (CurvatureProgress, "Progress"),
]


def named(annotation: Any, *args: Any, spelled: Any = inspect.formatannotation, **kwargs: Any) -> str:
    """An annotation as text: by its name, if it has one."""
    text = next((name for known, name in NAMES if annotation == known), None) or spelled(annotation, *args, **kwargs)
    return re.sub(r"jaxlib\._jax\.|(collections\.abc|typing)\.", "", text)


def without_any(signature: str) -> markupsafe.Markup:
    """A signature without the annotations that say nothing."""
    return markupsafe.Markup(re.sub(r'<span class="p">:</span> *<span class="n">Any</span>', "", signature))


def with_formulas(docstring: str) -> str:
    """A docstring with its formulas in MathML, which browsers draw themselves; programs are left as they are."""

    def formula(found: re.Match[str]) -> str:
        block, inline = found[1], found[2]
        if not (block or inline):
            return found[0]
        text = " ".join((block or inline).replace("{aligned}", "{align*}").split())
        return latex2mathml.converter.convert(text, display="block" if block else "inline")

    return re.sub(r"`[^`]*`|^ *(?:>>>|\.\.\.).*?$|\$\$(.+?)\$\$|\$(.+?)\$", formula, docstring, flags=re.S | re.M)


def main() -> None:
    inspect.formatannotation = pdoc.doc.formatannotation = named
    pdoc.render.configure(docformat="google", template_directory=FOLDER)
    filters = pdoc.render.env.filters
    filters["without_any"], markdown = without_any, filters["to_html"]
    filters["to_html"] = lambda docstring: markdown(with_formulas(docstring))
    pdoc.pdoc("gdx", output_directory=Path(sys.argv[1]))


if __name__ == "__main__":
    main()
