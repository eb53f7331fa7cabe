"""What ``mlx-m3 convert`` prints."""

from ..common import size_in_words
from .card import components
from .plan import Plan
from .prepare import Prepared
from .run import Report, Space


def plan_lines(prepared: Prepared, space: Space | None = None) -> list[str]:
    """The plan as a table, and whether the disk has room for it."""
    plan = prepared.plan
    rows = [("Component", "parameters", "bytes", "bits/weight", "stored as")]
    for name, parameters, size, spec in components(plan):
        rows.append((name, f"{parameters:,}", f"{size:,}", f"{8 * size / max(parameters, 1):.2f}", spec))
    total = f"{plan.bits_per_weight:.2f}"
    rows.append(("total", f"{plan.parameters:,}", f"{plan.nbytes:,}", total, ""))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [f"{plan.recipe.name}: {plan.recipe.summary}", ""]
    for name, *numbers, spec in rows:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells, spec]).rstrip())
    lines += ["", f"{size_in_words(plan.nbytes)} in {len(plan.shards)} files; {_packing(plan)}"]
    if prepared.measured:
        lines.append(f"sensitivity of layers: {prepared.measured}")
    if space is not None:
        lines.append(f"disk: {space}: {'enough' if space.is_enough else 'NOT ENOUGH'}")
    return lines


def _packing(plan: Plan) -> str:
    if plan.packed:
        return "experts fused and packed with the shared one: for mlx-lm 0.32, mlx-vlm 0.6.4 and newer"
    return "experts unfused, for their bits differ: for mlx-lm 0.32, mlx-vlm 0.6.5 and newer"


def report_lines(report: Report) -> list[str]:
    lines = [
        f"Wrote {report.path}: {size_in_words(report.bytes)} in {report.files} files, "
        f"{report.bits_per_weight:.2f} bits per weight"
    ]
    if report.resumed:
        lines.append(f"{report.resumed} of the files were there from an earlier run")
    return [*lines, f"How good it is: mlx-m3 evaluate {report.path} --reference SOURCE"]
