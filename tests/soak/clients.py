"""Clients of a stock server: good ones, ones that leave, and ones that ask for what cannot be."""

import http.client
import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

SECONDS, TRIES = 300, 5
# A PNG of one pixel.
PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABpfZFQAAA"
    "AABJRU5ErkJggg=="
)
# What is sent, and how many of a hundred.
KINDS = {
    "streamed": 66,
    "whole": 10,
    "leaves": 10,
    "too long": 2,
    "no JSON": 3,
    "unknown tools": 3,
    "picture": 3,
    "no messages": 3,
}
GOOD = ("streamed", "whole")
SENTENCE = "which block of keys does a query take when its head looks far back"


@dataclass
class Outcome:
    """Of one request; ``first`` and ``seconds`` are from when it was sent."""

    kind: str
    prompt: int
    status: int = 0
    text: str = ""
    finish_reason: str | None = None
    first: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Load:
    """Requests to one server.

    Attributes:
        prompts: the users' messages; ``expected``: the answer to each, when it is alone.
        tokens: how many each answer has at most.  settings: further fields of each request.
    """

    address: str
    model: str
    prompts: list[str]
    tokens: int
    expected: dict[int, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def body(self, prompt: int, stream: bool, **more: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": self.prompts[prompt]}]
        settings = {"temperature": 0, "max_tokens": self.tokens, "stream": stream}
        return {"model": self.model, "messages": messages, **settings, **self.settings, **more}

    def learn(self) -> None:
        """Ask everything once, one after the other."""
        for prompt in range(len(self.prompts)):
            self.expected[prompt] = self.ask("whole", prompt).text

    def ask(self, kind: str, prompt: int) -> Outcome:
        """As clients do: try again where a connection was not taken.

        mlx-lm's server lets five wait for it to be taken; of 32 at once some are refused.
        """
        for _ in range(TRIES):
            try:
                return self._ask(kind, prompt)
            except ConnectionError:
                time.sleep(0.5)
        return self._ask(kind, prompt)

    def _ask(self, kind: str, prompt: int) -> Outcome:
        outcome, begun = Outcome(kind, prompt), time.perf_counter()
        address = urlsplit(self.address)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=SECONDS)
        try:
            connection.request(
                "POST", "/v1/chat/completions", self._data(kind, prompt), {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            outcome.status = response.status
            if kind in ("streamed", "leaves") and response.status == 200:
                self._follow(response, outcome, begun, leave_after=3 if kind == "leaves" else None)
            else:
                _read_whole(response.read(), outcome)
        finally:
            connection.close()
        outcome.seconds = time.perf_counter() - begun
        return outcome

    def _data(self, kind: str, prompt: int) -> bytes:
        body = self.body(prompt, stream=kind in ("streamed", "leaves"))
        if kind == "no JSON":
            return json.dumps(body).encode()[:-7]
        if kind == "no messages":
            del body["messages"]
        if kind == "too long":
            body["messages"][0]["content"] *= 5
            body["max_tokens"] = 2
        if kind == "unknown tools":
            call = {"id": "1", "type": "function", "function": {"name": "nobody", "arguments": "{]"}}
            body["messages"] += [
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "2", "content": "?"},
            ]
        if kind == "picture":
            picture = {"type": "image_url", "image_url": {"url": PICTURE}}
            body["messages"][0]["content"] = [{"type": "text", "text": "What is it?"}, picture]
        return json.dumps(body).encode()

    @staticmethod
    def _follow(response: Any, outcome: Outcome, begun: float, leave_after: int | None) -> None:
        for pieces, (delta, finish_reason) in enumerate(_deltas(response), 1):
            outcome.text += delta
            outcome.finish_reason = finish_reason or outcome.finish_reason
            if delta and not outcome.first:
                outcome.first = time.perf_counter() - begun
            if pieces == leave_after:
                return

    def run(self, kinds: list[str], clients: int, seed: int) -> Iterator[Outcome]:
        """All at once, ``clients`` at a time; outcomes as they come."""
        rng = random.Random(seed)
        asked = [(kind, rng.randrange(len(self.prompts))) for kind in kinds]
        with ThreadPoolExecutor(clients) as pool:
            yield from pool.map(lambda one: self.ask(*one), asked)


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(SENTENCE.split(), k=count))


def mixed(count: int, seed: int) -> list[str]:
    """Kinds of requests; every one is among them."""
    rng = random.Random(seed)
    kinds = [*KINDS, *rng.choices(list(KINDS), list(KINDS.values()), k=count - len(KINDS))]
    rng.shuffle(kinds)
    return kinds


def _deltas(response: Any) -> Iterator[tuple[str, str | None]]:
    for line in response:
        if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
            continue
        for choice in json.loads(line[6:]).get("choices", []):
            delta = choice.get("delta", {})
            yield (delta.get("reasoning") or "") + (delta.get("content") or ""), choice.get("finish_reason")


def _read_whole(data: bytes, outcome: Outcome) -> None:
    if outcome.status != 200:
        outcome.text = data.decode(errors="replace")
        return
    (choice,) = json.loads(data)["choices"]
    message = choice["message"]
    outcome.text = (message.get("reasoning") or "") + (message.get("content") or "")
    outcome.finish_reason = choice["finish_reason"]
