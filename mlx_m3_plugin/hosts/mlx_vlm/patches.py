"""All that we replace in mlx-vlm, beside the modules that it looks up by name."""

from os import PathLike
from pathlib import Path
from typing import Any

from mlx_m3_plugin.hosts.checks import strictly, with_checks
from mlx_m3_plugin.hosts.mlx_vlm import prompts, server
from mlx_m3_plugin.hosts.patching import Arguments, Patch, call, for_m3

# What save_config has to say of the weights that save_weights has written: by directory.
_described: dict[Path | None, dict[str, Any]] = {}


def save_weights(module: Any, original: Any) -> Any:
    """Have it write mlx-vlm's own layout."""

    def save_m3(given: Arguments) -> None:
        given.arguments["model"], description = given.arguments["model"].as_stored()
        call(original, given)
        _described[_real(given.arguments["save_path"])] = description

    # Only our classes have the method.
    return for_m3(original, lambda given: hasattr(type(given["model"]), "as_stored"), save_m3)


def save_config(module: Any, original: Any) -> Any:
    """Have it describe what :func:`save_weights` has written."""

    def is_described(given: Any) -> bool:
        if not _described or _real(given["config_path"], parent=True) not in _described:
            return False
        from mlx_m3_plugin.weights.files import MODEL_TYPES

        config = given["config"]
        return isinstance(config, dict) and config.get("model_type") in MODEL_TYPES

    def save_described(given: Arguments) -> None:
        description = _described.pop(_real(given.arguments["config_path"], parent=True))
        given.arguments["config"] = describe(given.arguments["config"], description)
        call(original, given)

    return for_m3(original, is_described, save_described)


def _real(path: Any, parent: bool = False) -> Path | None:
    """The path, or the directory it is in, without links; None for what is no path."""
    if not isinstance(path, (str, PathLike)):
        return None
    real = Path(path).resolve()
    return real.parent if parent else real


def describe(config: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    """``config`` with what is true of the weights beside it: quantization, and the layout of experts."""
    from mlx_m3_plugin.weights import with_quantization

    config = with_quantization(config, description["quantization"])
    packed = {"pack_shared_expert": description["pack_shared_expert"]}
    if isinstance(config.get("text_config"), dict):
        return {**config, "text_config": config["text_config"] | packed}
    return config | packed


# Two functions that are replaced together or not at all.
_SAVING = ("save_weights(save_path, model)", "save_config(config, config_path)")
_THINKING_STREAM = (
    "ThinkingStreamState.__init__(thinking_start_token, thinking_end_token)",
    "ThinkingStreamState._build_open_close_markers(thinking_start_token, thinking_end_token)",
    "ThinkingStreamState.feed(text)",
    "ThinkingStreamDelta(reasoning, content, thinking_closed)",
)
_ENDPOINTS = ("register_routes(app, deps): build_gen_args, count_thinking_tag_tokens",)
_HAS_TOKENIZER = "ResponseGenerator.__init__: tokenizer"
_KNOWS_MARKERS = "mlx-vlm knows M3's markers"
_MARKERS_FAULT = "test_neither_knows_the_markers_of_reasoning"
_M3_ONLY = "never: requests and histories of M3 have what others do not"

PATCHES = [
    Patch(
        "mlx_vlm.utils:load_model",
        "load_model checks the files of M3 checkpoints",
        lambda module, original: with_checks(original),
        ("load_model(model_path, lazy)",),
        until="never: MLX opens files that are cut off, and lets the second tensor of one name win",
    ),
    Patch(
        "mlx_vlm.utils:sharded_load",
        "sharded_load is strict about M3 checkpoints",
        lambda module, original: strictly(original),
        ("sharded_load",),
        until="mlx-vlm shards M3, and loads shards strictly",
        fault="test_mlx_vlm_cannot_share_it",
    ),
    Patch(
        "mlx_vlm.utils:load_processor",
        "a chat template where the checkpoint has none",
        prompts.load_processor,
        ("load_processor(model_path)",),
        until="never: checkpoints without a chat template stay",
    ),
    Patch(
        "mlx_vlm.utils:AutoProcessor",
        "text-only checkpoints open without an image processor",
        prompts.auto_processor,
        ("AutoProcessor",),
        until="never: mlx-vlm has no text-only M3",
    ),
    Patch(
        "mlx_vlm.utils:ThinkingBudgetCriteria.__init__",
        "thinking budgets",
        prompts.thinking_budget,
        (
            "ThinkingBudgetCriteria.__init__(tokenizer, thinking_start_token, thinking_end_token,"
            " enable_thinking, prompt_preopens_thinking)",
        ),
        until=_KNOWS_MARKERS,
        fault=_MARKERS_FAULT,
        since="0.7",
    ),
    Patch(
        "mlx_vlm.utils:save_weights",
        "save_weights writes mlx-vlm's own M3 layout",
        save_weights,
        _SAVING,
        until="never: our class holds other layouts",
    ),
    Patch(
        "mlx_vlm.utils:save_config",
        "save_config describes that layout",
        save_config,
        _SAVING,
        until="never: our class holds other layouts",
    ),
    Patch(
        "mlx_vlm.prompt_utils:apply_chat_template",
        "reasoning in histories",
        prompts.apply_chat_template,
        ("apply_chat_template(processor, config, prompt)",),
        until=_M3_ONLY,
    ),
    Patch(
        "mlx_vlm.prompt_utils:get_chat_template",
        "thinking modes, tools in their order",
        prompts.get_chat_template,
        ("get_chat_template(processor, messages, kwargs)",),
        until=_M3_ONLY,
    ),
    *(
        Patch(
            f"{module}:_infer_tool_parser_from_processor",
            "M3's parser, whatever the template",
            prompts.infer_tool_parser,
            ("_infer_tool_parser_from_processor(processor)",),
            until=until,
        )
        for module, until in (
            ("mlx_vlm.tool_parsers", "mlx-vlm 0.7.1"),
            ("mlx_vlm.tools.registry", "never: mlx-vlm looks for M3's markers in the template"),
        )
    ),
    *(
        Patch(
            f"mlx_vlm.server.{api}:register_routes",
            "thinking modes and template arguments of requests",
            server.register_routes,
            _ENDPOINTS,
            until=_M3_ONLY,
        )
        for api in ("openai", "anthropic")
    ),
    Patch(
        "mlx_vlm.server.generation:ResponseGenerator.generate",
        "replies whose markers come whole",
        server.generate,
        ("ResponseGenerator.generate(prompt)", "StreamingToken(text, finish_reason, token_count)"),
        until=_KNOWS_MARKERS,
        fault=_MARKERS_FAULT,
    ),
    Patch(
        "mlx_vlm.server.generation:ResponseGenerator._prompt_has_open_thinking",
        "reasoning that the end of a prompt opens",
        server.prompt_opens_reasoning,
        ("ResponseGenerator._prompt_has_open_thinking(args, input_ids)", _HAS_TOKENIZER),
        until=_KNOWS_MARKERS,
        fault=_MARKERS_FAULT,
    ),
    Patch(
        "mlx_vlm.server.generation:ResponseGenerator._prompt_thinking_already_closed",
        "reasoning that the end of a prompt closes",
        server.prompt_closes_reasoning,
        ("ResponseGenerator._prompt_thinking_already_closed(args, input_ids)", _HAS_TOKENIZER),
        until=_KNOWS_MARKERS,
        fault=_MARKERS_FAULT,
        since="0.7",
    ),
    Patch(
        "mlx_vlm.server.responses_state:ThinkingStreamState.__init__",
        "<mm:think> in replies that stream",
        server.thinking_stream_init,
        _THINKING_STREAM,
        until=_KNOWS_MARKERS,
        fault=_MARKERS_FAULT,
    ),
    Patch(
        "mlx_vlm.server.responses_state:ThinkingStreamState._build_open_close_markers",
        "<think> in them is text",
        server.thinking_stream_markers,
        _THINKING_STREAM,
        until=_KNOWS_MARKERS,
        fault=_MARKERS_FAULT,
    ),
    Patch(
        "mlx_vlm.server.responses_state:_split_thinking",
        "several reasonings in one reply",
        server.split_thinking,
        ("_split_thinking(text, thinking_start_token)",),
        until=_KNOWS_MARKERS,
        fault=_MARKERS_FAULT,
    ),
    Patch(
        "mlx_vlm.server.responses_state:suppress_tool_call_content",
        "text after calls",
        server.text_after_calls,
        ("suppress_tool_call_content(tc_start, delta_content)",),
        until="mlx-vlm 0.7",
    ),
    Patch(
        "mlx_vlm.tools.streaming:ToolCallDeltaState.feed",
        "calls as they are completed",
        server.tool_deltas,
        (
            "ToolCallDeltaState.feed(text): tools, parser_name",
            "ToolCallDeltaState._update(index, name, arguments)",
            "ToolCallDeltaState.__init__: calls",
        ),
        until="never: mlx-vlm reads a block of calls when it is closed",
    ),
]
