"""A stock ``mlx_vlm.server`` in a child process, and a client of a few lines."""

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

from tests.end_to_end.environments import Environment
from tests.end_to_end.server_process import server_process


@dataclass(frozen=True)
class Server:
    """The address of a server, and the model it has loaded."""

    address: str
    model: Path

    def ask(self, question: str, *pictures: Path, max_tokens: int) -> dict[str, Any]:
        """The one choice of an answer, with ``usage`` beside ``message``."""
        with self._post(self._request(question, pictures, max_tokens)) as response:
            answer = json.load(response)
        (choice,) = answer["choices"]
        return {**choice, "usage": answer["usage"]}

    def ask_streamed(self, question: str, *pictures: Path, max_tokens: int) -> list[str]:
        """The pieces of an answer, as they come."""
        request = self._request(question, pictures, max_tokens) | {"stream": True}
        with self._post(request) as response:
            lines = [line.decode().strip() for line in response]
        events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert events.pop() == "[DONE]"
        choices = [choice for event in events for choice in json.loads(event)["choices"]]
        return [choice["delta"].get("content") or "" for choice in choices]

    def _request(self, question: str, pictures: tuple[Path, ...], max_tokens: int) -> dict[str, Any]:
        # Pictures first, as mlx_vlm.generate puts them; newer servers keep the order they are sent in.
        content = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
        content.append({"type": "text", "text": question})  # type: ignore[dict-item]
        return {
            "model": str(self.model),
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }

    def _post(self, content: dict[str, Any]) -> HTTPResponse:
        headers = {"Content-Type": "application/json"}
        url = f"{self.address}/v1/chat/completions"
        request = urllib.request.Request(url, json.dumps(content).encode(), headers=headers)
        try:
            return urllib.request.urlopen(request, timeout=120)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"status {error.code}: {error.read().decode()}") from None


def data_url(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


@contextmanager
def serving(environment: Environment, model: Path, log: Path) -> Iterator[Server]:
    """Start ``mlx_vlm.server`` and wait until it answers."""
    with server_process(environment, "mlx_vlm.server", model, log) as address:
        yield Server(address, model)
