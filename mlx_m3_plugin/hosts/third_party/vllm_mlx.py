"""vllm-mlx: ``--reasoning-parser minimax_m3 --tool-call-parser minimax_m3
--enable-auto-tool-choice``."""

from typing import Any

from mlx_m3_plugin.chat.markers import THINK_START
from mlx_m3_plugin.hosts.patching import Arguments, Patch, by_target, call, for_m3
from mlx_m3_plugin.hosts.third_party.parsers import (
    NAME,
    REASONING_NEEDS,
    TOOL_NEEDS,
    add_reasoning_parser,
    add_tool_parser,
)


def detect_implicit_thinking(module: Any, original: Any) -> Any:
    """Whether the prompt opens reasoning; upstream looks for ``<think>`` alone."""

    def detect(given: Arguments) -> bool:
        render = getattr(given.arguments["engine"], "_apply_chat_template", None)
        if render is None:
            return bool(call(original, given))
        options = given.arguments["chat_kwargs"] or {}
        passed = {key: options.get(key) for key in ("chat_template_kwargs", "enable_thinking", "tools")}
        prompt = render([{"role": "user", "content": "hi"}], **passed)
        return str(prompt).rstrip().endswith(THINK_START)

    return for_m3(original, lambda given: module._reasoning_parser_name == NAME, detect)


_PATCHES = {
    "vllm_mlx.reasoning:register_parser(name, parser_class)": Patch(
        "a reasoning parser, minimax_m3",
        add_reasoning_parser,
        "never: vllm-mlx knows no marker but its own parsers'",
        REASONING_NEEDS,
    ),
    "vllm_mlx.tool_parsers:ToolParserManager.register_module(name, module)": Patch(
        "a tool parser, minimax_m3",
        add_tool_parser,
        "never: vllm-mlx has the calls of MiniMax-M2 alone",
        TOOL_NEEDS,
    ),
    "vllm_mlx.server:_detect_implicit_thinking(engine, chat_kwargs)": Patch(
        "prompts that open reasoning, in replies that stream",
        detect_implicit_thinking,
        "never: vllm-mlx looks for <think> alone",
        ("_build_reasoning_parser: _reasoning_parser_name",),
    ),
}
PATCHES = by_target(_PATCHES)
