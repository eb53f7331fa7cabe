"""Every shard of a conversion has a checksum, and ``inspect --verify`` finds what differs from it."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mlx_m3_plugin.cli import main
from mlx_m3_plugin.toolbox.checksums import SUMS, read_sums
from mlx_m3_plugin.toolbox.convert import plan as planning
from mlx_m3_plugin.weights.headers import weight_files
from tests.checkpoints.conversions import MEMORY, Written, after, convert, converted, interrupt, planned
from tests.checkpoints.tiny_layouts import LAYOUTS


@pytest.fixture
def made(tiny: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A conversion in many files."""
    monkeypatch.setattr(planning, "SHARD_BYTES", 300_000)
    converted(tiny("published_float"), "4bit", tmp_path / "made")
    return tmp_path / "made"


def sums_of(directory: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in weight_files(directory)}


def change_a_byte(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(-10, 2)
        byte = stream.read(1)[0]
        stream.seek(-10, 2)
        stream.write(bytes([byte ^ 1]))


def inspected(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    code = main(["inspect", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out + (captured.err if code == 2 else "")


def test_a_conversion_has_the_sums_of_its_shards(made: Path) -> None:
    assert len(sums_of(made)) > 3
    assert read_sums(made) == sums_of(made)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_sha256sum_reads_the_list(made: Path) -> None:
    check = ["sha256sum", "--check", "--strict", SUMS]
    assert subprocess.run(check, cwd=made, capture_output=True).returncode == 0
    change_a_byte(weight_files(made)[0])
    assert subprocess.run(check, cwd=made, capture_output=True).returncode == 1


def test_a_resumed_conversion_has_all_sums(
    tiny: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "SHARD_BYTES", 60_000)
    plan = planned(tiny("published_float"), "4bit")
    with pytest.raises(KeyboardInterrupt):
        convert(plan, tmp_path / "made", memory=MEMORY, progress=after(20, interrupt))
    unfinished = tmp_path / "made.unfinished"
    # Killed after a shard got its name, before its sum was written.
    lines = (unfinished / SUMS).read_text().splitlines(keepends=True)
    assert len(lines) > 1
    (unfinished / SUMS).write_text("".join(lines[1:]))
    convert(plan, tmp_path / "made", memory=MEMORY, progress=lambda module, size: None)
    assert read_sums(tmp_path / "made") == sums_of(tmp_path / "made")


def test_a_conversion_of_a_conversion_has_its_own_sums(made: Path, tmp_path: Path) -> None:
    converted(made, "4bit", tmp_path / "again")
    assert read_sums(tmp_path / "again") == sums_of(tmp_path / "again")


def test_whole_files_are_as_written(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = inspected(capsys, made, "--verify")
    assert code == 0
    assert f"{len(weight_files(made))} files" in said
    assert "read and compared: all match" in said
    code, said = inspected(capsys, made, "--verify", "--json")
    verified = json.loads(said)["verified"]
    assert verified["bytes"] == sum(file.stat().st_size for file in weight_files(made))
    assert verified["problems"] == []


def test_a_changed_byte_is_found_where_headers_show_nothing(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = weight_files(made)[1]
    change_a_byte(changed)
    assert inspected(capsys, made)[0] == 0
    code, said = inspected(capsys, made, "--verify")
    assert code == 1
    assert f"{changed.name}: its content has changed" in said


def test_missing_and_unlisted_files_are_told(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (made / SUMS).read_text().splitlines(keepends=True)
    (made / SUMS).write_text("".join(lines[1:]) + f"{'0' * 64} *gone.safetensors\n")
    code, said = inspected(capsys, made, "--verify")
    assert code == 1
    assert f"{weight_files(made)[0].name}: has no checksum" in said
    assert "gone.safetensors: is missing" in said


def test_shards_in_a_folder_are_compared_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LAYOUTS["published_in_a_folder"].write(tmp_path)
    sums = (
        f"{hashlib.sha256(f.read_bytes()).hexdigest()}  shards/{f.name}\n" for f in weight_files(tmp_path)
    )
    (tmp_path / SUMS).write_text("".join(sums))
    assert inspected(capsys, tmp_path, "--verify")[0] == 0
    change_a_byte(weight_files(tmp_path)[1])
    code, said = inspected(capsys, tmp_path, "--verify")
    assert code == 1
    assert "shards/model-00002-of-00003.safetensors: its content has changed" in said


def test_without_checksums_nothing_can_be_verified(
    made: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (made / SUMS).unlink()
    code, said = inspected(capsys, made, "--verify")
    assert code == 2
    assert "has no SHA256SUMS, so nothing can be verified" in said
    (made / SUMS).write_text("not a list\n")
    code, said = inspected(capsys, made, "--verify")
    assert code == 2
    assert "SHA256SUMS: not a SHA-256 sum and a file name: 'not a list'" in said


def test_the_hubs_cache_has_sums_in_the_names_of_its_blobs(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (made / SUMS).unlink()
    snapshot, blobs = tmp_path / "snapshots" / "0", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in made.iterdir():
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        (snapshot / file.name).symlink_to(blob)
    assert inspected(capsys, snapshot, "--verify")[0] == 0
    changed = weight_files(snapshot)[2]
    change_a_byte(changed.resolve())
    code, said = inspected(capsys, snapshot, "--verify")
    assert code == 1
    assert f"{changed.name}: its content has changed" in said
