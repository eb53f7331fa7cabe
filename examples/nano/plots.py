"""Where M3-nano's measurements are kept, and how they are drawn.  Needs matplotlib."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).parents[2] / "docs" / "nano"


@contextmanager
def plot(name: str, columns: int = 1, **subplots: Any) -> Iterator[list[Any]]:
    """Axes, side by side, of a picture ``name`` in ``OUTPUT``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, squeeze=False, **subplots)
    yield list(axes[0])
    for each in axes[0]:
        each.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(OUTPUT / name, dpi=120)


def write_page(name: str, lines: Iterator[str]) -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
