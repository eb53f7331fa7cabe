"""Text files that people write or download, read with errors that name the file."""

import json
from pathlib import Path
from typing import Any


class UnreadableText(ValueError):
    """A file that is not what its reader takes; the message names it."""


def read_text(file: Path) -> str:
    """Raises: OSError: it cannot be read.  UnreadableText: it is not in UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableText(
            f"{file} is not text in UTF-8 ({error.reason} at byte {error.start:,})"
        ) from None


def read_json_object(file: Path) -> dict[str, Any]:
    """Raises: OSError: it cannot be read.  UnreadableText: it is not a JSON object."""
    return parse_json_object(read_text(file), str(file))


def parse_json_object(text: str, what: str) -> dict[str, Any]:
    """``what``: how errors call it."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableText(f"{what} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UnreadableText(f"{what} is not a JSON object")
    return content
