"""Text for ``status()`` and ``mlx-m3 doctor``.  Apart from the hook, which may be what is broken."""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def report(first: str, sections: Mapping[str, Sequence[str]]) -> str:
    """The first line, then each section that is not empty: its title and its lines, indented."""
    lines = [first]
    for title, entries in sections.items():
        lines += [title, *(f"  {entry}" for entry in entries)] if entries else []
    return "\n".join(lines)


def patch_lines(patches: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: {', '.join(what) if isinstance(what, list) else what}" for name, what in patches.items()
    ]


def version_of(package: str) -> str | None:
    """The installed version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
