"""Environments for the tests that start stock commands in child processes, and servers in this one."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end import scripted_model
from tests.end_to_end.chat_hosts import Host, mlx_lm_host, mlx_vlm_host
from tests.end_to_end.environments import Environment, build_wheel, make_environment, warm


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that a user would get from this checkout."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def cold_stock(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """mlx-lm without the plugin, each run in a new process.  For reading only."""
    return make_environment(tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="session")
def cold_guest(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    """The same with our wheel installed by pip.  For reading only."""
    environment = make_environment(tmp_path_factory.mktemp("guest"))
    environment.install(wheel)
    return environment


@pytest.fixture(scope="session")
def stock(cold_stock: Environment) -> Iterator[Environment]:
    """Without the plugin; each run is a fork, which starts at once."""
    with warm(cold_stock) as environment:
        yield environment


@pytest.fixture(scope="session")
def guest(cold_guest: Environment) -> Iterator[Environment]:
    """With our wheel; each run is a fork, which starts at once."""
    with warm(cold_guest) as environment:
        yield environment


@pytest.fixture
def new_environment(tmp_path: Path) -> Callable[[], Environment]:
    """Makes an environment without the plugin that a test may change and break."""

    def make(name: str = "environment") -> Environment:
        return make_environment(tmp_path / name)

    return make


@pytest.fixture
def own_guest(new_environment: Callable[[], Environment], cold_guest: Environment) -> Environment:
    """An environment with the plugin that a test may break."""
    environment = new_environment()
    environment.install_from(cold_guest)
    return environment


# --- both stock servers in this process; see chat_hosts.py ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted_model.write_scripted_model(tmp_path_factory.mktemp("scripted") / "m3")


@pytest.fixture(scope="module")
def vlm(model: Path) -> Iterator[Host]:
    with pytest.MonkeyPatch.context() as patch, mlx_vlm_host(model, patch) as running:
        yield running


@pytest.fixture(scope="module")
def lm(model: Path) -> Iterator[Host]:
    with pytest.MonkeyPatch.context() as patch, mlx_lm_host(model, patch) as running:
        yield running
