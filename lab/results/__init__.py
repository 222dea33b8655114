"""Results of parts: what identifies one, and a result that is made once, with its figure, in lab/ of the run directory.

A part runs in one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from shoal.artifacts.artifact import Artifact, Provenance
from shoal.artifacts.identity import Identity
from shoal.launch.verbs.run import Run
from shoal.models.load import load_model
from shoal.recipe.section import Section, as_dict
from shoal.runtime import device, seed_everything

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "lab"
Result = TypeVar("Result", bound=Artifact)


def identity(run: Run, settings: Section, **content: Any) -> dict[str, Any]:
    """What identifies the result of a part: the model, how it is run, the part's settings and the ``content`` it
    reads."""
    recipe = run.recipe
    numerics = {"seed": recipe.seed, "dtype": recipe.dtype, "attention": recipe.attention}
    return {"model": run.teacher_fingerprint, **numerics, **as_dict(settings), **content}


def text_identity(run: Run) -> dict[str, Any]:
    """The part of an identity that is the text of `measure`."""
    from shoal.data.sources import sources_fingerprint

    measure = run.recipe.measure
    sizes = {"num_tokens": measure.num_tokens, "sequence_length": measure.sequence_length}
    return {"data": sources_fingerprint(measure.data), **sizes}


def model_of(run: Run) -> Any:
    """The model that the run measures and cuts, loaded."""
    return load_model(run.teacher, device=device(), **run.load_args())


def made(
    run: Run,
    kind: type[Result],
    inputs: dict[str, Any],
    make: Callable[[Provenance], Result],
    draw: Callable[[Result], Figure],
) -> Result:
    """The result with these ``inputs``: read, where lab/ holds it, else made, written and drawn."""
    from shoal.figures.style import save_figure

    path = run.dir / FOLDER / kind.FILE
    asked = Identity(kind, path, inputs, f"lab {path.stem}")
    if asked.is_done():
        return asked.require()
    seed_everything(run.recipe.seed)
    result = make(asked.provenance)
    result.write(path)
    save_figure(draw(result), path.with_suffix(".svg"))
    return result


def told(run: Run, result: Any) -> str:
    """What is printed of a result: its words and where it lies."""
    return f"{result.in_words()}\n{run.dir / FOLDER / result.FILE}"
