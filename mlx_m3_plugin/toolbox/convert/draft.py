"""The draft head of a checkpoint, which a conversion leaves out, or keeps bit for bit.

It is written into folders, where stock mlx-lm and mlx-vlm look for no weights.
"""

import json
import shutil
from pathlib import Path

from ..checkpoint import DRAFT_TENSORS, Checkpoint, draft_in_words

_PIECE = 1 << 22


def check_draft(source: Checkpoint) -> None:
    """Raises: ValueError: there is no draft head to keep, or two of them have the same place."""
    words = draft_in_words(source.draft_folders, source.headers.tensors)
    if words is None:
        raise ValueError(f"--keep-draft: {source.name} has no draft head")
    if source.draft_tensors and DRAFT_TENSORS in source.draft_folders:
        raise ValueError(
            f"--keep-draft: {source.name} has draft tensors in its shards, which would be written into "
            f"{DRAFT_TENSORS}/, and that folder is there already: rename it"
        )


def draft_bytes(source: Checkpoint) -> int:
    files = (f for folder in source.draft_folders for f in (source.directory / folder).rglob("*"))
    stored = sum(tensor.nbytes for tensor in source.draft_tensors.values())
    return stored + sum(file.stat().st_size for file in files if file.is_file())


def write_draft(source: Checkpoint, directory: Path) -> list[str]:
    """Folders are copied; draft tensors of the shards go into one of their own.  Returns all files' names."""
    for folder in source.draft_folders:
        shutil.copytree(source.directory / folder, directory / folder, dirs_exist_ok=True)
    folders = list(source.draft_folders)
    if source.draft_tensors:
        folders.append(DRAFT_TENSORS)
        (directory / DRAFT_TENSORS).mkdir(exist_ok=True)
        shutil.copyfile(source.directory / "config.json", directory / DRAFT_TENSORS / "config.json")
        _copy_tensors(source, directory / DRAFT_TENSORS / "model.safetensors")
    files = (file for folder in folders for file in (directory / folder).rglob("*") if file.is_file())
    return [file.relative_to(directory).as_posix() for file in files]


def _copy_tensors(source: Checkpoint, file: Path) -> None:
    """With their names, bytes and dtypes, also those that MLX reads as others."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in source.draft_tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": tensor.stored_dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as new:
        new.write(len(header).to_bytes(8, "little") + header)
        for tensor in source.draft_tensors.values():
            with (source.directory / tensor.file).open("rb") as shard:
                shard.seek(tensor.start)
                for done in range(0, tensor.nbytes, _PIECE):
                    new.write(shard.read(min(_PIECE, tensor.nbytes - done)))
