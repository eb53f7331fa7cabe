"""Stock servers under load and bad requests: every answer right, nothing leaked, nothing down."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from clients import GOOD, KINDS, Load, mixed
from environments import Environment, build_wheel, make_environment
from prompts import TOKENS, write_prompts
from server_process import server_process

from mlx_m3_plugin.toolbox.demo import write_demo

CLIENTS = 32
# Bytes that a prompt of this length takes in the caches of the demo model.
ONE_CACHE = 500 * 4 * (6 * 2 * 4 * 32 + 4 * 32)


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = make_environment(tmp_path_factory.mktemp("guest"))
    environment.install(build_wheel(tmp_path_factory.mktemp("wheel")))
    return environment


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "m3"
    write_demo(directory, vision=True)
    config = json.loads((directory / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 1024
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("script", ["mlx_lm.server", "mlx_vlm.server"])
def test_it_stays_up_and_stays_right(
    script: str,
    guest: Environment,
    model: Path,
    tmp_path: Path,
    fresh_seed: int,
    count: Callable[[int, int], int],
) -> None:
    prompts = write_prompts(model, count(4, 40), fresh_seed)
    with server_process(guest, script, model, tmp_path / "log") as address:
        load = Load(address, "default_model" if script == "mlx_lm.server" else str(model), prompts, TOKENS)
        load.learn()
        kinds = mixed(count(16, 2000), fresh_seed)
        memory: list[tuple[int, int]] = []
        wrong, seen = [], Counter()
        with memory_of(address, memory, seen):
            for outcome in load.run(kinds, CLIENTS, fresh_seed):
                seen[outcome.kind] += 1
                expected = load.expected[outcome.prompt]
                if outcome.kind in GOOD and (outcome.status != 200 or outcome.text != expected):
                    wrong.append((outcome, expected))
                if outcome.kind == "leaves" and not expected.startswith(outcome.text):
                    wrong.append((outcome, expected))
        assert not wrong, (len(wrong), wrong[:3])
        assert set(seen) == set(KINDS)
        # After all that: each kind of bad request once more, and a good one after it.
        for kind in KINDS:
            load.ask(kind, 0)
            assert load.ask("streamed", 1).text == load.expected[1], kind
    np.save(tmp_path / f"{script}.npy", np.array(memory))
    if len(kinds) >= 1000:
        check_memory(memory)
        print(f"memory of {script}:", tmp_path / f"{script}.npy")


def check_memory(memory: list[tuple[int, int]]) -> None:
    """After the first half of the requests, a request leaves less than a tenth of its cache behind."""
    requests, resident = np.array(memory).T
    late = requests > requests[-1] // 2
    slope = np.polyfit(requests[late], resident[late], 1)[0]
    assert slope < ONE_CACHE / 10, f"{slope:,.0f} bytes a request"


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
