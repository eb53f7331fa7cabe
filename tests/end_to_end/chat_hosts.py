"""Both stock servers in this process, with real clients in front and a given reply behind.

What a generation says is ``Host.reply``, in pieces that a tokenizer could make; no model computes it.
Requests, prompts and answers take the way they take in a server of their own: only the generation is
replaced, beneath our patch of it.
"""

import gc
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_m3_plugin.chat.markers import NAMESPACE, THINK_END, THINK_START

# A tokenizer has each marker as one token, and cuts other text anywhere.
_PIECES = re.compile(f"({'|'.join(map(re.escape, (THINK_START, THINK_END, NAMESPACE)))}|.{{1,3}})", re.DOTALL)


@dataclass
class Host:
    """A running server.

    Attributes:
        reply: what the next generations say, until their end.  limit: the most pieces of it.
        replies: what the next generations say, one each, before ``reply``.
        prompts: of all generations, as text.  arguments: mlx-vlm's of the last one.
    """

    address: str = ""
    model: str = ""
    reply: str = "Yes."
    limit: int | None = None
    replies: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    arguments: Any = None

    def pieces(self) -> list[str]:
        return [piece for piece in _PIECES.split(self.next_reply()) if piece][: self.limit]

    def next_reply(self) -> str:
        return self.replies.pop(0) if self.replies else self.reply

    def finish_reason(self) -> str:
        return "stop" if self.limit is None else "length"

    @property
    def prompt(self) -> str:
        return self.prompts[-1]

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """An answer; of one that streams, all of its events."""
        sent = json.dumps({"model": self.model, **body}).encode()
        request = urllib.request.Request(f"{self.address}{path}", sent, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            if not body.get("stream"):
                return json.load(response)
            lines = [line.decode().strip() for line in response]
        return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]

    def refusal(self, path: str, body: dict[str, Any]) -> str:
        """Why a request is refused with status 400."""
        with pytest.raises(urllib.error.HTTPError) as refused:
            self.post(path, body)
        assert refused.value.code == 400
        return refused.value.read().decode()


@contextmanager
def mlx_vlm_host(model: Path, patch: pytest.MonkeyPatch, generates: bool = False) -> Iterator[Host]:
    """``generates``: the model itself says what it says, and the prompts are written down."""
    import uvicorn
    from mlx_vlm.server import app, generation

    host = Host(model=str(model))
    if not generates:
        from mlx_m3_plugin.hosts.mlx_vlm import replies

        given = replies.generate(generation, partial(_given_to_vlm, host, generation))
        patch.setattr(generation.ResponseGenerator, "generate", given)
    else:
        patch.setattr(generation.ResponseGenerator, "generate", _recorded(host, generation))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        host.address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        # The server collects garbage after each request.
        gc.freeze()
        yield host
    finally:
        server.should_exit = True
        thread.join()
        # A generation thread that runs at the interpreter's end would take it down.
        import_module("mlx_vlm.server.app").unload_model_sync()


def _given_to_vlm(
    host: Host,
    generation: Any,
    self: Any,
    prompt: str,
    images: Any = None,
    audio: Any = None,
    args: Any = None,
    videos: Any = None,
) -> Any:
    host.prompts.append(prompt)
    host.arguments = args
    tokens = len(self.tokenizer.encode(prompt, add_special_tokens=False))
    return generation.GenerationContext(uid=1, prompt_tokens=tokens), _given_tokens(host, generation)


def _given_tokens(host: Host, generation: Any) -> Iterator[Any]:
    pieces = host.pieces()
    for n, piece in enumerate(pieces):
        last = n == len(pieces) - 1 and host.limit is not None
        yield generation.StreamingToken(piece, n, 0.0, "length" if last else None)
    if host.limit is None:
        yield generation.StreamingToken("", 0, 0.0, "stop")


@contextmanager
def mlx_lm_host(model: Path, patch: pytest.MonkeyPatch, *options: str) -> Iterator[Host]:
    from mlx_lm import server

    host = Host(model="default_model")
    # Alone, where what a model says comes from one function.
    patch.setattr(server.ResponseGenerator, "_is_batchable", lambda self, args: False)
    patch.setattr(server, "stream_generate", partial(_given_to_lm, host))
    with mlx_lm_server(
        model, patch, server.LRUPromptCache(0), "--prompt-cache-size", "0", *options
    ) as address:
        host.address = address
        yield host


@contextmanager
def mlx_lm_server(model: Path, patch: pytest.MonkeyPatch, prompt_cache: Any, *options: str) -> Iterator[str]:
    """mlx-lm's server as it is; its address."""
    from mlx_lm import server

    providers: list[Any] = []
    patch.setattr("sys.argv", ["mlx_lm.server", "--model", str(model), *options])
    patch.setattr(server, "run", lambda name, port, provider: providers.append(provider))
    server.main()
    generator = server.ResponseGenerator(providers[0], prompt_cache)
    httpd = server.ThreadingHTTPServer(("127.0.0.1", 0), partial(server.APIHandler, generator))
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}"
    finally:
        httpd.shutdown()
        httpd.server_close()
        generator.stop_and_join()
        thread.join()


def _given_to_lm(host: Host, model: Any, tokenizer: Any, prompt: Any, **options: Any) -> Iterator[Any]:
    import mlx.core as mx

    host.prompts.append(tokenizer.decode(prompt))
    host.arguments = options
    pieces = tokenizer.encode(host.next_reply(), add_special_tokens=False)[: host.limit]
    detokenizer, logprobs = tokenizer.detokenizer, mx.zeros(len(tokenizer._tokenizer))
    for n, token in enumerate(pieces):
        detokenizer.add_token(token)
        ends = n == len(pieces) - 1 and host.limit is not None
        if ends:
            detokenizer.finalize()
        reason = "length" if ends else None
        yield SimpleNamespace(
            text=detokenizer.last_segment, token=token, logprobs=logprobs, finish_reason=reason
        )
    if host.limit is None:
        detokenizer.finalize()
        end = tokenizer.eos_token_id
        yield SimpleNamespace(
            text=detokenizer.last_segment, token=end, logprobs=logprobs, finish_reason="stop"
        )


def _recorded(host: Host, generation: Any) -> Callable[..., Any]:
    original = generation.ResponseGenerator.generate

    def generate(self: Any, prompt: str, *args: Any, **kwargs: Any) -> Any:
        host.prompts.append(prompt)
        return original(self, prompt, *args, **kwargs)

    return generate
