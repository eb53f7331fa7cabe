"""What can be refused is refused before a weight is read: measuring and evaluating take hours."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_m3_plugin.cli import main
from mlx_m3_plugin.toolbox.new_directory import LOCK, check_can_write, locked
from mlx_m3_plugin.weights.byte_ranges import TensorReader
from tests.checkpoints.conversions import MEMORY, Written, convert, planned

SOURCE = "published_float"


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever reads a weight fails the test."""

    def read(*args: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(TensorReader, "read", read)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def exists(tiny: Written) -> None:
    Path("made").mkdir()
    Path("made/x").touch()


def parent_is_a_file(tiny: Written) -> None:
    Path("made").touch()


def holds_something_else(tiny: Written) -> None:
    Path("made.unfinished").mkdir()
    Path("made.unfinished/x").touch()


def begun_by_another_recipe(tiny: Written) -> None:
    def stop(module: Any, size: int) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorReader, "read", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(planned(tiny(SOURCE), "4bit"), "made", memory=MEMORY, progress=stop)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("prepare", "target", "complaint"),
    [
        (exists, "made", "made exists already"),
        (parent_is_a_file, "made/below", "Not a directory"),
        (holds_something_else, "made", "made.unfinished holds files"),
        (begun_by_another_recipe, "made", "an unfinished conversion of another source, recipe or version"),
    ],
)
def test_a_target_that_cannot_be_written(
    tiny: Written,
    capsys: pytest.CaptureFixture[str],
    prepare: Callable[[Written], None],
    target: str,
    complaint: str,
) -> None:
    prepare(tiny)
    assert main(["convert", str(tiny(SOURCE)), target, "--recipe", "oq4"]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.usefixtures("unread")
def test_a_target_that_another_process_writes(
    tiny: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path / "made.unfinished" / LOCK, "`mlx-m3 convert` is writing to made", "x"):
        assert main(["convert", str(tiny(SOURCE)), "made", "--recipe", "oq4"]) == 2
    said = capsys.readouterr().err
    assert "another `mlx-m3 convert` is writing to made (process " in said
    assert "run the same command again" not in said


def free_bytes(monkeypatch: pytest.MonkeyPatch, path: Path, free: int) -> None:
    usage = shutil.disk_usage(path)._replace(free=free)
    with_usage = SimpleNamespace(**vars(shutil) | {"disk_usage": lambda path: usage})
    monkeypatch.setattr("mlx_m3_plugin.toolbox.convert.run.shutil", with_usage)


@pytest.mark.usefixtures("unread")
def test_too_little_disk(
    tiny: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free_bytes(monkeypatch, tmp_path, 1000)
    assert main(["convert", str(tiny(SOURCE)), "made", "--recipe", "oq4"]) == 2
    assert "0.0 GB free, and 0.1 GB are needed" in capsys.readouterr().err
    assert not list(tmp_path.glob("made*"))


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(("free", "is_enough"), [(1000, False), (1 << 40, True)])
def test_a_dry_run_tells_the_space(
    tiny: Written,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    free: int,
    is_enough: bool,
) -> None:
    free_bytes(monkeypatch, tmp_path, free)
    arguments = ["convert", str(tiny(SOURCE)), "not/yet/there", "--recipe", "4bit", "--dry-run"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert f"{free / 1e9:,.1f} GB free, and 0.1 GB are needed" in said
    assert ("NOT ENOUGH" in said) is not is_enough
    assert main([*arguments, "--json"]) == 0
    space = json.loads(capsys.readouterr().out)["space"]
    assert (space["free"], space["is_enough"]) == (free, is_enough)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--plot", "nowhere/x.png"], "cannot write nowhere/x.png: No such file or directory"),
        (["--plot", "file/x.png"], "cannot write file/x.png: Not a directory"),
        (["--plot", "x.xyz"], "--plot x.xyz: "),
        (["--cache", "file"], "file"),
    ],
)
def test_an_evaluation_whose_results_have_no_place(
    tiny: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    arguments = ["evaluate", str(tiny(SOURCE)), "--reference", str(tiny(SOURCE)), "--tokens", "100"]
    assert main([*arguments, *options]) == 2
    assert complaint in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} <= {"file", "directory", "cache"}


@pytest.mark.usefixtures("unread")
def test_a_plot_without_matplotlib(
    tiny: Written, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["evaluate", str(tiny(SOURCE)), "--reference", str(tiny(SOURCE)), "--plot", "x.png"]) == 2
    assert "--plot needs matplotlib: pip install" in capsys.readouterr().err


def test_looking_whether_a_file_can_be_written_changes_nothing(tmp_path: Path) -> None:
    check_can_write(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old").write_text("kept")
    check_can_write(tmp_path / "old")
    assert (tmp_path / "old").read_text() == "kept"
