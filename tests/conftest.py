"""How much of the random tests to run: a share by default, the full counts with ``--full``."""

import gc
import os
import pkgutil
import random
import sys
from collections.abc import Callable, Generator, Iterator
from types import ModuleType
from typing import Any

import pytest

SAMPLED_LAYOUTS = 10


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the full counts of the random tests")
    parser.addoption("--most", type=int, help="the most cases of each test; which ones is chance")


@pytest.fixture(scope="session")
def count(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """``count(share, full)``: how many cases to run."""
    full = request.config.getoption("--full")
    return lambda share, all_of_them: all_of_them if full else share


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests with an argument ``layout_name`` run for a sample of all layouts, for all with ``--full``."""
    if "layout_name" in metafunc.fixturenames:
        metafunc.parametrize("layout_name", sample_of_layouts(metafunc.config))


def sample_of_layouts(config: pytest.Config) -> list[str]:
    """The table stands in families, so every fifth of it is some of each."""
    from tests.checkpoints.tiny_layouts import LAYOUTS

    step = 1 if config.getoption("--full") else len(LAYOUTS) // SAMPLED_LAYOUTS
    first = random.Random(os.environ.get("M3_SEED")).randrange(step)
    return list(LAYOUTS)[first::step]


@pytest.fixture(scope="session")
def sampled_layouts(pytestconfig: pytest.Config) -> list[str]:
    """As many names of layouts as ``layout_name`` takes, for a test that tries all of them in one process."""
    return sample_of_layouts(pytestconfig)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "some(count, least): so many of a test's cases by chance, all with --full"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test that is marked ``some(count)``, so many of its cases are run; all with ``--full``.

    ``some(count, least)``: and ``least`` of them where ``--most`` is less.
    """
    if config.getoption("--full"):
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    most_of_all = config.getoption("--most") or len(items)
    rng = random.Random(os.environ.get("M3_SEED"))
    left_out: set[pytest.Item] = set()
    for of_one_test in cases.values():
        marker = of_one_test[0].get_closest_marker("some")
        count, least = (*(marker.args if marker else (len(of_one_test),)), 0)[:2]
        most = min(count, max(most_of_all, least))
        left_out |= set(rng.sample(of_one_test, max(0, len(of_one_test) - most)))
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    """What is imported stays, and whoever collects garbage need not look through it: servers often do."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def fresh_seed(record_property: Callable[[str, object], None]) -> int:
    """Another one each time; ``M3_SEED`` repeats a run."""
    seed = int(os.environ.get("M3_SEED", random.SystemRandom().randrange(2**31)))
    record_property("seed", seed)
    return seed


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failing random test says how to repeat it."""
    report = yield
    seed = dict(item.user_properties).get("seed")
    if report.failed and seed is not None:
        report.sections.append(("the same again", f"M3_SEED={seed}"))
    return report


# What a process is told at its start.  Only who reads it is affected.
_OF_THE_PROCESS = {("sys", name) for name in ("argv", "stdin", "stdout", "stderr")}
_replace = pytest.MonkeyPatch.setattr


def _replace_our_own(patch: pytest.MonkeyPatch, target: Any, name: Any, *rest: Any, **options: Any) -> None:
    """No test replaces a function of the standard library: other code of this process calls it, too.

    What else runs depends on the machine (matplotlib starts processes to build its font cache, once per
    home directory), so that such a test fails on a new machine only.  Replace a name of our own.
    """
    if isinstance(target, str):
        # ("package.module.name", value): the name is in the first.
        path, _, attribute = target.rpartition(".")
        owner = pkgutil.resolve_name(path)
    else:
        owner, attribute = target, name
    module = owner.__name__ if isinstance(owner, ModuleType) else ""
    if module.partition(".")[0] in sys.stdlib_module_names and (module, attribute) not in _OF_THE_PROCESS:
        raise AssertionError(f"{module}.{attribute} is the whole process's; replace a name of our own")
    _replace(patch, target, name, *rest, **options)


pytest.MonkeyPatch.setattr = _replace_our_own  # type: ignore[method-assign]


@pytest.fixture
def started_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A machine with a Metal GPU, whose kernels run on the CPU; the names of those that were started."""
    import mlx.core as mx

    from mlx_m3_plugin.msa import engine
    from tests.msa import metal_on_cpu

    started: list[str] = []

    def metal_kernel(name: str, **options: Any) -> Callable[..., list[mx.array]]:
        kernel = metal_on_cpu.metal_kernel(name, **options)

        def start(**arguments: Any) -> list[mx.array]:
            started.append(name)
            return kernel(**arguments)

        return start

    monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
    monkeypatch.setattr(engine, "has_metal", lambda: True)
    monkeypatch.setattr(engine, "SIZES", {"few": (1, 50), "many": (20, 50)})
    engine._examined.cache_clear()
    yield started
    monkeypatch.undo()
    engine._examined.cache_clear()
    engine.configure()
