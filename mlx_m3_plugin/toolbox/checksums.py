"""``SHA256SUMS`` beside the shards, in the format of ``sha256sum -c``, and shards compared with it."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from ..weights.headers import weight_files
from .common import Progress, Watch
from .new_directory import replace_text

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_PIECE = 1 << 22


class Verification(SimpleNamespace):
    """Files read whole and compared with their checksums.

    Attributes:
        files, bytes: how many were read.
        problems: files that differ, are missing, cannot be read or have no checksum, one line each.
    """


def verify(directory: Path, watch: Watch) -> Verification:
    """Read all shards in ``directory``, and compare them with their checksums.

    In the Hugging Face cache the names of the blobs are the checksums.

    Raises:
        ValueError: there are no checksums, so nothing can be verified.
    """
    shards = {file.relative_to(directory).as_posix(): file for file in weight_files(directory)}
    expected = {name: blob for name, file in shards.items() if (blob := _blob_sum(file))}
    expected |= read_sums(directory)
    if not expected:
        raise ValueError(
            f"{directory} has no {SUMS}, so nothing can be verified; `mlx-m3 convert` writes that file, "
            "or run `sha256sum *.safetensors > SHA256SUMS` where the files are known to be whole"
        )
    problems = [f"{name}: has no checksum" for name in shards if name not in expected]
    there = {name: directory / name for name in expected if (directory / name).is_file()}
    problems += [f"{name}: is missing" for name in expected if name not in there]
    size = sum(file.stat().st_size for file in there.values())
    progress = watch("verifying", size)
    for name, file in there.items():
        try:
            if sha256_of(file, progress) != expected[name]:
                problems.append(f"{name}: its content has changed (SHA-256 differs)")
        except OSError as error:
            problems.append(f"{name}: cannot be read: {error.strerror or error}")
    return Verification(files=len(there), bytes=size, problems=problems)


def sha256_of(file: Path, progress: Progress = lambda *_: None) -> str:
    """In hexadecimal digits; reads the file once."""
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
            progress(file, len(piece))
    return digest.hexdigest()


def read_sums(directory: Path) -> dict[str, str]:
    """File name -> sum; empty if there is no list.

    Raises:
        ValueError: a line of the list is not a sum and a name.
    """
    try:
        lines = (directory / SUMS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    matches = [(line, _LINE.fullmatch(line)) for line in lines if line.strip()]
    wrong = next((line for line, match in matches if match is None), None)
    if wrong is not None:
        raise ValueError(f"{directory / SUMS}: not a SHA-256 sum and a file name: {wrong[:100]!r}")
    return {match[2]: match[1].lower() for _, match in matches if match is not None}


def write_sums(directory: Path, sums: Mapping[str, str]) -> None:
    replace_text(directory / SUMS, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


def _blob_sum(file: Path) -> str | None:
    blob = file.resolve()
    is_sum = file.is_symlink() and blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name)
    return blob.name if is_sum else None
