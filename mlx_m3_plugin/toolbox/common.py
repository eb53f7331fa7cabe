"""What all commands use: sizes as text, text files, hints and progress bars."""

import difflib
import json
import re
import textwrap
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Called with what was done, and how much of it: the bytes of a file, or a number of layers.
Progress = Callable[[Any, int], None]
# Makes a progress bar from a title and how much there is to do.
Watch = Callable[[str, int], Progress]


class Answer(NamedTuple):
    """What a command prints, as JSON or as lines, and whether its answer is yes."""

    content: Any
    lines: Sequence[str]
    yes: bool = True


# --- sizes ---

LEAST_MEMORY, MOST_MEMORY = 1 << 30, 16 << 40
_MEMORY_UNITS = {
    "": 1 << 30,
    "B": 1,
    **{f"{prefix}{end}": 1024**power for power, prefix in enumerate("KMGT", 1) for end in ("", "B", "IB")},
}
_TOKEN_UNITS = {"": 1, "K": 1024, "M": 1024**2}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*\Z")


class InvalidSize(ArgumentTypeError, ValueError):
    """Not a size or a rate; argparse prints the message."""


def parse_memory(text: str) -> int:
    """Bytes of ``256GB``, ``0.5TiB``, ``64G``, or ``256``, which is in GB.

    Memory is sold by powers of 1024: a Mac with 256GB has 256 GiB.
    """
    size = _parse(text, _MEMORY_UNITS)
    if size is None:
        raise InvalidSize(f"invalid size {text!r}: use 256GB or 64GiB")
    if not LEAST_MEMORY <= size <= MOST_MEMORY:
        raise InvalidSize(f"invalid memory size {text!r}: must be between 1GB and 16TB")
    return size


def parse_memories(text: str) -> list[int]:
    return [parse_memory(part) for part in text.split(",")]


def parse_count(text: str) -> int:
    """Tokens of ``131072``, ``128K`` or ``1M``, in units of 1024."""
    count = _parse(text, _TOKEN_UNITS)
    if not count:
        raise InvalidSize(f"invalid number of tokens {text!r}: use 131072 or 128K")
    return count


def parse_acceptance(text: str) -> list[float]:
    """``0.8``, or one number for each token of a block: ``0.9,0.8,0.7``."""
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    # NaN fails the comparison as well.
    if not rates or not all(0 <= rate <= 1 for rate in rates):
        raise InvalidSize(f"invalid acceptance {text!r}: use numbers from 0 to 1, as in 0.8 or 0.9,0.8,0.7")
    return rates


def _parse(text: str, units: Mapping[str, int]) -> int | None:
    match = _SIZE.match(text)
    factor = units.get(match[2].upper()) if match else None
    return None if match is None or factor is None else int(float(match[1]) * factor)


def size_in_words(count: int) -> str:
    """Bytes in GiB, MiB or bytes, in the largest unit that gives at least 1."""
    return next(
        (f"{count / (1 << n):,.1f} {unit}" for n, unit in ((30, "GiB"), (20, "MiB")) if count >= 1 << n),
        f"{count:,} bytes",
    )


def tokens_in_words(count: int) -> str:
    return f"{count:,} {'token' if count == 1 else 'tokens'}"


def component_table(rows: Iterable[tuple[str, int, int, str]], columns: int = 1000) -> list[str]:
    """Of a model's parts and all together: name, parameters, bytes, bits per weight, what they are stored as.

    ``columns``: the longest line; what each part is stored as is cut to fit.
    """
    parts = list(rows)
    parts.append(("total", sum(part[1] for part in parts), sum(part[2] for part in parts), ""))
    table = [("Component", "parameters", "bytes", "bits/weight", "stored as")]
    for name, parameters, size, stored_as in parts:
        bits = f"{8 * size / parameters:.2f}" if parameters else ""
        table.append((name, f"{parameters:,}", f"{size:,}", bits, stored_as))
    names, *numbers = [max(len(line[column]) for line in table) for column in range(4)]
    lines = []
    for name, *cells, stored_as in table:
        aligned = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, numbers, strict=True))
        line = f"{name:{names}}  {aligned}  "
        lines.append((line + textwrap.shorten(stored_as, columns - len(line), placeholder=" ...")).rstrip())
    return lines


# --- text files that people write or download ---


class UnreadableText(ValueError):
    """A file with the wrong content; the message names it."""


def read_text(file: Path) -> str:
    """Raises: OSError: it cannot be read.  UnreadableText: it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableText(f"{file} is not UTF-8 text ({error.reason} at byte {error.start:,})") from None


def text_of(file: str | None = None) -> str:
    """What is in ``file``, or the built-in text: prose in several languages, code and tool calls."""
    return read_text(Path(__file__).with_name("calibration.txt") if file is None else Path(file).expanduser())


def read_json_object(file: Path) -> dict[str, Any]:
    """Raises: OSError: it cannot be read.  UnreadableText: it is not a JSON object."""
    return parse_json_object(read_text(file), str(file))


def parse_json_object(text: str, name: str) -> dict[str, Any]:
    """``name`` is what errors call it."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableText(f"{name} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UnreadableText(f"{name} is not a JSON object")
    return content


# --- hints and progress ---


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean oq2.5?)``, or nothing if no known word is similar."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.8)
    return f" (did you mean {near[0]}?)" if near else ""


def layers_bar(title: str, layers: int) -> Progress:
    """For a forward pass: call it with a layer's number and 1, and first with -1 and how many are done."""
    return _bar(title, layers, unit="layer")


def bytes_bar(title: str, total: int) -> Progress:
    """For reading or writing files."""
    return _bar(title, total, unit="B", unit_scale=True, unit_divisor=1024, smoothing=0.05)


def _bar(title: str, total: int, **options: Any) -> Progress:
    """On stderr, if that is a terminal."""
    # Imported here: --help needs no bar.
    from tqdm import tqdm

    bar: Any = tqdm(total=total, desc=title, disable=None, **options)

    def advance(_: Any, count: int) -> None:
        bar.update(count)
        if bar.n >= total:
            bar.close()

    return advance
