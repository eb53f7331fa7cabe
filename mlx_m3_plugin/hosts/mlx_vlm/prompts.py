"""mlx-vlm's prompts for M3: thinking modes, whole histories, tools as they were given, a template."""

from collections import UserList
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

from mlx_m3_plugin.chat.history import prepared
from mlx_m3_plugin.chat.reasoning import thinking_mode
from mlx_m3_plugin.chat.template import CHAT_TEMPLATE
from mlx_m3_plugin.chat.vocabulary import is_m3
from mlx_m3_plugin.weights.files import MODEL_TYPES, TEXT_ONLY, model_type_of


def tokenizer_of(processor: Any) -> Any:
    return getattr(processor, "tokenizer", processor)


def is_m3_processor(processor: Any) -> bool:
    return is_m3(tokenizer_of(processor))


def knows_open_prompts(budget_criteria: Any) -> bool:
    """Whether ``ThinkingBudgetCriteria`` tells a prompt that has opened reasoning from one that has
    not, as it does from mlx-vlm 0.7 on.  Before, there are no budgets in adaptive mode."""
    return "prompt_preopens_thinking" in signature(budget_criteria.__init__).parameters


def with_template(load_processor: Callable[..., Any]) -> Callable[..., Any]:
    """``load_processor`` that gives an M3 without a chat template ours."""

    @wraps(load_processor)
    def load(*args: Any, **kwargs: Any) -> Any:
        processor = load_processor(*args, **kwargs)
        if is_m3_processor(processor):
            templates = [
                getattr(part, "chat_template", None) for part in (processor, tokenizer_of(processor))
            ]
            # Prompts are rendered by the processor, and the tool parser is looked up at its tokenizer.
            template = next(filter(None, templates), CHAT_TEMPLATE)
            for part in (processor, tokenizer_of(processor)):
                if not getattr(part, "chat_template", None):
                    part.chat_template = template
        return processor

    return load


def with_tokenizers(auto_processor: Any) -> Any:
    """``AutoProcessor`` that gives a text-only M3 its tokenizer alone.

    Files of an image processor often stay behind when the vision tower is taken out, and would have
    transformers look for torchvision.
    """

    class AutoProcessor(auto_processor):  # type: ignore[misc]
        @classmethod
        def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
            if model_type_of(path) == TEXT_ONLY:
                from transformers import AutoTokenizer

                return AutoTokenizer.from_pretrained(path, *args, **kwargs)
            return auto_processor.from_pretrained(path, *args, **kwargs)

    return AutoProcessor


def prompt_utils(module: Any, load_entry_points: Callable[[str], list[Any]]) -> list[str]:
    """Have M3's template get all that a conversation holds."""
    module.apply_chat_template = _with_whole_messages(module.apply_chat_template)
    module.get_chat_template = _with_m3_arguments(module.get_chat_template)
    return ["thinking modes, reasoning in histories, tools in their order"]


def _with_whole_messages(apply_chat_template: Callable[..., Any]) -> Callable[..., Any]:
    """mlx-vlm rebuilds messages from role and content, but for those with ``tool_calls``."""

    @wraps(apply_chat_template)
    def apply(processor: Any, config: Any, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        model_type = config.get("model_type") if isinstance(config, dict) else config.model_type
        if model_type in MODEL_TYPES and isinstance(prompt, list):
            prompt = [_kept_whole(message) for message in prepared(prompt)]
        return apply_chat_template(processor, config, prompt, *args, **kwargs)

    return apply


def _kept_whole(message: Any) -> Any:
    if isinstance(message, dict) and message.get("reasoning_content"):
        return {"tool_calls": [], **message}
    return message


class _InTheirOrder(UserList):  # type: ignore[type-arg]
    """Tools whose keys mlx-vlm, which sorts those of lists, leaves as they are."""


def _with_m3_arguments(get_chat_template: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(get_chat_template)
    def get(processor: Any, messages: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_m3_processor(processor):
            return get_chat_template(processor, messages, *args, **kwargs)
        # The commands say ``enable_thinking=False`` when nobody has said anything.
        mode = thinking_mode({**kwargs, "enable_thinking": kwargs.get("enable_thinking") or None})
        kwargs.pop("thinking_mode", None)
        if mode is not None:
            kwargs["thinking_mode"] = mode
        if isinstance(kwargs.get("tools"), (list, tuple)):
            kwargs["tools"] = _InTheirOrder(kwargs["tools"])
        return get_chat_template(processor, prepared(messages), *args, **kwargs)

    return get


def tool_parsers(module: Any, load_entry_points: Callable[[str], list[Any]]) -> list[str]:
    """``mlx_vlm.tools.registry``, before 0.7.1 ``mlx_vlm.tool_parsers``: M3's parser for every M3.

    Upstream looks for M3's markers in the template, which need not have them.
    """
    infer = module._infer_tool_parser_from_processor

    @wraps(infer)
    def _infer_tool_parser_from_processor(processor: Any, *args: Any, **kwargs: Any) -> Any:
        asked = [*args, *kwargs.values()]
        if is_m3_processor(processor) and not any(asked):
            return "minimax_m3"
        return infer(processor, *args, **kwargs)

    module._infer_tool_parser_from_processor = _infer_tool_parser_from_processor
    return ["M3's parser, whatever the template"]
