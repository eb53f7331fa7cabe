"""One model in every layout that M3 checkpoints are published in: for tests of whatever has to open them."""

from .source import Source
from .table import LAYOUTS, Layout

__all__ = ["LAYOUTS", "Layout", "Source"]
