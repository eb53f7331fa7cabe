"""``mlx-m3 convert`` from its arguments to what it says."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ...weights.files import MODEL_TYPES
from ..common import bytes_bar, layers_bar, read_text
from ..evaluate.evaluation import default_cache
from ..memory import default_memory
from ..new_directory import STATE, new_directory, unfinished_of
from .prepare import Prepared, prepare
from .recipe import load_recipe, recipe_names
from .run import Space, check_unfinished, report, space_for, write
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
    prepare_plan = partial(
        prepare,
        source,
        recipe,
        sensitivity=sensitivity,
        text=None if text_file is None else read_text(Path(text_file).expanduser()),
        cache=default_cache(),
        memory=memory // 2,
        watch=layers_bar,
    )
    if dry_run or destination is None:
        prepared = prepare_plan(only_plan=True)
        space = None if destination is None else space_for(prepared.plan, unfinished_of(Path(destination)))
        return _described(prepared, space), plan_lines(prepared, space)
    target = Path(destination)
    with _hint(unfinished_of(target)), new_directory(target, "convert", resumable=True) as unfinished:
        check = partial(check_unfinished, unfinished, is_draft=True)
        prepared = prepare_plan(check=check)
        plan = prepared.plan
        bar = bytes_bar(plan.recipe.name, plan.nbytes)
        resumed = write(plan, unfinished, memory=memory, progress=bar, scores=prepared.scores)
    made = report(plan, target, resumed)
    return asdict(made), report_lines(made)


@contextmanager
def _hint(unfinished: Path) -> Iterator[None]:
    """Says of what was begun that it can be gone on with."""
    hint = f"what is finished is in {unfinished}; the same command goes on from there"
    try:
        yield
    except (FileExistsError, BlockingIOError):
        # Nothing was begun.
        raise
    except OSError as error:
        raise (OSError(f"{error}\n{hint}") if (unfinished / STATE).exists() else error) from error
    except KeyboardInterrupt:
        raise (KeyboardInterrupt(hint) if (unfinished / STATE).exists() else KeyboardInterrupt) from None


def _described(prepared: Prepared, space: Space | None) -> dict[str, Any]:
    plan = prepared.plan
    assert plan.source.config["model_type"] in MODEL_TYPES
    return {
        "recipe": plan.recipe.name,
        "files": len(plan.shards),
        "bytes": plan.nbytes,
        "parameters": plan.parameters,
        "bits_per_weight": plan.bits_per_weight,
        "packed": plan.packed,
        "modules": {path: str(spec) for path, spec in plan.specs.items()},
        "sensitivity": prepared.measured,
        "space": None if space is None else {**space._asdict(), "is_enough": space.is_enough},
    }
