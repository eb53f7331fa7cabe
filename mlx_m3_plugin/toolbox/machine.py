"""The machine that this runs on."""

import os
import sys

_LEAST_TO_WORK_WITH = 1 << 30


def machine_memory() -> int | None:
    """Bytes of physical memory."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def is_mac() -> bool:
    return sys.platform == "darwin"


def default_memory() -> int:
    """Bytes that a tool takes unless it is told otherwise: a quarter of the machine's."""
    return max(_LEAST_TO_WORK_WITH, (machine_memory() or 4 * _LEAST_TO_WORK_WITH) // 4)
