"""Stock ``mlx_lm.server`` over two processes."""

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.server import LRUPromptCache

from tests.distributed.jobs import free_ports, launcher, start, stop
from tests.end_to_end.chat_hosts import mlx_lm_server

BODY = {
    "messages": [{"role": "user", "content": "How are blocks of keys chosen? " * 6}],
    "temperature": 0,
    "max_tokens": 12,
}


@contextmanager
def serving(command: list[str], *arguments: str) -> Iterator[str]:
    port = free_ports(1)
    process = start([*command, *arguments, "--port", str(port)])
    try:
        address = f"http://127.0.0.1:{port}/v1"
        for _ in range(600):
            assert process.poll() is None, process.communicate()[0]
            try:
                urllib.request.urlopen(f"{address}/models", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        yield address
    finally:
        stop(process)


def answer(address: str) -> tuple[Any, int]:
    """The choice, and how much of the prompt was cached."""
    request = urllib.request.Request(f"{address}/chat/completions", json.dumps(BODY).encode())
    with urllib.request.urlopen(request, timeout=60) as response:
        reply = json.load(response)
    return reply["choices"], reply["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.some(1)
@pytest.mark.parametrize("arguments", [["--pipeline"], []], ids=["pipeline", "tensor"])
def test_it_answers_as_one_process_does(checkpoint: Callable[[str], Path], arguments: list[str]) -> None:
    server = str(Path(sys.executable).with_name("mlx_lm.server"))
    model = ["--model", str(checkpoint("4bit"))]
    cache = LRUPromptCache(0)
    with pytest.MonkeyPatch.context() as patch, mlx_lm_server(checkpoint("4bit"), patch, cache) as address:
        expected, _ = answer(f"{address}/v1")
    split = ["--env", "MLX_M3_PLUGIN_PIPELINE_SPLIT=4,2"] if arguments else []
    with serving([*launcher(2), *split, server], *model, *arguments) as address:
        first, cached = answer(address)
        again, cached_again = answer(address)
    assert first == again == expected
    assert cached == 0 < cached_again
