"""The matrices of an M3, and the words that recipes have for them."""

from collections.abc import Iterable
from dataclasses import dataclass

from ...model.config import TextConfig
from ...weights.names import layer_of
from ..parameters import component_of, text_shapes

# A part's word in recipes -> its name in ``mlx-m3 inspect``, and the projections in it.
_WORDS = {
    "embeddings": ("embeddings", ()),
    "lm_head": ("lm_head", ()),
    "attention": ("attention", ("q_proj", "k_proj", "v_proj", "o_proj")),
    "indexer": ("indexer", ("index_q_proj", "index_k_proj")),
    "router": ("router", ()),
    "dense_mlp": ("dense MLP", ("gate_proj", "up_proj", "down_proj")),
    "experts": ("routed experts", ("gate_proj", "up_proj", "down_proj")),
    "shared_expert": ("shared expert", ("gate_proj", "up_proj", "down_proj")),
}
_COMPONENT_WORDS = {component: word for word, (component, _) in _WORDS.items()}
# The tower, the projector and the patch merge, which are never quantized.
VISION = "vision"
PARTS = (
    *(word for word in _WORDS),
    *(f"{word}.{projection}" for word, (_, projections) in _WORDS.items() for projection in projections),
    VISION,
)


@dataclass(frozen=True)
class Matrix:
    """A weight of the text model that may be quantized; for routed experts all of a layer's.

    Attributes:
        module: path of its module, published and without a prefix.
        part: a recipe's word for where it belongs.  layer: None outside of the layers.
        experts: how many there are of it; 0 for one that has no expert axis.
        rows, columns: outputs and inputs of one.
    """

    module: str
    part: str
    layer: int | None
    experts: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        return max(self.experts, 1) * self.rows * self.columns

    @property
    def projection(self) -> str:
        return self.module.rpartition(".")[2]

    def is_one_of(self, parts: Iterable[str]) -> bool:
        return any(part in (self.part, f"{self.part}.{self.projection}") for part in parts)


def matrices_of(config: TextConfig, *, indexers: bool = True) -> list[Matrix]:
    """All of them, in the order in which a token meets them."""
    found = []
    for name, shape in text_shapes(config, indexers=indexers).items():
        module = name.removesuffix(".weight")
        word = _COMPONENT_WORDS.get(component_of(name))
        if module != name and len(shape) > 1 and word is not None:
            *experts, rows, columns = shape
            found.append(Matrix(module, word, layer_of(name), sum(experts), rows, columns))
    return found
