"""``mlx-m3 convert`` from its arguments to what it says."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...weights.files import MODEL_TYPES
from ..evaluate.evaluation import default_cache
from ..machine import default_memory
from ..progress import bytes_bar, layers_bar
from ..text_files import read_text
from .plan import Plan
from .prepare import prepare
from .recipe import load_recipe, recipe_names
from .run import check_destination, convert
from .text import plan_lines, report_lines


def list_recipes() -> dict[str, str]:
    """The summary of each recipe by its name."""
    from ...model.config import TextConfig

    config = TextConfig()
    return {name: load_recipe(name, config).summary for name in recipe_names()}


def convert_command(
    source: str,
    destination: str | None,
    recipe: str,
    *,
    dry_run: bool = False,
    sensitivity: str | None = None,
    text_file: str | None = None,
    memory: int | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """What to print, as JSON and as lines.

    Raises:
        OSError, ValueError: see :func:`.prepare.prepare` and :func:`.run.convert`.
    """
    memory = memory or default_memory()
    text = None if text_file is None else read_text(Path(text_file).expanduser())
    prepared = prepare(
        source,
        recipe,
        sensitivity=sensitivity,
        text=text,
        cache=default_cache(),
        memory=memory // 2,
        only_plan=dry_run,
        watch=layers_bar,
    )
    plan = prepared.plan
    if dry_run or destination is None:
        return _described(plan) | {"sensitivity": prepared.measured}, plan_lines(prepared)
    target = Path(destination).expanduser().absolute()
    check_destination(plan, target)
    unfinished = target.with_name(target.name + ".unfinished")
    hint = f"what is finished is in {unfinished}; the same command goes on from there"
    bar = bytes_bar(plan.recipe.name, plan.nbytes)
    try:
        report = convert(plan, target, memory=memory, progress=bar, scores=prepared.scores)
    except OSError as error:
        raise OSError(f"{error}\n{hint}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(hint) from None
    return asdict(report), report_lines(report)


def _described(plan: Plan) -> dict[str, Any]:
    assert plan.source.config["model_type"] in MODEL_TYPES
    return {
        "recipe": plan.recipe.name,
        "files": len(plan.shards),
        "bytes": plan.nbytes,
        "parameters": plan.parameters,
        "bits_per_weight": plan.bits_per_weight,
        "packed": plan.packed,
        "modules": {path: str(how) for path, how in plan.hows.items()},
    }
