"""mlx-vlm's prompts for M3: thinking modes, whole histories, tools as they were given, a template."""

from collections import UserList
from inspect import signature
from types import ModuleType
from typing import Any

from mlx_m3_plugin.chat.history import prepared
from mlx_m3_plugin.chat.reasoning import thinking_mode
from mlx_m3_plugin.chat.template import CHAT_TEMPLATE
from mlx_m3_plugin.hosts.mlx_vlm.identity import is_m3, remember, tokenizer_of
from mlx_m3_plugin.hosts.patching import Arguments, Loader, call, each, find, for_m3
from mlx_m3_plugin.weights.files import MODEL_TYPES, TEXT_ONLY, model_type_of
from mlx_m3_plugin.weights.files import is_m3 as is_m3_checkpoint

PARSER_NAME = "minimax_m3"


def knows_open_prompts(budget_criteria: Any) -> bool:
    """Whether ``ThinkingBudgetCriteria`` tells a prompt that has opened reasoning from one that has
    not, as it does from mlx-vlm 0.7 on.  Before, there are no budgets in adaptive mode."""
    return "prompt_preopens_thinking" in signature(budget_criteria.__init__).parameters


def load_processor(module: Any) -> str:
    """Have ``load_processor`` give an M3 without a chat template ours."""
    original = find(module, "load_processor", "model_path")

    def load(given: Arguments) -> Any:
        processor = call(original, given)
        remember(processor)
        parts = (processor, tokenizer_of(processor))
        # Prompts are rendered by the processor, and the tool parser is looked up at its tokenizer.
        template = next(filter(None, (getattr(part, "chat_template", None) for part in parts)), CHAT_TEMPLATE)
        for part in parts:
            if not getattr(part, "chat_template", None):
                part.chat_template = template
        return processor

    module.load_processor = for_m3(original, lambda given: is_m3_checkpoint(given["model_path"]), load)
    return "a chat template where the checkpoint has none"


def auto_processor(module: Any) -> str:
    """Have ``AutoProcessor`` give a text-only M3 its tokenizer alone.

    Files of an image processor often stay behind when the vision tower is taken out, and would have
    transformers look for torchvision.
    """
    original = find(module, "AutoProcessor")

    class AutoProcessor(original):  # type: ignore[misc,valid-type]
        @classmethod
        def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
            if model_type_of(path) == TEXT_ONLY:
                from transformers import AutoTokenizer

                return AutoTokenizer.from_pretrained(path, *args, **kwargs)
            return original.from_pretrained(path, *args, **kwargs)

    module.AutoProcessor = AutoProcessor
    return "text-only checkpoints open without an image processor"


def prompt_utils(module: ModuleType, load_entry_points: Loader) -> list[str]:
    """Have M3's template get all that a conversation holds."""
    return each(module, _apply_chat_template, _get_chat_template)


def _apply_chat_template(module: Any) -> str:
    """mlx-vlm rebuilds messages from role and content, but for those with ``tool_calls``."""
    original = find(module, "apply_chat_template", "processor", "config", "prompt")

    def is_m3_config(given: Any) -> bool:
        config = given["config"]
        fields = config if isinstance(config, dict) else getattr(config, "__dict__", {})
        return fields.get("model_type") in MODEL_TYPES

    def apply(given: Arguments) -> Any:
        remember(given.arguments["processor"])
        prompt = given.arguments["prompt"]
        if isinstance(prompt, list):
            given.arguments["prompt"] = [_kept_whole(message) for message in prepared(prompt)]
        return call(original, given)

    module.apply_chat_template = for_m3(original, is_m3_config, apply)
    return "reasoning in histories"


def _kept_whole(message: Any) -> Any:
    if isinstance(message, dict) and message.get("reasoning_content"):
        return {"tool_calls": [], **message}
    return message


class _InTheirOrder(UserList):  # type: ignore[type-arg]
    """Tools whose keys mlx-vlm, which sorts those of lists, leaves as they are."""


def _get_chat_template(module: Any) -> str:
    original = find(module, "get_chat_template", "processor", "messages", "kwargs")

    def get(given: Arguments) -> Any:
        given.arguments["messages"] = prepared(given.arguments["messages"])
        options = dict(given.arguments["kwargs"])
        # The commands say ``enable_thinking=False`` when nobody has said anything.
        mode = thinking_mode({**options, "enable_thinking": options.get("enable_thinking") or None})
        options.pop("thinking_mode", None)
        if mode is not None:
            options["thinking_mode"] = mode
        if isinstance(options.get("tools"), (list, tuple)):
            options["tools"] = _InTheirOrder(options["tools"])
        given.arguments["kwargs"] = options
        return call(original, given)

    module.get_chat_template = for_m3(original, lambda given: is_m3(given["processor"]), get)
    return "thinking modes, tools in their order"


def tool_parsers(module: ModuleType, load_entry_points: Loader) -> list[str]:
    """``mlx_vlm.tools.registry``, before 0.7.1 ``mlx_vlm.tool_parsers``: M3's parser for every M3.

    Upstream looks for M3's markers in the template, which need not have them.
    """
    return each(module, _infer_tool_parser)


def _infer_tool_parser(module: Any) -> str:
    infer = find(module, "_infer_tool_parser_from_processor", "processor")

    def parser_of_m3(given: Arguments) -> Any:
        return call(infer, given) if given.arguments.get("override") is not None else PARSER_NAME

    ours = for_m3(infer, lambda given: is_m3(given["processor"]), parser_of_m3)
    module._infer_tool_parser_from_processor = ours
    return "M3's parser, whatever the template"
