"""Requests per second and time to the first token of stock servers, with the plugin against without it.

    python benchmarks/serving.py [--rounds 9] [--server mlx_vlm.server]

One wheel in one environment and two processes of one server, of which one has ``MLX_M3_PLUGIN=off``: there
upstream's own class serves.  Both hold the same small random model (blocks of 8 tokens, 4 of them chosen).
Each round sends both the same new prompts, one after the other and in random order; a ratio is the median
over the rounds.  At or above 1 the plugin is the better one in either column.
"""

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

sys.path.append(str(Path(__file__).parents[1]))

from tests.checkpoints.random_model import write_random_model
from tests.end_to_end.environments import build_wheel, make_environment
from tests.end_to_end.server_process import server_process
from tests.soak.clients import Load, Outcome, words

SERVERS = ("mlx_lm.server", "mlx_vlm.server")
OURS, STOCK = "with the plugin", "without"
VARIABLES = {OURS: {}, STOCK: {"MLX_M3_PLUGIN": "off"}}


@dataclass(frozen=True)
class Case:
    """``requests`` of prompts of ``words`` words (about three tokens each), ``clients`` at a time.

    ``scripted``: each answer is the same token again and again, so that both say the same.
    """

    clients: int
    words: int
    requests: int
    tokens: int = 16
    scripted: bool = False


CASES = (
    Case(1, 10, 16),
    Case(1, 200, 3),
    Case(8, 50, 8),
    Case(32, 50, 32),
    Case(8, 200, 8),
    # What taking a reply apart costs.
    Case(1, 10, 1, tokens=2000, scripted=True),
)
# One that every vocabulary has, and that is text.
SCRIPTED = {"logit_bias": {"70": 1000}}


@dataclass(frozen=True)
class Measured:
    """Of one case on one server."""

    requests_per_second: float
    first_token: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--server", action="append", choices=SERVERS, help="default: both")
    parser.add_argument("--scripted", action="store_true", help="only the case of a scripted reply")
    parser.add_argument("--json", type=Path, help="write every round's numbers there")
    arguments = parser.parse_args()
    cases = [case for case in CASES if case.scripted or not arguments.scripted]
    with tempfile.TemporaryDirectory() as directory:
        rounds = {
            server: measure(server, cases, arguments.rounds, Path(directory) / server)
            for server in arguments.server or SERVERS
        }
    if arguments.json:
        arguments.json.write_text(json.dumps(rounds, default=vars, indent=1))
    print("\n".join(table(cases, rounds)))


def measure(server: str, cases: list[Case], rounds: int, directory: Path) -> list[list[dict[str, Measured]]]:
    """What each case of each round was, on both sides; a round before them warms up."""
    directory.mkdir()
    environment = make_environment(directory / "guest")
    environment.install(build_wheel(directory))
    write_random_model(directory / "m3", vision=True)
    model = "default_model" if server == "mlx_lm.server" else str(directory / "m3")
    with ExitStack() as servers:
        addresses = {
            side: servers.enter_context(
                server_process(
                    environment, server, directory / "m3", directory / f"{side}.log", env=variables
                )
            )
            for side, variables in VARIABLES.items()
        }
        found = []
        for number in range(-1, rounds):
            found.append([one_case(addresses, model, case, random.Random(number)) for case in cases])
            progress(server, number + 1, rounds)
    return found[1:]


def one_case(addresses: dict[str, str], model: str, case: Case, rng: random.Random) -> dict[str, Measured]:
    prompts = [words(rng, case.words) for _ in range(case.requests)]
    sides = list(addresses)
    rng.shuffle(sides)
    settings = SCRIPTED if case.scripted else {}
    return {
        side: send(Load(addresses[side], model, prompts, case.tokens, settings=settings), case)
        for side in sides
    }


def send(load: Load, case: Case) -> Measured:
    begun = time.perf_counter()
    outcomes = list(load.run(["streamed"] * case.requests, case.clients, seed=0))
    seconds = time.perf_counter() - begun
    check(outcomes)
    return Measured(case.requests / seconds, median(outcome.first for outcome in outcomes))


def check(outcomes: list[Outcome]) -> None:
    failed = [outcome for outcome in outcomes if outcome.status != 200 or not outcome.text]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(outcomes)} requests failed: {failed[0]}")


def progress(server: str, done: int, rounds: int) -> None:
    print(
        f"\r{server}: {done} of {rounds} rounds",
        end="" if done < rounds else "\n",
        file=sys.stderr,
        flush=True,
    )


def table(cases: list[Case], rounds: dict[str, list[list[dict[str, Measured]]]]) -> Iterator[str]:
    packages = ", ".join(f"{name} {version(name)}" for name in ("mlx", "mlx-lm", "mlx-vlm"))
    yield f"{packages}, {platform.machine()}."
    yield ""
    yield (
        "| server | clients | words | tokens | requests/s | stock | ratio | first token, s | stock "
        "| stock / ours |"
    )
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    for server, measured in rounds.items():
        for case, of_case in zip(cases, zip(*measured, strict=True), strict=True):
            rates = [(one[OURS].requests_per_second, one[STOCK].requests_per_second) for one in of_case]
            firsts = [(one[OURS].first_token, one[STOCK].first_token) for one in of_case]
            sizes = (case.clients, case.words, case.tokens)
            cells = [server, *sizes, *columns(rates, False), *columns(firsts, True)]
            yield "| " + " | ".join(map(str, cells)) + " |"


def columns(pairs: list[tuple[float, float]], less_is_better: bool) -> list[str]:
    """Medians of both, and of their ratio with its least and greatest."""
    ratios = sorted(stock / ours if less_is_better else ours / stock for ours, stock in pairs)
    ours, stock = (median(values) for values in zip(*pairs, strict=True))
    return [f"{ours:.3f}", f"{stock:.3f}", f"**{median(ratios):.2f}** ({ratios[0]:.2f}-{ratios[-1]:.2f})"]


if __name__ == "__main__":
    main()
