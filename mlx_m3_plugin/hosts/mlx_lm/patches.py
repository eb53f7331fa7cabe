"""All that we replace in mlx-lm, beside the modules that it looks up by name."""

from typing import Any

from mlx_m3_plugin.hosts.mlx_lm import chat, drafts
from mlx_m3_plugin.hosts.patching import (
    WHY_FILES_ARE_CHECKED,
    Arguments,
    Patch,
    by_target,
    call,
    dequantize_model,
    for_m3,
    is_draft_head,
    is_m3_checkpoint,
    where_ours,
    with_checks,
)


def load_model(module: Any, original: Any) -> Any:
    """Checks the files of M3 checkpoints, finds shards of any name, and refuses draft heads."""

    def load(given: Arguments) -> Any:
        from mlx_m3_plugin.hosts.mlx_lm.sharded import with_shards_named_as_expected
        from mlx_m3_plugin.weights.headers import check_dtypes

        check_dtypes(given.arguments["model_path"])
        with with_shards_named_as_expected(given.arguments["model_path"]) as path:
            given.arguments["model_path"] = path
            return call(original, given)

    ours = with_checks(for_m3(original, lambda given: is_m3_checkpoint(given["model_path"]), load))
    return for_m3(ours, lambda given: is_draft_head(given["model_path"]), drafts.refuse)


def sharded_load(module: Any, original: Any) -> Any:
    def is_m3_repository(repo: Any) -> bool:
        try:
            return is_m3_checkpoint(module._download(repo, allow_patterns=["config.json"]))
        except Exception:
            # The original fails in the same way and says why.
            return False

    def load(given: Arguments) -> Any:
        # It brings the whole model with it, which others are not to wait for.
        from mlx_m3_plugin.hosts.mlx_lm.sharded import is_ours, load_shared

        config = module.load_config(module._download(given.arguments["repo"], allow_patterns=["config.json"]))
        if not is_ours(module, config):
            return call(original, given)
        return load_shared(module, given.arguments)

    return for_m3(original, lambda given: is_m3_repository(given["repo"]), load)


def awq_main(module: Any, original: Any) -> Any:
    def main() -> None:
        try:
            original()
        except NotImplementedError as error:
            if "minimax_m3" not in str(error):
                raise
            raise NotImplementedError(
                f"{error} It moves scales through up projections, and M3's activation clips what they give. "
                "Use mlx-m3 convert, or mlx_lm.dwq, mlx_lm.gptq or mlx_lm.dynamic_quant."
            ) from None

    return main


@where_ours("model", "check_is_whole")
def save_model(save: Any, given: Arguments) -> None:
    given.arguments["model"].check_is_whole()
    call(save, given)


_MARKERS = "test_neither_knows_the_markers_of_reasoning"

_PATCHES = {
    f"mlx_lm.tokenizer_utils:TokenizerWrapper.__init__(tokenizer): {', '.join(chat.ATTRIBUTES)}": Patch(
        "tool calls, <mm:think>, thinking modes",
        chat.wrapper_init,
        _MARKERS,
        (
            "TokenizerWrapper.apply_chat_template",
            "TokenizerWrapper.rfind_think_start(tokens)",
            "TokenizerWrapper.rfind_think_end(tokens)",
        ),
    ),
    "mlx_lm.tokenizer_utils:TokenizerWrapper.structural_markers": Patch(
        "a lone </mm:think> is not content", chat.structural_markers, _MARKERS, since="0.32"
    ),
    "mlx_lm.tokenizer_utils:_infer_tool_parser": Patch(
        "no parser inferred from M3's template",
        chat.infer_tool_parser,
        "test_mlx_lm_takes_another_parser_for_tools",
    ),
    "mlx_lm.server:ResponseGenerator.generate(request, generation_args)": Patch(
        "replies are taken apart by M3's markers", chat.generate, _MARKERS
    ),
    "mlx_lm.server:APIHandler.handle_chat_completions: body": Patch(
        "fields of requests that mlx-lm does not read",
        chat.completion_request,
        "never: mlx-lm's server does not read tool_choice, or fields about thinking",
    ),
    "mlx_lm.server:ResponseGenerator._tokenize(tokenizer, request, args)": Patch(
        "thinking modes and effort of requests",
        chat.tokenize,
        "never: mlx-lm's server does not read fields about thinking",
        ("GenerationArguments(stop_words, logits, chat_template_kwargs)",),
    ),
    "mlx_lm.server:APIHandler.generate_response": Patch(
        "the role in the first delta only",
        chat.generate_response,
        "test_mlx_lm_sends_the_role_with_every_delta",
    ),
    "mlx_lm.server:APIHandler._set_completion_headers": Patch(
        "status 400 for what M3 can't do",
        chat.set_headers,
        "never: mlx-lm answers 404 to whatever a generation refuses",
    ),
    "mlx_lm.generate:TextStateMachine.split(state, text)": Patch(
        "the parts of M3's replies", chat.split, _MARKERS, ("TextStateMachine.flush(state)",), "0.32"
    ),
    "mlx_lm.generate:SequenceStateMachine.__init__(transitions)": Patch(
        "replies are read as text", chat.sequence_init, "mlx-lm 0.32"
    ),
    "mlx_lm.generate:speculative_generate_step(prompt, model, draft_model, logits_processors, "
    "prompt_cache, max_tokens, prefill_step_size)": Patch(
        "drafts leave whole caches",
        drafts.speculative_generate_step,
        "test_drafts_leave_the_last_token_out_of_the_cache",
    ),
    "mlx_lm.utils:load_model(model_path, lazy, strict)": Patch(
        "load_model checks the files of M3 checkpoints", load_model, WHY_FILES_ARE_CHECKED
    ),
    "mlx_lm.utils:save_model(model)": Patch(
        "no model is saved without its experts on disk", save_model, "never: experts on disk are ours"
    ),
    "mlx_lm.utils:dequantize_model(model)": Patch(
        "dequantizing keeps tensor scales", dequantize_model, "test_dequantizing_loses_tensor_scales"
    ),
    "mlx_lm.quant.awq:main": Patch(
        "awq says what to use instead",
        awq_main,
        "never: AWQ needs layers that are linear in the up projection",
    ),
    "mlx_lm.utils:sharded_load(repo, pipeline_group, tensor_group, return_config)": Patch(
        "sharded_load takes any layout and split",
        sharded_load,
        "test_mlx_lm_shares_what_lacks_weights",
        (
            # What ours uses, which is imported when the first M3 comes.
            "_download(allow_patterns)",
            "_get_classes",
            "load_config",
            "load_model(lazy, get_model_classes)",
            "load_tokenizer(eos_token_ids)",
        ),
    ),
}
PATCHES = by_target(_PATCHES)
