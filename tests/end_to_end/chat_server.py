"""A stock ``mlx_lm.server`` in a child process, and what the ``openai`` client gets from it."""

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
from environments import Environment, clean_variables


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
    """The address of a server, and the file with all it has said."""

    address: str
    log: Path

    def ask(self, messages: str | list[Any], stream: bool = False, **request: Any) -> Answer:
        """Greedily.  ``request`` is further arguments of the ``openai`` client."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        request = {"model": "default_model", "temperature": 0, "messages": messages, **request}
        with openai.OpenAI(
            base_url=f"{self.address}/v1", api_key="none", timeout=120, max_retries=0
        ) as client:
            if stream:
                options = {"include_usage": True}
                chunks = client.chat.completions.create(**request, stream=True, stream_options=options)
                return _streamed(list(chunks))
            return _whole(client.chat.completions.create(**request))


def _whole(completion: Any) -> Answer:
    (choice,) = completion.choices
    message = choice.message.model_dump(exclude_none=True)
    answer = Answer(
        message.get("reasoning", ""),
        message.get("content", ""),
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
    answer.cached = usage.prompt_tokens_details.cached_tokens


@contextmanager
def serving(
    environment: Environment, model: Path, log: Path, *options: str, env: Mapping[str, str] | None = None
) -> Iterator[ChatServer]:
    """Start ``mlx_lm.server`` and wait until it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [environment.python, environment.script("mlx_lm.server"), "--model", model, "--port", port]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*map(str, command), *options],
            env=clean_variables() | dict(env or {}),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield ChatServer(f"http://127.0.0.1:{port}", log)
    finally:
        process.terminate()
        process.wait(timeout=60)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
        else:
            return
    raise AssertionError(f"{url} does not answer; exit code {process.poll()}\n{log.read_text()}")
