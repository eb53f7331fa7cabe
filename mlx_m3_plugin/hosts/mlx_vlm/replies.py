"""``mlx_vlm.server``'s replies of M3, taken apart by its markers.

A reply is M3's if the arguments of its request are, or by M3's opening marker in them.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from mlx_m3_plugin.chat.markers import (
    NO_CHARACTER,
    THINK_END,
    THINK_MARKER,
    THINK_START,
    TOOL_CALL_START,
    calls_in,
    restored,
    without_calls,
    without_cut_character,
    without_space,
)
from mlx_m3_plugin.hosts.mlx_vlm.grammars import AnswerGrammar, where_a_reply_begins
from mlx_m3_plugin.hosts.mlx_vlm.prompts import PARSER_NAME
from mlx_m3_plugin.hosts.mlx_vlm.requests import M3Arguments, is_text, starts_with_m3
from mlx_m3_plugin.hosts.patching import Arguments, call, for_m3, where

if TYPE_CHECKING:
    # Their parsers take milliseconds to import, for which other models are not to wait.
    from mlx_m3_plugin.chat.rewriting import ReplyRewriter


def _m3_arguments(given: Mapping[str, Any]) -> Any:
    """Those of this call, at any position; None without any."""
    return next((value for value in given.values() if isinstance(value, M3Arguments)), None)


@where(lambda given: _m3_arguments(given) is not None)
def generate(original: Any, given: Arguments) -> Any:
    """Every reply of M3 comes through here."""
    prompt, arguments = given.arguments["prompt"], _m3_arguments(given.arguments)
    if arguments.logits_processors is not None:
        begin, tokenizer = where_a_reply_begins(prompt), given.arguments["self"].tokenizer
        arguments.logits_processors = [
            AnswerGrammar(grammar, tokenizer, begin, may_call=bool(arguments.tools))
            for grammar in arguments.logits_processors
        ]
    context, tokens = call(original, given)
    return context, _RewrittenTokens(tokens, _rewriter(prompt, arguments))


@where(lambda given: isinstance(given["args"], M3Arguments))
def wrap_processors(original: Any, given: Arguments) -> Any:
    """Ours know where the answer begins."""
    return given.arguments["processors"]


def _rewriter(prompt: Any, arguments: Any) -> "ReplyRewriter":
    from mlx_m3_plugin.chat.rewriting import ReplyRewriter

    tools = getattr(arguments, "tools", None)
    in_reasoning = isinstance(prompt, str) and prompt.rstrip().endswith(THINK_START)
    return ReplyRewriter(tools, in_reasoning, calls_are_text=not tools)


def at_prompt_end(marker: str) -> Callable[[Any, Any], Any]:
    """M3's instructions, and what users write, hold both markers: only the prompt's end counts."""

    @where(lambda given: isinstance(given["args"], M3Arguments))
    def is_at_end(original: Any, given: Arguments) -> bool:
        generator, arguments, input_ids = (given.arguments[name] for name in ("self", "args", "input_ids"))
        tokens = input_ids.flatten().tolist() if input_ids is not None else []
        tokens = without_space(tokens, generator.tokenizer.decode)
        end = [generator.tokenizer.convert_tokens_to_ids(marker)]
        return arguments.enable_thinking and tokens[-1:] == end

    return is_at_end


class _RewrittenTokens:
    """The tokens of a reply, with the text that a server is to see."""

    def __init__(self, tokens: Any, rewriter: "ReplyRewriter"):
        self._tokens, self._rewriter = tokens, rewriter
        self._rewritten = self._rewrite()

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return next(self._rewritten)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokens, name)

    def _rewrite(self) -> Iterator[Any]:
        token = None
        for token in self._tokens:
            text = self._rewriter.feed(without_cut_character(token.text, token.finish_reason))
            if token.finish_reason:
                text += self._rewriter.finish()
            yield dataclasses.replace(token, text=text)
        rest = self._rewriter.finish()
        if token is not None and rest:
            yield dataclasses.replace(token, text=rest, token_count=0)


# What takes replies apart is given M3's opening marker.


def thinking_stream_init(module: Any, init: Any) -> Any:
    def become_m3(given: Arguments) -> None:
        call(init, given)
        made = given.arguments["self"]
        base: Any = type(made)
        made.__class__ = _m3_stream(base, module.ThinkingStreamDelta)

    return for_m3(init, starts_with_m3, become_m3)


@where(starts_with_m3)
def thinking_stream_markers(original: Any, given: Arguments) -> Any:
    """``<think>`` in a reply of M3 is text."""
    return ((given.arguments["thinking_start_token"], given.arguments["thinking_end_token"]),)


@cache
def _m3_stream(base: Any, delta: Any) -> Any:
    class M3Stream(base):  # type: ignore[misc]
        """The text itself says whether it begins in reasoning."""

        _is_reasoning = False

        def feed(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            was_reasoning = self._is_reasoning
            reasoning, content, self._is_reasoning = _split(text or "", was_reasoning)
            closed = was_reasoning and not self._is_reasoning
            return delta(
                reasoning=_Exact(restored(reasoning)) or None,
                content=_Exact(content) or None,
                thinking_closed=closed,
            )

    return M3Stream


@where(lambda given: starts_with_m3(given) and bool(given["text"]))
def split_thinking(original: Any, given: Arguments) -> Any:
    reasoning, content, _ = _split(given.arguments["text"], False)
    return _Exact(restored(reasoning)) or None, _Exact(restored(content))


def _split(text: str, is_reasoning: bool) -> tuple[str, str, bool]:
    """Reasoning, content, and which of them goes on: every marker in rewritten text is one, and comes whole.
    Calls stay in the content, where the server takes them out."""
    said = {True: "", False: ""}
    for piece in THINK_MARKER.split(text):
        if piece in (THINK_START, THINK_END):
            is_reasoning = piece == THINK_START
        else:
            said[is_reasoning] += piece
    return said[True], said[False], is_reasoning


class _Exact(str):
    """Text of M3, which mlx-vlm sends without the white space at its ends where it streams."""

    def __radd__(self, before: str) -> "_Exact":
        return _Exact(before + str(self))

    def lstrip(self, *args: Any) -> "_Exact":
        return self

    def rstrip(self, *args: Any) -> "_Exact":
        return self


def _beside_calls(text: str) -> _Exact:
    return _Exact(restored(without_calls(text)))


def _has_m3_start(given: Mapping[str, Any]) -> bool:
    # Without tools, upstream has no marker there, and the text itself shows whose it is.
    text = given["text"]
    return is_text(given["self"].tc_start, TOOL_CALL_START) or (
        isinstance(text, str) and NO_CHARACTER in text
    )


@where(_has_m3_start)
def shown_content(original: Any, given: Arguments) -> Any:
    """Text beside calls, and markers that are text, as they were written."""
    given.arguments["self"].finished |= given.arguments["last"]
    return _beside_calls(given.arguments["text"] or "") or None


@where(lambda given: starts_with_m3(given) and bool(given["text"]))
def strip_markers(original: Any, given: Arguments) -> Any:
    """Of M3 there are none left but those that are text."""
    return given.arguments["text"]


def _are_m3_calls(given: Mapping[str, Any]) -> bool:
    return is_text(getattr(given["tool_module"], "tool_call_start", None), TOOL_CALL_START)


@where(_are_m3_calls)
def process_tool_calls(original: Any, given: Arguments) -> Any:
    """Nothing stands where calls stood."""
    found, rest = call(original, given), without_calls(given.arguments["model_output"])
    # until: mlx-vlm 0.7
    if isinstance(found, dict):
        return {**found, "remaining_text": rest}
    return dataclasses.replace(found, remaining_text=rest)


@where(lambda given: starts_with_m3(given) and bool(given["full_text"]))
def response_items(original: Any, given: Arguments) -> Any:
    """Text beside calls is an item, too."""
    items, content, reasoning, reason = call(original, given)
    if reason == "tool_calls":
        content = _beside_calls(_split(given.arguments["full_text"], False)[1])
        part = {"type": "output_text", "text": content, "annotations": []}
        message = {"id": given.arguments["message_id"], "type": "message", "status": "completed"}
        message |= {"role": "assistant", "content": [part]}
        thoughts = sum(item["type"] == "reasoning" for item in items)
        items[thoughts:thoughts] = [message] if content else []
    return items, content, reasoning, reason


# until: mlx-vlm 0.7
@where(lambda given: is_text(given["tc_start"], TOOL_CALL_START) and bool(given["delta_content"]))
def text_after_calls(original: Any, given: Arguments) -> Any:
    """mlx-vlm 0.6 shows nothing more of a reply once a call has begun."""
    return False, _beside_calls(given.arguments["delta_content"]) or None


def _parses_m3(given: Mapping[str, Any]) -> bool:
    # In upstream's own order; what is not there is not read.
    state = given["self"]
    return bool(getattr(state, "tools", None)) and getattr(state, "parser_name", None) == PARSER_NAME


@where(_parses_m3)
def tool_deltas(original: Any, given: Arguments) -> Any:
    """A call of M3 is sent when it is complete, not when all are."""
    state, text = given.arguments["self"], given.arguments["text"]
    return [
        state._update(
            len(state.calls), call["name"].strip(), json.dumps(call["arguments"], ensure_ascii=False)
        )
        for call in map(json.loads, calls_in(text or ""))
    ]
