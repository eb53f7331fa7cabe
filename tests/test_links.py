"""Every relative link in a page names a file, every anchor a heading of it, and every page is linked."""

import re
from collections.abc import Iterator
from pathlib import Path

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
