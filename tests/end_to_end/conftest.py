"""Environments for the tests that start stock commands in child processes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.environments import Environment, build_wheel, make_environment


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that a user would get from this checkout."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """mlx-lm without the plugin.  For reading only."""
    return make_environment(tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="session")
def guest(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    """The same with our wheel installed by pip.  For reading only."""
    environment = make_environment(tmp_path_factory.mktemp("guest"))
    environment.install(wheel)
    return environment


@pytest.fixture
def new_environment(tmp_path: Path) -> Callable[[], Environment]:
    """Makes an environment without the plugin that a test may change and break."""

    def make(name: str = "environment") -> Environment:
        return make_environment(tmp_path / name)

    return make


@pytest.fixture
def own_guest(new_environment: Callable[[], Environment], guest: Environment) -> Environment:
    """An environment with the plugin that a test may break."""
    environment = new_environment()
    environment.install_from(guest)
    return environment
