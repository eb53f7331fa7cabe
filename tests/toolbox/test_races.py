"""Two processes on one target and one cache, started and signalled at random: a whole result or none."""

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_m3_plugin.toolbox.common import text_of
from mlx_m3_plugin.toolbox.new_directory import LOCK, STATE
from tests.checkpoints.conversions import Written, digest
from tests.toolbox.race_server import BROKEN

NAMES = {"made", "made.unfinished", "passes", "cache"}
WRITERS = ("convert", "convert otherwise", "convert measured", "demo")
READERS = ("evaluate the source", "evaluate the target")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)


class Server:
    """``race_server.py``, and where its commands write."""

    def __init__(self, root: Path, source: Path):
        self.root, self.source, self.seconds = root, source, dict[str, float]()
        self.text = root / "text"
        self.text.write_text(text_of()[:1500])
        self._process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("race_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def arguments(self, kind: str, room: Path) -> list[str]:
        source, target = str(self.source), str(room / "made")
        evaluate = ["--text", str(self.text), "--tokens", "200", "--context", "100"]
        evaluate += ["--cache", str(room / "passes"), "--json"]
        return {
            "convert": ["convert", source, target, "--recipe", "4bit"],
            "convert otherwise": ["convert", source, target, "--recipe", "selector-safe"],
            "convert measured": ["convert", source, target, "--recipe", "oq4", "--text", str(self.text)],
            "demo": ["demo", target, "--bits", "4"],
            "evaluate the source": ["evaluate", source, *evaluate],
            "evaluate the target": ["evaluate", target, *evaluate],
        }[kind]

    def race(self, room: Path, runs: list[dict[str, Any]]) -> list[tuple[int, str]]:
        """Exit code and output of each."""
        outputs = [self.root / f"output-{number}" for number in range(len(runs))]
        wanted = [
            {"start": 0, "signal": None, "signal_after": 0}
            | run
            | {"arguments": self.arguments(run["kind"], room), "output": str(output)}
            | {"cache": str(room / "cache")}
            for run, output in zip(runs, outputs, strict=True)
        ]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(wanted), file=self._process.stdin, flush=True)
        codes = json.loads(self._process.stdout.readline())
        return [(code, output.read_text()) for code, output in zip(codes, outputs, strict=True)]

    def alone(self, room: Path, kind: str) -> tuple[int, str]:
        return self.race(room, [{"kind": kind}])[0]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait() == 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny: Written) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("races"), tiny("published_float"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def expected(server: Server) -> dict[str, Any]:
    """What each command makes when it is alone, and how long it takes."""
    made: dict[str, Any] = {}
    # The first one is slow, and is measured again.
    for number, kind in enumerate((WRITERS[0], *WRITERS, READERS[0])):
        room = server.root / f"alone-{number}"
        room.mkdir()
        begin = time.monotonic()
        code, output = server.alone(room, kind)
        server.seconds[kind] = time.monotonic() - begin
        assert code == 0, output
        made[kind] = digest(room / "made") if kind in WRITERS else perplexity(output)
    server.seconds[READERS[1]] = server.seconds[READERS[0]]
    return made


def perplexity(output: str) -> float:
    return float(json.loads(output[output.index("{\n") : output.rindex("}") + 1])["perplexity"])


def without_strays(directory: Path) -> dict[str, str]:
    """What a process killed between its last two steps leaves besides a whole result."""
    return {name: sum for name, sum in digest(directory).items() if name not in (LOCK, STATE)}


def test_two_processes_leave_a_whole_result_or_none(
    server: Server,
    expected: dict[str, Any],
    count: Callable[[int, int], int],
    fresh_seed: int,
    record_property: Callable[[str, object], None],
) -> None:
    rng, outcomes = random.Random(fresh_seed), Counter[str]()
    for number in range(count(4, 200)):
        room = server.root / f"race-{number}"
        room.mkdir()
        kinds = [rng.choice(WRITERS), rng.choice(WRITERS + READERS)]
        rng.shuffle(kinds)
        runs = [random_run(rng, kind, server) for kind in kinds]
        results = server.race(room, runs)
        told = f"seed {fresh_seed}, race {number}: {runs} -> {results}"
        outcomes[check_what_is_left(room, kinds, results, expected, told)] += 1
        check_a_later_run(server, room, kinds, expected, told)
    record_property("outcomes", dict(outcomes))
    print(json.dumps(outcomes, indent=2))


def random_run(rng: random.Random, kind: str, server: Server) -> dict[str, Any]:
    seconds = server.seconds[kind]
    chosen = rng.choice((*SIGNALS, None))
    return {
        "kind": kind,
        "start": rng.random() * seconds / 2,
        "signal": chosen,
        "signal_after": rng.random() * 1.2 * seconds,
    }


def check_what_is_left(
    room: Path, kinds: list[str], results: list[tuple[int, str]], expected: dict[str, Any], told: str
) -> str:
    """Right after the race.  In words, what came of it."""
    assert {file.name for file in room.iterdir()} <= NAMES, told
    finished = without_strays(room / "made") if (room / "made").exists() else None
    makers = [kind for kind in kinds if kind in WRITERS and expected[kind] == finished]
    assert finished is None or makers, told
    succeeded = []
    for kind, (code, output) in zip(kinds, results, strict=True):
        assert code in (0, 2, 130, *(-s for s in SIGNALS)), told
        assert code != BROKEN, told
        if code == 0 and kind in WRITERS:
            succeeded.append(kind)
            assert kind in makers, told
        if code == 0 and kind == READERS[0]:
            assert perplexity(output) == expected[kind], told
    assert len(succeeded) <= 1, told
    refused = any("another `mlx-m3" in output for _, output in results)
    what = "a whole result" if finished else "unfinished" if (room / "made.unfinished").exists() else "none"
    return what + (", one refused" if refused else "")


def check_a_later_run(
    server: Server, room: Path, kinds: list[str], expected: dict[str, Any], told: str
) -> None:
    """Of the commands that were run, alone now: one of them completes, and all agree with it."""
    before = without_strays(room / "made") if (room / "made").exists() else None
    later = [(kind, *server.alone(room, kind)) for kind in kinds]
    assert (room / "made").exists(), (told, later)
    made = without_strays(room / "made")
    assert made in [expected[kind] for kind in kinds if kind in WRITERS], (told, later)
    assert before is None or before == made, (told, later)
    assert {file.name for file in room.iterdir()} <= NAMES, (told, later)
    for kind, code, output in later:
        if kind == READERS[0]:
            assert code == 0, (told, later)
            assert perplexity(output) == expected[kind], (told, later)
        else:
            assert code in (0, 2), (told, later)
