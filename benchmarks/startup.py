"""What the installed plugin adds to the start of an interpreter that never imports mlx.

    python benchmarks/startup.py --starts 400

Three bare virtual environments: without anything, with a ``.pth`` file that holds one comment
(the price of having any start-up file, which site pays once for all of them), and with our
wheel.  ``python -c pass`` is started in them in turns, in a new random order each round, so
that what else the machine does falls on all three alike.  The added time is a difference of
medians; its interval comes from resampling whole rounds (bootstrap, 95 %).
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from statistics import median

CHECKOUT = Path(__file__).resolve().parents[1]
TARGET_MS = 1.0
WARM_UP_ROUNDS = 10
RESAMPLES = 2000

BARE, COMMENT, PLUGIN = "nothing installed", "a `.pth` with one comment", "mlx-m3-plugin"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=400, help="starts of each interpreter (default: 400)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        times = measure(make_environments(Path(directory)), args.starts)
    results = evaluate(times)
    print(json.dumps(results, indent=2) if args.json else as_markdown(results))


def make_environments(directory: Path) -> dict[str, Path]:
    """The interpreter of each variant, with all byte code written already."""
    return {
        BARE: make_environment(directory / "bare", lambda python: None),
        COMMENT: make_environment(directory / "comment", add_comment),
        PLUGIN: make_environment(directory / "plugin", install_plugin),
    }


def make_environment(path: Path, fill: Callable[[Path], None]) -> Path:
    venv.create(path, with_pip=False, symlinks=True)
    python = path / "bin" / "python"
    fill(python)
    subprocess.run([python, "-m", "compileall", "-q", site_packages(python)], check=True)
    return python


def site_packages(python: Path) -> Path:
    (directory,) = python.parents[1].glob("lib/python*/site-packages")
    return directory


def add_comment(python: Path) -> None:
    (site_packages(python) / "comment.pth").write_text("# nothing\n")


def install_plugin(python: Path) -> None:
    wheels = python.parents[1] / "wheels"
    build = ["hatchling", "build", "--target", "wheel", "--directory", str(wheels)]
    subprocess.run([sys.executable, "-m", *build], cwd=CHECKOUT, check=True, capture_output=True)
    install = ["pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([sys.executable, "-m", *install, *wheels.glob("*.whl")], check=True)
    # Measure nothing rather than an interpreter that does not see the plugin.
    subprocess.run([python, "-c", "import sys; sys.modules['mlx_m3_plugin']"], check=True)


def measure(interpreters: dict[str, Path], starts: int) -> dict[str, list[float]]:
    """Milliseconds from launch to end, by variant and round."""
    times: dict[str, list[float]] = {name: [] for name in interpreters}
    names = list(interpreters)
    for number in range(-WARM_UP_ROUNDS, starts):
        random.shuffle(names)
        for name in names:
            elapsed = time_start(interpreters[name])
            if number >= 0:
                times[name].append(elapsed)
    return times


def time_start(python: Path) -> float:
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MLX_M3_PLUGIN"))}
    begin = time.perf_counter()
    subprocess.run([python, "-c", "pass"], env=variables, stdin=subprocess.DEVNULL, check=True)
    return (time.perf_counter() - begin) * 1000


def evaluate(times: dict[str, list[float]]) -> dict:
    rows = [{"installed": BARE, "median_ms": median(times[BARE])}]
    for name in (COMMENT, PLUGIN):
        low, high = interval(times[BARE], times[name])
        added = median(times[name]) - median(times[BARE])
        rows.append({"installed": name, "median_ms": median(times[name]), "added_ms": added})
        rows[-1]["added_ms_95"] = [low, high]
    return {
        "starts": len(times[BARE]),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "target_ms": TARGET_MS,
        "target_met": rows[-1]["added_ms"] <= TARGET_MS,
        "rows": rows,
    }


def interval(baseline: list[float], other: list[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the difference of medians, rounds resampled as pairs."""
    pairs = list(zip(baseline, other, strict=True))
    differences = []
    for _ in range(RESAMPLES):
        sample = random.choices(pairs, k=len(pairs))
        differences.append(median(b for _, b in sample) - median(a for a, _ in sample))
    differences.sort()
    return differences[int(0.025 * RESAMPLES)], differences[int(0.975 * RESAMPLES)]


def as_markdown(results: dict) -> str:
    head = [
        "# Added time per interpreter start",
        "",
        f"`python benchmarks/startup.py --starts {results['starts']}`, Python {results['python']}, "
        f"{results['system']}.",
        "`python -c pass`, byte code written beforehand, variants interleaved in random order.",
        "",
        "| installed | median ms | added ms | 95 % interval |",
        "|---|---|---|---|",
    ]
    verdict = "met" if results["target_met"] else "missed"
    tail = ["", f"Target: a median of at most {results['target_ms']:g} ms added. **{verdict.capitalize()}.**"]
    return "\n".join([*head, *map(table_row, results["rows"]), *tail])


def table_row(row: dict) -> str:
    cells = [row["installed"], f"{row['median_ms']:.2f}", "", ""]
    if "added_ms" in row:
        low, high = row["added_ms_95"]
        cells[2:] = [f"{row['added_ms']:+.2f}", f"{low:+.2f} … {high:+.2f}"]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
