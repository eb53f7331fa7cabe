"""A repository in the Hugging Face cache is opened by its name or address, without a network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from mlx_m3_plugin.cli import main
from mlx_m3_plugin.toolbox.checkpoint import locate, open_checkpoint
from mlx_m3_plugin.toolbox.demo import NANO
from mlx_m3_plugin.toolbox.inspect import inspect

COMMIT, OTHER = "a" * 40, "b" * 40
SHARD = "model-00001-of-00001.safetensors"


def put_into_cache(home: Path, commit: str, ref: str | None, source: Path = NANO) -> Path:
    """As ``hf download someone/m3`` does: blobs, and a snapshot of links to them."""
    folder = home / "hub" / "models--someone--m3"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir(exist_ok=True)
    for number, file in enumerate(sorted(source.iterdir())):
        if file.is_file():
            blob = folder / "blobs" / f"{commit[:8]}{number}"
            shutil.copyfile(file, blob)
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    if ref is not None:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of ``someone/m3`` in the cache; the network must not be used."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return put_into_cache(tmp_path, COMMIT, "main")


def test_all_commands_open_a_cached_repository_offline(tmp_path: Path) -> None:
    put_into_cache(tmp_path / "hf", COMMIT, "main")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment = {k: v for k, v in environment.items() if k not in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")}
    address = "https://huggingface.co/someone/m3/tree/main"

    def run(*arguments: str) -> Any:
        command = [sys.executable, "-m", "mlx_m3_plugin.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for name in ("someone/m3", address):
        assert run("inspect", name).startswith("someone/m3\n")
        assert run("fit", name, "--memory", "64GB").startswith("someone/m3 (MiniMax-M3)\n")
    run("convert", address, "made", "--recipe", "4bit")
    assert "| made from | someone/m3 |" in (tmp_path / "made" / "README.md").read_text()
    options = ["--reference", "someone/m3", "--tokens", "64", "--context", "64", "--cache", "passes"]
    assert "Against someone/m3 (perplexity" in run("evaluate", "made", *options)


@pytest.mark.parametrize(
    "name",
    [
        "someone/m3",
        "https://huggingface.co/someone/m3",
        "https://huggingface.co/someone/m3/",
        "http://huggingface.co/someone/m3/tree/main",
        "https://www.huggingface.co/someone/m3/tree/main/",
        "https://hf.co/someone/m3",
        "huggingface.co/someone/m3",
        "https://huggingface.co/someone/m3/blob/main/config.json",
        "https://huggingface.co/someone/m3?library=mlx#files",
        f"https://huggingface.co/someone/m3/tree/{COMMIT}",
    ],
)
def test_names_and_addresses_of_a_repository(snapshot: Path, name: str) -> None:
    assert locate(name).on_disk() == snapshot
    checkpoint = open_checkpoint(name)
    assert (checkpoint.name, checkpoint.title, checkpoint.directory) == ("someone/m3", "someone/m3", snapshot)


def test_a_mirror_that_is_set(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://mirror.example")
    assert locate("https://mirror.example/someone/m3").directory == snapshot
    with pytest.raises(FileNotFoundError, match="neither a directory nor a repository"):
        locate("https://elsewhere.example/someone/m3")


def test_a_revision_is_that_one(snapshot: Path, tmp_path: Path) -> None:
    other = put_into_cache(tmp_path, OTHER, "v2")
    assert locate("https://huggingface.co/someone/m3/tree/v2").directory == other
    found = inspect("https://huggingface.co/someone/m3/tree/v2")
    assert found.name == "someone/m3"
    # The name alone would run the main one.
    assert f"--model {other} " in found.commands[0]
    assert "--model someone/m3 " in inspect("someone/m3").commands[0]
    with pytest.raises(FileNotFoundError, match=r"`hf download someone/m3 --revision v3`"):
        locate("https://huggingface.co/someone/m3/tree/v3").on_disk()


def test_a_directory_goes_before_a_repository(snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "someone" / "m3").mkdir(parents=True)
    assert locate("someone/m3").repository is None


@pytest.mark.parametrize("command", ["convert", "evaluate"])
def test_what_is_not_here_is_not_downloaded(
    snapshot: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["made", "--recipe", "4bit"] if command == "convert" else []
    assert main([command, "someone/else", *extra]) == 2
    said = capsys.readouterr().err
    assert "someone/else is neither a directory nor in the Hugging Face cache" in said
    assert "`hf download someone/else`" in said


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ([SHARD], SHARD),
        (["model.safetensors.index.json"], "model.safetensors.index.json"),
        ([SHARD, "model.safetensors.index.json"], r"\*\.safetensors"),
        (["config.json"], "config.json"),
    ],
)
def test_what_was_downloaded_in_part(snapshot: Path, gone: list[str], named: str) -> None:
    for name in gone:
        (snapshot / name).unlink()
    match = f"someone/m3 is incomplete .*: {named} missing; .*`hf download someone/m3`"
    with pytest.raises(FileNotFoundError, match=match):
        open_checkpoint("someone/m3")
    # Headers can come from the Hub; without a network the error says that as well.
    with pytest.raises(OSError, match=f"{match}; .*Hub"):
        inspect("someone/m3")


def test_a_damaged_index_is_named(snapshot: Path) -> None:
    index = snapshot / "model.safetensors.index.json"
    index.unlink()
    index.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        open_checkpoint("someone/m3")


def test_what_cannot_be_a_repository(snapshot: Path, tmp_path: Path) -> None:
    for name in ("nowhere", "a/b/c", "/no/such/directory", "https://huggingface.co/someone"):
        with pytest.raises(FileNotFoundError, match="neither a directory nor a repository"):
            locate(name)
    with pytest.raises(FileNotFoundError, match="someone/texts"):
        locate("https://huggingface.co/datasets/someone/texts")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        locate("file")
