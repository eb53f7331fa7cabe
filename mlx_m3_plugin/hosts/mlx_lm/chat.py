"""mlx-lm's tokenizers, and the replies of its server, for M3.

Only tokenizers with M3's markers in their vocabulary are touched.
"""

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, wraps
from typing import TYPE_CHECKING, Any

from mlx_m3_plugin.chat.markers import (
    ANY_MARKER,
    THINK_END,
    THINK_START,
    has_m3_markers,
    without_cut_character,
    without_space,
)
from mlx_m3_plugin.hosts.patching import Arguments, call, where
from mlx_m3_plugin.startup.settings import checked

if TYPE_CHECKING:
    from mlx_m3_plugin.chat.reply import Event

# --- TokenizerWrapper: markers, tool parser, thinking modes, template ---

# The wrapper is extended, not what ``load`` infers and writes into saved tokenizer configs: what is
# converted with us must open without us.  For the same reason the wrong inference is taken back.

# What ``TokenizerWrapper.__init__`` sets and :func:`become_m3` sets anew.
ATTRIBUTES = tuple(
    "_tokenizer _think_start _think_end _think_start_tokens _think_end_tokens _tool_parser _tool_call_start"
    " _tool_call_end _tool_call_start_tokens _tool_call_end_tokens has_chat_template".split()
)


# mlx-lm reads the vocabulary there itself.
@where(lambda given: has_m3_markers(given["tokenizer"]))
def wrapper_init(init: Any, given: Arguments) -> None:
    call(init, given)
    become_m3(given.arguments["self"])


def structural_markers(module: Any, original: Any) -> Any:
    """mlx-lm takes markers of this kind out of the content."""

    @property  # type: ignore[misc]
    @wraps(original.fget)
    def structural_markers(self: Any) -> Any:
        return (THINK_END,) if is_m3_wrapper(self) else original.fget(self)

    return structural_markers


def _reads_m3_template(given: Mapping[str, Any]) -> bool:
    # A tokenizer, or its template.  until: mlx-lm 0.32
    read = (getattr(value, "chat_template", value) for value in given.values())
    return any(isinstance(text, str) and THINK_START in text for text in read)


@where(_reads_m3_template)
def infer_tool_parser(infer: Any, given: Arguments) -> None:
    """None of mlx-lm's is M3's."""


class M3Tokens(tuple):  # type: ignore[type-arg]
    """The tokens of M3's closing marker, by which its automata are known."""


def become_m3(wrapper: Any) -> None:
    """Make a ``TokenizerWrapper`` use M3's formats; the checkpoint's own settings do not count."""
    from mlx_m3_plugin.chat import tool_calls
    from mlx_m3_plugin.chat.prompt import CHAT_TEMPLATE

    tokenizer = wrapper._tokenizer
    start, end = tokenizer.convert_tokens_to_ids([THINK_START, THINK_END])
    wrapper._think_start, wrapper._think_end = THINK_START, THINK_END
    wrapper._think_start_tokens, wrapper._think_end_tokens = (start,), M3Tokens((end,))
    wrapper._tool_parser = tool_calls.parse_tool_call
    for which in ("start", "end"):
        marker = getattr(tool_calls, f"tool_call_{which}")
        tokens = tuple(tokenizer.encode(marker, add_special_tokens=False))
        setattr(wrapper, f"_tool_call_{which}", marker)
        setattr(wrapper, f"_tool_call_{which}_tokens", tokens)
    if not wrapper.has_chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
        wrapper.has_chat_template = True
    base: Any = type(wrapper)
    wrapper.__class__ = _m3_class(base)


def is_m3_wrapper(tokenizer: Any) -> bool:
    """Whether :func:`become_m3` has changed it.  Reads only its type."""
    return issubclass(type(tokenizer), _M3Behaviour)


@cache
def _m3_class(base: Any) -> Any:
    return type(base.__name__, (_M3Behaviour, base), {"__module__": base.__module__})


class _M3Behaviour:
    """What an M3 wrapper does differently."""

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """With ``thinking_mode``, or with the ``enable_thinking`` that other models have."""
        from mlx_m3_plugin.chat.prompt import prepared, thinking_mode, with_effort

        template = kwargs.get("chat_template") or self.chat_template  # type: ignore[attr-defined]
        kwargs = with_effort(kwargs, checked("reasoning_effort"), template)
        mode = thinking_mode(kwargs)
        kwargs.pop("enable_thinking", None)
        if mode is not None:
            kwargs["thinking_mode"] = mode
        return super().apply_chat_template(prepared(conversation), *args, **kwargs)  # type: ignore[misc]

    # mlx-lm asks these about whole prompts, to know whether a reply begins in reasoning.  M3's
    # instructions, and what users write, hold both markers as text: only the prompt's end counts.
    def rfind_think_start(self, tokens: Any, start: Any = None, end: Any = None) -> int:
        return _at_end(self, tokens, self._think_start_tokens)  # type: ignore[attr-defined]

    def rfind_think_end(self, tokens: Any, start: Any = None, end: Any = None) -> int:
        return _at_end(self, tokens, self._think_end_tokens)  # type: ignore[attr-defined]


def _at_end(wrapper: Any, tokens: Any, marker: Any) -> int:
    """Where the marker begins if the tokens end with it and white space, or -1."""
    tokens = without_space(tokens, wrapper._tokenizer.decode)
    begin = len(tokens) - len(marker)
    return begin if begin >= 0 and tuple(tokens[begin:]) == tuple(marker) else -1


# --- requests ---


class RefusedRequest(ValueError):
    """What a request asks of M3 is not possible: status 400."""


class _WithFields(dict):  # type: ignore[type-arg]
    """A request's ``chat_template_kwargs``, and all of its fields: mlx-lm hands these on to every process."""

    fields: dict[str, Any]
    # Once a reply of M3 has begun: whether its role was sent.
    role_is_sent: bool | None = None


def completion_request(module: Any, original: Any) -> Any:
    """Which model a request is for is known later, in the generation thread."""

    @wraps(original)
    def handle_chat_completions(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        handed_on = getattr(self, "chat_template_kwargs", None)
        if handed_on is None or isinstance(handed_on, dict):
            self.chat_template_kwargs = _WithFields(handed_on or {})
            self.chat_template_kwargs.fields = self.body
        return request

    return handle_chat_completions


def _fields_of(args: Any) -> dict[str, Any]:
    return getattr(getattr(args, "chat_template_kwargs", None), "fields", {})


@where(lambda given: is_m3_wrapper(given["tokenizer"]))
def tokenize(original: Any, given: Arguments) -> Any:
    """The prompt of a request, with what its fields ask of the chat template."""
    from jinja2 import TemplateError

    from mlx_m3_plugin.chat.prompt import prepared

    request, args, tokenizer = (given.arguments[name] for name in ("request", "args", "tokenizer"))
    try:
        _check(args, tokenizer)
        handed_on = args.chat_template_kwargs
        if request.request_type == "chat":
            prepared(request.messages)
            asked = _template_arguments({"chat_template_kwargs": handed_on} | _fields_of(args), tokenizer)
            given.arguments["args"] = dataclasses.replace(args, chat_template_kwargs=asked)
        return call(original, given)
    except (ValueError, TemplateError) as error:
        raise RefusedRequest(str(error)) from error


def _template_arguments(fields: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    from mlx_m3_plugin.chat.asked import FIELDS, template_arguments
    from mlx_m3_plugin.startup.settings import EFFORTS

    wanted = fields.get("response_format")
    if isinstance(wanted, dict) and wanted.get("type") not in (None, "text"):
        raise ValueError(
            "mlx_lm.server can't hold a model to a schema: leave out response_format and offer the schema "
            "as a tool, or use mlx_vlm.server"
        )
    asked = {name: fields[name] for name in FIELDS if fields.get(name) is not None}
    return template_arguments(asked, tokenizer.chat_template, EFFORTS)


def _check(args: Any, tokenizer: Any) -> None:
    """What stops mlx-lm's generation thread, or writes outside of an array."""
    from mlx_m3_plugin.chat.asked import check_logit_bias

    handed_on = args.chat_template_kwargs
    if not (handed_on is None or isinstance(handed_on, dict)):
        raise ValueError("chat_template_kwargs must be an object")
    stop = args.stop_words or []
    if not (isinstance(stop, list) and all(isinstance(word, str) and word for word in stop)):
        raise ValueError(f"stop must be a string or a list of strings, not {str(stop)[:80]}")
    check_logit_bias(args.logits.logit_bias, len(tokenizer._tokenizer))


def generate_response(module: Any, original: Any) -> Any:
    """The role comes with the first delta only: clients add up what deltas say."""

    @wraps(original)
    def generate_response(self: Any, *args: Any, **kwargs: Any) -> Any:
        response = original(self, *args, **kwargs)
        request = getattr(self, "chat_template_kwargs", None)
        delta = response["choices"][0].get("delta")
        if delta and isinstance(request, _WithFields) and request.role_is_sent is not None:
            if request.role_is_sent:
                delta.pop("role", None)
            request.role_is_sent = True
        return response

    return generate_response


def set_headers(module: Any, original: Any) -> Any:
    """mlx-lm answers 404 to everything that a generation refuses."""

    @wraps(original)
    def _set_completion_headers(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(sys.exc_info()[1], RefusedRequest):
            return original(self, 400)
        return original(self, *args, **kwargs)

    return _set_completion_headers


# --- replies ---

# Every reply to a request comes through ``ResponseGenerator.generate``.  There M3's is taken apart, and the
# server gets the parts in the form that its own automaton has: from 0.32 on that is asked about every text.

_PARSER = "mlx_m3_plugin.chat.tool_calls"


def generate(module: Any, original: Any) -> Any:
    @wraps(original)
    def generate(self: Any, request: Any, generation_args: Any, *args: Any, **kwargs: Any) -> Any:
        context, responses = original(self, request, generation_args, *args, **kwargs)
        # What was loaded for the request is known only now.
        if getattr(getattr(context, "tool_parser", None), "__module__", None) != _PARSER:
            return context, responses
        handed_on = getattr(generation_args, "chat_template_kwargs", None)
        if isinstance(handed_on, _WithFields):
            handed_on.role_is_sent = False
        in_reasoning = self.model_provider.tokenizer.rfind_think_start(context.prompt) >= 0
        return context, _read(module, responses, request, generation_args, in_reasoning)

    return generate


Segments = list[tuple[str, str]]


class _Split(str):
    """The text of a response, with the parts of the reply that are known since."""

    segments: Segments


def _read(module: Any, responses: Any, request: Any, args: Any, in_reasoning: bool) -> Iterator[Any]:
    from mlx_m3_plugin.chat.reply import ReplyParser
    from mlx_m3_plugin.chat.tool_calls import RepairLog

    calls_are_text = _fields_of(args).get("tool_choice") == "none"
    parser = ReplyParser(request.tools, in_reasoning, calls_are_text=calls_are_text)
    log, texts = RepairLog(), _Texts(module, args.stop_words)
    shows = _with_segments if texts.has_machine else _with_states
    # Responses that wait, and parts of the reply for them: what is left at the end needs one to come with.
    waiting: list[Any] = []
    segments: Segments = []
    for response in responses:
        is_last = response.finish_reason is not None
        events = parser.feed(texts.of(response)) + (parser.finish() if is_last else [])
        log.add(events)
        segments += _segments(events)
        if waiting and is_last and texts.drops_text_of(response):
            yield from shows(waiting, segments)
            waiting, segments = [], []
        waiting.append(response)
        # One for each part, while more is to come.
        ready = len(segments) if parser.holds_back else len(waiting)
        if parser.holds_back and not 0 < ready < len(waiting):
            continue
        yield from shows(waiting[:ready], segments)
        waiting, segments = waiting[ready:], []
    yield from shows(waiting, segments + _segments(parser.finish()))


class _Texts:
    """The texts of responses without stop words."""

    def __init__(self, module: Any, stop_words: Any) -> None:
        # until: mlx-lm 0.32.  Before, stop words are taken out as tokens, and each response has a state.
        machine = getattr(module, "TextStateMachine", None)
        self.has_machine = machine is not None
        if machine is not None:
            words = [(word, "normal") for word in stop_words or ()]
            self._machine, self._begin = machine, machine({"normal": words}).make_state()
            self._state = self._begin
            self._has_marker = any(map(ANY_MARKER.search, stop_words or ()))

    def drops_text_of(self, response: Any) -> bool:
        return self.has_machine and response.finish_reason == "stop"

    def of(self, response: Any) -> str:
        given = without_cut_character(response.text, response.finish_reason)
        if not self.has_machine:
            return given
        if self.drops_text_of(response):
            return ""
        text = ""
        for piece in ANY_MARKER.split(given):
            if ANY_MARKER.match(piece) and not self._has_marker:
                # A stop word that is part of a marker is not written there: the marker is one token.
                text += self._held() + piece
            else:
                self._state, segments = self._machine.split(self._state, piece)
                text += "".join(text for _, text in segments)
        return text + (self._held() if response.finish_reason is not None else "")

    def _held(self) -> str:
        """What may have been the beginning of a stop word."""
        self._state, held, _ = self._machine.flush(self._state)
        self._state = self._begin
        return str(held)


def _segments(events: "Iterable[Event]") -> Segments:
    """Texts by the states of mlx-lm's automata.  A call ends when the state is another one."""
    from mlx_m3_plugin.chat.tool_calls import as_json

    segments: Segments = []
    for event in events:
        if event.call is not None:
            segments += [("tool", as_json(event.call)), ("normal", "")]
        elif event.kind in ("reasoning", "content"):
            state = "reasoning" if event.kind == "reasoning" else "normal"
            if segments and segments[-1][0] == state:
                segments[-1] = (state, segments[-1][1] + event.text)
            else:
                segments.append((state, event.text))
    return segments


def _with_segments(responses: list[Any], segments: Segments) -> Iterator[Any]:
    for n, response in enumerate(responses):
        text = _Split(response.text)
        text.segments = (segments if n == 0 else []) or [("normal", "")]
        yield dataclasses.replace(response, text=text)


# until: mlx-lm 0.32
def _with_states(responses: list[Any], segments: Segments) -> Iterator[Any]:
    """One state for each; what cannot be one by one comes at the end."""
    for n, response in enumerate(responses):
        is_last = n == len(responses) - 1
        own = segments[n:] if is_last else segments[n : n + 1]
        for state, text in own[:-1]:
            yield dataclasses.replace(response, text=text, state=state, finish_reason=None)
        state, text = own[-1] if own else ("normal", "")
        yield dataclasses.replace(response, text=text, state=state)


def split(module: Any, original: Any) -> Any:
    """The parts that are known already.  Called for every token of every model: binds no arguments."""

    @wraps(original)
    def split(state: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        if type(text) is _Split:
            return state, text.segments
        return original(state, text, *args, **kwargs)

    return split


# until: mlx-lm 0.32
@where(lambda given: _is_m3_machine(given["transitions"]))
def sequence_init(init: Any, given: Arguments) -> None:
    """Only what ends a reply is looked for in tokens: its text is taken apart later."""
    transitions = given.arguments["transitions"]
    given.arguments["transitions"] = {
        state: [edge for edge in edges if edge[1] is None] for state, edges in transitions.items()
    }
    call(init, given)


def _is_m3_machine(transitions: Any) -> bool:
    edges = transitions.get("reasoning") if isinstance(transitions, dict) else None
    if not isinstance(edges, (list, tuple)):
        return False
    return any(isinstance(edge, tuple) and edge and isinstance(edge[0], M3Tokens) for edge in edges)
