"""Third-party servers themselves, with the plugin and without: ``make test-hosts``, for hours."""

import subprocess
from pathlib import Path

import pytest

from tests.third_party.servers import HOSTS, ON_REGISTRY, environment_of, measure, write_nano


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("nano") / "m3-nano"
    write_nano(directory)
    return directory


@pytest.mark.parametrize("name", ON_REGISTRY)
def test_all_is_right_with_the_plugin_and_not_without(
    name: str, nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = list(measure(name, nano, tmp_path))
    with capsys.disabled():
        print("", *rows, sep="\n")
    right = [set(row.split(" | ")[1:]) <= {"yes", "– |", "yes |"} for row in rows]
    assert right == [True, False]
    python = environment_of(HOSTS[name]) / "bin" / "python"
    doctor = subprocess.run([python, "-m", "mlx_m3_plugin", "doctor"], capture_output=True, text=True)
    assert doctor.returncode == 0, doctor.stdout


def test_rapid_mlx_copies_lists_of_caches_whole() -> None:
    """If this fails, rapid-mlx was mended, and our patch of its prefix cache can go."""
    program = """
import mlx.core as mx
from mlx_lm.models.cache import CacheList, KVCache
from rapid_mlx.memory_cache import _trim_cache_offset
entry = CacheList(KVCache(), KVCache())
for cache in entry.caches:
    cache.update_and_fetch(mx.zeros((1, 1, 8, 4)), mx.zeros((1, 1, 8, 4)))
print([cache.offset for cache in _trim_cache_offset([entry], 3)[0].caches])
"""
    python = environment_of(HOSTS["rapid-mlx"]) / "bin" / "python"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[8, 8]"
