"""Changes to a checkpoint's directory that leave the rest of it as it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def stored_names(directory: Path) -> list[str]:
    return list(json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"])


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def edit_header(checkpoint: Path, name: str, edit: Callable[[dict[str, Any], str], object]) -> None:
    """``edit(header, name)`` in the file that holds ``name``, and in the index what is left."""
    index = checkpoint / "model.safetensors.index.json"
    file = checkpoint / json.loads(index.read_text())["weight_map"][name]
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header, name)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    names = header.keys() - {"__metadata__"}
    edit_json(
        index,
        lambda content: content.update(
            weight_map={n: f for n, f in content["weight_map"].items() if f != file.name}
            | dict.fromkeys(names, file.name)
        ),
    )
