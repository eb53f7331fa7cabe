"""``mlx_vlm.server`` for M3: what requests ask for, and replies taken apart by M3's markers.

The server's own functions find out that a model is M3 by its opening marker, which
:func:`arguments_of` sets where others leave it to be guessed.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache, wraps
from types import SimpleNamespace
from typing import Any

from mlx_m3_plugin.chat.history import prepared
from mlx_m3_plugin.chat.reasoning import THINK_END, THINK_START, thinking_mode
from mlx_m3_plugin.chat.reply import ReplyParser, ReplySplitter
from mlx_m3_plugin.chat.rewriting import ReplyRewriter
from mlx_m3_plugin.chat.tool_calls import tool_call_start
from mlx_m3_plugin.hosts.mlx_vlm.prompts import is_m3_processor, knows_open_prompts

Loader = Callable[[str], list[Any]]


# --- what requests ask for ---


def endpoints(module: Any, load_entry_points: Loader) -> list[str]:
    """``mlx_vlm.server.openai`` and ``.anthropic``, which are given what they call when they start."""
    register = module.register_routes

    @wraps(register)
    def register_routes(app: Any, deps: Any) -> Any:
        given = SimpleNamespace(**vars(deps))
        given.build_gen_args = _with_m3_arguments(deps.build_gen_args)
        given.count_thinking_tag_tokens = _with_no_m3_tags(deps.count_thinking_tag_tokens)
        return register(app, given)

    module.register_routes = register_routes
    return ["thinking modes and template arguments of requests"]


def _with_m3_arguments(build_gen_args: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(build_gen_args)
    def build(request: Any, processor: Any = None, *args: Any, **kwargs: Any) -> Any:
        made = build_gen_args(request, processor, *args, **kwargs)
        if not is_m3_processor(processor):
            return made
        try:
            return arguments_of(made, request)
        except ValueError as error:
            raise _refusal(str(error)) from error

    return build


def _refusal(why: str) -> Exception:
    """What the server answers with status 400, wherever it asks for the arguments."""
    from fastapi import HTTPException

    class RefusedRequest(HTTPException):
        def __str__(self) -> str:
            return self.detail

    return RefusedRequest(400, why)


def _with_no_m3_tags(count: Callable[..., int]) -> Callable[..., int]:
    """All that M3 has generated is counted: the prompt may have opened the reasoning."""

    @wraps(count)
    def counted(text: str, start: Any = None, end: Any = None) -> int:
        return 0 if start == THINK_START else count(text, start, end)

    return counted


def arguments_of(made: Any, request: Any) -> Any:
    """``GenerationArguments`` for M3, from upstream's and the request.

    Raises:
        ValueError: an unknown thinking mode, or a history with arguments that are no JSON object.
    """
    _check_history(request)
    template = dict(getattr(request, "chat_template_kwargs", None) or {})
    mode = _mode_of(request, template, made)
    template.pop("enable_thinking", None)
    arguments = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
    arguments |= {
        "enable_thinking": _may_think(mode, made),
        "thinking_start_token": THINK_START,
        "thinking_end_token": THINK_END,
        # The markers may be special tokens, and have to be seen.
        "skip_special_tokens": False,
        "template_arguments": template | ({"thinking_mode": mode} if mode else {}),
        "tools": _offered_tools(request),
    }
    base: Any = type(made)
    return _arguments_class(base)(**arguments)


def _mode_of(request: Any, template: dict[str, Any], made: Any) -> str | None:
    """M3's own name goes first, then what the request says otherwise, then the command line."""
    asked = [
        {"thinking_mode": getattr(request, "thinking_mode", None)},
        {"thinking_mode": template.get("thinking_mode")},
        {"thinking_mode": "adaptive" if _field(request, "thinking", "type") == "adaptive" else None},
        {"enable_thinking": _said(request, "enable_thinking")},
        {"enable_thinking": template.get("enable_thinking")},
        # Upstream's reading of ``reasoning`` and ``reasoning_effort``; None if there was none.
        {"enable_thinking": getattr(made, "reasoning", None)},
        {"enable_thinking": made.enable_thinking or None},
    ]
    return next(filter(None, map(thinking_mode, asked)), None)


def _may_think(mode: str | None, made: Any) -> bool:
    """Upstream's ``enable_thinking``: whether reasoning is shown, limited, and waited for."""
    if mode == "enabled" or mode == "disabled":
        return mode == "enabled"
    from mlx_vlm.utils import ThinkingBudgetCriteria

    has_budget = made.thinking_budget is not None and knows_open_prompts(ThinkingBudgetCriteria)
    # A grammar would wait for the end of a reasoning that may never begin.
    return made.logits_processors is None and (made.enable_thinking or has_budget)


def _said(request: Any, name: str) -> Any:
    """A field's value if the client has sent it, and not if it is a default."""
    return getattr(request, name, None) if name in getattr(request, "model_fields_set", ()) else None


def _field(request: Any, name: str, key: str) -> Any:
    value = _plain(getattr(request, name, None))
    return value.get(key) if isinstance(value, Mapping) else None


def _plain(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else value


def _check_history(request: Any) -> None:
    """Upstream takes arguments that cannot be read for none."""
    messages = list(map(_plain, getattr(request, "messages", None) or ()))
    items = getattr(request, "input", None)
    for item in items if isinstance(items, list) else ():
        if isinstance(item, Mapping) and item.get("type") == "function_call":
            messages.append({"role": "assistant", "tool_calls": [item]})
    prepared(messages)


def _offered_tools(request: Any) -> list[Any]:
    """In the form of chat completions, whichever of three forms they have come in."""
    if getattr(request, "tool_choice", None) == "none":
        return []
    offered = []
    for tool in map(_plain, getattr(request, "tools", None) or ()):
        if isinstance(tool, Mapping) and "function" not in tool:
            parameters = tool.get("parameters", tool.get("input_schema"))
            tool = {"function": {"name": tool.get("name"), "parameters": parameters}}
        offered.append(tool)
    return offered


class _M3Arguments:
    """What M3's generation arguments do differently."""

    def to_template_kwargs(self) -> dict[str, Any]:
        return super().to_template_kwargs() | self.template_arguments  # type: ignore[misc,attr-defined]


@cache
def _arguments_class(base: Any) -> Any:
    fields = [
        (name, kind, dataclasses.field(default_factory=kind))
        for name, kind in (("template_arguments", dict), ("tools", list))
    ]
    return dataclasses.make_dataclass(base.__name__, fields, bases=(_M3Arguments, base))


# --- replies ---


def generation(module: Any, load_entry_points: Loader) -> list[str]:
    """``mlx_vlm.server.generation``: every reply of M3 comes through here."""
    generator = module.ResponseGenerator
    generate, has_open, is_closed = (
        getattr(generator, name, None)
        for name in ("generate", "_prompt_has_open_thinking", "_prompt_thinking_already_closed")
    )

    @wraps(generate)  # type: ignore[arg-type]
    def generate_rewritten(self: Any, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        context, tokens = generate(self, prompt, *args, **kwargs)  # type: ignore[misc]
        if not is_m3_processor(self.processor):
            return context, tokens
        asked = kwargs.get("args", args[2] if len(args) > 2 else None)
        return context, _RewrittenTokens(tokens, _rewriter(prompt, asked))

    generator.generate = generate_rewritten
    if has_open and is_closed:
        # M3's instructions, and what users write, hold both markers: only the prompt's end counts.
        generator._prompt_has_open_thinking = _at_prompt_end(has_open, THINK_START)
        generator._prompt_thinking_already_closed = _at_prompt_end(is_closed, THINK_END)
    return ["replies whose markers come whole"]


def _rewriter(prompt: Any, arguments: Any) -> ReplyRewriter:
    tools = getattr(arguments, "tools", None)
    in_reasoning = isinstance(prompt, str) and prompt.endswith(THINK_START)
    return ReplyRewriter(tools, in_reasoning, calls_are_text=not tools)


def _at_prompt_end(asks: Callable[..., bool], marker: str) -> Callable[..., bool]:
    @wraps(asks)
    def answer(self: Any, arguments: Any, input_ids: Any, *args: Any, **kwargs: Any) -> bool:
        if arguments.thinking_start_token != THINK_START:
            return asks(self, arguments, input_ids, *args, **kwargs)
        tokens = input_ids.flatten().tolist() if input_ids is not None else []
        return arguments.enable_thinking and tokens[-1:] == [self.tokenizer.convert_tokens_to_ids(marker)]

    return answer


class _RewrittenTokens:
    """The tokens of a reply, with the text that a server is to see."""

    def __init__(self, tokens: Any, rewriter: ReplyRewriter):
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
            text = self._rewriter.feed(token.text)
            if token.finish_reason:
                text += self._rewriter.finish()
            yield dataclasses.replace(token, text=text)
        rest = self._rewriter.finish()
        if token is not None and rest:
            yield dataclasses.replace(token, text=rest, token_count=0)


def responses_state(module: Any, load_entry_points: Loader) -> list[str]:
    """``mlx_vlm.server.responses_state``: what takes replies apart, given M3's opening marker."""
    state, delta, split = module.ThinkingStreamState, module.ThinkingStreamDelta, module._split_thinking
    pairs_of, feed = state._build_open_close_markers.__func__, state.feed

    @classmethod  # type: ignore[misc]
    @wraps(pairs_of)
    def _build_open_close_markers(cls: Any, start: Any, end: Any) -> Any:
        # ``<think>`` in a reply of M3 is text.
        return ((start, end),) if start == THINK_START else pairs_of(cls, start, end)

    @wraps(feed)
    def feed_m3(self: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        if self.open_close_markers[0][0] != THINK_START:
            return feed(self, text, *args, **kwargs)
        splitter = getattr(self, "_m3_splitter", None)
        if splitter is None:
            # The text itself says whether it begins in reasoning.
            splitter = self._m3_splitter = ReplySplitter()
        was_in_reasoning = splitter.in_reasoning
        reasoning, content = _split(splitter, text or "")
        closed = was_in_reasoning and not splitter.in_reasoning
        return delta(reasoning=reasoning or None, content=content or None, thinking_closed=closed)

    @wraps(split)
    def _split_thinking(text: Any, start: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not text or start != THINK_START:
            return split(text, start, *args, **kwargs)
        reasoning, content = _split(ReplySplitter(), text)
        return reasoning or None, content

    state._build_open_close_markers = _build_open_close_markers
    state.feed = feed_m3
    module._split_thinking = _split_thinking
    if hasattr(module, "suppress_tool_call_content"):
        _show_text_after_calls(module)
    return [f"{THINK_START}, and several reasonings in one reply"]


def _split(splitter: ReplySplitter, text: str) -> tuple[str, str]:
    """Reasoning and content.  Calls stay in the content, where the server takes them out."""
    said = {"reasoning": "", "content": ""}
    # No marker is in two pieces, thanks to the rewriting.
    for part in splitter.feed(text) + splitter.flush():
        if part.kind != "problem":
            said["reasoning" if part.kind == "reasoning" else "content"] += part.text
    return said["reasoning"], said["content"]


def _show_text_after_calls(module: Any) -> None:
    """mlx-vlm 0.6 shows nothing more of a reply once a call has begun."""
    suppress = module.suppress_tool_call_content

    @wraps(suppress)
    def suppress_tool_call_content(full_output: str, in_call: bool, start: Any, content: Any) -> Any:
        if start != tool_call_start or not content:
            return suppress(full_output, in_call, start, content)
        parser = ReplyParser()
        events = parser.feed(content) + parser.finish()
        return False, "".join(event.text for event in events if event.kind == "content") or None

    module.suppress_tool_call_content = suppress_tool_call_content


def tool_streaming(module: Any, load_entry_points: Loader) -> list[str]:
    """``mlx_vlm.tools.streaming``: a call of M3 is told when it is complete, not when all is."""
    state = module.ToolCallDeltaState
    feed = state.feed

    @wraps(feed)
    def feed_m3(self: Any, text: Any) -> Any:
        if not self.tools or getattr(self.module, "tool_call_start", None) != tool_call_start:
            return feed(self, text)
        parser = ReplyParser(self.tools)
        calls = [event.call for event in parser.feed(text or "") + parser.finish() if event.call]
        return [
            self._update(len(self.calls), call.name.strip(), json.dumps(call.arguments, ensure_ascii=False))
            for call in calls
        ]

    state.feed = feed_m3
    return ["calls as they are completed"]
