"""``mlx-m3 convert``: from its arguments to what it prints."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...model.config import TextConfig
from ..checkpoint import Checkpoint, open_checkpoint
from ..common import bytes_bar, layers_bar, read_text, size_in_words
from ..forward_pass import Texts, built_in_text, default_cache, read_texts
from ..memory import default_memory
from ..new_directory import STATE, new_directory, unfinished_of
from ..precision import Quantization
from .allocation import Scores, allocate_bits, measure_sensitivity, read_scores, scores_by_position
from .config_and_card import components
from .plan import ConversionPlan, plan_conversion
from .recipe import Recipe, load_recipe, recipe_names
from .run import Report, Space, check_unfinished, report, space_for, write

BY_POSITION = "position"
# As oQ: 128 samples of 256 tokens, or as many as the text has.
_SAMPLES, _WINDOW = 128, 256


def list_recipes() -> dict[str, str]:
    """The summary of each recipe by its name."""
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

    Args:
        sensitivity: a saved map, or ``position``; None measures, if the recipe needs it.
        text_file: the text to measure with; None for the built-in one.

    Raises:
        OSError, ValueError: the source, the recipe or the map cannot be used; see :func:`.run.convert`.
    """
    memory = memory or default_memory()
    text = built_in_text() if text_file is None else read_text(Path(text_file).expanduser())
    if dry_run or destination is None:
        prepared = _prepare(source, recipe, sensitivity, _by_position)
        space = None if destination is None else space_for(prepared.plan, unfinished_of(Path(destination)))
        return _as_json(prepared, space), _plan_lines(prepared, space)
    target = Path(destination)
    with _hint(unfinished_of(target)), new_directory(target, "convert", resumable=True) as unfinished:

        def measure(checkpoint: Checkpoint, wanted: Recipe) -> tuple[Scores, str]:
            # First see that a plan of about the final size can be written: measuring takes hours.
            by_position = allocate_bits(checkpoint, wanted, _by_position(checkpoint, wanted)[0])
            check_unfinished(unfinished, plan_conversion(checkpoint, wanted, by_position), is_draft=True)
            return _measured(checkpoint, wanted, text, memory // 2)

        prepared = _prepare(source, recipe, sensitivity, measure)
        plan = prepared.plan
        bar = bytes_bar(plan.recipe.name, plan.nbytes)
        resumed = write(plan, unfinished, memory=memory, progress=bar, scores=prepared.scores)
    made = report(plan, target, resumed)
    return asdict(made), _report_lines(made)


# --- from arguments to a plan ---


@dataclass(frozen=True)
class _Prepared:
    """A plan; and for recipes with a [plan] the sensitivity behind its bits, and where that is from."""

    plan: ConversionPlan
    scores: Scores | None = None
    measured: str | None = None


# Sensitivity of the layers where the user gave none, and in words where it is from.
_Sensitivity = Callable[[Checkpoint, Recipe], tuple[Scores, str]]


def _prepare(source: str, recipe_name: str, sensitivity: str | None, otherwise: _Sensitivity) -> _Prepared:
    checkpoint = open_checkpoint(source)
    recipe = load_recipe(recipe_name, checkpoint.text_config)
    if not recipe.bit_targets:
        if sensitivity is not None:
            raise ValueError(
                f"--sensitivity does not apply to {recipe_name}: its bits are fixed, it has no [plan]"
            )
        return _Prepared(plan_conversion(checkpoint, recipe))
    if sensitivity is None:
        scores, measured = otherwise(checkpoint, recipe)
    elif sensitivity == BY_POSITION:
        scores, measured = _by_position(checkpoint, recipe)
    else:
        scores, measured = read_scores(Path(sensitivity).expanduser()), f"from {sensitivity}"
    specs = allocate_bits(checkpoint, recipe, scores)
    return _Prepared(plan_conversion(checkpoint, recipe, specs), scores, measured)


def _by_position(checkpoint: Checkpoint, recipe: Recipe) -> tuple[Scores, str]:
    layers = checkpoint.text_config.num_hidden_layers
    return scores_by_position(layers), "by position: nothing was measured"


def _measured(checkpoint: Checkpoint, recipe: Recipe, text: str, memory: int) -> tuple[Scores, str]:
    texts = Texts(read_texts(checkpoint.directory, text, None, _WINDOW).windows[:_SAMPLES])
    base = Quantization(int(recipe.bit_targets.get("base_bits", 4)), recipe.default.group_size)
    progress = layers_bar(f"sensitivity of {checkpoint.title}", checkpoint.text_config.num_hidden_layers)
    scores = measure_sensitivity(
        checkpoint, texts, base, default_cache(), memory=memory, step=_WINDOW, progress=progress
    )
    return scores, f"measured at {base} on {len(texts.tokens):,} tokens"


@contextmanager
def _hint(unfinished: Path) -> Iterator[None]:
    """Says of an interrupted conversion that it can be resumed."""
    hint = f"what is finished is in {unfinished}; run the same command again to resume"
    try:
        yield
    except (FileExistsError, BlockingIOError):
        # Nothing was begun.
        raise
    except OSError as error:
        raise (OSError(f"{error}\n{hint}") if (unfinished / STATE).exists() else error) from error
    except KeyboardInterrupt:
        raise (KeyboardInterrupt(hint) if (unfinished / STATE).exists() else KeyboardInterrupt) from None


# --- output ---


def _as_json(prepared: _Prepared, space: Space | None) -> dict[str, Any]:
    plan = prepared.plan
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


def _plan_lines(prepared: _Prepared, space: Space | None) -> list[str]:
    """The plan as a table, and whether the disk has room for it."""
    plan = prepared.plan
    table = [("Component", "parameters", "bytes", "bits/weight", "stored as")]
    for name, parameters, size, spec in components(plan):
        table.append((name, f"{parameters:,}", f"{size:,}", f"{8 * size / max(parameters, 1):.2f}", spec))
    total = f"{plan.bits_per_weight:.2f}"
    table.append(("total", f"{plan.parameters:,}", f"{plan.nbytes:,}", total, ""))
    widths = [max(len(line[column]) for line in table) for column in range(4)]
    lines = [f"{plan.recipe.name}: {plan.recipe.summary}", ""]
    for name, *numbers, spec in table:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells, spec]).rstrip())
    lines += ["", f"{size_in_words(plan.nbytes)} in {len(plan.shards)} files; {_packing(plan)}"]
    if prepared.measured:
        lines.append(f"sensitivity of layers: {prepared.measured}")
    if space is not None:
        lines.append(f"disk: {space}: {'enough' if space.is_enough else 'NOT ENOUGH'}")
    return lines


def _packing(plan: ConversionPlan) -> str:
    if plan.packed:
        return "experts fused and packed with the shared one: for mlx-lm 0.32, mlx-vlm 0.6.4 and newer"
    return "experts unfused, for their bits differ: for mlx-lm 0.32, mlx-vlm 0.6.5 and newer"


def _report_lines(made: Report) -> list[str]:
    lines = [
        f"Wrote {made.path}: {size_in_words(made.bytes)} in {made.files} files, "
        f"{made.bits_per_weight:.2f} bits per weight"
    ]
    if made.resumed:
        lines.append(f"{made.resumed} of the files were there from an earlier run")
    return [*lines, f"To measure its quality: mlx-m3 evaluate {made.path} --reference SOURCE"]
