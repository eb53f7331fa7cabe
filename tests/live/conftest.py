"""Options of the live parity run."""

import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seeds", type=int, default=2, help="random seeds per shape")
    parser.addoption(
        "--first-seed", type=int, default=None, help="default: a fresh one, printed in the header"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--first-seed") is None:
        # Above the range of a hand-picked seed; below 2**31, as torch wants it.
        config.option.first_seed = int.from_bytes(os.urandom(3), "big") + 1000


def pytest_report_header(config: pytest.Config) -> str:
    first, seeds = config.getoption("--first-seed"), config.getoption("--seeds")
    return f"live parity: --first-seed {first} --seeds {seeds}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        first = metafunc.config.getoption("--first-seed")
        seeds = range(first, first + metafunc.config.getoption("--seeds"))
        metafunc.parametrize("seed", seeds, scope="module")
