"""The soak test at its full count, and a plot of what memory each server takes on the way.

    python benchmarks/soak.py      # writes docs/benchmarks/soak.md and soak-*.png; an hour and a half

All that is judged is judged by ``tests/soak``; this runs it and draws what it kept.  Servers that were not
run now keep their line of the table and their plot.  Needs matplotlib.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))

from tests.soak.memory import late_slope

CHECKOUT = Path(__file__).resolve().parents[1]
OUTPUT = CHECKOUT / "docs" / "benchmarks"
MIB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument(
        "--kept", type=Path, help="draw what an earlier run left in this --basetemp of pytest"
    )
    arguments = parser.parse_args()
    if arguments.kept:
        write(curves(arguments.kept), arguments.output)
        return 0
    with tempfile.TemporaryDirectory() as directory:
        soak = [sys.executable, "-m", "pytest", "-q", "tests/soak", "--full", "--basetemp", directory]
        status = subprocess.run(soak, cwd=CHECKOUT).returncode
        write(curves(Path(directory)), arguments.output)
    return status


def curves(directory: Path) -> dict[str, np.ndarray]:
    """By server: requests answered, and resident bytes then."""
    return {path.stem: np.load(path) for path in sorted(directory.glob("test_*/*.server.npy"))}


def write(found: dict[str, np.ndarray], output: Path) -> None:
    page = output / "soak.md"
    rows = {row.split()[1]: row for row in page.read_text("utf-8").splitlines() if ".server |" in row}
    rows |= {server: row_of(server, memory) for server, memory in found.items()}
    page.write_text("\n".join(lines(rows)) + "\n", encoding="utf-8")
    for server, memory in found.items():
        draw(server, memory, output / f"soak-{server}.png")


def row_of(server: str, memory: np.ndarray) -> str:
    requests, resident = memory.T
    at = [resident[np.searchsorted(requests, share * requests[-1])] / MIB for share in (0.25, 0.5, 1)]
    cells = [server, requests[-1], *(f"{mib:.0f} MiB" for mib in at), f"{late_slope(memory):,.0f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def lines(rows: dict[str, str]) -> Iterator[str]:
    yield "# Resident memory of stock servers with the plugin, under load"
    yield ""
    yield "`python benchmarks/soak.py`: 32 clients; a quarter of the requests are cut off or bad."
    yield ""
    yield "| server | requests | at a quarter | at half | at the end | bytes a request, second half |"
    yield "|---|--:|--:|--:|--:|--:|"
    yield from rows.values()
    for server in rows:
        yield f"\n![memory of {server} by requests](soak-{server}.png)"


def draw(server: str, memory: np.ndarray, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6))
    axes.plot(memory[:, 0], memory[:, 1] / MIB, label=server, linewidth=1)
    axes.set(xlabel="requests answered", ylabel="resident memory, MiB", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
