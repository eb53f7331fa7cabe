"""Reads and writes at a place in a file, in pieces that every system takes.

macOS refuses to read or write 2 GiB or more at once (EINVAL).
"""

import os

# Much less than that: a piece is in memory twice while it is read.
LARGEST_PIECE = 1 << 26


def read_at(descriptor: int, start: int, size: int) -> bytearray:
    """``size`` bytes from ``start`` on.

    Raises:
        OSError: they cannot be read, or the file ends before.
    """
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        piece = os.pread(descriptor, min(LARGEST_PIECE, size - done), start + done)
        if not piece:
            raise OSError(f"the file ends {size - done:,} bytes before the tensor does")
        view[done : done + len(piece)] = piece
        done += len(piece)
    return data


def write_at(descriptor: int, start: int, data: bytes) -> None:
    """Put all of ``data`` at ``start``.

    Raises:
        OSError: it cannot be written.
    """
    view, done = memoryview(data), 0
    while done < len(data):
        done += os.pwrite(descriptor, view[done : done + LARGEST_PIECE], start + done)
