"""What a conversion writes: modules, their bits, and the files they go into.

Made from headers alone, so that sizes are known before anything is read.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from ...weights.shapes import component_of, text_shapes
from ...weights.tensor import Tensor
from ...weights.writing import NewTensor
from ..checkpoint import Checkpoint
from ..precision import How
from .matrices import VISION, Matrix, matrices_of
from .recipe import Recipe

# As mlx-lm and mlx-vlm cut their conversions.
SHARD_BYTES = 5 << 30
# Before the text model's names, as mlx-lm and mlx-vlm write them; a text-only model becomes one too.
PREFIX = "language_model."


@dataclass(frozen=True)
class Piece:
    """One matrix to be stored: ``weight`` and its scales as the source has them, and how that is."""

    module: str
    how: How
    parts: Mapping[str, Tensor]
    rows: int
    columns: int


@dataclass(frozen=True)
class Module:
    """What is written under one path.

    Attributes:
        path: with the prefix.  component: as ``mlx-m3 inspect`` names it.
        pieces: matrices one below the other, experts one after the other.
        tensors: what is stored, by part: ``weight``, ``scales``, ``biases``.
    """

    path: str
    component: str
    how: How
    pieces: tuple[Piece, ...]
    tensors: Mapping[str, NewTensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        return sum(piece.rows * piece.columns for piece in self.pieces)


@dataclass(frozen=True)
class Plan:
    """A whole conversion.

    Attributes:
        packed: gate and up are fused, and the shared expert is one more row of the experts.
        shards: modules by file.
        hows: module path without a prefix -> how it is stored; for the card and for tests.
    """

    source: Checkpoint
    recipe: Recipe
    packed: bool
    shards: list[list[Module]]
    hows: Mapping[str, How] = field(default_factory=dict)

    @property
    def modules(self) -> Iterator[Module]:
        return (module for shard in self.shards for module in shard)

    @property
    def nbytes(self) -> int:
        return sum(module.nbytes for module in self.modules)

    @property
    def parameters(self) -> int:
        return sum(module.parameters for module in self.modules)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.parameters

    def file_names(self) -> list[str]:
        count = len(self.shards)
        return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]

    def quantization(self) -> dict[str, Any] | None:
        """The ``quantization`` of the config to write."""
        hows = {m.path: m.how.as_quantization() for m in self.modules if m.how.bits is not None}
        if not hows:
            return None
        every = list(hows.values())
        default = max(every, key=every.count)
        return {**default, **{path: how for path, how in hows.items() if how != default}}


def plan_conversion(source: Checkpoint, recipe: Recipe, hows: Mapping[str, How] | None = None) -> Plan:
    """Lay out what ``recipe`` makes of ``source``.

    Args:
        hows: by module path, in place of the recipe's; what :mod:`.budget` has worked out.

    Raises:
        RecipeError: the recipe does not fit this model.
    """
    matrices = {m.module: m for m in matrices_of(source.text_config, indexers=source.indexers)}
    wanted = {path: (hows or {}).get(path) or recipe.how(matrix) for path, matrix in matrices.items()}
    chosen = {path: _resolved(source, matrices[path], how) for path, how in wanted.items()}
    packed = _can_pack(source, chosen)
    modules = [*_text_modules(source, matrices, chosen, packed), *_vision_modules(source, recipe)]
    return Plan(source, recipe, packed, _cut(modules), chosen)


def _resolved(source: Checkpoint, matrix: Matrix, how: How) -> How:
    """``keep`` of a matrix that is quantized already is its own precision."""
    if how.bits is None and how.dtype == "keep":
        return replace(source.how(matrix.module), dtype="keep")
    return how


def _can_pack(source: Checkpoint, hows: Mapping[str, How]) -> bool:
    """Whether everything that mlx-vlm packs together by default has the same precision, in every layer."""
    config = source.text_config
    if config.shared_intermediate_size != config.intermediate_size:
        return False
    for layer in range(config.num_hidden_layers):
        if config.is_moe(layer):
            moe = f"model.layers.{layer}.block_sparse_moe"
            projections = [
                [f"{moe}.{owner}.{projection}_proj" for owner in ("switch_mlp", "shared_experts")]
                for projection in ("gate", "up", "down")
            ]
            together = [[*projections[0], *projections[1]], projections[2]]
            for paths in together:
                precisions = {(hows[path], source.float_dtype(path)) for path in paths}
                # In floats a fused matrix would have more elements than MLX can count.
                if len(precisions) > 1 or hows[paths[0]].bits is None:
                    return False
    return any(config.is_moe(layer) for layer in range(config.num_hidden_layers))


# --- modules ---


def _text_modules(
    source: Checkpoint, matrices: Mapping[str, Matrix], hows: Mapping[str, How], packed: bool
) -> Iterator[Module]:
    for name in text_shapes(source.text_config, indexers=source.indexers):
        path, _, part = name.rpartition(".")
        matrix = matrices.get(path)
        if matrix is None or part != "weight":
            yield _as_it_is(source, name, PREFIX + name)
        elif packed and matrix.part in ("experts", "shared_expert"):
            if matrix.part == "experts" and matrix.projection != "up_proj":
                yield _packed(source, matrices, hows, matrix)
        else:
            yield _module(source, PREFIX + path, hows[path], list(_pieces(source, matrix)))


def _packed(
    source: Checkpoint, matrices: Mapping[str, Matrix], hows: Mapping[str, How], matrix: Matrix
) -> Module:
    """``gate_up_proj`` or ``down_proj`` of all experts, and of the shared one after them."""
    moe, _, projection = matrix.module.rpartition(".switch_mlp.")
    names = ["gate_proj", "up_proj"] if projection == "gate_proj" else [projection]
    columns = []
    for name in names:
        routed, shared = matrices[f"{moe}.switch_mlp.{name}"], matrices[f"{moe}.shared_experts.{name}"]
        columns.append([*_pieces(source, routed), *_pieces(source, shared)])
    pieces = [piece for row in zip(*columns, strict=True) for piece in row]
    fused = "gate_up_proj" if len(names) == 2 else projection
    path = f"{PREFIX}{moe}.switch_mlp.{fused}"
    return _module(source, path, hows[matrix.module], pieces, experts=len(columns[0]))


def _pieces(source: Checkpoint, matrix: Matrix) -> Iterator[Piece]:
    parts = {
        part: source.plan[f"{matrix.module}.{part}"]
        for part in ("weight", "scales", "biases", "global_scale")
        if f"{matrix.module}.{part}" in source.plan
    }
    how = source.how(matrix.module)
    if not matrix.experts:
        yield Piece(matrix.module, how, parts, matrix.rows, matrix.columns)
    for number in range(matrix.experts):
        one = {part: tensor.expert(number) for part, tensor in parts.items()}
        yield Piece(matrix.module, how, one, matrix.rows, matrix.columns)


def _module(source: Checkpoint, path: str, how: How, pieces: list[Piece], experts: int = 0) -> Module:
    first = pieces[0]
    experts = experts or (len(pieces) if len(source.plan[f"{first.module}.weight"].shape) == 3 else 0)
    rows = sum(piece.rows for piece in pieces) // max(experts, 1)
    leading = (experts, rows) if experts else (rows,)
    tensors = _tensors(path, how, leading, first.columns, source.float_dtype(first.module))
    return Module(path, component_of(first.module + ".weight"), how, tuple(pieces), tensors)


def _tensors(path: str, how: How, leading: tuple[int, ...], columns: int, dtype: str) -> dict[str, NewTensor]:
    if how.bits is None:
        kept = dtype if how.dtype == "keep" else f"mlx.core.{how.dtype}"
        return {"weight": NewTensor(f"{path}.weight", (*leading, columns), kept)}
    groups = (*leading, columns // how.group_size)
    scales = dtype if how.mode == "affine" else str(mx.uint8)
    made = {
        "weight": NewTensor(f"{path}.weight", (*leading, columns * how.bits // 32), str(mx.uint32)),
        "scales": NewTensor(f"{path}.scales", groups, scales),
    }
    if how.mode == "affine":
        made["biases"] = NewTensor(f"{path}.biases", groups, scales)
    return made


def _vision_modules(source: Checkpoint, recipe: Recipe) -> Iterator[Module]:
    how = next((rule.how for rule in reversed(recipe.rules) if VISION in rule.parts), How())
    for name in source.vision:
        yield _as_it_is(source, name, name, how)


def _as_it_is(source: Checkpoint, name: str, new_name: str, how: How | None = None) -> Module:
    """A norm, a bias, or a weight of the vision tower."""
    how, tensor = how or How(), source.plan[name]
    dtype = tensor.dtype if how.dtype == "keep" else f"mlx.core.{how.dtype}"
    path = new_name.rpartition(".")[0]
    width = tensor.shape[-1] if tensor.shape else 1
    rows = math.prod(tensor.shape) // max(width, 1)
    piece = Piece(name, How(), {"weight": tensor.reshape(rows, width)}, rows, width)
    component = component_of(name)
    return Module(path, component, how, (piece,), {"weight": NewTensor(new_name, tensor.shape, dtype)})


# --- files ---


def _cut(modules: list[Module]) -> list[list[Module]]:
    """In order, no file larger than it must be; a module is in one file."""
    shards: list[list[Module]] = [[]]
    size = 0
    for module in modules:
        if shards[-1] and size + module.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(module)
        size += module.nbytes
    return shards
