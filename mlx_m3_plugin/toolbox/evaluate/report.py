"""What ``mlx-m3 evaluate`` prints and draws."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..common import size_in_words
from ..new_directory import check_can_write
from .metrics import Evaluation, LayerComparison

_WORST = 5
_PANELS: tuple[tuple[str, Callable[[LayerComparison], Any]], ...] = (
    ("error of hidden states", lambda layer: layer.hidden_error),
    ("experts in common", lambda layer: layer.router_overlap),
    ("blocks in common", lambda layer: layer.block_overlap),
)


def report_lines(found: Evaluation) -> list[str]:
    lines = [
        f"{found.checkpoint}: {size_in_words(found.bytes)}",
        f"{found.tokens:,} tokens in {found.windows} windows of {found.context:,}",
        f"  perplexity  {found.perplexity:.4f}",
    ]
    if found.distributions is None or found.reference_perplexity is None:
        return lines
    different = found.distributions
    lines[-1] += f", {found.perplexity / found.reference_perplexity - 1:+.2%} of the reference's"
    lines += [
        f"Against {found.reference} (perplexity {found.reference_perplexity:.4f})",
        f"  KL divergence  {different.kl_mean:.5f} on average, {different.kl_95:.5f} at the 95th percentile",
        f"  same top token {different.top_1:.2%}",
        f"  EAR            {different.ear:.4f} (1 is the reference itself, 0.99 is called lossless)",
        "",
        *_layer_lines(found.layers),
    ]
    return lines


def _layer_lines(layers: list[LayerComparison]) -> list[str]:
    """All of few layers; of many those that differ most, the first and the last."""
    shown = layers
    title = "Layer  hidden error  experts in common  blocks in common"
    if len(layers) > 2 * _WORST:
        worst = sorted(layers, key=lambda layer: layer.router_overlap or 1)[:_WORST]
        worst += sorted(layers, key=lambda layer: layer.block_overlap or 1)[:_WORST]
        by_number = {layer.layer: layer for layer in [*worst, layers[0], layers[-1]]}
        shown = [by_number[number] for number in sorted(by_number)]
        title += "   (those that differ most; --json has all)"
    cells = [
        f"{layer.layer:>5}  {layer.hidden_error:>12.6f}  {_percent(layer.router_overlap):>17}  "
        f"{_percent(layer.block_overlap):>16}"
        for layer in shown
    ]
    return [title, *cells]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def check_can_draw(path: Path) -> None:
    """See, before anything is computed, that a plot can be drawn and written to ``path``.

    Raises:
        ValueError: matplotlib is not installed, or cannot write such a file.
        OSError: the file cannot be written.
    """
    canvas = _pyplot().figure().canvas
    _pyplot().close(canvas.figure)
    kinds = canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise ValueError(f"--plot {path}: the name must end in .{', .'.join(kinds)}")
    check_can_write(path)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ValueError('--plot needs matplotlib: pip install "mlx-m3-plugin[plot]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(found: Evaluation, path: Path) -> None:
    """Draw the error and the choices of each layer of an evaluation with a reference."""
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(len(_PANELS), 1, sharex=True, figsize=(9, 9), layout="constrained")
    for axes, (title, value) in zip(panels, _PANELS, strict=True):
        points = [(layer.layer, value(layer)) for layer in found.layers if value(layer) is not None]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3) if points else None
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[-1].set_xlabel("layer")
    different = found.distributions
    assert different is not None
    figure.suptitle(
        f"{Path(found.checkpoint).name} against {Path(found.reference or '').name}: perplexity "
        f"{found.perplexity:.3f} ({found.reference_perplexity:.3f}), KL {different.kl_mean:.4f}, "
        f"EAR {different.ear:.4f}",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
