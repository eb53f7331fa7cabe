"""What a conversion writes: modules, how they are quantized, and their files.

Made from headers alone: all sizes are known before a weight is read.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from ...weights.names import TEXT_PREFIX
from ...weights.quantization import quantization_entry
from ...weights.tensor import Tensor
from ..checkpoint import Checkpoint
from ..parameters import component_of, text_shapes
from ..precision import Quantization
from ..shards import NewTensor
from .recipe import VISION, Matrix, Recipe, matrices_of

# The largest file, as in conversions by mlx-lm and mlx-vlm.
SHARD_BYTES = 5 << 30


@dataclass(frozen=True)
class SourceMatrix:
    """One matrix of the source, of one expert where there are experts.

    Attributes:
        spec: how the source stores it.  parts: its tensors, ``weight``, ``scales``, ...
    """

    module: str
    spec: Quantization
    parts: Mapping[str, Tensor]
    outputs: int
    inputs: int

    @property
    def size(self) -> int:
        return self.outputs * self.inputs


@dataclass(frozen=True)
class NewModule:
    """What is written under one path.

    Attributes:
        path: with the prefix.  component: as ``mlx-m3 inspect`` names it.
        matrices: those of the source in it, one below the other, experts one after the other.
        tensors: by part: ``weight``, ``scales``, ``biases``.
    """

    path: str
    component: str
    spec: Quantization
    matrices: tuple[SourceMatrix, ...]
    tensors: Mapping[str, NewTensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        return sum(matrix.size for matrix in self.matrices)


@dataclass(frozen=True)
class ConversionPlan:
    """A whole conversion.

    Attributes:
        packed: gate and up are fused, and the shared expert is one more of the experts.
        shards: modules by file.
        specs: module path without a prefix -> how it will be stored.
    """

    source: Checkpoint
    recipe: Recipe
    packed: bool
    shards: list[list[NewModule]]
    specs: Mapping[str, Quantization] = field(default_factory=dict)

    @property
    def modules(self) -> Iterator[NewModule]:
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
        return quantization_entry(specs)


def plan_conversion(
    source: Checkpoint, recipe: Recipe, specs: Mapping[str, Quantization] | None = None
) -> ConversionPlan:
    """Lay out what ``recipe`` makes of ``source``.

    Args:
        specs: by module path, in place of the recipe's, from :func:`.allocation.allocate_bits`.

    Raises:
        RecipeError: the recipe does not fit this model.
    """
    matrices = {m.module: m for m in matrices_of(source.text_config, indexers=source.indexers)}
    wanted = {path: (specs or {}).get(path) or recipe.spec(matrix) for path, matrix in matrices.items()}
    chosen = {path: _resolved(source, matrices[path], spec) for path, spec in wanted.items()}
    packed = _can_pack(source, chosen)
    modules = [*_text_modules(source, matrices, chosen, packed), *_vision_modules(source, recipe)]
    return ConversionPlan(source, recipe, packed, _cut(modules), chosen)


def _resolved(source: Checkpoint, matrix: Matrix, spec: Quantization) -> Quantization:
    """``keep`` of a matrix that is quantized already keeps its quantization."""
    if spec.bits is None and spec.dtype == "keep":
        return replace(source.spec(matrix.module), dtype="keep")
    return spec


def _can_pack(source: Checkpoint, specs: Mapping[str, Quantization]) -> bool:
    """Whether everything that mlx-vlm packs together by default is stored alike, in every layer."""
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
                stored = {(specs[path], source.float_dtype(path)) for path in paths}
                # Unquantized, a fused matrix would have more elements than MLX can count.
                if len(stored) > 1 or specs[paths[0]].bits is None:
                    return False
    return any(config.is_moe(layer) for layer in range(config.num_hidden_layers))


# --- modules ---


def _text_modules(
    source: Checkpoint, matrices: Mapping[str, Matrix], specs: Mapping[str, Quantization], packed: bool
) -> Iterator[NewModule]:
    for name in text_shapes(source.text_config, indexers=source.indexers):
        path, _, part = name.rpartition(".")
        matrix = matrices.get(path)
        if matrix is None or part != "weight":
            yield _copied(source, name, TEXT_PREFIX + name)
        elif packed and matrix.part in ("experts", "shared_expert"):
            if matrix.part == "experts" and matrix.projection != "up_proj":
                yield _packed(source, matrices, specs, matrix)
        else:
            yield _module(source, TEXT_PREFIX + path, specs[path], list(_source_matrices(source, matrix)))


def _packed(
    source: Checkpoint, matrices: Mapping[str, Matrix], specs: Mapping[str, Quantization], matrix: Matrix
) -> NewModule:
    """``gate_up_proj`` or ``down_proj`` of all experts, and of the shared one after them."""
    moe, _, projection = matrix.module.rpartition(".switch_mlp.")
    names = ["gate_proj", "up_proj"] if projection == "gate_proj" else [projection]
    each = []
    for name in names:
        routed, shared = matrices[f"{moe}.switch_mlp.{name}"], matrices[f"{moe}.shared_experts.{name}"]
        each.append([*_source_matrices(source, routed), *_source_matrices(source, shared)])
    together = [matrix for of_an_expert in zip(*each, strict=True) for matrix in of_an_expert]
    fused = "gate_up_proj" if len(names) == 2 else projection
    path = f"{TEXT_PREFIX}{moe}.switch_mlp.{fused}"
    return _module(source, path, specs[matrix.module], together, experts=len(each[0]))


def _source_matrices(source: Checkpoint, matrix: Matrix) -> Iterator[SourceMatrix]:
    parts, spec = source.parts(matrix.module), source.spec(matrix.module)
    if not matrix.experts:
        yield SourceMatrix(matrix.module, spec, parts, matrix.outputs, matrix.inputs)
    for number in range(matrix.experts):
        one = {part: tensor.expert(number) for part, tensor in parts.items()}
        yield SourceMatrix(matrix.module, spec, one, matrix.outputs, matrix.inputs)


def _module(
    source: Checkpoint, path: str, spec: Quantization, matrices: list[SourceMatrix], experts: int = 0
) -> NewModule:
    first = matrices[0]
    experts = experts or (len(matrices) if len(source.plan[f"{first.module}.weight"].shape) == 3 else 0)
    outputs = sum(matrix.outputs for matrix in matrices) // max(experts, 1)
    leading = (experts, outputs) if experts else (outputs,)
    tensors = _tensors(path, spec, leading, first.inputs, source.float_dtype(first.module))
    return NewModule(path, component_of(first.module + ".weight"), spec, tuple(matrices), tensors)


def _tensors(
    path: str, spec: Quantization, leading: tuple[int, ...], inputs: int, dtype: mx.Dtype
) -> dict[str, NewTensor]:
    if spec.bits is None:
        kept = dtype if spec.dtype == "keep" else getattr(mx, spec.dtype)
        return {"weight": NewTensor(f"{path}.weight", (*leading, inputs), kept)}
    groups = (*leading, inputs // spec.group_size)
    scales = dtype if spec.mode == "affine" else mx.uint8
    made = {
        "weight": NewTensor(f"{path}.weight", (*leading, inputs * spec.bits // 32), mx.uint32),
        "scales": NewTensor(f"{path}.scales", groups, scales),
    }
    if spec.mode == "affine":
        made["biases"] = NewTensor(f"{path}.biases", groups, scales)
    return made


def _vision_modules(source: Checkpoint, recipe: Recipe) -> Iterator[NewModule]:
    spec = next((rule.spec for rule in reversed(recipe.rules) if VISION in rule.parts), Quantization())
    for name in source.vision:
        yield _copied(source, name, name, spec)


def _copied(source: Checkpoint, name: str, new_name: str, spec: Quantization | None = None) -> NewModule:
    """A norm, a bias, or a weight of the vision tower."""
    spec, tensor = spec or Quantization(), source.plan[name]
    dtype = tensor.dtype if spec.dtype == "keep" else getattr(mx, spec.dtype)
    path = new_name.rpartition(".")[0]
    inputs = tensor.shape[-1] if tensor.shape else 1
    outputs = math.prod(tensor.shape) // max(inputs, 1)
    parts = {"weight": tensor.reshape(outputs, inputs)}
    matrix = SourceMatrix(name, Quantization(), parts, outputs, inputs)
    tensors = {"weight": NewTensor(new_name, tensor.shape, dtype)}
    return NewModule(path, component_of(name), spec, (matrix,), tensors)


# --- files ---


def _cut(modules: list[NewModule]) -> list[list[NewModule]]:
    """In order, each file as full as ``SHARD_BYTES`` allows; a module is never split."""
    shards: list[list[NewModule]] = [[]]
    size = 0
    for module in modules:
        if shards[-1] and size + module.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(module)
        size += module.nbytes
    return shards
