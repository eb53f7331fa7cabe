"""A stock server of either library in a child process."""

import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.end_to_end.environments import Environment
from tests.end_to_end.forks import Fork


@contextmanager
def server_process(
    environment: Environment,
    script: str,
    model: Path,
    log: Path,
    *options: str,
    env: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Start ``script`` (``mlx_lm.server`` or ``mlx_vlm.server``); its address, once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    where = ("--model", model, "--host", "127.0.0.1", "--port", str(port))
    process = environment.start(environment.script(script), *where, *options, log=log, env=env)
    try:
        _wait_for(f"{address}/health", process, log)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def _wait_for(url: str, process: "subprocess.Popen[bytes] | Fork", log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
        else:
            return
    raise AssertionError(f"{url} does not answer; exit code {process.poll()}\n{log.read_text()}")
