"""The list of what only a Mac can prove, and the script that runs it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import on_a_mac

CHECKOUT = Path(__file__).parents[1]
SCRIPT = CHECKOUT / "benchmarks" / "on_a_mac.py"
HEAD = "| name | claim | command | seen |\n|---|---|---|---|\n"


def table(tmp_path: Path, *rows: tuple[str, str]) -> Path:
    path = tmp_path / "table.md"
    path.write_text(HEAD + "".join(f"| {name} | of {name} | `{command}` | |\n" for name, command in rows))
    return path


def run(monkeypatch: pytest.MonkeyPatch, path: Path, *arguments: str) -> tuple[int, str, dict[str, dict]]:
    """Its exit status, the report, and the results beside it."""
    monkeypatch.setattr(on_a_mac, "TABLE", path)
    report = path.with_name("report.md")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--report", str(report), *arguments])
    status = on_a_mac.main()
    kept = json.loads(report.with_suffix(".json").read_text())
    return status, report.read_text(), {result["name"]: result for result in kept}


def test_every_line_of_the_list_can_be_run() -> None:
    proofs = on_a_mac.read_table(on_a_mac.TABLE)
    assert len({proof.name for proof in proofs}) == len(proofs) >= 16
    for proof in proofs:
        for named in re.findall(r"(?:tests|benchmarks|examples)/[\w./]+", proof.command):
            assert (CHECKOUT / named).exists(), proof
        assert set(re.findall(r"\$([A-Z0-9]+)\b", proof.command)) <= {"M3", "HOSTS", "TMP", "F", "S"}, proof


def test_a_line_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "table.md"
    path.write_text(HEAD + "| one | claim | no command | |\n")
    with pytest.raises(SystemExit, match="a line of the table is not"):
        on_a_mac.read_table(path)


def test_what_ends_well_what_fails_and_what_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("good", 'echo fine > "$TMP/a"; cat "$TMP/a"'), ("bad", "false && echo x"), ("big", 'ls "$M3"')]
    path = table(tmp_path, *rows, ("after", "echo 1 >> ran"))
    monkeypatch.setattr(on_a_mac, "CHECKOUT", tmp_path)
    status, report, results = run(monkeypatch, path)
    assert status == 1
    assert {name: result["status"] for name, result in results.items()} == {
        "good": 0,
        "bad": 1,
        "big": None,
        "after": 0,
    }
    assert results["good"]["output"] == "fine\n"
    assert "| bad | of bad | **failed** |" in report
    assert "| big | of big | not run (needs --m3) |" in report
    # What ended well is not run again; what failed or lacked something is.
    status, _, results = run(
        monkeypatch, table(tmp_path, *rows, ("after", "echo 1 >> ran")), "--m3", str(tmp_path)
    )
    assert (status, results["big"]["status"], (tmp_path / "ran").read_text()) == (1, 0, "1\n")


def test_a_name_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, table(tmp_path, ("one", "true")), "--only", "two")
    assert stopped.value.code == 2


def test_ctrl_c_keeps_what_was_run(tmp_path: Path) -> None:
    path = table(tmp_path, ("first", 'echo once >> "$REACHED"'), ("second", "echo begun; sleep 60"))
    program = (
        # As at a terminal, also where these tests run in the background, with Ctrl-C ignored.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"import sys, on_a_mac; on_a_mac.TABLE = on_a_mac.Path({str(path)!r}); sys.exit(on_a_mac.main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "--report", str(tmp_path / "report.md")],
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parent), "REACHED": str(tmp_path / "reached")},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.stdout.readline() != "begun\n":
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    begun = time.monotonic()
    assert process.wait(timeout=30) == 130
    assert time.monotonic() - begun < 30
    assert "| first | of first | ended well |" in (tmp_path / "report.md").read_text()
