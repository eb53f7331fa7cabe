"""All that we replace in mlx-vlm, beside the modules that it looks up by name."""

from collections.abc import Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from mlx_m3_plugin.chat.markers import THINK_END, THINK_START
from mlx_m3_plugin.hosts.mlx_vlm import drafts, histories, prompts, replies, requests
from mlx_m3_plugin.hosts.patching import (
    Arguments,
    Patch,
    call,
    dequantize_model,
    strictly,
    where,
)


# Only our classes have the method.
@where(lambda given: hasattr(type(given["model"]), "as_stored"))
def patch_model(patch: Any, given: Arguments) -> Any:
    """Experts in the form of the store; see :mod:`.moe_offload`."""
    # It brings the model with it, which others are not to wait for.
    from mlx_m3_plugin.hosts.mlx_vlm.moe_offload import expect_stored_experts

    expect_stored_experts(given.arguments["model"], Path(given.arguments["offload_dir"]))
    return call(patch, given)


# What save_config has to say of the weights that save_weights has written: by directory.
_described: dict[Path | None, dict[str, Any]] = {}


# Only our classes have the method.
@where(lambda given: hasattr(type(given["model"]), "as_stored"))
def save_weights(save: Any, given: Arguments) -> None:
    """In mlx-vlm's own layout."""
    given.arguments["model"], description = given.arguments["model"].as_stored()
    call(save, given)
    _described[_real(given.arguments["save_path"])] = description


def _is_described(given: Mapping[str, Any]) -> bool:
    if not _described or _real(given["config_path"], parent=True) not in _described:
        return False
    from mlx_m3_plugin.weights.headers import MODEL_TYPES

    config = given["config"]
    return isinstance(config, dict) and config.get("model_type") in MODEL_TYPES


@where(_is_described)
def save_config(save: Any, given: Arguments) -> None:
    """Describes what :func:`save_weights` has written."""
    description = _described.pop(_real(given.arguments["config_path"], parent=True))
    given.arguments["config"] = describe(given.arguments["config"], description)
    call(save, given)


def _real(path: Any, parent: bool = False) -> Path | None:
    """The path, or the directory it is in, without links; None for anything but a path."""
    if not isinstance(path, (str, PathLike)):
        return None
    real = Path(path).resolve()
    return real.parent if parent else real


def describe(config: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    """``config`` with what is true of the weights beside it: quantization, and the layout of experts."""
    from mlx_m3_plugin.weights.quantization import with_quantization

    config = with_quantization(config, description["quantization"])
    packed = {"pack_shared_expert": description["pack_shared_expert"]}
    if isinstance(config.get("text_config"), dict):
        return {**config, "text_config": config["text_config"] | packed}
    return config | packed


# Functions that are replaced together or not at all need what each of them needs.
_SAVE_WEIGHTS, _SAVE_CONFIG = "save_weights(save_path, model)", "save_config(config, config_path)"
_STREAM_INIT = "ThinkingStreamState.__init__(thinking_start_token, thinking_end_token)"
_STREAM_MARKERS = "ThinkingStreamState._build_open_close_markers(thinking_start_token, thinking_end_token)"
_STREAM = ("ThinkingStreamState.feed(text)", "ThinkingStreamDelta(reasoning, content, thinking_closed)")
_HAS_TOKENIZER = ("ResponseGenerator.__init__: tokenizer",)
_M3_ONLY = "never: requests and histories of M3 have what others do not"

until_markers = partial(
    Patch, until="mlx-vlm knows M3's markers", fault="test_neither_knows_the_markers_of_reasoning"
)

PATCHES = [
    Patch(
        "mlx_vlm.utils:load_model(model_path, lazy, kwargs)",
        "load_model checks the files of M3 checkpoints",
        drafts.load_model,
        until="never: MLX opens files that are cut off, and lets the second tensor of one name win",
    ),
    Patch(
        "mlx_vlm.utils:get_model_and_args(config)",
        "M3.1's draft head",
        drafts.model_class,
        until="mlx-vlm has M3.1's draft head",
        fault="test_mlx_vlm_has_no_draft_head_of_m31",
    ),
    Patch(
        "mlx_vlm.speculative.drafters:load_drafter(path_or_repo)",
        "the draft head of a checkpoint, by the checkpoint's name",
        drafts.load_drafter,
        until="never: it is a folder in the checkpoint",
    ),
    Patch(
        "mlx_vlm.speculative.utils:SpeculativePrefill.__init__(draft_kind, drafter): chunks",
        "long prompts with drafts in bounded memory",
        drafts.hidden_states,
        ("SpeculativePrefill.append(output): chunks", "SpeculativePrefill.finish(output): chunks"),
        until="never: mlx-vlm keeps hidden states of a whole prompt for every drafter",
        since="0.7.10",
    ),
    Patch(
        "mlx_vlm.generate.ar:generate_step(model, draft_model, draft_block_size, logits_processors,"
        " logit_bias, repetition_penalty, presence_penalty, frequency_penalty)",
        "penalties and thinking budgets where drafts are asked for",
        drafts.generate_step,
        until="mlx-vlm obeys them with drafts",
        fault="test_mlx_vlm_ignores_penalties_with_drafts",
    ),
    Patch(
        "mlx_vlm.generate.ar:BatchGenerator.__init__(draft_model, draft_block_size)",
        "no drafts in batches where they do not pay",
        drafts.batch_generator,
        until="never: what drafts of M3 cost depends on its experts",
    ),
    Patch(
        "mlx_vlm.generate.ar:BatchGenerator.insert(logits_processors)",
        "no penalty that drafts would ignore",
        drafts.insert,
        ("BatchGenerator.__init__: draft_model, model",),
        until="mlx-vlm obeys them with drafts",
        fault="test_mlx_vlm_ignores_penalties_with_drafts",
    ),
    Patch(
        "mlx_vlm.speculative.dflash:_dflash_next_block_size(draft_model, requested_block_total,"
        " remaining_budget)",
        "as many drafts as pay",
        drafts.next_block_size,
        until="never: what drafts of M3 cost depends on its experts",
    ),
    Patch(
        "mlx_vlm.generate.common:PromptCacheState.update(token_ids, kv_cache)",
        "conversations with drafts go on from what their cache holds",
        drafts.remember,
        until="mlx-vlm counts the token that a round of drafts leaves out of the cache",
        fault="test_mlx_vlm_takes_a_token_for_cached_that_is_not",
    ),
    Patch(
        "mlx_vlm.utils:sharded_load",
        "sharded_load is strict about M3 checkpoints",
        lambda module, original: strictly(original),
        until="mlx-vlm shards M3, and loads shards strictly",
        fault="test_mlx_vlm_cannot_share_it",
        since="0.6.3",
    ),
    Patch(
        "mlx_vlm.utils:load_processor(model_path)",
        "a chat template where the checkpoint has none; U+FFFD at the end of texts",
        prompts.load_processor,
        until="never: checkpoints without a chat template stay",
    ),
    Patch(
        "mlx_vlm.utils:AutoProcessor",
        "text-only checkpoints open without an image processor",
        prompts.auto_processor,
        until="never: mlx-vlm has no text-only M3",
    ),
    until_markers(
        "mlx_vlm.utils:ThinkingBudgetCriteria.__init__(tokenizer, thinking_start_token, thinking_end_token,"
        " enable_thinking, prompt_preopens_thinking)",
        "thinking budgets",
        prompts.thinking_budget,
        since="0.7",
    ),
    Patch(
        "mlx_vlm.quant_utils:dequantize_model(model)",
        "dequantizing keeps tensor scales",
        dequantize_model,
        until="never: mlx-vlm's dequantize_model knows the tensor scales of its own layers alone",
    ),
    Patch(
        f"mlx_vlm.utils:{_SAVE_WEIGHTS}",
        "save_weights writes mlx-vlm's own M3 layout",
        save_weights,
        (_SAVE_CONFIG,),
        until="never: our class holds other layouts",
    ),
    Patch(
        f"mlx_vlm.utils:{_SAVE_CONFIG}",
        "save_config describes that layout",
        save_config,
        (_SAVE_WEIGHTS,),
        until="never: our class holds other layouts",
    ),
    Patch(
        "mlx_vlm.moe_offload:patch_model(model, offload_dir)",
        "expert offload of mlx-vlm's own M3 layout",
        patch_model,
        until="never: our class holds experts and the shared expert apart",
    ),
    Patch(
        "mlx_vlm.prompt_utils:apply_chat_template(processor, config, prompt)",
        "reasoning in histories",
        prompts.apply_chat_template,
        until=_M3_ONLY,
    ),
    Patch(
        "mlx_vlm.prompt_utils:get_chat_template(processor, messages, kwargs)",
        "thinking modes, tools in their order",
        prompts.get_chat_template,
        until=_M3_ONLY,
    ),
    Patch(
        "mlx_vlm.trainer.vlm.sft.dataset:VisionDataset.process(row)",
        "training rows with tools",
        prompts.training_row,
        until="mlx-vlm renders a row's tools",
        fault="test_mlx_vlm_trains_without_tools",
        since="0.7.10",
    ),
    *(
        Patch(
            f"mlx_vlm.prompt_utils:{name}(content)",
            f"{whose} content lists are joined as M3's template joins them",
            histories.joined_content,
            until=_M3_ONLY,
            since=since,
        )
        for name, whose, since in (
            ("extract_text_from_content", "other roles'", ""),
            ("normalize_image_content", "users'", "0.7.4"),
        )
    ),
    *(
        Patch(
            f"{module}:_infer_tool_parser_from_processor(processor)",
            "M3's parser with any template",
            prompts.infer_tool_parser,
            until=until,
        )
        for module, until in (
            ("mlx_vlm.tool_parsers", "mlx-vlm 0.7.1"),
            ("mlx_vlm.tools.registry", "never: mlx-vlm looks for M3's markers in the template"),
        )
    ),
    *(
        Patch(
            f"mlx_vlm.server.{api}:register_routes(app, deps): build_gen_args, count_thinking_tag_tokens",
            "thinking modes and template arguments of requests",
            requests.register_routes,
            until=_M3_ONLY,
        )
        for api in ("openai", "anthropic")
    ),
    Patch(
        "mlx_vlm.server.responses_state:_response_items_to_chat(items)",
        "reasoning and whole turns in the items of responses",
        histories.responses,
        ("_response_call_to_chat_tool_call(item)",),
        until=_M3_ONLY,
    ),
    Patch(
        "mlx_vlm.server.anthropic:_anthropic_messages_to_internal(request)",
        "thinking and the order of blocks in messages",
        histories.anthropic,
        ("_anthropic_tools_to_openai(tools)", "_anthropic_tool_choice_to_openai(tool_choice)"),
        until=_M3_ONLY,
    ),
    until_markers(
        "mlx_vlm.server.generation:ResponseGenerator.generate(prompt)",
        "replies whose markers come whole",
        replies.generate,
        (
            "StreamingToken(text, finish_reason, token_count)",
            *_HAS_TOKENIZER,
            *requests.ARGUMENTS,
        ),
    ),
    until_markers(
        "mlx_vlm.server.generation:ResponseGenerator._wrap_processors_until_thinking_done(args, processors)",
        "grammars that begin with the answer",
        replies.wrap_processors,
        ("ResponseGenerator.generate(prompt)",),
    ),
    until_markers(
        "mlx_vlm.server.generation:ResponseGenerator._prompt_has_open_thinking(args, input_ids)",
        "reasoning that the end of a prompt opens",
        replies.at_prompt_end(THINK_START),
        _HAS_TOKENIZER,
    ),
    until_markers(
        "mlx_vlm.server.generation:ResponseGenerator._prompt_thinking_already_closed(args, input_ids)",
        "reasoning that the end of a prompt closes",
        replies.at_prompt_end(THINK_END),
        _HAS_TOKENIZER,
        since="0.7",
    ),
    until_markers(
        f"mlx_vlm.server.responses_state:{_STREAM_INIT}",
        "<mm:think> in replies that stream",
        replies.thinking_stream_init,
        (_STREAM_MARKERS, *_STREAM),
    ),
    until_markers(
        f"mlx_vlm.server.responses_state:{_STREAM_MARKERS}",
        "<think> in them is text",
        replies.thinking_stream_markers,
        (_STREAM_INIT, *_STREAM),
    ),
    until_markers(
        "mlx_vlm.server.responses_state:_split_thinking(text, thinking_start_token)",
        "several reasonings in one reply",
        replies.split_thinking,
    ),
    until_markers(
        "mlx_vlm.tools.extractor:process_tool_calls(model_output, tool_module)",
        "text beside calls, as it was written",
        replies.process_tool_calls,
    ),
    Patch(
        "mlx_vlm.server.responses_state:process_tool_calls(model_output, tool_module)",
        "text beside calls, as it was written",
        replies.process_tool_calls,
        ("suppress_tool_call_content",),
        until="mlx-vlm 0.7",
    ),
    until_markers(
        "mlx_vlm.server.responses_state:_response_output_items_from_text"
        "(full_text, message_id, thinking_start_token)",
        "text beside calls in the items of responses",
        replies.response_items,
    ),
    until_markers(
        "mlx_vlm.server.responses_state:strip_protocol_markers(text, thinking_start_token)",
        "markers that are text, beside calls",
        replies.strip_markers,
        since="0.7.1",
    ),
    until_markers(
        "mlx_vlm.server.responses_state:ToolCallStreamState.feed(text, last): finished",
        "text beside calls in replies that stream",
        replies.shown_content,
        since="0.7.1",
    ),
    Patch(
        "mlx_vlm.server.responses_state:suppress_tool_call_content(tc_start, delta_content)",
        "text after calls",
        replies.text_after_calls,
        until="mlx-vlm 0.7",
    ),
    Patch(
        "mlx_vlm.tools.streaming:ToolCallDeltaState.feed(text): tools, parser_name",
        "calls as they are completed",
        replies.tool_deltas,
        ("ToolCallDeltaState._update(index, name, arguments)", "ToolCallDeltaState.__init__: calls"),
        until="never: mlx-vlm reads a block of calls when it is closed",
    ),
]
