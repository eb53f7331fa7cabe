"""What all commands have in common: exit codes, JSON, hints, and errors that name the file."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_m3_plugin import cli
from mlx_m3_plugin.cli import main
from mlx_m3_plugin.toolbox.common import bytes_bar, layers_bar
from mlx_m3_plugin.toolbox.demo import NANO
from mlx_m3_plugin.weights.headers import INDEX
from tests.checkpoints.edits import edit_json
from tests.checkpoints.tiny_layouts import LAYOUTS

COMMANDS = ("demo", "doctor", "inspect", "convert", "evaluate", "fit")


@pytest.fixture
def m3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The trained model in a directory ``m3``, to be damaged."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(NANO, tmp_path / "m3"))


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlx_m3_plugin", *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_alone_it_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 0
    help_text = capsys.readouterr().out
    assert all(f"\n    {name} " in help_text for name in COMMANDS)
    assert re.search(r"exit codes:\n +0 .*\n +1 .*\n +2 .*\n +130 +interrupted", help_text)


def test_help_imports_no_mlx() -> None:
    code = "import sys; from mlx_m3_plugin import cli; cli._parser(); sys.exit('mlx' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_python_m_is_the_same_command() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: mlx-m3 ")


def test_json_is_a_flag_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert re.search(r"^  --json  +print the result", capsys.readouterr().out, re.MULTILINE), name


@pytest.mark.parametrize("arguments", [["convert", "--list-recipes"]])
def test_lists_as_json(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [list(entry.values()) for entry in printed] == [line.split(maxsplit=1) for line in lines]
    assert all(entry.keys() in ({"name", "title"}, {"name", "summary"}) for entry in printed)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["inspect", "nowhere"], "input", "nowhere is neither"),
        (["convert", "nowhere", "made", "--recipe", "4bit"], "input", "nowhere is neither"),
        (["evaluate", "nowhere"], "input", "nowhere is neither"),
        (["fit", "nowhere", "--memory", "256GB"], "input", "nowhere is neither"),
        (["fit", "nowhere", "--memory", "much"], "usage", "size 'much'"),
        (["demo", "here", "--bits", "7"], "input", "--bits 7"),
        (["demo", "here", "--bits", "x"], "usage", "invalid int value: 'x'"),
        (["doctor", "--verbose"], "usage", "unrecognized arguments: --verbose"),
        (["no-such-command"], "usage", "unknown command no-such-command"),
    ],
)
def test_errors_as_json(
    arguments: list[str], kind: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--json"]) == 2
    said = capsys.readouterr()
    error = json.loads(said.out)["error"]
    assert (error["kind"], error["exit_code"], said.err) == (kind, 2, "")
    assert message in error["message"]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err


@pytest.mark.parametrize("old", ["m3 --json out.json", "--json - m3", "m3 --json=out.json"])
def test_json_with_a_file_says_what_has_become_of_it(old: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *old.split()]) == 2
    said = capsys.readouterr()
    assert "--json takes no value: it prints to stdout, so write --json > FILE" in said.out + said.err


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["inspct", "m3"], "inspect"),
        (["convert", "m3", "made", "--recipe", "oq25"], "oq2.5"),
        (["convert", "m3", "made", "--recipe", "selector_safe"], "selector-safe"),
        (["convert", "m3", "made", "--recpie", "4bit"], "--recipe"),
        (["fit", "m3", "--contxt", "4K"], "--context"),
    ],
)
def test_did_you_mean(arguments: list[str], meant: str, m3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert f"(did you mean {meant}" in capsys.readouterr().err
    assert not Path("made").exists()


def test_a_destination_may_come_after_options(m3: Path) -> None:
    assert main(["convert", "m3", "--recipe", "4bit", "made"]) == 0
    assert main(["convert", "--recipe", "4bit", "m3", "again"]) == 0
    assert main(["demo", "--bits", "8", "third"]) == 0
    assert all((Path(name) / "config.json").exists() for name in ("made", "again", "third"))


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda m3: (m3 / name).write_bytes(content) and None


# Of each damage: the file that an error has to name.
DAMAGED = {
    "config is not JSON": (write("config.json", b"{"), "m3/config.json"),
    "config is not an object": (write("config.json", b"[1]"), "m3/config.json"),
    "config is not UTF-8": (write("config.json", b"\xff\xfe"), "m3/config.json"),
    "config is nested": (write("config.json", b"[" * 100_000), "m3/config.json"),
    "config without layers": (
        lambda m3: edit_json(m3 / "config.json", lambda c: c["text_config"].update(num_hidden_layers="x")),
        "config.json",
    ),
    "index is not JSON": (write(INDEX, b"{"), INDEX),
    "index is not UTF-8": (write(INDEX, b"\xff"), INDEX),
    "index is nested": (
        write("model.safetensors.index.json", b"[" * 100_000),
        "model.safetensors.index.json",
    ),
    "a shard is not one": (write("model-00001-of-00001.safetensors", b"x" * 99), "model-00001-of-00001"),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "m3"],
        ["fit", "m3", "--memory", "256GB"],
        ["fit", "m3", "--memory", "256GB,64GB"],
        ["convert", "m3", "made", "--recipe", "4bit"],
        ["evaluate", "m3", "--cache", "passes"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_errors_name_the_damaged_file(
    damage: str, arguments: list[str], m3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, named = DAMAGED[damage]
    spoil(m3)
    assert main(arguments) in (1, 2)
    said = capsys.readouterr()
    assert named.removeprefix("m3/") in said.out + said.err
    assert "Error" not in said.err.replace("JSONDecodeError", "")
    assert not Path("made").exists()


@pytest.mark.parametrize(
    ("options", "file", "content"),
    [
        (["--recipe", "mine.toml"], "mine.toml", b"[default"),
        (["--recipe", "mine.toml"], "mine.toml", b"[default]\nbits = 9"),
        (["--recipe", "mine.toml"], "mine.toml", b"\xff\xfe"),
        (["--recipe", "mine.toml"], "mine.toml", b"x = 1"),
        (["--recipe", "oq4", "--text", "mine.txt"], "mine.txt", b"abc\xff"),
        (["--recipe", "oq4", "--sensitivity", "map.json"], "map.json", b"[]"),
        (["--recipe", "oq4", "--sensitivity", "map.json"], "map.json", b"\xff"),
        (["--recipe", "oq4", "--sensitivity", "absent.json"], "absent.json", None),
        (["--recipe", "oq4", "--text", "absent.txt"], "absent.txt", None),
    ],
)
def test_errors_name_the_files_of_options(
    options: list[str], file: str, content: bytes | None, m3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        Path("folder").mkdir()
        Path("folder", file).write_bytes(content)
    options = [option.replace(file, f"folder/{file}") for option in options]
    assert main(["convert", "m3", "made", *options]) == 2
    said = capsys.readouterr().err
    assert f"folder/{file}" in said
    assert len(said.splitlines()) == 1


def test_a_text_that_is_not_one_is_named(m3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.txt").write_bytes(b"caf\xe9")
    assert main(["evaluate", "m3", "--text", "mine.txt"]) == 2
    assert "mine.txt is not" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("x"), MemoryError(), RecursionError("x")])
def test_an_exception_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: Any) -> int:
        raise error

    monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(command=fail))
    assert main(["fit", "m3"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["fit", "m3", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_is_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(args: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(command=interrupt))
    arguments = [name] if name == "doctor" else [name, "m3"]
    assert main(arguments) == 130
    assert capsys.readouterr().err == "mlx-m3: interrupted\n"
    assert main([*arguments, "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "interrupted"


def test_a_real_ctrl_c(tmp_path: Path) -> None:
    """While a checkpoint's text is read: a named pipe that nobody writes to."""
    LAYOUTS["published_float"].write(tmp_path / "m3")
    os.mkfifo(tmp_path / "text")
    command = [sys.executable, "-m", "mlx_m3_plugin", "evaluate", "m3", "--text", "text"]
    # A shell starts what runs in its background with Ctrl-C ignored.
    child = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    writer = None
    while writer is None and child.poll() is None:
        try:
            # Refused until the command has opened the pipe.
            writer = os.open(tmp_path / "text", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.05)
    # A signal between opening and reading is seen only when the reading ends: then by the next signal.
    for _ in range(10):
        child.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(6)
            break
    assert child.returncode == 130
    assert child.stderr is not None
    assert child.stderr.read() == "mlx-m3: interrupted\n"


def test_a_reader_that_leaves_early() -> None:
    for arguments in ("convert --list-recipes", "inspect nowhere --json", "convert --list-recipes --json"):
        line = f"{sys.executable} -m mlx_m3_plugin {arguments} | true"
        done = subprocess.run(line, shell=True, capture_output=True, text=True)
        assert done.stderr == ""


def test_bars_are_quiet_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    layers, size = layers_bar("layers", 2), bytes_bar("made", 100)
    for _ in range(2):
        layers(0, 1)
        size(None, 50)
    assert capfd.readouterr() == ("", "")


def test_a_command_without_a_terminal_says_only_its_result(m3: Path) -> None:
    done = run("convert", "m3", "made", "--recipe", "4bit")
    assert (done.returncode, done.stderr) == (0, "")
