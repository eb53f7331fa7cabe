"""What the ``openai`` client gets from a stock server of either library."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.end_to_end.environments import Environment
from tests.end_to_end.server_process import server_process


@dataclass
class Answer:
    """One choice, the same whether it was streamed or not.

    Attributes:
        calls: names and arguments.  message: the assistant's message, to go on with.
        prompt, tokens: how many of the prompt and of the reply.  cached: how many of the prompt the
            server had from before.  logprobs: of the reply's tokens.
    """

    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    message: dict[str, Any] = field(default_factory=dict)
    prompt: int = 0
    tokens: int = 0
    cached: int = 0
    logprobs: list[float] = field(default_factory=list)

    @property
    def said(self) -> tuple[str, str, list[tuple[str, Any]], str | None]:
        return self.reasoning, self.content, self.calls, self.finish_reason


@dataclass(frozen=True)
class ChatServer:
    """The address of a server, the file with all it has said, and its name for the model."""

    address: str
    log: Path
    model: str

    def ask(self, messages: str | list[Any], stream: bool = False, **request: Any) -> Answer:
        """Greedily.  ``request`` is further arguments of the ``openai`` client."""
        if stream:
            return _streamed(self.chunks(messages, **request))
        with self._client() as client:
            return _whole(client.chat.completions.create(**self._request(messages, request)))

    def chunks(self, messages: str | list[Any], **request: Any) -> list[Any]:
        """An answer as it is streamed."""
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        with self._client() as client:
            return list(client.chat.completions.create(**self._request(messages, request), **streamed))

    def _client(self) -> Any:
        # Here, because it takes a second that collecting tests should not.
        import openai

        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", timeout=120, max_retries=0)

    def _request(self, messages: str | list[Any], request: dict[str, Any]) -> dict[str, Any]:
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return {"model": self.model, "temperature": 0, "messages": messages, **request}


def _whole(completion: Any) -> Answer:
    (choice,) = completion.choices
    message = choice.message.model_dump(exclude_none=True)
    answer = Answer(
        message.get("reasoning", ""),
        message.get("content") or "",
        finish_reason=choice.finish_reason,
        message=message,
    )
    _count(answer, completion.usage)
    for call in message.get("tool_calls", []):
        _add_call(answer, call)
    if choice.logprobs:
        answer.logprobs = [token.logprob for token in choice.logprobs.content]
    return answer


def _streamed(chunks: list[Any]) -> Answer:
    answer, calls = Answer(), []
    for chunk in chunks:
        if chunk.usage:
            _count(answer, chunk.usage)
        for choice in chunk.choices:
            delta = choice.delta.model_dump(exclude_none=True)
            answer.reasoning += delta.get("reasoning", "")
            answer.content += delta.get("content", "")
            calls += delta.get("tool_calls", [])
            assert answer.finish_reason is None, "something came after the reason to finish"
            answer.finish_reason = choice.finish_reason
    # Each call comes whole, and in its place.
    assert [call.pop("index") for call in calls] == list(range(len(calls)))
    for call in calls:
        _add_call(answer, call)
    answer.message = {"role": "assistant", "content": answer.content, "reasoning": answer.reasoning}
    if calls:
        answer.message["tool_calls"] = calls
    return answer


def _add_call(answer: Answer, call: dict[str, Any]) -> None:
    assert call["type"] == "function"
    assert call["id"]
    answer.calls.append((call["function"]["name"], json.loads(call["function"]["arguments"])))


def _count(answer: Answer, usage: Any) -> None:
    answer.prompt, answer.tokens = usage.prompt_tokens, usage.completion_tokens
    details = usage.prompt_tokens_details
    answer.cached = details.cached_tokens if details else 0


@contextmanager
def serving(
    environment: Environment,
    script: str,
    model: Path,
    log: Path,
    *options: str,
    env: Mapping[str, str] | None = None,
) -> Iterator[ChatServer]:
    """Start ``mlx_lm.server`` or ``mlx_vlm.server`` and wait until it answers."""
    with server_process(environment, script, model, log, *options, env=env) as address:
        yield ChatServer(address, log, "default_model" if script == "mlx_lm.server" else str(model))
