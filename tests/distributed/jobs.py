"""What several processes are to compute, and what one computes for comparison."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class Job:
    """One model, one way to share it, and one prompt.

    Attributes:
        checkpoint: its directory; ``{rank}`` in it stands for the process's number.
        kind: ``tensor`` or ``pipeline``.
        parts: where the prompt is cut.  decoded: how many of the last tokens are given one by one.
        split: layers by rank, as all processes are told; ``splits``: as one of them is told.
        generate: tokens that ``stream_generate`` adds greedily.
    """

    checkpoint: str
    kind: str
    tokens: list[int]
    parts: list[int] = field(default_factory=list)
    decoded: int = 0
    split: list[int] | None = None
    splits: dict[str, list[int]] = field(default_factory=dict)
    generate: int = 0
    library: str = "mlx_lm"


def launch(
    jobs: list[Job], directory: Path, processes: int, timeout: float = 600
) -> list[list[dict[str, np.ndarray]]]:
    """What each rank found of each job."""
    directory.mkdir()
    file = directory / "jobs.json"
    file.write_text(json.dumps([asdict(job) for job in jobs]))
    run = subprocess.run(command(processes, file), capture_output=True, text=True, timeout=timeout)
    # The launcher ends with 0 whatever its processes do.
    results = [directory / f"{number}-{rank}.npz" for number in range(len(jobs)) for rank in range(processes)]
    assert all(result.exists() for result in results), run.stdout + run.stderr
    return [
        [dict(np.load(directory / f"{number}-{rank}.npz")) for rank in range(processes)]
        for number in range(len(jobs))
    ]


def start(command: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def stop(process: "subprocess.Popen[str]") -> None:
    """With all that it has started: MLX's launcher leaves its processes to themselves."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def wait_for_tokens(launcher: "subprocess.Popen[str]", processes: int) -> set[int]:
    """Until all generate; their ids."""
    ids: set[int] = set()
    assert launcher.stdout is not None
    for line in launcher.stdout:
        if line.startswith("token "):
            ids.add(int(line.split()[2]))
        if len(ids) == processes:
            return ids
    raise AssertionError(f"the launcher has ended: {launcher.wait()}")


def command(processes: int, *arguments: object) -> list[str]:
    python = [sys.executable] if processes == 1 else launcher(processes)
    return [*python, str(WORKER), *map(str, arguments)]


def launcher(processes: int) -> list[str]:
    """MLX's own, before a script."""
    options = ["-n", str(processes), "--starting-port", str(free_ports(processes))]
    launch = str(Path(sys.executable).with_name("mlx.launch"))
    return [launch, "--backend", "ring", *options, "--python", sys.executable]


def free_ports(count: int) -> int:
    """The first of ``count`` ports in a row that are free now."""
    while True:
        first = random.randrange(20_000, 60_000)
        sockets = [socket.socket() for _ in range(count)]
        try:
            for number, one in enumerate(sockets):
                one.bind(("127.0.0.1", first + number))
            return first
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
