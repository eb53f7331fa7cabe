"""Sizes in words, and words for sizes."""

import re

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}{end}": 1024**power for power, prefix in enumerate("KMGT", 1) for end in ("", "B", "IB")},
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*\Z")


def parse_size(text: str) -> int:
    """Bytes of ``256GB``, ``0.5TiB``, ``64G`` or a plain number.

    It is memory that is meant, and memory is sold by powers of 1024: a Mac of 256GB has 256 GiB.

    Raises:
        ValueError: it is no size.
    """
    match = _SIZE.match(text)
    unit = match[2].upper() if match else None
    if match is None or unit not in _UNITS:
        raise ValueError(f"{text!r} is no size; write 256GB or 64GiB")
    return int(float(match[1]) * _UNITS[unit])


def parse_count(text: str) -> int:
    """Tokens of ``131072``, ``128K`` or ``1M``, in units of 1024.

    Raises:
        ValueError: it is no count.
    """
    match = _SIZE.match(text)
    factor = {"": 1, "K": 1024, "M": 1024**2}.get(match[2].upper()) if match else None
    if match is None or factor is None or not float(match[1]):
        raise ValueError(f"{text!r} is no number of tokens; write 131072 or 128K")
    return int(float(match[1]) * factor)


def size_in_words(count: int) -> str:
    """Bytes in the largest unit of which there is one."""
    return next(
        (f"{count / (1 << n):,.1f} {unit}" for n, unit in ((30, "GiB"), (20, "MiB")) if count >= 1 << n),
        f"{count:,} bytes",
    )
