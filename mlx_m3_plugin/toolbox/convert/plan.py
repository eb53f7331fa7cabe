"""What a conversion writes: modules, their bits, and the files they go into.

Made from headers alone, so that sizes are known before anything is read.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from ...weights.tensor import Tensor
from ..checkpoint import Checkpoint
from ..parameters import component_of, text_shapes
from ..precision import Quantization
from ..shards import NewTensor
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
    spec: Quantization
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
    spec: Quantization
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
        specs: module path without a prefix -> how it is stored; for the card and for tests.
    """

    source: Checkpoint
    recipe: Recipe
    packed: bool
    shards: list[list[Module]]
    specs: Mapping[str, Quantization] = field(default_factory=dict)

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
        specs = {m.path: m.spec.as_quantization() for m in self.modules if m.spec.bits is not None}
        if not specs:
            return None
        every = list(specs.values())
        default = max(every, key=every.count)
        return {**default, **{path: spec for path, spec in specs.items() if spec != default}}


def plan_conversion(
    source: Checkpoint, recipe: Recipe, specs: Mapping[str, Quantization] | None = None
) -> Plan:
    """Lay out what ``recipe`` makes of ``source``.

    Args:
        specs: by module path, in place of the recipe's; what :mod:`.allocation` has worked out.

    Raises:
        RecipeError: the recipe does not fit this model.
    """
    matrices = {m.module: m for m in matrices_of(source.text_config, indexers=source.indexers)}
    wanted = {path: (specs or {}).get(path) or recipe.spec(matrix) for path, matrix in matrices.items()}
    chosen = {path: _resolved(source, matrices[path], spec) for path, spec in wanted.items()}
    packed = _can_pack(source, chosen)
    modules = [*_text_modules(source, matrices, chosen, packed), *_vision_modules(source, recipe)]
    return Plan(source, recipe, packed, _cut(modules), chosen)


def _resolved(source: Checkpoint, matrix: Matrix, spec: Quantization) -> Quantization:
    """``keep`` of a matrix that is quantized already is its own precision."""
    if spec.bits is None and spec.dtype == "keep":
        return replace(source.spec(matrix.module), dtype="keep")
    return spec


def _can_pack(source: Checkpoint, specs: Mapping[str, Quantization]) -> bool:
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
                precisions = {(specs[path], source.float_dtype(path)) for path in paths}
                # In floats a fused matrix would have more elements than MLX can count.
                if len(precisions) > 1 or specs[paths[0]].bits is None:
                    return False
    return any(config.is_moe(layer) for layer in range(config.num_hidden_layers))


# --- modules ---


def _text_modules(
    source: Checkpoint, matrices: Mapping[str, Matrix], specs: Mapping[str, Quantization], packed: bool
) -> Iterator[Module]:
    for name in text_shapes(source.text_config, indexers=source.indexers):
        path, _, part = name.rpartition(".")
        matrix = matrices.get(path)
        if matrix is None or part != "weight":
            yield _as_it_is(source, name, PREFIX + name)
        elif packed and matrix.part in ("experts", "shared_expert"):
            if matrix.part == "experts" and matrix.projection != "up_proj":
                yield _packed(source, matrices, specs, matrix)
        else:
            yield _module(source, PREFIX + path, specs[path], list(_pieces(source, matrix)))


def _packed(
    source: Checkpoint, matrices: Mapping[str, Matrix], specs: Mapping[str, Quantization], matrix: Matrix
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
    return _module(source, path, specs[matrix.module], pieces, experts=len(columns[0]))


def _pieces(source: Checkpoint, matrix: Matrix) -> Iterator[Piece]:
    parts = {
        part: source.plan[f"{matrix.module}.{part}"]
        for part in ("weight", "scales", "biases", "global_scale")
        if f"{matrix.module}.{part}" in source.plan
    }
    spec = source.spec(matrix.module)
    if not matrix.experts:
        yield Piece(matrix.module, spec, parts, matrix.rows, matrix.columns)
    for number in range(matrix.experts):
        one = {part: tensor.expert(number) for part, tensor in parts.items()}
        yield Piece(matrix.module, spec, one, matrix.rows, matrix.columns)


def _module(
    source: Checkpoint, path: str, spec: Quantization, pieces: list[Piece], experts: int = 0
) -> Module:
    first = pieces[0]
    experts = experts or (len(pieces) if len(source.plan[f"{first.module}.weight"].shape) == 3 else 0)
    rows = sum(piece.rows for piece in pieces) // max(experts, 1)
    leading = (experts, rows) if experts else (rows,)
    tensors = _tensors(path, spec, leading, first.columns, source.float_dtype(first.module))
    return Module(path, component_of(first.module + ".weight"), spec, tuple(pieces), tensors)


def _tensors(
    path: str, spec: Quantization, leading: tuple[int, ...], columns: int, dtype: str
) -> dict[str, NewTensor]:
    if spec.bits is None:
        kept = dtype if spec.dtype == "keep" else f"mlx.core.{spec.dtype}"
        return {"weight": NewTensor(f"{path}.weight", (*leading, columns), kept)}
    groups = (*leading, columns // spec.group_size)
    scales = dtype if spec.mode == "affine" else str(mx.uint8)
    made = {
        "weight": NewTensor(f"{path}.weight", (*leading, columns * spec.bits // 32), str(mx.uint32)),
        "scales": NewTensor(f"{path}.scales", groups, scales),
    }
    if spec.mode == "affine":
        made["biases"] = NewTensor(f"{path}.biases", groups, scales)
    return made


def _vision_modules(source: Checkpoint, recipe: Recipe) -> Iterator[Module]:
    spec = next((rule.spec for rule in reversed(recipe.rules) if VISION in rule.parts), Quantization())
    for name in source.vision:
        yield _as_it_is(source, name, name, spec)


def _as_it_is(source: Checkpoint, name: str, new_name: str, spec: Quantization | None = None) -> Module:
    """A norm, a bias, or a weight of the vision tower."""
    spec, tensor = spec or Quantization(), source.plan[name]
    dtype = tensor.dtype if spec.dtype == "keep" else f"mlx.core.{spec.dtype}"
    path = new_name.rpartition(".")[0]
    width = tensor.shape[-1] if tensor.shape else 1
    rows = math.prod(tensor.shape) // max(width, 1)
    piece = Piece(name, Quantization(), {"weight": tensor.reshape(rows, width)}, rows, width)
    component = component_of(name)
    return Module(path, component, spec, (piece,), {"weight": NewTensor(new_name, tensor.shape, dtype)})


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
