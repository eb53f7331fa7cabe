"""mlx-lm's tokenizers and its automata that read replies, for M3.

Only tokenizers with M3's markers in their vocabulary are touched.
"""

from collections.abc import Sequence
from functools import cache, wraps
from typing import Any

from mlx_m3_plugin.chat.markers import NAMESPACE, THINK_END, THINK_START, has_m3_markers
from mlx_m3_plugin.hosts.patching import Arguments, UpstreamChangedError, call, for_m3, where

# --- TokenizerWrapper: markers, tool parser, thinking modes, template ---

# The wrapper is extended, not what ``load`` infers and writes into saved tokenizer configs: what is
# converted with us must open without us.  For the same reason the wrong inference is taken back.

# What ``TokenizerWrapper.__init__`` sets and :func:`become_m3` sets anew.
ATTRIBUTES = (
    "_tokenizer",
    "_think_start",
    "_think_end",
    "_think_start_tokens",
    "_think_end_tokens",
    "_tool_parser",
    "_tool_call_start",
    "_tool_call_end",
    "_tool_call_start_tokens",
    "_tool_call_end_tokens",
    "has_chat_template",
)


def wrapper_init(module: Any, original: Any) -> Any:
    @wraps(original)
    def __init__(self: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        original(self, tokenizer, *args, **kwargs)
        # mlx-lm has just read the vocabulary itself.
        if has_m3_markers(tokenizer):
            become_m3(self)

    return __init__


def structural_markers(module: Any, original: Any) -> Any:
    """mlx-lm takes markers of this kind out of the content."""

    @property  # type: ignore[misc]
    @wraps(original.fget)
    def structural_markers(self: Any) -> Any:
        return (THINK_END,) if is_m3_wrapper(self) else original.fget(self)

    return structural_markers


def infer_tool_parser(module: Any, original: Any) -> Any:
    @wraps(original)
    def _infer_tool_parser(*args: Any, **kwargs: Any) -> Any:
        inferred = original(*args, **kwargs)
        # A tokenizer, or its template.  until: mlx-lm 0.32
        read = (getattr(value, "chat_template", value) for value in (*args, *kwargs.values()))
        if inferred is not None and any(isinstance(text, str) and THINK_START in text for text in read):
            return None
        return inferred

    return _infer_tool_parser


class SwallowedTokens(tuple):  # type: ignore[type-arg]
    """The tokens of a marker that is not content outside of reasoning either."""


def become_m3(wrapper: Any) -> None:
    """Make a ``TokenizerWrapper`` use M3's formats; the checkpoint's own settings do not count."""
    from mlx_m3_plugin.chat import tool_calls
    from mlx_m3_plugin.chat.prompt import CHAT_TEMPLATE

    tokenizer = wrapper._tokenizer
    start, end = tokenizer.convert_tokens_to_ids([THINK_START, THINK_END])
    wrapper._think_start, wrapper._think_end = THINK_START, THINK_END
    wrapper._think_start_tokens, wrapper._think_end_tokens = (start,), SwallowedTokens((end,))
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
        from mlx_m3_plugin.chat.prompt import prepared, thinking_mode

        mode = thinking_mode(kwargs)
        kwargs.pop("enable_thinking", None)
        if mode is not None:
            kwargs["thinking_mode"] = mode
        return super().apply_chat_template(prepared(conversation), *args, **kwargs)  # type: ignore[misc]

    # mlx-lm asks these about whole prompts, to know whether a reply begins in reasoning.  M3's
    # instructions, and what users write, hold both markers as text: only the prompt's end counts.
    def rfind_think_start(self, tokens: Any, start: Any = None, end: Any = None) -> int:
        return _at_end(tokens, self._think_start_tokens)  # type: ignore[attr-defined]

    def rfind_think_end(self, tokens: Any, start: Any = None, end: Any = None) -> int:
        return _at_end(tokens, self._think_end_tokens)  # type: ignore[attr-defined]


def _at_end(tokens: Any, marker: Any) -> int:
    """Where the marker begins if the tokens end with it, or -1."""
    begin = len(tokens) - len(marker)
    return begin if begin >= 0 and tuple(tokens[begin:]) == tuple(marker) else -1


# --- replies: none of M3's markers is let through as text ---

# A reply that needs no reasoning begins with the closing marker.  One that ``max_tokens`` cuts off may
# end between the two tokens of the marker before tool calls.

# ``split``, ``flush`` and ``match`` are called for every token of every model, so ours do not bind
# their arguments.


class M3States(dict):  # type: ignore[type-arg]
    """The states of an automaton for M3's replies, what its namespace token is there, and stop words."""

    def __init__(self, states: Any, namespace: Any, stop_words: Sequence[str] = ()) -> None:
        super().__init__(states)
        self.namespace, self.stop_words = namespace, stop_words


def _is_m3_state(state: Any) -> bool:
    """Whether this is the state of an automaton of M3's: a tuple that holds its ``M3States``."""
    return isinstance(state, tuple) and len(state) > 2 and isinstance(state[2], M3States)


def make_text_state_machine(module: Any, original: Any) -> Any:
    example = module.TextStateMachine()
    state = example.make_state()
    if len(state) != 4 or state[2] is not example._states:
        raise UpstreamChangedError(
            f"{module.__name__}.TextStateMachine.make_state does not return (name, trie, _states, text)"
        )

    def make_for_m3(given: Arguments) -> Any:
        made = call(original, given)
        made._states = M3States(made._states, NAMESPACE, tuple(given.arguments["stop_words"] or ()))
        return made

    return for_m3(original, lambda given: is_m3_wrapper(given["tokenizer"]), make_for_m3)


def split(module: Any, original: Any) -> Any:
    """mlx-lm holds back text that may begin a marker, and drops it when the reply ends: each final ``]``,
    for M3.  M3's markers begin with a token that comes whole, so there is less to hold back.
    """

    @wraps(original)
    def split(state: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_m3_state(state):
            return original(state, *args, **kwargs)
        state, segments = original(state, *args, **kwargs)
        name, _, states, held = state
        ends = [held[n:] for n in range(len(held))]
        if NAMESPACE not in held and not any(w.startswith(end) for w in states.stop_words for end in ends):
            segments.append((name, held))
            state = (name, states[name][0], states, "")
        return state, [(name, _shown(piece, name)) for name, piece in segments]

    return split


def flush(module: Any, original: Any) -> Any:
    @wraps(original)
    def flush(state: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_m3_state(state):
            return original(state, *args, **kwargs)
        state, text, name = original(state, *args, **kwargs)
        return state, _shown(text, name), name

    return flush


def _shown(text: str, name: str) -> str:
    return text if name == "tool" else text.replace(NAMESPACE, "")


# until: mlx-lm 0.32
@where(lambda given: bool(_swallowed(given["transitions"])))
def sequence_init(init: Any, given: Arguments) -> None:
    """As in mlx-lm 0.32, the closing marker is not content, and a call may come within reasoning."""
    transitions = given.arguments["transitions"]
    reasoning, normal = transitions["reasoning"], transitions.get("normal", ())
    calls = [edge for edge in normal if edge[1] == "tool"]
    normal = [*normal, *((tokens, "normal") for tokens in _swallowed(transitions))]
    given.arguments["transitions"] = {**transitions, "normal": normal, "reasoning": [*reasoning, *calls]}
    call(init, given)
    made = given.arguments["self"]
    made._states = M3States(made._states, calls[0][0][0] if calls else None)


# until: mlx-lm 0.32
def sequence_match(module: Any, original: Any) -> Any:
    @wraps(original)
    def match(state: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_m3_state(state):
            return original(state, x, *args, **kwargs)
        state, matched, name = original(state, x, *args, **kwargs)
        if matched is None and name != "tool" and x == state[2].namespace:
            # The text of what was matched is not shown; the automaton itself still waits for more.
            matched = (x,)
        return state, matched, name

    return match


# until: mlx-lm 0.32
def _swallowed(transitions: Any) -> list[SwallowedTokens]:
    """M3's closing marker, where it ends the reasoning of this automaton."""
    edges = transitions.get("reasoning") if isinstance(transitions, dict) else None
    if not isinstance(edges, (list, tuple)):
        return []
    return [
        edge[0] for edge in edges if isinstance(edge, tuple) and edge and isinstance(edge[0], SwallowedTokens)
    ]
