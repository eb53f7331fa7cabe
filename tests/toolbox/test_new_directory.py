"""Two processes never write one target, and what they leave is whole or can be gone on with."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_m3_plugin.toolbox import new_directory as module
from mlx_m3_plugin.toolbox.demo import write_nano
from mlx_m3_plugin.toolbox.new_directory import LOCK, STATE, locked, new_directory
from tests.checkpoints.conversions import (
    MEMORY,
    Written,
    after,
    convert,
    converted,
    digest,
    interrupt,
    planned,
)
from tests.toolbox.test_convert_faults import start

SOURCE = "published_float"


@pytest.mark.parametrize("recipe", ["4bit", "6bit"])
def test_a_second_conversion_does_not_spoil_the_first(
    tiny: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    converted(tiny(SOURCE), "4bit", tmp_path / "alone")
    refused: list[str] = []

    def begin_a_second() -> None:
        # Interrupted, if it is let in.
        with suppress(KeyboardInterrupt):
            try:
                second = planned(tiny(SOURCE), recipe)
                convert(second, tmp_path / "made", memory=MEMORY, progress=after(10, interrupt))
            except (OSError, ValueError) as error:
                refused.append(str(error))

    convert(
        planned(tiny(SOURCE), "4bit"), tmp_path / "made", memory=MEMORY, progress=after(40, begin_a_second)
    )
    assert digest(tmp_path / "made") == digest(tmp_path / "alone")
    target = tmp_path / "made"
    assert refused == [
        f"another `mlx-m3 convert` is writing to {target} (process {os.getpid()}); "
        "wait for it, or choose another destination"
    ]


def test_a_demo_is_not_written_where_a_conversion_is(tiny: Written, tmp_path: Path) -> None:
    refused = []

    def begin_a_demo() -> None:
        try:
            write_nano(tmp_path / "made")
        except OSError as error:
            refused.append(str(error))

    convert(planned(tiny(SOURCE), "4bit"), tmp_path / "made", memory=MEMORY, progress=after(9, begin_a_demo))
    assert len(refused) == 1
    assert "another `mlx-m3 convert` is writing to" in refused[0]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["made"]


def test_a_conversion_is_not_written_where_a_demo_is(tiny: Written, tmp_path: Path) -> None:
    with new_directory(tmp_path / "made", "demo") as unfinished:
        (unfinished / "x").touch()
        with pytest.raises(BlockingIOError, match=r"another `mlx-m3 demo` is writing to .*made"):
            converted(tiny(SOURCE), "4bit", tmp_path / "made")
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["x"]


def test_a_target_that_appears_meanwhile_is_left_alone(tiny: Written, tmp_path: Path) -> None:
    def appear() -> None:
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "thesis.tex").write_text("x")

    plan = planned(tiny(SOURCE), "4bit")
    with pytest.raises(OSError, match=r"made\.unfinished"):
        convert(plan, tmp_path / "made", memory=MEMORY, progress=after(40, appear))
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["thesis.tex"]
    (tmp_path / "made" / "thesis.tex").unlink()
    report = convert(plan, tmp_path / "made", memory=MEMORY, progress=lambda module, size: None)
    assert report["resumed"] == report["files"]
    converted(tiny(SOURCE), "4bit", tmp_path / "alone")
    assert digest(tmp_path / "made") == digest(tmp_path / "alone")


def test_a_target_that_is_a_link_is_written_where_it_leads(tiny: Written, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "empty").symlink_to(tmp_path / "there")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere yet")
    for link, place in (("empty", "there"), ("dangling", "nowhere yet")):
        converted(tiny(SOURCE), "4bit", tmp_path / link)
        assert (tmp_path / link).is_symlink()
        assert (tmp_path / place / "config.json").exists()


def test_a_refused_target_keeps_its_empty_directory(tiny: Written, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made.unfinished").mkdir()
    (tmp_path / "made.unfinished" / "thesis.tex").write_text("x")
    for write in (lambda path: converted(tiny(SOURCE), "4bit", path), write_nano):
        with pytest.raises((ValueError, OSError), match="delete"):
            write(tmp_path / "made")
    assert [file.name for file in (tmp_path / "made.unfinished").iterdir()] == ["thesis.tex"]
    assert list((tmp_path / "made").iterdir()) == []


KILLED = """
import os, sys
from pathlib import Path
from mlx_m3_plugin.toolbox.new_directory import new_directory
with new_directory(Path(sys.argv[1]), "demo") as unfinished:
    (unfinished / "model.safetensors").write_text("half of it")
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("command", ["demo", "convert"])
def test_what_a_killed_demo_leaves_is_in_nobodys_way(tiny: Written, tmp_path: Path, command: str) -> None:
    made = tmp_path / "made"
    done = subprocess.run([sys.executable, "-c", KILLED, str(made)])
    assert done.returncode == -signal.SIGKILL
    assert [file.name for file in tmp_path.iterdir()] == ["made.unfinished"]
    write_nano(made) if command == "demo" else converted(tiny(SOURCE), "4bit", made)
    assert [file.name for file in tmp_path.iterdir()] == ["made"]
    assert not {LOCK, STATE} & {file.name for file in made.iterdir()}


def test_an_ended_conversion_leaves_what_can_be_gone_on_with(tiny: Written, tmp_path: Path) -> None:
    process = start(tiny(SOURCE), tmp_path / "made")
    process.terminate()
    assert process.wait() == -signal.SIGTERM
    assert {file.name for file in tmp_path.iterdir()} <= {"made.unfinished"}
    process = start(tiny(SOURCE), tmp_path / "made")
    assert process.wait() == 0
    assert [file.name for file in tmp_path.iterdir()] == ["made"]


def test_a_killed_first_word_is_written_again(tiny: Written, tmp_path: Path) -> None:
    """Killed before its state had its name, a conversion has left nothing that matters."""
    (tmp_path / "made.unfinished").mkdir()
    (tmp_path / "made.unfinished" / f"{STATE}.tmp").write_text('{"ver')
    (tmp_path / "made.unfinished" / LOCK).write_text("17\n`mlx-m3 convert` is writing")
    converted(tiny(SOURCE), "4bit", tmp_path / "made")
    assert not (tmp_path / "made.unfinished").exists()


@pytest.mark.parametrize("goes", ["is renamed", "is deleted"])
def test_a_lock_on_a_file_that_is_gone_keeps_nobody_out_and_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goes: str
) -> None:
    """Opened while its holder finishes: locked only after the name leads elsewhere."""
    file, flock = tmp_path / "d" / "lock", fcntl.flock
    locks = []

    def finish_first(descriptor: int, operation: int) -> None:
        if not locks:
            if goes == "is renamed":
                file.parent.rename(tmp_path / "finished")
            else:
                file.unlink()
        locks.append(os.fstat(descriptor).st_ino)
        flock(descriptor, operation)

    monkeypatch.setattr(module, "fcntl", SimpleNamespace(**vars(fcntl) | {"flock": finish_first}))
    with locked(file, "it", "nothing") as descriptor:
        assert len(locks) == 2
        assert os.path.samestat(os.fstat(descriptor), file.stat())
        with pytest.raises(BlockingIOError), locked(file, "it", "nothing"):
            pass


def test_a_process_that_died_holds_no_lock(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom mlx_m3_plugin.toolbox.new_directory import locked\n"
        'with locked(Path(sys.argv[1]), "it", "nothing"):\n    os.kill(os.getpid(), 9)\n'
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "lock")]).returncode == -signal.SIGKILL
    assert (tmp_path / "lock").read_text().endswith("\nit")
    with locked(tmp_path / "lock", "it", "nothing"):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\nit"


def test_a_disk_without_locks_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(module, "fcntl", SimpleNamespace(**vars(fcntl) | {"flock": unsupported}))
    with (
        pytest.warns(UserWarning, match="this disk has no locks"),
        locked(tmp_path / "lock", "it", "no"),
    ):
        pass


def test_a_text_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state.json"
    module.replace_text(file, json.dumps([1]))

    def full(self: Path, text: str, **options: Any) -> int:
        self.write_bytes(text.encode()[:3])
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="full"):
            module.replace_text(file, json.dumps([1, 2, 3]))
    assert json.loads(file.read_text()) == [1]
    module.replace_text(file, json.dumps([4]))
    assert [f.name for f in tmp_path.iterdir()] == ["state.json"]
