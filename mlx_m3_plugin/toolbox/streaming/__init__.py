"""An M3 computed layer by layer, and in it expert by expert, straight from its files.

The arithmetic is the model's own (:mod:`mlx_m3_plugin.model`); what differs is that no more weights
are in memory than one expert's, beside a layer's attention.
"""

from .ends import Embedding, Head
from .layer import Choices, StreamedLayer
from .states import States

__all__ = ["Choices", "Embedding", "Head", "States", "StreamedLayer"]
