"""Drafts in mlx-lm (``--draft-model``), by a smaller M3: caches that the next request can go on from."""

import sys
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_m3_plugin.hosts.patching import Arguments, call, for_m3


def speculative_generate_step(module: Any, original: Any) -> Any:
    """Gives what ``generate_step`` gives, and leaves every token of it in the caches of both models.

    Upstream's caches lack the last token where it was not drafted, and the draft model's lacks one or more
    where all were accepted or none drafted.  mlx-lm's server stores them as if nothing were missing.
    """

    def generate(given: Arguments) -> Iterator[Any]:
        options = given.arguments
        if options["max_tokens"] < 0:
            # No limit.  Upstream takes the minimum of it and the number of tokens to draft.
            options["max_tokens"] = sys.maxsize
        before = options["prompt"][:-1]
        # until: mlx-lm 0.32.  Before, plain decoding too shows processors the prompt's last token alone.
        if "stream" in options:
            options["logits_processors"] = [
                partial(_with_all_tokens, processor, before)
                for processor in options["logits_processors"] or ()
            ]
        if options["prompt_cache"] is None:
            yield from call(original, given)
            return
        tokens = options["prompt"].tolist()
        held = [(model, cache, _offset(cache)) for model, cache in _pairs(options) if _is_ours(model)]

        def read_the_rest() -> None:
            # A parameter from 0.32 on.
            stream: Any = options.get("stream") or getattr(module, "generation_stream", mx.default_device())
            step = options["prefill_step_size"]
            with mx.stream(stream):
                for model, cache, start in held:
                    for at in range(_offset(cache) - start, len(tokens), step):
                        model(mx.array([tokens[at : at + step]]), cache=cache)
                        mx.eval([entry.state for entry in cache])

        with closing(call(original, given)) as generated:
            try:
                for token, *more in generated:
                    tokens.append(int(token))
                    yield (token, *more)
            except GeneratorExit:
                generated.close()
                read_the_rest()
                raise
        read_the_rest()

    return for_m3(original, lambda given: _is_ours(given["model"]), generate)


def _with_all_tokens(processor: Any, before: mx.array, tokens: mx.array, logits: mx.array) -> mx.array:
    return processor(mx.concatenate([before.astype(tokens.dtype), tokens]), logits)


def refuse(given: Arguments) -> Any:
    """For a DSpark draft head, which reads hidden states that mlx-lm's loop does not pass on."""
    path = given.arguments["model_path"]
    raise ValueError(
        f"{path} is a DSpark draft head, which mlx-lm does not run; mlx-vlm's commands do: "
        f"mlx_vlm.generate --model CHECKPOINT --draft-model {path}"
    )


def _is_ours(model: Any) -> bool:
    # Only our classes have the method.
    return hasattr(type(model), "check_is_whole")


def _pairs(options: Any) -> list[tuple[Any, list[Any]]]:
    """Each model with its part of the prompt cache."""
    cache, count = options["prompt_cache"], len(options["model"].layers)
    if len(cache) <= count:
        raise ValueError(
            f"the prompt cache has {len(cache)} entries, the model's alone, and none for the draft model: "
            "it was made without a draft model; leave out either the draft model or the cache"
        )
    return [(options["model"], cache[:count]), (options["draft_model"], cache[count:])]


def _offset(cache: list[Any]) -> int:
    return cache[0].caches[0].offset
