"""rapid-mlx: ``--reasoning-parser minimax_m3 --tool-call-parser minimax_m3 --enable-auto-tool-choice``."""

import copy
from collections.abc import Mapping
from typing import Any

from mlx_m3_plugin.chat.markers import has_m3_markers
from mlx_m3_plugin.hosts.patching import Arguments, Patch, by_target, call, for_m3, where
from mlx_m3_plugin.hosts.third_party.parsers import (
    NAME,
    REASONING_NEEDS,
    TOOL_NEEDS,
    add_reasoning_parser,
    add_tool_parser,
)

# --- its prefix cache ---


def _is_m3_cache(given: Mapping[str, Any]) -> bool:
    """Ours, or upstream's as it comes from disk: no other model has lists of one cache and of two."""
    cache = given["cache"]
    sizes = [len(getattr(entry, "caches", ())) for entry in cache] if isinstance(cache, list) else []
    return bool(sizes) and set(sizes) <= {1, 2} and (1 in sizes or _is_ours(cache[0]))


def _is_ours(entry: Any) -> bool:
    return type(entry).__module__.startswith("mlx_m3_plugin.")


@where(_is_m3_cache)
def trim_cache_offset(trim: Any, given: Arguments) -> Any:
    """Each layer's caches cut to their first tokens; None, which is a miss, where one cannot be cut.

    Upstream copies lists of caches whole, and the next prompt then follows the end of an earlier one.
    """
    made = []
    for entry in given.arguments["cache"]:
        caches = [_cut(held, given.arguments["trim_by"]) for held in entry.caches]
        if None in caches:
            return None
        made.append(copy.copy(entry))
        made[-1].caches = type(entry.caches)(caches)
    return made


def _cut(held: Any, trim_by: int) -> Any:
    if type(held).__name__ != "KVCache" or held.keys is None or not 0 <= trim_by <= held.offset:
        return None
    made = copy.copy(held)
    made.offset = held.offset - trim_by
    # Arrays of its own: the next token is written into what is there.
    made.keys, made.values = (array[..., : made.offset, :] for array in (held.keys, held.values))
    return made


def _of_m3(held: Any) -> bool:
    return type(held).__name__ == "MiniMaxM3KVCache"


@where(lambda given: isinstance(given["caches"], list) and any(map(_of_m3, given["caches"])))
def first_incompatible_mllm_cache_type(find: Any, given: Arguments) -> Any:
    """Upstream asks for classes of caches that can be merged; M3's can."""
    given.arguments["caches"] = [held for held in given.arguments["caches"] if not _of_m3(held)]
    return call(find, given)


# --- thinking ---

# It routes tokens by ``<think>``, which is in M3's vocabulary and means nothing there.


def from_tokenizer(module: Any, original: Any) -> Any:
    # Upstream reads the vocabulary itself.
    return for_m3(original, lambda given: has_m3_markers(given["tokenizer"]), lambda given: None)


def _serves_m3(module: Any) -> bool:
    # As upstream reads it there.
    return bool(getattr(module.get_config(), "reasoning_parser_name", None) == NAME)


def client_signalled_reasoning_intent(module: Any, original: Any) -> Any:
    """M3 is asked to leave reasoning out by clients alone, not by the host."""
    return for_m3(original, lambda given: _serves_m3(module), lambda given: True)


def extract_thinking_from_request(module: Any, original: Any) -> Any:
    """Whether a request's prompt opens reasoning, where it has M3's own ``thinking_mode``."""

    def has_mode(given: Mapping[str, Any]) -> bool:
        return _serves_m3(module) and _mode(given) is not None

    return for_m3(original, has_mode, lambda given: _mode(given.arguments) == "enabled")


def _mode(given: Mapping[str, Any]) -> Any:
    options = getattr(given["request"], "chat_template_kwargs", None)
    return options.get("thinking_mode") if isinstance(options, dict) else None


_OWN_PARSERS = "never: rapid-mlx knows no marker but its own parsers'"

_PATCHES = {
    "rapid_mlx.memory_cache:_trim_cache_offset(cache, trim_by)": Patch(
        "prefixes are cut where prompts part",
        trim_cache_offset,
        "test_rapid_mlx_copies_lists_of_caches_whole",
    ),
    "rapid_mlx.mllm_cache_compat:first_incompatible_mllm_cache_type(caches)": Patch(
        "images", first_incompatible_mllm_cache_type, "never: rapid-mlx lists the caches that it knows"
    ),
    "rapid_mlx.reasoning:register_parser(name, parser_class)": Patch(
        "a reasoning parser, minimax_m3", add_reasoning_parser, _OWN_PARSERS, REASONING_NEEDS
    ),
    "rapid_mlx.tool_parsers:ToolParserManager.register_module(name, module)": Patch(
        "a tool parser, minimax_m3", add_tool_parser, _OWN_PARSERS, TOOL_NEEDS
    ),
    "rapid_mlx.output_router:OutputRouter.from_tokenizer(tokenizer)": Patch(
        "<think> is text", from_tokenizer, _OWN_PARSERS
    ),
    "rapid_mlx.service.helpers:_client_signalled_reasoning_intent": Patch(
        "reasoning with tools and in short chats",
        client_signalled_reasoning_intent,
        "never: rapid-mlx leaves reasoning out where clients say nothing",
        ("get_config",),
    ),
    "rapid_mlx.service.helpers:_extract_thinking_from_request(request)": Patch(
        "thinking_mode",
        extract_thinking_from_request,
        "never: other models have no thinking_mode",
        ("get_config",),
    ),
}
PATCHES = by_target(_PATCHES)
