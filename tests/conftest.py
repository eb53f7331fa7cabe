"""How much of the random tests to run: a share by default, the full counts with ``--full``."""

import os
import random
from collections.abc import Callable

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the full counts of the random tests")


@pytest.fixture(scope="session")
def count(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """``count(share, full)``: how many cases to run."""
    full = request.config.getoption("--full")
    return lambda share, all_of_them: all_of_them if full else share


@pytest.fixture
def fresh_seed(record_property: Callable[[str, object], None]) -> int:
    """Another one each time; ``M3_SEED`` repeats a run.  A failing test shows it as an argument."""
    seed = int(os.environ.get("M3_SEED", random.SystemRandom().randrange(2**31)))
    record_property("seed", seed)
    return seed
