"""``mlx-m3 convert``: any M3 checkpoint to MLX's layout by a recipe, in little memory."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ...model.config import TextConfig
from ...model.memory import default_memory
from ...weights.headers import DRAFT_FOLDER
from ..checkpoint import draft_in_words, open_checkpoint
from ..common import Answer, bytes_bar, component_table, size_in_words, text_of
from ..new_directory import STATE, new_directory, unfinished_of
from .allocation import Scores, allocate_bits, read_scores, scores_by_position
from .config_and_card import components
from .plan import ConversionPlan, plan_conversion, plan_draft_head
from .recipe import load_recipe, recipe_names
from .run import check_unfinished, space_for, write

_BY_POSITION = "position"


def command(args: Namespace) -> Answer:
    if args.list_recipes:
        return _recipes()
    if args.source is None or args.recipe is None or (args.destination is None and not args.dry_run):
        raise ValueError(
            "convert needs SRC, DST and --recipe; `mlx-m3 convert --list-recipes` lists the recipes"
        )
    text, memory = text_of(args.text), args.memory or default_memory()
    target = None if args.destination is None else Path(args.destination)
    if args.dry_run or target is None:
        plan, _, origin = _prepare(args, text, memory, None)
        return _planned(plan, origin, target)
    with _hint(unfinished_of(target)), new_directory(target, "convert", resumable=True) as unfinished:
        plan, scores, _ = _prepare(args, text, memory, unfinished)
        bar = bytes_bar(plan.recipe.name, plan.nbytes)
        resumed = write(plan, unfinished, memory=memory, progress=bar, scores=scores)
    made = {"path": str(target.expanduser().absolute()), **plan.summary(), "resumed": resumed}
    lines = [
        f"Wrote {made['path']}: {size_in_words(plan.nbytes)} in {made['files']} files, "
        f"{plan.bits_per_weight:.2f} bits per weight",
        *_draft(plan),
        *([f"{resumed} of the files were there from an earlier run"] if resumed else []),
        f"To measure its quality: mlx-m3 evaluate {made['path']} --reference SOURCE",
    ]
    return Answer(made, lines)


def _recipes() -> Answer:
    summaries = {name: load_recipe(name, TextConfig()).summary for name in recipe_names()}
    width = max(map(len, summaries))
    return Answer(
        [{"name": name, "summary": summary} for name, summary in summaries.items()],
        [f"{name.ljust(width)}  {summary}" for name, summary in summaries.items()],
    )


# --- from arguments to a plan ---


def _prepare(
    args: Namespace, text: str, memory: int, unfinished: Path | None
) -> tuple[ConversionPlan, Scores | None, str | None]:
    """A plan; and for recipes with a [plan] the sensitivity behind its bits, and its origin in words.

    Without ``unfinished``, which is for a dry run, nothing is measured.
    """
    checkpoint = open_checkpoint(args.source)
    recipe = load_recipe(args.recipe, checkpoint.text_config)
    if args.keep_draft and args.no_draft:
        raise ValueError("--keep-draft and --no-draft exclude each other")
    head = None if args.no_draft else plan_draft_head(checkpoint, recipe, keep=args.keep_draft)
    plan_it = partial(plan_conversion, checkpoint, recipe, draft=head)
    if not recipe.bit_targets:
        if args.sensitivity is not None:
            raise ValueError(
                f"--sensitivity does not apply to {args.recipe}: its bits are fixed, it has no [plan]"
            )
        return plan_it(), None, None
    scores: Scores = scores_by_position(checkpoint.text_config.num_hidden_layers)
    origin = "by position: nothing was measured"
    if args.sensitivity is None and unfinished is not None:
        # First see that a plan of about the final size can be written: measuring takes hours.
        draft = plan_it(allocate_bits(checkpoint, recipe, scores))
        check_unfinished(unfinished, draft, bits_may_change=True)
        # Imported here: it needs mlx-lm, which takes long to import, and recipes with fixed bits do not.
        from .sensitivity import measured

        scores = measured(checkpoint, recipe, text, memory // 2)
    elif args.sensitivity not in (None, _BY_POSITION):
        scores = read_scores(Path(args.sensitivity).expanduser())
        origin = f"from {args.sensitivity}"
    return plan_it(allocate_bits(checkpoint, recipe, scores)), scores, origin


@contextmanager
def _hint(unfinished: Path) -> Iterator[None]:
    """Says of an interrupted conversion that it can be resumed."""
    try:
        yield
    except (OSError, KeyboardInterrupt) as error:
        # Of the first two kinds: nothing was begun.
        if isinstance(error, (FileExistsError, BlockingIOError)) or not (unfinished / STATE).exists():
            raise
        hint = f"what is finished is in {unfinished}; run the same command again to resume"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(hint) from None
        raise OSError(f"{error}\n{hint}") from error


# --- output ---


def _planned(plan: ConversionPlan, origin: str | None, target: Path | None) -> Answer:
    """The plan, and whether the disk of ``target`` has room for it."""
    space = None if target is None else space_for(plan, unfinished_of(target))
    content = {
        **plan.summary(),
        "modules": {path: str(spec) for path, spec in plan.specs.items()},
        "sensitivity": origin,
        "space": None if space is None else {**space._asdict(), "is_enough": space.is_enough},
    }
    packing = "experts unfused, for their bits differ: for mlx-lm 0.32, mlx-vlm 0.6.5 and newer"
    if plan.packed:
        packing = "experts fused and packed with the shared one: for mlx-lm 0.32, mlx-vlm 0.6.4 and newer"
    lines = [
        *(f"{plan.recipe.name}: {plan.recipe.summary}", "", *component_table(components(plan)), ""),
        f"{size_in_words(plan.nbytes)} in {len(plan.shards)} files; {packing}",
        *_draft(plan),
        *([f"sensitivity of layers: {origin}"] if origin else []),
        *([f"disk: {space}: {'enough' if space.is_enough else 'NOT ENOUGH'}"] if space else []),
    ]
    return Answer(content, lines)


def _draft(plan: ConversionPlan) -> list[str]:
    """A line on the source's draft head, if it has one."""
    words = draft_in_words(plan.source.draft_folders, plan.source.headers.tensors)
    if words is None:
        return []
    if plan.draft is None:
        return [f"draft head ({words}): left out; --keep-draft keeps it"]
    if plan.draft.head is None:
        return [f"draft head ({words}): kept bit for bit"]
    size = size_in_words(plan.draft.nbytes)
    return [f"draft head ({DRAFT_FOLDER}/): quantized by the recipe, {size}; --keep-draft copies it"]
