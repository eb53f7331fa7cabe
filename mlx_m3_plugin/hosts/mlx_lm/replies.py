"""mlx-lm's automata that take replies apart, for M3: none of its markers is let through as text.

A reply that needs no reasoning begins with the closing marker.  One that ``max_tokens`` cuts off may
end between the two tokens of the marker before tool calls.

``split``, ``flush`` and ``match`` are called for every token of every model, so ours do not bind
their arguments.
"""

from collections.abc import Sequence
from functools import wraps
from typing import Any

from mlx_m3_plugin.chat.markers import NAMESPACE
from mlx_m3_plugin.hosts.mlx_lm.tokenizer import SwallowedTokens, is_m3_wrapper
from mlx_m3_plugin.hosts.patching import Arguments, UpstreamChangedError, call, for_m3


class M3States(dict):  # type: ignore[type-arg]
    """The states of an automaton for M3's replies, what its namespace token is there, and stop words."""

    def __init__(self, states: Any, namespace: Any, stop_words: Sequence[str] = ()) -> None:
        super().__init__(states)
        self.namespace, self.stop_words = namespace, stop_words


def _is_m3_state(state: Any) -> bool:
    """Whether the state of an automaton, a tuple, is of one with ``M3States``."""
    return isinstance(state, tuple) and len(state) > 2 and isinstance(state[2], M3States)


def make_text_state_machine(module: Any, original: Any) -> Any:
    example = module.TextStateMachine()
    state = example.make_state()
    if len(state) != 4 or state[2] is not example._states:
        raise UpstreamChangedError(f"{module.__name__}.TextStateMachine has no _states as they were")

    def make_for_m3(given: Arguments) -> Any:
        made = call(original, given)
        made._states = M3States(made._states, NAMESPACE, tuple(given.arguments["stop_words"] or ()))
        return made

    return for_m3(original, lambda given: is_m3_wrapper(given["tokenizer"]), make_for_m3)


def split(module: Any, original: Any) -> Any:
    """It holds back text that a marker may begin with, and forgets it when the reply ends: each final
    ``]``, for M3.  Its markers begin with a token that comes whole, so there is less to hold back.
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
def sequence_init(module: Any, original: Any) -> Any:
    """As in mlx-lm 0.32, the closing marker is not content, and a call may come within reasoning."""

    def init_for_m3(given: Arguments) -> None:
        transitions = given.arguments["transitions"]
        reasoning, normal = transitions["reasoning"], transitions.get("normal", ())
        calls = [edge for edge in normal if edge[1] == "tool"]
        normal = [*normal, *((tokens, "normal") for tokens in _swallowed(transitions))]
        given.arguments["transitions"] = {**transitions, "normal": normal, "reasoning": [*reasoning, *calls]}
        call(original, given)
        made = given.arguments["self"]
        made._states = M3States(made._states, calls[0][0][0] if calls else None)

    return for_m3(original, lambda given: bool(_swallowed(given["transitions"])), init_for_m3)


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
