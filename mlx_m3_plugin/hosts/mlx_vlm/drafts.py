"""Patches for drafts: how mlx-vlm finds M3.1's draft head, and what it would get wrong with drafts."""

import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_m3_plugin.hosts.patching import (
    Arguments,
    call,
    for_m3,
    is_draft_head,
    is_m3_checkpoint,
    where,
    where_ours,
    with_checks,
)

log = logging.getLogger("mlx_m3_plugin")

# Whether mlx-vlm asks for a drafter, which may be the draft head of an M3 checkpoint.
LOADS_DRAFTER: ContextVar[bool] = ContextVar("loads_drafter", default=False)


def _is_draft_config(config: object) -> bool:
    from mlx_m3_plugin.weights.headers import is_draft_config

    return is_draft_config(config)


def _is_m3_cache(caches: object) -> bool:
    names = (type(entry).__name__ for entry in caches) if isinstance(caches, list) else ()
    return any("MiniMaxM3KVCache" in name for name in names)


@where(lambda given: _is_m3_cache(given["kv_cache"]))
def remember(update: Any, given: Arguments) -> None:
    """Only the tokens that the cache holds: after a round of drafts it lacks the last one."""
    held = max(entry.offset for entry in given.arguments["kv_cache"])
    given.arguments["token_ids"] = given.arguments["token_ids"][:held]
    call(update, given)


class _Newest(list[list[Any]]):
    """Hidden states of a prompt, layer by layer in pieces: the newest that have ``n_tokens``."""

    def __init__(self, n_tokens: int):
        super().__init__()
        self._n_tokens = n_tokens

    def append(self, piece: list[Any]) -> None:
        super().append(piece)
        while sum(layers[0].shape[1] for layers in self[1:]) >= self._n_tokens:
            del self[0]


@where_ours("drafter", "longest_context")
def hidden_states(init: Any, given: Arguments) -> None:
    """No more of them than the head sees: of a whole prompt they are 61 KB per token."""
    call(init, given)
    given.arguments["self"].chunks = _Newest(given.arguments["drafter"].longest_context)


# What a round of drafts would leave out.
_NOT_IN_ROUNDS = (
    *("logits_processors", "logit_bias", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    "thinking_budget_criteria",
)


# Only our classes have the method.
@where(lambda given: given["draft_model"] is not None and hasattr(type(given["model"]), "as_stored"))
def generate_step(generate: Any, given: Arguments) -> Any:
    """Without drafts where these would change the answer."""
    options = {**given.arguments.get("kwargs", {}), **given.arguments}
    if asked := [name for name in _NOT_IN_ROUNDS if options.get(name)]:
        log.warning("mlx-m3-plugin: no drafts, because mlx-vlm ignores %s with them", ", ".join(asked))
        given.arguments["draft_model"] = None
    elif options["draft_block_size"] == 1:
        # A block is the newest token and its drafts; mlx-vlm would end the answer.
        given.arguments["draft_model"] = None
    else:
        _leave_out_if_dear(given)
    return call(generate, given)


@where_ours("draft_model", "best_length")
def batch_generator(init: Any, given: Arguments) -> None:
    _leave_out_if_dear(given)
    call(init, given)


def _ignores_processors(given: Mapping[str, Any]) -> bool:
    generator = given["self"]
    is_asked = any(given["logits_processors"] or ()) and generator.draft_model is not None
    return is_asked and type(generator.model).__module__.startswith("mlx_m3_plugin.")


@where(_ignores_processors)
def insert(add: Any, given: Arguments) -> Any:
    """Raises: ValueError: what changes logits is asked for, which mlx-vlm would not do with drafts."""
    raise ValueError(
        "penalties, logit_bias and grammars are not supported with drafts: leave them out, or start the "
        "server without --draft-model"
    )


def _leave_out_if_dear(given: Arguments) -> None:
    """Plain decoding where no number of drafts would pay, and the user asks for none."""
    drafter = given.arguments["draft_model"]
    if not hasattr(type(drafter), "best_length") or given.arguments["draft_block_size"] is not None:
        return
    if drafter.best_length() == 0:
        given.arguments["draft_model"] = None
        if not _said_so:
            _said_so.append(True)
            accepted = ", ".join(f"{p:.2f}" for p in drafter.acceptance()[:3])
            log.warning(
                "mlx-m3-plugin: drafting is off, because too few drafts are accepted here to pay for their "
                "verification (expected of the first three: %s); --draft-block-size drafts nevertheless",
                accepted,
            )


_said_so: list[bool] = []


@where_ours("draft_model", "next_block_size")
def next_block_size(choose: Any, given: Arguments) -> int:
    most = min(given.arguments["requested_block_total"], given.arguments["remaining_budget"])
    return int(given.arguments["draft_model"].next_block_size(most)) if most > 1 else most


@where(lambda given: _is_draft_config(given["config"]))
def model_class(get: Any, given: Arguments) -> tuple[ModuleType, str]:
    """By the architecture: what these configs have as ``model_type`` may be the target's."""
    return import_module("mlx_m3_plugin.hosts.mlx_vlm.drafter"), "dspark"


def load_model(module: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    """``load_model`` with checks of M3's checkpoints and draft heads; see :func:`.with_checks`.

    Where a drafter is asked for and an M3 checkpoint is given, it loads that checkpoint's draft head.
    """
    checked = with_checks(original, lambda directory: is_m3_checkpoint(directory) or is_draft_head(directory))

    def load(given: Arguments) -> Any:
        from mlx_m3_plugin.weights.headers import DRAFT_FOLDER

        directory = Path(given.arguments["model_path"])
        if not is_draft_head(directory):
            if not is_draft_head(directory / DRAFT_FOLDER):
                raise ValueError(
                    f"{directory} is a MiniMax-M3 checkpoint without a draft head in {DRAFT_FOLDER}/: leave "
                    "--draft-model out, or name a draft head"
                )
            given.arguments["model_path"] = directory / DRAFT_FOLDER
        if find_spec("mlx_vlm.speculative.drafters.dspark") is None:
            raise ValueError(
                "this mlx-vlm does not know DSpark draft heads: install mlx-vlm 0.7.10 or newer, or leave "
                "--draft-model out"
            )
        return call(checked, given)

    def is_asked(given: Mapping[str, Any]) -> bool:
        directory = given.get("model_path")
        return is_draft_head(directory) or (LOADS_DRAFTER.get() and is_m3_checkpoint(directory))

    return for_m3(checked, is_asked, load)
