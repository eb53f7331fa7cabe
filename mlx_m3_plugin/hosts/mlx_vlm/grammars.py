"""Structured output of M3: a grammar holds its answer, and neither its reasoning nor its calls."""

from enum import Enum, auto
from typing import Any

import mlx.core as mx

from mlx_m3_plugin.chat.markers import MARKERS, THINK_END, THINK_START


class Where(Enum):
    """What comes next in a reply."""

    ANYTHING = auto()  # reasoning, or the answer: the prompt has left it open
    REASONING = auto()
    ANSWER_OR_CALL = auto()
    ANSWER = auto()
    CALL = auto()


def where_a_reply_begins(prompt: Any) -> Where:
    end = prompt.rstrip() if isinstance(prompt, str) else ""
    if end.endswith(THINK_START):
        return Where.REASONING
    return Where.ANSWER_OR_CALL if end.endswith(THINK_END) else Where.ANYTHING


class AnswerGrammar:
    """A logits processor around mlx-vlm's, which lets M3 think first and call tools instead.

    Args:
        grammar: mlx-vlm's, for one row.
        tokenizer: has M3's markers.
        begin: where the reply begins.
        may_call: tools are offered.
    """

    # As mlx-vlm's own has it: a token is not to wait for other rows' prompts.
    requires_immediate_decode_yield = True

    def __init__(self, grammar: Any, tokenizer: Any, begin: Where, may_call: bool):
        self._start, self._end, self._namespace = tokenizer.convert_tokens_to_ids(list(MARKERS))
        self._grammar, self._tokenizer, self._may_call = grammar, tokenizer, may_call
        self._begin = self._next = begin
        self._is_first = True

    def clone(self) -> "AnswerGrammar":
        return AnswerGrammar(self._grammar.clone(), self._tokenizer, self._begin, self._may_call)

    def reset(self) -> None:
        self._grammar.reset()
        self._next, self._is_first = self._begin, True

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Logits [1, V] or [V] of the token after ``tokens`` [n], with -inf for what can't be an answer."""
        last: Any = tokens.reshape(-1)[-1].item()
        return self.process_last_token(last, logits)

    def process_last_token(self, token: int, logits: mx.array) -> mx.array:
        # The first one is the prompt's.
        if not self._is_first:
            self._read(token)
        self._is_first = False
        if self._next in (Where.REASONING, Where.CALL):
            return logits
        held: mx.array = self._grammar.process_last_token(token, logits)
        allowed = [self._start, self._end] if self._next is Where.ANYTHING else []
        if self._may_call and self._next is not Where.ANSWER:
            allowed.append(self._namespace)
        if allowed:
            held[..., mx.array(allowed)] = logits[..., mx.array(allowed)]
        return held

    def _read(self, token: int) -> None:
        if self._next is Where.ANYTHING and token == self._start:
            # It has been asked about the first token.
            self._grammar.reset()
            self._next = Where.REASONING
        elif token == self._end and self._next in (Where.ANYTHING, Where.REASONING):
            self._grammar.reset()
            self._next = Where.ANSWER_OR_CALL
        elif self._next in (Where.ANYTHING, Where.ANSWER_OR_CALL):
            is_call = token == self._namespace and self._may_call
            self._next = Where.CALL if is_call else Where.ANSWER
