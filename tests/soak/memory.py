"""Resident memory of a server in another process."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np


def late_slope(memory: np.ndarray) -> float:
    """Bytes a request, in the second half of ``memory`` ``[n, 2]``: requests answered, resident bytes."""
    requests, resident = memory.T
    late = requests > requests[-1] // 2
    return float(np.polyfit(requests[late], resident[late], 1)[0])


@contextmanager
def memory_of(address: str, into: list[tuple[int, int]], seen: "Counter[str]") -> Iterator[None]:
    """Resident bytes of the process that listens there, every half second, by requests answered."""
    process = listener(int(address.rpartition(":")[2]))
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
            into.append((sum(seen.values()), pages * 4096))
            time.sleep(0.5)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def listener(port: int) -> int:
    inodes = {
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A"
    }
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        if target.startswith("socket:[") and target[8:-1] in inodes:
            return int(entry.parts[2])
    raise AssertionError(f"nobody listens on {port}")
