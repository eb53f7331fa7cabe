"""What the pages name exists: files, headings, commands with their options, variables.  What fits is true."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlx_m3_plugin.cli import _parser
from mlx_m3_plugin.startup.settings import read_settings
from mlx_m3_plugin.toolbox.fit import fit
from tests.checkpoints import real_size
from tests.checkpoints.real_size import REAL_LAYOUTS, RealCheckpoint

Writer = Callable[[Path], RealCheckpoint]

ROOT = Path(__file__).parents[1]
PLACES = ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/*.md")
PAGES = sorted(page for place in PLACES for page in ROOT.glob(place))


def links_of(page: Path) -> Iterator[tuple[str, Path, str]]:
    """Each relative link as it is written, its file, and its anchor."""
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if not re.match("https?:", link):
            path, _, anchor = link.partition("#")
            yield link, (page.parent / path).resolve() if path else page, anchor


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ +(.*)$", without_code(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def broken_links(page: Path) -> list[str]:
    return [
        link
        for link, target, anchor in links_of(page)
        if not target.exists() or (anchor and anchor not in anchors(target))
    ]


def test_links_lead_somewhere() -> None:
    assert {str(page): broken for page in PAGES if (broken := broken_links(page))} == {}


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    links = "[1](#a-b-c) [2](#a) [3](page.md#a-b-c) [4](gone.md) [5](https://x.y)"
    page.write_text(f"# A `b`, c\n{links}\n```\n# A\n[6](gone.md)\n```\n", encoding="utf-8")
    assert broken_links(page) == ["#a", "gone.md"]


def test_the_readme_leads_to_every_page() -> None:
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        seen.add(page)
        todo += [target for _, target, _ in links_of(page) if target.suffix == ".md" and target not in seen]
    assert [page for page in PAGES if page not in seen] == []


def unknown_options(text: str) -> list[str]:
    """Of the commands ``mlx-m3 NAME ...`` in a text's code."""
    _, commands = _parser()
    known = {name: set(re.findall(r"--[a-z-]+", parser.format_help())) for name, parser in commands.items()}
    code = "\n".join(re.findall(r"^```.*?^```|`[^`\n]+`", text, flags=re.DOTALL | re.MULTILINE))
    return [
        f"mlx-m3 {name} {option}"
        for name, rest in re.findall(r"mlx-m3 ([a-z]+)\b([^`|;&#\n]*)", code)
        for option in re.findall(r" (--[a-z-]+)", rest) or ["--help"]
        if option not in known.get(name, ())
    ]


def unknown_variables(text: str) -> list[str]:
    complaints = read_settings(dict.fromkeys(re.findall(r"\bMLX_M3_PLUGIN\w*", text), "?")).complaints
    return [complaint for complaint in complaints if complaint.startswith("unknown variable")]


def test_commands_and_variables_of_pages_exist() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert unknown_options(text) == []
    assert unknown_variables(text) == []


def test_unknown_ones_are_found() -> None:
    text = "`mlx-m3 fit X --memory 1 --contxt 2`, `mlx-m3 fits X`"
    assert unknown_options(text) == ["mlx-m3 fit --contxt", "mlx-m3 fits --help"]
    assert len(unknown_variables("MLX_M3_PLUGIN=off MLX_M3_PLUGIN_STRIC=1")) == 1


def uniform(bits: int) -> Writer:
    return real_size._mlx_writer(real_size.experts_fused_with_shared, real_size.uniform_bits(bits))


def context_cell(directory: Path, memory: int) -> str:
    """As in ``docs/which-checkpoint.md``: with 16 bits, and in brackets with ``--kv-bits 8``."""
    found = [fit(directory, memory, kv_bits=bits) for bits in (None, 8)]
    words = [
        "all" if f.largest_context == f.model_context else f"{f.largest_context // 1000}K" for f in found
    ]
    if not found[0].largest_context:
        return "no"
    return "all" if words[0] == "all" else f"{words[0]} ({words[1]})"


# Rows with few tensors: the other rows are counted in the same way.
@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("row", "write"),
    [
        ("4 bits", REAL_LAYOUTS["fused_4bit"]),
        ("oQ4", REAL_LAYOUTS["oq4"]),
        ("Config-I", REAL_LAYOUTS["config_i"]),
    ]
    + [(f"{bits} bits", uniform(bits)) for bits in (3, 6, 8)],
)
def test_what_fits(row: str, write: Writer, tmp_path: Path) -> None:
    write(tmp_path)
    weights = f"{fit(tmp_path, 512 << 30).weights / 2**30:.1f}"
    cells = [context_cell(tmp_path, size << 30) for size in (192, 256, 512)]
    page = (ROOT / "docs" / "which-checkpoint.md").read_text(encoding="utf-8")
    line = next(line for line in page.splitlines() if line.startswith(f"| {row} |"))
    assert line.strip("| ").split(" | ")[2:] == [weights, *cells]
