"""Progress bars on stderr, if that is a terminal: bytes written, layers done, and the time that is left."""

from collections.abc import Callable
from typing import Any

from tqdm import tqdm


def layers_bar(title: str, layers: int) -> Callable[[int, int], None]:
    """For a walk through a model: called with a layer's number, or -1, and how many are done."""
    bar: Any = tqdm(total=layers, desc=title, unit="layer", disable=None)

    def advance(_: int, count: int) -> None:
        bar.update(count)
        if bar.n >= layers:
            bar.close()

    return advance


def bytes_bar(title: str, total: int) -> Callable[[Any, int], None]:
    """For a conversion: called with what was written, and its bytes."""
    size = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    bar: Any = tqdm(total=total, desc=title, smoothing=0.05, disable=None, **size)

    def advance(_: Any, count: int) -> None:
        bar.update(count)
        if bar.n >= total:
            bar.close()

    return advance
