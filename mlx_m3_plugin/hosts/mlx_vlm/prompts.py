"""mlx-vlm's prompts for M3: thinking modes, whole histories, tools as they were given, a template."""

from collections import UserList
from collections.abc import Mapping
from contextlib import suppress
from copy import copy
from functools import cache, partial
from typing import Any
from weakref import WeakValueDictionary

from mlx_m3_plugin.chat.markers import THINK_END, THINK_START
from mlx_m3_plugin.chat.prompt import CHAT_TEMPLATE, prepared, thinking_mode, with_effort
from mlx_m3_plugin.hosts.mlx_vlm.histories import as_sent, count_images, whole_history
from mlx_m3_plugin.hosts.patching import Arguments, call, is_m3_checkpoint, where
from mlx_m3_plugin.startup.settings import checked

PARSER_NAME = "minimax_m3"

# --- which processors and tokenizers are M3's ---

# This reads no attribute of an object: stock would not read it, and an object may refuse.
# It is M3's if it was loaded from an M3 checkpoint or used with an M3 config, or if its class was
# written for M3.

# By identity: to compare or to hash an object may run code of its own.
_known: WeakValueDictionary[int, Any] = WeakValueDictionary()


def tokenizer_of(processor: Any) -> Any:
    return getattr(processor, "tokenizer", processor)


def remember(processor: Any) -> None:
    """Remember that a processor is M3's, and so its tokenizer."""
    if processor is None:
        return
    for part in (processor, tokenizer_of(processor)):
        # Some objects take no weak references.
        with suppress(TypeError):
            _known[id(part)] = part


def is_m3(processor: Any) -> bool:
    """Whether a processor or a tokenizer is M3's.  Never raises."""
    if processor is not None and _known.get(id(processor)) is processor:
        return True
    if not any("minimax_m3_vl" in str(cls.__module__).split(".") for cls in type(processor).__mro__):
        return False
    remember(processor)
    return True


# --- prompts ---


@where(lambda given: is_m3_checkpoint(given["model_path"]))
def load_processor(load: Any, given: Arguments) -> Any:
    """Gives an M3 without a chat template ours, and texts their end."""
    processor = call(load, given)
    if (detokenizer := getattr(processor, "detokenizer", None)) is not None:
        base: Any = type(detokenizer)
        detokenizer.__class__ = _with_whole_texts(base)
    remember(processor)
    parts = (processor, tokenizer_of(processor))
    # Prompts are rendered by the processor, and the tool parser is looked up at its tokenizer.
    template = next(filter(None, (getattr(part, "chat_template", None) for part in parts)), CHAT_TEMPLATE)
    for part in parts:
        if not getattr(part, "chat_template", None):
            part.chat_template = template
    return processor


@cache
def _with_whole_texts(base: Any) -> Any:
    class WholeTexts(base):  # type: ignore[misc]
        """Upstream returns nothing of a text that ends in U+FFFD, as more of a character may come, even when
        no more comes; and drops the bytes of one that was cut off, which U+FFFD stands for."""

        _is_final = False

        offset: int

        def reset(self) -> None:
            super().reset()
            self._is_final = False

        def finalize(self) -> None:
            decoder, rest = getattr(self, "_byte_decoder", None), getattr(self, "_unflushed", "")
            if decoder and not self.trim_space and decoder.keys() >= set(rest):
                self.text += bytes(decoder[character] for character in rest).decode("utf-8", "replace")
                self._unflushed = ""
            super().finalize()
            self._is_final = True

        @property
        def last_segment(self) -> Any:
            if not self._is_final:
                return super().last_segment
            whole = self.text
            segment, self.offset = whole[self.offset :], len(whole)
            return segment

    return WholeTexts


def auto_processor(module: Any, original: Any) -> Any:
    """Gives a text-only M3 its tokenizer alone.

    Files of an image processor often stay behind when the vision tower is taken out, and would have
    transformers look for torchvision.
    """

    class AutoProcessor(original):  # type: ignore[misc]
        @classmethod
        def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
            from mlx_m3_plugin.weights.headers import TEXT_ONLY, model_type_of

            if model_type_of(path) == TEXT_ONLY:
                from transformers import AutoTokenizer

                return AutoTokenizer.from_pretrained(path, *args, **kwargs)
            return original.from_pretrained(path, *args, **kwargs)

    return AutoProcessor


@where(lambda given: is_m3(given["tokenizer"]))
def thinking_budget(init: Any, given: Arguments) -> None:
    """``--thinking-budget`` for M3, where nobody has named the markers.

    mlx-vlm's default markers are in M3's vocabulary, but M3 never writes them.  mlx-vlm would then
    take any prompt for one that opens no reasoning.  M3's prompt opens it with ``enable_thinking``.
    """
    if given.arguments["thinking_start_token"] in (None, "<think>"):
        opened = bool(given.arguments["enable_thinking"])
        given.arguments.update(
            thinking_start_token=THINK_START,
            thinking_end_token=THINK_END,
            prompt_preopens_thinking=opened,
            enable_thinking=True,
        )
    call(init, given)


def _has_m3_config(given: Mapping[str, Any]) -> bool:
    from mlx_m3_plugin.weights.headers import MODEL_TYPES

    config = given["config"]
    fields = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    return fields.get("model_type") in MODEL_TYPES


@where(_has_m3_config)
def apply_chat_template(apply: Any, given: Arguments) -> Any:
    """mlx-vlm rebuilds messages from role and content, but for those with ``tool_calls``."""
    remember(given.arguments["processor"])
    prompt = given.arguments["prompt"]
    if not isinstance(prompt, list):
        return call(apply, given)
    prompt = [as_sent(message) for message in prompt]
    history = whole_history(prompt)
    # mlx-vlm puts images without a place into the last question.
    placed = history is not None and count_images(history) == given.arguments["num_images"]
    if placed:
        given.arguments["num_images"] = 0
    given.arguments["prompt"] = [
        _kept_whole(message, placed) for message in prepared(prompt if history is None else history)
    ]
    return call(apply, given)


def _kept_whole(message: Any, with_images: bool) -> Any:
    if isinstance(message, dict) and (with_images or message.get("reasoning_content")):
        return {"tool_calls": [], **message}
    return message


class _InTheirOrder(UserList):  # type: ignore[type-arg]
    """Tools whose keys mlx-vlm leaves in their order; it sorts those in lists."""


@where(lambda given: is_m3(given["processor"]))
def get_chat_template(get: Any, given: Arguments) -> Any:
    given.arguments["messages"] = prepared(given.arguments["messages"])
    template = getattr(given.arguments["processor"], "chat_template", None)
    options = with_effort(dict(given.arguments["kwargs"]), checked("reasoning_effort"), template)
    # The commands pass ``enable_thinking=False`` when the user has not asked for anything.
    mode = thinking_mode({**options, "enable_thinking": options.get("enable_thinking") or None})
    options.pop("thinking_mode", None)
    if mode is not None:
        options["thinking_mode"] = mode
    if isinstance(options.get("tools"), (list, tuple)):
        options["tools"] = _InTheirOrder(options["tools"])
    given.arguments["kwargs"] = options
    return call(get, given)


@where(lambda given: is_m3(given["self"].processor))
def training_row(process: Any, given: Arguments) -> Any:
    """With the row's ``tools``: mlx-vlm's server renders them, and what it trains on lacks them."""
    dataset, tools = copy(given.arguments["self"]), given.arguments["row"].get("tools")
    if tools:
        dataset._apply_chat_template = partial(dataset._apply_chat_template, tools=tools)
    given.arguments["self"] = dataset
    return call(process, given)


@where(lambda given: is_m3(given["processor"]))
def infer_tool_parser(infer: Any, given: Arguments) -> Any:
    """M3's parser for every M3.  Upstream looks for its markers in the template, which need not have them."""
    return call(infer, given) if given.arguments.get("override") is not None else PARSER_NAME
