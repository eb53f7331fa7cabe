"""Run every command of ``docs/needs-a-mac.md`` and write one report.

    python benchmarks/on_a_mac.py --m3 PATH_OR_REPO --hosts hosts.json --report report.md

What is shown by the end of each command goes into the report as it is; nothing is left out in silence.
What an earlier run has proved is not run again, unless the report's ``.json`` beside it is removed.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
TABLE = CHECKOUT / "docs" / "needs-a-mac.md"
ROW = re.compile(r"\| (?P<name>[\w-]+) \| (?P<claim>.+?) \| `(?P<command>.+)` \| (?P<seen>.*?) ?\|")
LINES_KEPT = 120
PACKAGES = ("mlx-m3-plugin", "mlx", "mlx-lm", "mlx-vlm", "transformers")


@dataclass(frozen=True)
class Proof:
    """A line of the table: ``command`` proves ``claim``, where a reader finds ``seen`` in its output."""

    name: str
    claim: str
    command: str
    seen: str


@dataclass(frozen=True)
class Result:
    """``status`` is the exit status, or None for what was not run; then ``output`` says why."""

    name: str
    command: str
    status: int | None
    seconds: float
    output: str

    @property
    def verdict(self) -> str:
        return "not run" if self.status is None else "ended well" if self.status == 0 else "**failed**"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--m3", metavar="PATH_OR_REPO", help="a MiniMax-M3 that fits this machine")
    parser.add_argument("--hosts", type=Path, help="MLX's hosts.json of several machines")
    parser.add_argument("--report", type=Path, default=Path("on-a-mac.md"), help="default: on-a-mac.md")
    parser.add_argument("--only", action="append", metavar="NAME", help="can be given several times")
    parser.add_argument("--list", action="store_true", help="show the commands and run none")
    arguments = parser.parse_args()
    proofs = chosen(read_table(TABLE), arguments.only, parser)
    if arguments.list:
        print("\n\n".join(f"{proof.name}: {proof.claim}\n  {proof.command}" for proof in proofs))
        return 0
    given = {"M3": arguments.m3, "HOSTS": arguments.hosts and str(arguments.hosts.resolve())}
    return run_all(proofs, given, arguments.report)


def read_table(path: Path) -> list[Proof]:
    rows = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    matches = [ROW.fullmatch(row) for row in rows]
    if not rows or not all(matches):
        raise SystemExit(f"{path}: a line of the table is not `| name | claim | command | seen |`")
    return [Proof(**match.groupdict()) for match in matches if match]


def chosen(proofs: list[Proof], only: list[str] | None, parser: argparse.ArgumentParser) -> list[Proof]:
    names = [proof.name for proof in proofs]
    for name in only or ():
        if name not in names:
            parser.error(f"there is no {name!r}; there are {', '.join(names)}")
    return [proof for proof in proofs if not only or proof.name in only]


def run_all(proofs: list[Proof], given: dict[str, str | None], report: Path) -> int:
    """Run what is not proved yet; 0 if nothing failed, 1 if something did, 130 after Ctrl-C."""
    kept = report.with_suffix(".json")
    earlier = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else []
    results = {result["name"]: Result(**result) for result in earlier}
    try:
        for proof in proofs:
            before = results.get(proof.name)
            if before and before.status == 0 and before.command == proof.command:
                print(f"{proof.name}: ended well before")
                continue
            results[proof.name] = run(proof, given)
            kept.write_text(
                json.dumps([asdict(result) for result in results.values()], indent=1), encoding="utf-8"
            )
            report.write_text("\n".join(as_markdown(read_table(TABLE), results)) + "\n", encoding="utf-8")
    except KeyboardInterrupt:
        print(f"\nStopped. {report} has what was run; the same command goes on.", file=sys.stderr)
        return 130
    print(f"\n{report}")
    return int(any(results[proof.name].status for proof in proofs))


def run(proof: Proof, given: dict[str, str | None]) -> Result:
    absent = [name for name, value in given.items() if f"${name}" in proof.command and not value]
    if absent:
        return Result(proof.name, proof.command, None, 0.0, f"needs --{absent[0].lower()}")
    print(f"\n=== {proof.name}: {proof.claim}\n{proof.command}", flush=True)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        variables = {name: value for name, value in given.items() if value} | {"TMP": temporary}
        # The commands of this Python's environment come first.
        variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        process = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", proof.command],
            cwd=CHECKOUT,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        output = follow(process)
    return Result(proof.name, proof.command, process.returncode, time.monotonic() - begun, output)


def follow(process: "subprocess.Popen[str]") -> str:
    """Show what it prints as it comes; its last lines, once it has ended."""
    lines: deque[str] = deque(maxlen=LINES_KEPT)
    try:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
        process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    return "".join(lines)


def as_markdown(proofs: list[Proof], results: dict[str, Result]) -> Iterator[str]:
    yield "# What a Mac says of mlx-m3-plugin\n"
    yield from (f"- {line}" for line in machine())
    yield "\n| name | claim | status | seconds |\n|---|---|---|--:|"
    shown = [(proof, results[proof.name]) for proof in proofs if proof.name in results]
    for proof, result in shown:
        why = f" ({result.output})" if result.status is None else ""
        yield f"| {proof.name} | {proof.claim} | {result.verdict}{why} | {result.seconds:.0f} |"
    for proof, result in shown:
        if result.status is not None:
            yield f"\n## {proof.name}\n\n{proof.claim}"
            yield f"\nLook for: {proof.seen}" if proof.seen else ""
            yield f"```text\n$ {proof.command}\n{result.output.rstrip()}\n```"
            yield f"Exit status {result.status}."


def machine() -> Iterator[str]:
    """What the numbers are of; each line is there even where it cannot be told."""
    yield f"system: {platform.platform()}" + ("" if platform.system() == "Darwin" else " (not a Mac)")
    yield f"chip: {said_by('sysctl', '-n', 'machdep.cpu.brand_string') or platform.processor() or 'unknown'}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield f"memory: {memory / 2**30:.0f} GiB"
    yield f"commit: {said_by('git', '-C', str(CHECKOUT), 'rev-parse', 'HEAD') or 'unknown'}"
    yield f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in PACKAGES)


def said_by(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
