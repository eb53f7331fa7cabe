"""All that we replace in mlx-vlm, beside the modules that it looks up by name."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from mlx_m3_plugin.chat.markers import THINK_END, THINK_START
from mlx_m3_plugin.hosts.mlx_vlm import drafts, histories, prompts, replies, requests
from mlx_m3_plugin.hosts.patching import (
    LOADS_STRICTLY,
    WHY_FILES_ARE_CHECKED,
    Arguments,
    Patch,
    by_target,
    call,
    calling_sets,
    dequantize_model,
    where,
    where_ours,
)


@where_ours("model", "as_stored")
def patch_model(patch: Any, given: Arguments) -> Any:
    """Experts in the form of the store; see :mod:`.moe_offload`."""
    # It brings the model with it, which others are not to wait for.
    from mlx_m3_plugin.hosts.mlx_vlm.moe_offload import expect_stored_experts

    expect_stored_experts(given.arguments["model"], Path(given.arguments["offload_dir"]))
    return call(patch, given)


# What save_config has to say of the weights that save_weights has written: by directory.
_described: dict[Path | None, dict[str, Any]] = {}


@where_ours("model", "as_stored")
def save_weights(save: Any, given: Arguments) -> None:
    """In mlx-vlm's own layout."""
    given.arguments["model"], description = given.arguments["model"].as_stored()
    call(save, given)
    _described[Path(given.arguments["save_path"]).resolve()] = description


def _is_described(given: Mapping[str, Any]) -> bool:
    if not _described or _directory_of(given["config_path"]) not in _described:
        return False
    from mlx_m3_plugin.weights.headers import MODEL_TYPES

    config = given["config"]
    return isinstance(config, dict) and config.get("model_type") in MODEL_TYPES


@where(_is_described)
def save_config(save: Any, given: Arguments) -> None:
    """With what is true of the weights beside it: quantization, and the layout of experts."""
    from mlx_m3_plugin.weights.quantization import with_quantization

    description = _described.pop(_directory_of(given.arguments["config_path"]))
    config = with_quantization(given.arguments["config"], description["quantization"])
    packed = {"pack_shared_expert": description["pack_shared_expert"]}
    nested = config.get("text_config")
    given.arguments["config"] = config | (
        {"text_config": nested | packed} if isinstance(nested, dict) else packed
    )
    call(save, given)


def _directory_of(file: Any) -> Path | None:
    """Without links; None for anything but a path."""
    return Path(file).resolve().parent if isinstance(file, (str, PathLike)) else None


# Functions that are replaced together or not at all need what each of them needs.
_SAVE_WEIGHTS, _SAVE_CONFIG = "save_weights(save_path, model)", "save_config(config, config_path)"
_STREAM_INIT = "ThinkingStreamState.__init__(thinking_start_token, thinking_end_token)"
_STREAM_MARKERS = "ThinkingStreamState._build_open_close_markers(thinking_start_token, thinking_end_token)"
_STREAM = ("ThinkingStreamState.feed(text)", "ThinkingStreamDelta(reasoning, content, thinking_closed)")
_HAS_TOKENIZER = ("ResponseGenerator.__init__: tokenizer",)
# Reasons for several patches.
_MARKERS = "test_neither_knows_the_markers_of_reasoning"
_NO_PENALTIES = "test_mlx_vlm_ignores_penalties_with_drafts"
_M3_ONLY = "never: requests and histories of M3 have what others do not"
_OTHER_LAYOUTS = "never: our class holds other layouts"
_COST = "never: what drafts of M3 cost depends on its experts"

_PATCHES = {
    "mlx_vlm.utils:load_model(model_path, lazy, kwargs)": Patch(
        "load_model checks the files of M3 checkpoints", drafts.load_model, WHY_FILES_ARE_CHECKED
    ),
    "mlx_vlm.utils:get_model_and_args(config)": Patch(
        "M3.1's draft head", drafts.model_class, "test_mlx_vlm_has_no_draft_head_of_m31"
    ),
    "mlx_vlm.speculative.drafters:load_drafter(path_or_repo)": Patch(
        "the draft head of a checkpoint, by the checkpoint's name",
        calling_sets(drafts.LOADS_DRAFTER),
        "never: it is a folder in the checkpoint",
    ),
    "mlx_vlm.speculative.utils:SpeculativePrefill.__init__(draft_kind, drafter): chunks": Patch(
        "long prompts with drafts in bounded memory",
        drafts.hidden_states,
        "never: mlx-vlm keeps hidden states of a whole prompt for every drafter",
        ("SpeculativePrefill.append(output): chunks", "SpeculativePrefill.finish(output): chunks"),
        since="0.7.10",
    ),
    "mlx_vlm.generate.ar:generate_step(model, draft_model, draft_block_size, logits_processors, logit_bias,"
    " repetition_penalty, presence_penalty, frequency_penalty)": Patch(
        "penalties and thinking budgets where drafts are asked for", drafts.generate_step, _NO_PENALTIES
    ),
    "mlx_vlm.generate.ar:BatchGenerator.__init__(draft_model, draft_block_size)": Patch(
        "no drafts in batches where they do not pay", drafts.batch_generator, _COST
    ),
    "mlx_vlm.generate.ar:BatchGenerator.insert(logits_processors)": Patch(
        "no penalty that drafts would ignore",
        drafts.insert,
        _NO_PENALTIES,
        ("BatchGenerator.__init__: draft_model, model",),
    ),
    "mlx_vlm.speculative.dflash:_dflash_next_block_size"
    "(draft_model, requested_block_total, remaining_budget)": Patch(
        "as many drafts as pay", drafts.next_block_size, _COST
    ),
    "mlx_vlm.generate.common:PromptCacheState.update(token_ids, kv_cache)": Patch(
        "conversations with drafts go on from what their cache holds",
        drafts.remember,
        "test_mlx_vlm_takes_a_token_for_cached_that_is_not",
    ),
    "mlx_vlm.utils:sharded_load": Patch(
        "sharded_load is strict about M3 checkpoints",
        calling_sets(LOADS_STRICTLY),
        "test_mlx_vlm_cannot_share_it",
        since="0.6.3",
    ),
    "mlx_vlm.utils:load_processor(model_path)": Patch(
        "a chat template where the checkpoint has none; U+FFFD at the end of texts",
        prompts.load_processor,
        "never: checkpoints without a chat template stay",
    ),
    "mlx_vlm.utils:AutoProcessor": Patch(
        "text-only checkpoints open without an image processor",
        prompts.auto_processor,
        "never: mlx-vlm has no text-only M3",
    ),
    "mlx_vlm.utils:ThinkingBudgetCriteria.__init__(tokenizer, thinking_start_token, thinking_end_token,"
    " enable_thinking, prompt_preopens_thinking)": Patch(
        "thinking budgets", prompts.thinking_budget, _MARKERS, since="0.7"
    ),
    "mlx_vlm.quant_utils:dequantize_model(model)": Patch(
        "dequantizing keeps tensor scales",
        dequantize_model,
        "never: mlx-vlm's dequantize_model knows the tensor scales of its own layers alone",
    ),
    f"mlx_vlm.utils:{_SAVE_WEIGHTS}": Patch(
        "save_weights writes mlx-vlm's own M3 layout", save_weights, _OTHER_LAYOUTS, (_SAVE_CONFIG,)
    ),
    f"mlx_vlm.utils:{_SAVE_CONFIG}": Patch(
        "save_config describes that layout", save_config, _OTHER_LAYOUTS, (_SAVE_WEIGHTS,)
    ),
    "mlx_vlm.moe_offload:patch_model(model, offload_dir)": Patch(
        "expert offload of mlx-vlm's own M3 layout",
        patch_model,
        "never: our class holds experts and the shared expert apart",
    ),
    "mlx_vlm.prompt_utils:apply_chat_template(processor, config, prompt)": Patch(
        "reasoning in histories", prompts.apply_chat_template, _M3_ONLY
    ),
    "mlx_vlm.prompt_utils:get_chat_template(processor, messages, kwargs)": Patch(
        "thinking modes, tools in their order", prompts.get_chat_template, _M3_ONLY
    ),
    "mlx_vlm.trainer.vlm.sft.dataset:VisionDataset.process(row)": Patch(
        "training rows with tools", prompts.training_row, "test_mlx_vlm_trains_without_tools", since="0.7.10"
    ),
    "mlx_vlm.prompt_utils:extract_text_from_content(content)": Patch(
        "other roles' content lists are joined as M3's template joins them",
        histories.joined_content,
        _M3_ONLY,
    ),
    "mlx_vlm.prompt_utils:normalize_image_content(content)": Patch(
        "users' content lists are joined as M3's template joins them",
        histories.joined_content,
        _M3_ONLY,
        since="0.7.4",
    ),
    "mlx_vlm.tool_parsers:_infer_tool_parser_from_processor(processor)": Patch(
        "M3's parser with any template", prompts.infer_tool_parser, "mlx-vlm 0.7.1"
    ),
    "mlx_vlm.tools.registry:_infer_tool_parser_from_processor(processor)": Patch(
        "M3's parser with any template",
        prompts.infer_tool_parser,
        "never: mlx-vlm looks for M3's markers in the template",
    ),
    **{
        f"mlx_vlm.server.{api}:register_routes(app, deps): build_gen_args, count_thinking_tag_tokens": Patch(
            "thinking modes and template arguments of requests", requests.register_routes, _M3_ONLY
        )
        for api in ("openai", "anthropic")
    },
    "mlx_vlm.server.responses_state:_response_items_to_chat(items)": Patch(
        "reasoning and whole turns in the items of responses",
        histories.responses,
        _M3_ONLY,
        ("_response_call_to_chat_tool_call(item)",),
    ),
    "mlx_vlm.server.anthropic:_anthropic_messages_to_internal(request)": Patch(
        "thinking and the order of blocks in messages",
        histories.anthropic,
        _M3_ONLY,
        ("_anthropic_tools_to_openai(tools)", "_anthropic_tool_choice_to_openai(tool_choice)"),
    ),
    "mlx_vlm.server.generation:ResponseGenerator.generate(prompt)": Patch(
        "replies whose markers come whole",
        replies.generate,
        _MARKERS,
        ("StreamingToken(text, finish_reason, token_count)", *_HAS_TOKENIZER, *requests.ARGUMENTS),
    ),
    "mlx_vlm.server.generation:ResponseGenerator._wrap_processors_until_thinking_done"
    "(args, processors)": Patch(
        "grammars that begin with the answer",
        replies.wrap_processors,
        _MARKERS,
        ("ResponseGenerator.generate(prompt)",),
    ),
    "mlx_vlm.server.generation:ResponseGenerator._prompt_has_open_thinking(args, input_ids)": Patch(
        "reasoning that the end of a prompt opens",
        replies.at_prompt_end(THINK_START),
        _MARKERS,
        _HAS_TOKENIZER,
    ),
    "mlx_vlm.server.generation:ResponseGenerator._prompt_thinking_already_closed(args, input_ids)": Patch(
        "reasoning that the end of a prompt closes",
        replies.at_prompt_end(THINK_END),
        _MARKERS,
        _HAS_TOKENIZER,
        since="0.7",
    ),
    f"mlx_vlm.server.responses_state:{_STREAM_INIT}": Patch(
        "<mm:think> in replies that stream",
        replies.thinking_stream_init,
        _MARKERS,
        (_STREAM_MARKERS, *_STREAM),
    ),
    f"mlx_vlm.server.responses_state:{_STREAM_MARKERS}": Patch(
        "<think> in them is text", replies.thinking_stream_markers, _MARKERS, (_STREAM_INIT, *_STREAM)
    ),
    "mlx_vlm.server.responses_state:_split_thinking(text, thinking_start_token)": Patch(
        "several reasonings in one reply", replies.split_thinking, _MARKERS
    ),
    "mlx_vlm.tools.extractor:process_tool_calls(model_output, tool_module)": Patch(
        "text beside calls, as it was written", replies.process_tool_calls, _MARKERS
    ),
    "mlx_vlm.server.responses_state:process_tool_calls(model_output, tool_module)": Patch(
        "text beside calls, as it was written",
        replies.process_tool_calls,
        "mlx-vlm 0.7",
        ("suppress_tool_call_content",),
    ),
    "mlx_vlm.server.responses_state:_response_output_items_from_text"
    "(full_text, message_id, thinking_start_token)": Patch(
        "text beside calls in the items of responses", replies.response_items, _MARKERS
    ),
    "mlx_vlm.server.responses_state:strip_protocol_markers(text, thinking_start_token)": Patch(
        "markers that are text, beside calls", replies.strip_markers, _MARKERS, since="0.7.1"
    ),
    "mlx_vlm.server.responses_state:ToolCallStreamState.feed(text, last): finished": Patch(
        "text beside calls in replies that stream", replies.shown_content, _MARKERS, since="0.7.1"
    ),
    "mlx_vlm.server.responses_state:suppress_tool_call_content(tc_start, delta_content)": Patch(
        "text after calls", replies.text_after_calls, "mlx-vlm 0.7"
    ),
    "mlx_vlm.tools.streaming:ToolCallDeltaState.feed(text): tools, parser_name": Patch(
        "calls as they are completed",
        replies.tool_deltas,
        "never: mlx-vlm reads a block of calls when it is closed",
        ("ToolCallDeltaState._update(index, name, arguments)", "ToolCallDeltaState.__init__: calls"),
    ),
}
PATCHES = by_target(_PATCHES)
