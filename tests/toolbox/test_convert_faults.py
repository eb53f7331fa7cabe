"""Conversions that are killed, that run out of disk, whose source goes away: nothing is lost or half done."""

import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_m3_plugin.cli import main
from mlx_m3_plugin.toolbox.convert import plan as planning
from mlx_m3_plugin.weights.headers import weight_files
from tests.checkpoints.conversions import Written, after, convert, converted, digest, interrupt, planned
from tests.end_to_end.environments import here
from tests.end_to_end.forks import Fork

# A conversion into many files that takes its time.
SLOWLY = """
import sys, time
sys.path.append(sys.argv[3])
from pathlib import Path
from tests.checkpoints.conversions import convert, planned
from mlx_m3_plugin.toolbox.convert import plan
plan.SHARD_BYTES = 60_000
made = planned(Path(sys.argv[1]), "selector-safe")
print("begin", flush=True)
convert(made, Path(sys.argv[2]), memory=1 << 30, progress=lambda module, count: time.sleep(0.004))
print("end", flush=True)
"""
CHECKOUT = str(Path(__file__).parents[2])


def start(source: Path, destination: Path) -> Fork:
    """Returns when the conversion begins."""
    process = here().start("-c", SLOWLY, source, destination, CHECKOUT)
    while "begin" not in process.said():
        assert process.poll() is None, process.said("stderr")
        time.sleep(0.01)
    return process


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    tiny: Written, tmp_path: Path, count: Callable[[int, int], int], fresh_seed: int
) -> None:
    rng = random.Random(fresh_seed)
    source = tiny("published_float")
    process = start(source, tmp_path / "whole")
    begin = time.monotonic()
    assert process.wait() == 0
    seconds, expected = time.monotonic() - begin, digest(tmp_path / "whole")
    assert sum(name.endswith(".safetensors") for name in expected) > 10
    kills, resumed = count(5, 20), 0
    destination, unfinished = tmp_path / "made", tmp_path / "made.unfinished"
    while kills:
        process = start(source, destination)
        time.sleep(rng.random() * seconds / 3)
        process.kill()
        killed = process.wait() == -signal.SIGKILL
        if destination.exists():
            # At the very end; what looks finished is.
            assert digest(destination) == expected
            shutil.rmtree(destination)
        elif killed:
            kills -= 1
            resumed += any(unfinished.glob("*.safetensors"))
    process = start(source, destination)
    assert process.wait() == 0
    assert digest(destination) == expected
    assert not unfinished.exists()
    assert resumed, "no kill came after a finished file"


def test_finished_files_are_not_written_again(
    tiny: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "SHARD_BYTES", 60_000)
    plan = planned(tiny("published_float"), "4bit")
    with pytest.raises(KeyboardInterrupt):
        convert(plan, tmp_path / "made", memory=1 << 30, progress=after(20, interrupt))
    finished = sorted((tmp_path / "made.unfinished").glob("*.safetensors"))
    times = [file.stat().st_mtime_ns for file in finished]
    assert finished
    report = convert(plan, tmp_path / "made", memory=1 << 30, progress=lambda module, size: None)
    assert report["resumed"] == len(finished)
    assert [(tmp_path / "made" / file.name).stat().st_mtime_ns for file in finished] == times


def test_an_unfinished_conversion_of_something_else_is_left_alone(tiny: Written, tmp_path: Path) -> None:
    def stop(module: Any, size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(planned(tiny("published_float"), "4bit"), tmp_path / "made", memory=1 << 30, progress=stop)
    before = digest(tmp_path / "made.unfinished")
    with pytest.raises(ValueError, match="an unfinished conversion of another source, recipe or version"):
        converted(tiny("published_float"), "6bit", tmp_path / "made")
    assert digest(tmp_path / "made.unfinished") == before
    (tmp_path / "other.unfinished").mkdir()
    (tmp_path / "other.unfinished" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"other\.unfinished holds files"):
        converted(tiny("published_float"), "6bit", tmp_path / "other")


def test_too_little_disk_is_told_before_anything_is_written(
    tiny: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    full = SimpleNamespace(disk_usage=lambda path: usage._replace(free=1000))
    monkeypatch.setattr("mlx_m3_plugin.toolbox.convert.run.shutil", full)
    assert main(["convert", str(tiny("published_float")), str(tmp_path / "made"), "--recipe", "4bit"]) == 2
    assert "GB free, and 0.1 GB are needed" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors*"))


LIMITED = """
import resource, signal, sys
from mlx_m3_plugin.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
sys.exit(main(["convert", sys.argv[1], sys.argv[2], "--recipe", "8bit"]))
"""


def test_a_disk_that_is_full_all_the_same(tiny: Written, tmp_path: Path) -> None:
    """Here: a limit on the size of files."""
    done = here().run("-c", LIMITED, tiny("published_float"), tmp_path / "made", check=False)
    assert done.returncode == 2
    assert os.strerror(errno.EFBIG) in done.stderr
    assert "made.unfinished; run the same command again" in done.stderr
    assert not (tmp_path / "made").exists()
    assert not list(tmp_path.rglob("*.safetensors"))
    converted(tiny("published_float"), "8bit", tmp_path / "whole")
    converted(tiny("published_float"), "8bit", tmp_path / "made")
    assert digest(tmp_path / "made") == digest(tmp_path / "whole")


def test_a_file_that_cannot_be_read(
    tiny: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        broken_os = SimpleNamespace(**vars(os) | {"preadv": broken})
        patch.setattr("mlx_m3_plugin.weights.byte_ranges.os", broken_os)
        arguments = ["convert", str(tiny("published_float")), str(tmp_path / "made"), "--recipe", "4bit"]
        assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "model-0000" in said
    assert "cannot read language_model.model.embed_tokens.weight: Input/output error" in said
    assert "run the same command again" in said
    assert not (tmp_path / "made").exists()


def test_a_shard_that_vanishes(tiny: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(shutil.copytree(tiny("published_float"), tmp_path / "source"))
    monkeypatch.setattr(planning, "SHARD_BYTES", 60_000)
    plan = planned(source, "4bit")
    gone = weight_files(source)[-1]

    def vanish(module: Any, size: int) -> None:
        gone.unlink(missing_ok=True)

    with pytest.raises(OSError, match=rf"{gone.name}: cannot read .*: No such file"):
        convert(plan, tmp_path / "made", memory=1 << 30, progress=vanish)
    assert not (tmp_path / "made").exists()


def test_interrupted_by_the_user(
    tiny: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlx_m3_plugin.toolbox import convert as command

    def interrupted(title: str, total: int) -> Callable[[Any, int], None]:
        def stop(module: Any, size: int) -> None:
            raise KeyboardInterrupt

        return stop

    monkeypatch.setattr(command, "bytes_bar", interrupted)
    assert main(["convert", str(tiny("published_float")), str(tmp_path / "made"), "--recipe", "4bit"]) == 130
    assert "made.unfinished; run the same command again" in capsys.readouterr().err
