"""Extensions of mlx-lm modules that it does not look up by name."""

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from mlx_m3_plugin.chat.reasoning import THINK_START
from mlx_m3_plugin.chat.tool_calls import NAMESPACE
from mlx_m3_plugin.chat.vocabulary import is_m3 as is_m3_tokenizer
from mlx_m3_plugin.hosts.checks import with_checks
from mlx_m3_plugin.hosts.mlx_lm.links import with_shards_named_as_expected
from mlx_m3_plugin.hosts.mlx_lm.tokenizer import ATTRIBUTES, SwallowedTokens, become_m3, is_m3_wrapper
from mlx_m3_plugin.hosts.patching import (
    Arguments,
    Loader,
    UpstreamChangedError,
    call,
    check_uses,
    each,
    find,
    for_m3,
)
from mlx_m3_plugin.weights.files import is_m3


def tokenizer_utils(module: ModuleType, load_entry_points: Loader) -> list[str]:
    """Teach ``TokenizerWrapper`` M3's formats.

    Only tokenizers with M3's markers in their vocabulary are touched.  The wrapper is extended, not
    what ``load`` infers and writes into saved tokenizer configs: what is converted with us must
    open without us.  For the same reason the wrong inference is taken back.
    """
    (tool_parser,) = load_entry_points("mlx_lm.tool_parsers")
    return each(module, lambda module: _wrapper(module, tool_parser), _inferred_parser)


def _wrapper(module: Any, tool_parser: Any) -> str:
    original = find(module, "TokenizerWrapper.__init__", "tokenizer")
    check_uses(original, *ATTRIBUTES)

    @functools.wraps(original)
    def __init__(self: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        original(self, tokenizer, *args, **kwargs)
        # mlx-lm has just read the vocabulary itself.
        if is_m3_tokenizer(tokenizer):
            become_m3(self, tool_parser)

    module.TokenizerWrapper.__init__ = __init__
    return f"tool calls, {THINK_START}, thinking modes"


def _inferred_parser(module: Any) -> str:
    infer = find(module, "_infer_tool_parser")

    @functools.wraps(infer)
    def _infer_tool_parser(*args: Any, **kwargs: Any) -> Any:
        inferred = infer(*args, **kwargs)
        # A tokenizer; before mlx-lm 0.32 its template.
        read = (getattr(value, "chat_template", value) for value in (*args, *kwargs.values()))
        if inferred is not None and any(isinstance(text, str) and THINK_START in text for text in read):
            return None
        return inferred

    module._infer_tool_parser = _infer_tool_parser
    return "no parser inferred from M3's template"


class M3States(dict):  # type: ignore[type-arg]
    """The states of an automaton for M3's replies, what its namespace token is there, and stop words."""

    def __init__(self, states: Any, namespace: Any, stop_words: Sequence[str] = ()) -> None:
        super().__init__(states)
        self.namespace, self.stop_words = namespace, stop_words


def _is_m3_state(state: Any) -> bool:
    """Whether the state of an automaton, a tuple, is of one with ``M3States``."""
    return isinstance(state, tuple) and len(state) > 2 and isinstance(state[2], M3States)


def generate(module: ModuleType, load_entry_points: Loader) -> list[str]:
    """Have the automaton that takes replies apart let none of M3's markers through as text.

    A reply that needs no reasoning begins with the closing marker.  One that ``max_tokens`` cuts
    off may end between the two tokens of the marker before tool calls.
    """
    takes_text = any(hasattr(module, name) for name in ("TextStateMachine", "make_text_state_machine"))
    return each(module, _on_text if takes_text else _on_tokens)


def _on_text(module: Any) -> str:
    """The automaton of mlx-lm 0.32.

    It holds back text that a marker may begin with, and forgets it when the reply ends: each final
    ``]``, for M3.  Its markers begin with a token that comes whole, so there is less to hold back.
    """
    make = find(module, "make_text_state_machine", "tokenizer", "stop_words")
    split = find(module, "TextStateMachine.split", "state", "text")
    flush = find(module, "TextStateMachine.flush", "state")
    machine = module.TextStateMachine
    example = machine()
    state = example.make_state()
    if len(state) != 4 or not isinstance(state[2], dict) or getattr(example, "_states", None) is not state[2]:
        raise UpstreamChangedError(f"{module.__name__}.TextStateMachine has no _states as they were")

    def make_for_m3(given: Arguments) -> Any:
        made = call(make, given)
        made._states = M3States(made._states, NAMESPACE, tuple(given.arguments["stop_words"] or ()))
        return made

    def shown(text: str, name: str) -> str:
        return text if name == "tool" else text.replace(NAMESPACE, "")

    # Called for every token of every model, so without binding its arguments.
    @functools.wraps(split)
    def split_(state: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_m3_state(state):
            return split(state, *args, **kwargs)
        state, segments = split(state, *args, **kwargs)
        name, _, states, held = state
        ends = [held[n:] for n in range(len(held))]
        if NAMESPACE not in held and not any(w.startswith(end) for w in states.stop_words for end in ends):
            segments.append((name, held))
            state = (name, states[name][0], states, "")
        return state, [(name, shown(piece, name)) for name, piece in segments]

    @functools.wraps(flush)
    def flush_(state: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_m3_state(state):
            return flush(state, *args, **kwargs)
        state, text, name = flush(state, *args, **kwargs)
        return state, shown(text, name), name

    module.make_text_state_machine = for_m3(
        make, lambda given: is_m3_wrapper(given["tokenizer"]), make_for_m3
    )
    machine.split, machine.flush = staticmethod(split_), staticmethod(flush_)
    return "markers are no content"


def _on_tokens(module: Any) -> str:
    """The automaton of mlx-lm 0.31.

    It is taught two things of 0.32: the closing marker is no content, and a call may come in the
    midst of reasoning.
    """
    original = find(module, "SequenceStateMachine.__init__", "transitions")
    original_match = find(module, "SequenceStateMachine.match", "state", "x")
    check_uses(original, "_states")
    machine = module.SequenceStateMachine

    def init_for_m3(given: Arguments) -> None:
        transitions = given.arguments["transitions"]
        reasoning, normal = transitions["reasoning"], transitions.get("normal", ())
        calls = [edge for edge in normal if edge[1] == "tool"]
        normal = [*normal, *((tokens, "normal") for tokens in _swallowed(transitions))]
        given.arguments["transitions"] = {**transitions, "normal": normal, "reasoning": [*reasoning, *calls]}
        call(original, given)
        made = given.arguments["self"]
        made._states = M3States(made._states, calls[0][0][0] if calls else None)

    # Called for every token of every model, so without binding its arguments.
    @functools.wraps(original_match)
    def match(state: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_m3_state(state):
            return original_match(state, x, *args, **kwargs)
        state, matched, name = original_match(state, x, *args, **kwargs)
        if matched is None and name != "tool" and x == state[2].namespace:
            # The text of what was matched is not shown; the automaton itself still waits for more.
            matched = (x,)
        return state, matched, name

    machine.__init__ = for_m3(original, lambda given: bool(_swallowed(given["transitions"])), init_for_m3)
    machine.match = staticmethod(match)
    return "markers are no content"


def _swallowed(transitions: Any) -> list[SwallowedTokens]:
    """M3's closing marker, where it ends the reasoning of this automaton."""
    edges = transitions.get("reasoning") if isinstance(transitions, dict) else None
    if not isinstance(edges, (list, tuple)):
        return []
    return [
        edge[0] for edge in edges if isinstance(edge, tuple) and edge and isinstance(edge[0], SwallowedTokens)
    ]


def utils(module: ModuleType, load_entry_points: Loader) -> list[str]:
    """Have ``load_model`` look at the files of M3 checkpoints, under whatever names they have."""
    return each(module, _load_model, _sharded_load)


def _load_model(module: Any) -> str:
    original = find(module, "load_model", "model_path", "lazy", "strict")

    def load(given: Arguments) -> Any:
        with with_shards_named_as_expected(given.arguments["model_path"]) as path:
            given.arguments["model_path"] = path
            return call(original, given)

    with_names = for_m3(original, lambda given: is_m3(given["model_path"]), load)
    module.load_model = with_checks(with_names)
    return "load_model checks the files of M3 checkpoints"


def _sharded_load(module: Any) -> str:
    """Have ``sharded_load`` take M3 another way."""
    options = ("repo", "pipeline_group", "tensor_group", "return_config")
    original = find(module, "sharded_load", *options)
    # What ours needs, which is imported when the first M3 comes.
    find(module, "_download", "allow_patterns")
    find(module, "_get_classes")
    find(module, "load_config")
    find(module, "load_model", "lazy", "get_model_classes")
    find(module, "load_tokenizer", "eos_token_ids")

    def is_m3_repository(repo: Any) -> bool:
        try:
            return is_m3(module._download(repo, allow_patterns=["config.json"]))
        except Exception:
            # The original fails in the same way and says why.
            return False

    def load(given: Arguments) -> Any:
        # It brings the whole model with it, which others are not to wait for.
        from mlx_m3_plugin.hosts.mlx_lm.sharded import is_ours, load_shared

        config = module.load_config(module._download(given.arguments["repo"], allow_patterns=["config.json"]))
        if not is_ours(module, config):
            return call(original, given)
        return load_shared(module, given.arguments)

    module.sharded_load = for_m3(original, lambda given: is_m3_repository(given["repo"]), load)
    return "sharded_load takes any layout and split"
