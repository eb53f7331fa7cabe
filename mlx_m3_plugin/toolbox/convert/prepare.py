"""From what a user asks for to a plan: opening, recipe, and sensitivity where the recipe needs it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import open_checkpoint
from ..precision import Quantization
from ..texts import built_in_text, read_texts
from .allocation import work_out
from .plan import Plan, plan_conversion
from .recipe import load_recipe
from .sensitivity import Scores, measure_sensitivity, read_scores, scores_by_position

BY_POSITION = "position"
# oQ measures 128 samples of 256 tokens; what the built-in text has of them is measured.
_TOKENS, _WINDOW, _STEP = 128 * 256, 256, 256

# Given a title and how many layers there are: what is told of each.
Watch = Callable[[str, int], Any]


@dataclass(frozen=True)
class Prepared:
    """A plan, and for recipes with a budget what it was worked out from.

    Attributes:
        measured: in words, how ``scores`` were found.
    """

    plan: Plan
    scores: Scores | None = None
    measured: str | None = None


def prepare(
    source: str | Path,
    recipe: str,
    *,
    sensitivity: str | None = None,
    text: str | None = None,
    cache: Path,
    memory: int,
    only_plan: bool = False,
    check: Callable[[Plan], None] = lambda plan: None,
    watch: Watch,
) -> Prepared:
    """Plan the conversion of ``source`` by ``recipe``.

    Args:
        sensitivity: a saved map, or ``position``; None measures, where a recipe needs it.
        text: to measure by; None for the built-in one.
        cache: where a measurement goes on that was interrupted.
        only_plan: measure nothing, whatever it takes.
        check: given a plan of the same recipe and about the same size before anything is measured;
            what it raises ends the preparation.

    Raises:
        OSError, ValueError: the source, the recipe or the map cannot be used; says why.
    """
    checkpoint = open_checkpoint(source)
    wanted = load_recipe(recipe, checkpoint.text_config)
    if not wanted.plan:
        if sensitivity is not None:
            raise ValueError(f"{recipe} has fixed bits; --sensitivity is for recipes with a [plan]")
        return Prepared(plan_conversion(checkpoint, wanted))
    layers = checkpoint.text_config.num_hidden_layers
    scores: Scores = scores_by_position(layers)
    if sensitivity == BY_POSITION or (sensitivity is None and only_plan):
        measured = "by position: nothing was measured"
    elif sensitivity is not None:
        scores, measured = read_scores(Path(sensitivity).expanduser()), f"from {sensitivity}"
    else:
        check(plan_conversion(checkpoint, wanted, work_out(checkpoint, wanted, scores)))
        ids = read_texts(checkpoint.directory, text or built_in_text(), None, _WINDOW)
        texts = type(ids)(ids.windows[: _TOKENS // _WINDOW])
        base = Quantization(int(wanted.plan.get("base_bits", 4)), wanted.default.group_size)
        progress = watch(f"sensitivity of {checkpoint.title}", layers)
        scores = measure_sensitivity(
            checkpoint, texts, base, cache, memory=memory, step=_STEP, progress=progress
        )
        measured = f"measured at {base} on {len(texts.tokens):,} tokens"
    specs = work_out(checkpoint, wanted, scores)
    return Prepared(plan_conversion(checkpoint, wanted, specs), scores, measured)
