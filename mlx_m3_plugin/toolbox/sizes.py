"""Sizes in words, and words for sizes."""

import re

LEAST_MEMORY, MOST_MEMORY = 1 << 30, 16 << 40
_UNITS = {
    "": 1 << 30,
    "B": 1,
    **{f"{prefix}{end}": 1024**power for power, prefix in enumerate("KMGT", 1) for end in ("", "B", "IB")},
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*\Z")


def parse_memory(text: str) -> int:
    """Bytes of ``256GB``, ``0.5TiB``, ``64G``, or ``256``, which is in GB.

    Memory is sold by powers of 1024: a Mac of 256GB has 256 GiB.

    Raises:
        ValueError: it is no size, or no machine has so little or so much memory.
    """
    match = _SIZE.match(text)
    unit = match[2].upper() if match else None
    if match is None or unit not in _UNITS:
        raise ValueError(f"{text!r} is no size; write 256GB or 64GiB")
    size = int(float(match[1]) * _UNITS[unit])
    if not LEAST_MEMORY <= size <= MOST_MEMORY:
        raise ValueError(f"{text!r} is not a size of memory: it must be between 1GB and 16TB")
    return size


def parse_count(text: str) -> int:
    """Tokens of ``131072``, ``128K`` or ``1M``, in units of 1024.

    Raises:
        ValueError: it is no count.
    """
    match = _SIZE.match(text)
    factor = {"": 1, "K": 1024, "M": 1024**2}.get(match[2].upper()) if match else None
    count = 0 if match is None or factor is None else int(float(match[1]) * factor)
    if not count:
        raise ValueError(f"{text!r} is no number of tokens; write 131072 or 128K")
    return count


def size_in_words(count: int) -> str:
    """Bytes in the largest unit of which there is one."""
    return next(
        (f"{count / (1 << n):,.1f} {unit}" for n, unit in ((30, "GiB"), (20, "MiB")) if count >= 1 << n),
        f"{count:,} bytes",
    )


def tokens_in_words(count: int) -> str:
    return f"{count:,} {'token' if count == 1 else 'tokens'}"
