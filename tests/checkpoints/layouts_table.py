"""The table in ``docs/layouts.md``: which library opens what, alone and with this package.

    python tests/checkpoints/layouts_table.py "mlx-lm 0.32.2 alone=lm.json" ...

writes the columns anew, each from what ``opens.py`` printed.  A column that is not named is kept.
"""

import json
import sys
from pathlib import Path

from tests.checkpoints.tiny_layouts import LAYOUTS

PAGE = Path(__file__).parents[2] / "docs" / "layouts.md"
BEGIN, END = "<!-- table: tests/checkpoints/layouts_table.py -->", "<!-- end of table -->"
FIXED = ("checkpoint", "where it is met", "name")


def read_table() -> dict[str, dict[str, str]]:
    """``{layout: {column: cell}}``."""
    lines = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    table = [dict(zip(header, row, strict=True)) for row in rows]
    return {row["name"].strip("`"): row for row in table}


def write_table(columns: dict[str, dict[str, str | None]]) -> None:
    try:
        kept = read_table()
    except ValueError:
        kept = {}
    names = [*dict.fromkeys([c for row in kept.values() for c in row if c not in FIXED] + list(columns))]
    lines = ["| " + " | ".join([*FIXED, *names]) + " |", "|---|---|---|" + "---|" * len(names)]
    for name, layout in LAYOUTS.items():
        answers = [
            ("yes" if columns[c][name] is None else "no") if c in columns else kept[name][c] for c in names
        ]
        lines.append(f"| {layout.title} | {layout.where} | `{name}` | " + " | ".join(answers) + " |")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    table = "\n".join(lines)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    given = (argument.partition("=") for argument in sys.argv[1:])
    write_table({column: json.loads(Path(path).read_text()) for column, _, path in given})
