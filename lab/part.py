"""What parts share: what identifies a result, and one that is made once, with its figure, in lab/ of the run directory.

A part runs in one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from shoal.artifacts.artifact import Artifact, Provenance
from shoal.artifacts.identity import Identity
from shoal.artifacts.importance import Estimate
from shoal.formatting import interval_text
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
    numerics = {"seed": recipe.seed, "dtype": recipe.dtype, "attention": recipe.attn_implementation}
    return {"model": run.teacher_fingerprint, **numerics, **as_dict(settings), **content}


def model_of(run: Run) -> Any:
    """The model that the run measures and cuts, loaded."""
    return load_model(run.teacher, device=device(), **run.load_args())


def made(
    run: Run,
    kind: type[Result],
    inputs: dict[str, Any],
    make: Callable[[Provenance], Result],
    draw: Callable[[Result], Figure] | None = None,
) -> Result:
    """The result with these ``inputs``: read, where lab/ holds it, else made, written and, if it can be, drawn."""
    from shoal.figures.style import save_figure

    path = run.dir / FOLDER / kind.FILE
    asked = Identity(kind, path, inputs, f"lab {path.stem}")
    if asked.is_done():
        return asked.require()
    seed_everything(run.recipe.seed)
    result = make(asked.provenance)
    result.save(path)
    if draw is not None:
        save_figure(draw(result), path.with_suffix(".svg"))
    return result


def in_interval(estimate: Estimate, spec: str) -> str:
    """The estimate with the ends of its interval."""
    return interval_text((estimate.value, estimate.low, estimate.high), spec)


def told(run: Run, result: Any) -> str:
    """What is printed of a result: its words and where it lies."""
    return f"{result.in_words()}\n{run.dir / FOLDER / result.FILE}"
