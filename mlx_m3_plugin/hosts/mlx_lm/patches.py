"""Extensions of mlx-lm modules that it does not look up by name."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from mlx_m3_plugin.chat.reasoning import THINK_START
from mlx_m3_plugin.chat.tool_calls import NAMESPACE
from mlx_m3_plugin.chat.vocabulary import is_m3 as is_m3_tokenizer
from mlx_m3_plugin.hosts.mlx_lm.tokenizer import SwallowedTokens, become_m3
from mlx_m3_plugin.weights.files import is_m3, with_checks, with_shards_named_as_expected


def tokenizer_utils(module: Any, load_entry_points: Callable[[str], list[Any]]) -> list[str]:
    """Teach ``TokenizerWrapper`` M3's formats.

    Only tokenizers with M3's markers in their vocabulary are touched.  The wrapper is extended, not
    what ``load`` infers and writes into saved tokenizer configs: what is converted with us must
    open without us.  For the same reason the wrong inference is taken back.
    """
    (tool_parser,) = load_entry_points("mlx_lm.tool_parsers")
    wrapper = module.TokenizerWrapper
    original, infer = wrapper.__init__, module._infer_tool_parser

    @functools.wraps(original)
    def __init__(self: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        original(self, tokenizer, *args, **kwargs)
        if is_m3_tokenizer(tokenizer):
            become_m3(self, tool_parser)

    @functools.wraps(infer)
    def _infer_tool_parser(template_or_tokenizer: Any) -> Any:
        template = getattr(template_or_tokenizer, "chat_template", template_or_tokenizer)
        inferred = infer(template_or_tokenizer)
        return None if isinstance(template, str) and THINK_START in template else inferred

    wrapper.__init__ = __init__
    module._infer_tool_parser = _infer_tool_parser
    return [f"tool calls, {THINK_START}, thinking modes"]


class M3States(dict):  # type: ignore[type-arg]
    """The states of an automaton for M3's replies, what its namespace token is there, and stop words."""

    def __init__(self, states: Any, namespace: Any, stop_words: Sequence[str] = ()) -> None:
        super().__init__(states)
        self.namespace, self.stop_words = namespace, stop_words


def generate(module: Any, load_entry_points: Callable[[str], list[Any]]) -> list[str]:
    """Have the automaton that takes replies apart let none of M3's markers through as text.

    A reply that needs no reasoning begins with the closing marker.  One that ``max_tokens`` cuts
    off may end between the two tokens of the marker before tool calls.
    """
    if hasattr(module, "TextStateMachine"):
        _on_text(module)
    elif hasattr(module, "SequenceStateMachine"):
        _on_tokens(module)
    else:
        return []
    return ["markers are no content"]


def _on_text(module: Any) -> None:
    """The automaton of mlx-lm 0.32.

    It holds back text that a marker may begin with, and forgets it when the reply ends: each final
    ``]``, for M3.  Its markers begin with a token that comes whole, so there is less to hold back.
    """
    make, machine = module.make_text_state_machine, module.TextStateMachine
    split, flush = machine.split, machine.flush

    @functools.wraps(make)
    def make_text_state_machine(tokenizer: Any, stop_words: Any = None) -> Any:
        made = make(tokenizer, stop_words)
        if isinstance(tokenizer.think_end_tokens, SwallowedTokens):
            made._states = M3States(made._states, NAMESPACE, tuple(stop_words or ()))
        return made

    def shown(text: str, name: str) -> str:
        return text if name == "tool" else text.replace(NAMESPACE, "")

    @functools.wraps(split)
    def split_(state: Any, text: str) -> Any:
        state, segments = split(state, text)
        name, _, states, held = state
        if not isinstance(states, M3States):
            return state, segments
        ends = [held[n:] for n in range(len(held))]
        if NAMESPACE not in held and not any(w.startswith(end) for w in states.stop_words for end in ends):
            segments.append((name, held))
            state = (name, states[name][0], states, "")
        return state, [(name, shown(piece, name)) for name, piece in segments]

    @functools.wraps(flush)
    def flush_(state: Any) -> Any:
        state, text, name = flush(state)
        return state, shown(text, name) if isinstance(state[2], M3States) else text, name

    module.make_text_state_machine = make_text_state_machine
    machine.split, machine.flush = staticmethod(split_), staticmethod(flush_)


def _on_tokens(module: Any) -> None:
    """The automaton of mlx-lm 0.31.

    It is taught two things of 0.32: the closing marker is no content, and a call may come in the
    midst of reasoning.
    """
    machine = module.SequenceStateMachine
    original, original_match = machine.__init__, machine.match

    @functools.wraps(original)
    def __init__(self: Any, transitions: Any = {}, *args: Any, **kwargs: Any) -> None:  # noqa: B006
        reasoning, normal = transitions.get("reasoning", ()), transitions.get("normal", ())
        swallowed = [tokens for tokens, _ in reasoning if isinstance(tokens, SwallowedTokens)]
        if not swallowed:
            original(self, transitions, *args, **kwargs)
            return
        calls = [edge for edge in normal if edge[1] == "tool"]
        normal = [*normal, *((tokens, "normal") for tokens in swallowed)]
        transitions = {**transitions, "normal": normal, "reasoning": [*reasoning, *calls]}
        original(self, transitions, *args, **kwargs)
        self._states = M3States(self._states, calls[0][0][0] if calls else None)

    @functools.wraps(original_match)
    def match(state: Any, token: Any) -> Any:
        state, matched, name = original_match(state, token)
        states = state[2]
        if matched is None and name != "tool" and isinstance(states, M3States) and token == states.namespace:
            # The text of what was matched is not shown; the automaton itself still waits for more.
            matched = (token,)
        return state, matched, name

    machine.__init__, machine.match = __init__, staticmethod(match)


def utils(module: Any, load_entry_points: Callable[[str], list[Any]]) -> list[str]:
    """Have ``load_model`` look at the files of M3 checkpoints, under whatever names they have."""
    original = module.load_model

    @functools.wraps(original)
    def load_model(model_path: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_m3(model_path):
            return original(model_path, *args, **kwargs)
        with with_shards_named_as_expected(model_path) as path:
            return original(path, *args, **kwargs)

    module.load_model = with_checks(load_model)
    _share_m3(module)
    return ["load_model checks the files of M3 checkpoints", "sharded_load takes any layout and split"]


def _share_m3(module: Any) -> None:
    """Have ``sharded_load`` take M3 another way."""
    original = module.sharded_load
    asked_of = inspect.signature(original)

    @functools.wraps(original)
    def sharded_load(*args: Any, **kwargs: Any) -> Any:
        asked = asked_of.bind(*args, **kwargs)
        asked.apply_defaults()
        path = module._download(asked.arguments["repo"], allow_patterns=["config.json"])
        if not is_m3(path):
            return original(*args, **kwargs)
        # It brings the whole model with it, which others are not to wait for.
        from mlx_m3_plugin.hosts.mlx_lm.sharded import is_ours, load_shared

        if not is_ours(module, module.load_config(path)):
            return original(*args, **kwargs)
        return load_shared(module, asked.arguments)

    module.sharded_load = sharded_load
