"""What a conversion writes: modules, how they are quantized, and their files.

Made from headers alone: all sizes are known before a weight is read.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...weights import group_names, shorten
from ...weights.names import TEXT_PREFIX
from ...weights.quantization import quantization_entry
from ...weights.tensor import Tensor
from ..checkpoint import Checkpoint
from ..parameters import text_shapes
from ..precision import Quantization
from ..shards import NewTensor
from .recipe import VISION, Matrix, Recipe, RecipeError, matrices_of

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
        path: with the prefix.
        matrices: those of the source in it, one below the other, experts one after the other.
        tensors: by part: ``weight``, ``scales``, ``biases``, ``global_scale``.
    """

    path: str
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
class DraftPlan:
    """How a draft head is written.

    Attributes:
        head: to be quantized by the recipe, as ``modules`` of one file; None to be kept bit for bit.
    """

    head: Checkpoint | None = None
    modules: tuple[NewModule, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(module.nbytes for module in self.modules)


@dataclass(frozen=True)
class ConversionPlan:
    """A whole conversion.

    Attributes:
        packed: gate and up are fused, and the shared expert is one more of the experts.
        shards: modules by file.
        specs: module path without a prefix -> how it will be stored.
        draft: what is written of the source's draft head; None for nothing.
    """

    source: Checkpoint
    recipe: Recipe
    packed: bool
    shards: list[list[NewModule]]
    specs: Mapping[str, Quantization]
    draft: DraftPlan | None = None

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

    def summary(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.name,
            "files": len(self.shards),
            "bytes": self.nbytes,
            "parameters": self.parameters,
            "bits_per_weight": self.bits_per_weight,
            "packed": self.packed,
        }

    def file_names(self) -> list[str]:
        count = len(self.shards)
        return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]

    def quantization(self) -> dict[str, Any] | None:
        """The ``quantization`` of the config to write."""
        specs = {m.path: m.spec.in_config() for m in self.modules if m.spec.bits is not None}
        return quantization_entry(specs)


def plan_conversion(
    source: Checkpoint,
    recipe: Recipe,
    specs: Mapping[str, Quantization] | None = None,
    *,
    draft: DraftPlan | None = None,
) -> ConversionPlan:
    """Lay out what ``recipe`` makes of ``source``.

    ``specs``: by module path, in place of the recipe's, from :func:`.allocation.allocate_bits`.
    """
    matrices = {m.module: m for m in matrices_of(source.text_config, indexers=source.indexers)}
    chosen = {path: (specs or {}).get(path) or recipe.spec(matrix) for path, matrix in matrices.items()}
    # What is quantized already and to be kept keeps its quantization.
    kept = Quantization()
    chosen |= {path: source.spec(path) for path, spec in chosen.items() if spec == kept}
    _check_kept(source, recipe, chosen)
    packed = _can_pack(source, chosen)
    modules = list(_text_modules(source, matrices, chosen, packed))
    vision = next((rule.spec for rule in reversed(recipe.rules) if VISION in rule.parts), Quantization())
    modules += [copied_module(source, name, name, vision) for name in source.vision]
    return ConversionPlan(source, recipe, packed, _cut(modules), chosen, draft)


def _check_kept(source: Checkpoint, recipe: Recipe, specs: Mapping[str, Quantization]) -> None:
    """See that what is stored as its spec says can be written with the same bits.

    Raises:
        RecipeError: names the tensors that cannot.
    """
    lost = []
    for path, spec in specs.items():
        stored = source.parts(path)
        if spec == source.spec(path):
            written = spec.parts(stored["weight"].shape, source.float_dtype(path))
            lost += [f"{path}.{part}" for part, t in stored.items() if written[part][1] != t.dtype]
    if lost:
        raise RecipeError(
            f"{recipe.name}: MLX's layers cannot hold these tensors in the dtype they have: "
            f"{', '.join(shorten(group_names(lost)))}; store their modules in another way"
        )


def _can_pack(source: Checkpoint, specs: Mapping[str, Quantization]) -> bool:
    """Whether everything that mlx-vlm packs together by default is stored alike, in every layer."""
    config = source.text_config
    if not config.n_shared_experts or config.shared_intermediate_size != config.intermediate_size:
        return False
    with_experts = [layer for layer in range(config.num_hidden_layers) if config.is_moe(layer)]
    for layer in with_experts:
        moe = f"model.layers.{layer}.block_sparse_moe"
        for projections in (("gate_proj", "up_proj"), ("down_proj",)):
            paths = [f"{moe}.{owner}.{p}" for p in projections for owner in ("switch_mlp", "shared_experts")]
            stored = {(specs[path], source.float_dtype(path)) for path in paths}
            # Unquantized, a fused matrix would have more elements than MLX can count.  Fused gate and up
            # would have one tensor scale.
            if len(stored) > 1 or specs[paths[0]].bits is None or specs[paths[0]].tensor_scales:
                return False
    return bool(with_experts)


# --- modules ---


def _text_modules(
    source: Checkpoint, matrices: Mapping[str, Matrix], specs: Mapping[str, Quantization], packed: bool
) -> Iterator[NewModule]:
    for name in text_shapes(source.text_config, indexers=source.indexers):
        path, _, part = name.rpartition(".")
        matrix = matrices.get(path)
        if matrix is None or part != "weight":
            yield copied_module(source, name, TEXT_PREFIX + name, Quantization())
        elif packed and matrix.part in ("experts", "shared_expert"):
            if matrix.part == "experts" and matrix.projection != "up_proj":
                yield _packed(source, matrices, specs, matrix)
        else:
            yield new_module(source, TEXT_PREFIX + path, specs[path], list(source_matrices(source, matrix)))


def _packed(
    source: Checkpoint, matrices: Mapping[str, Matrix], specs: Mapping[str, Quantization], matrix: Matrix
) -> NewModule:
    """``gate_up_proj`` or ``down_proj`` of all experts, and of the shared one after them."""
    moe, _, projection = matrix.module.rpartition(".switch_mlp.")
    names = ["gate_proj", "up_proj"] if projection == "gate_proj" else [projection]
    each = []
    for name in names:
        routed, shared = matrices[f"{moe}.switch_mlp.{name}"], matrices[f"{moe}.shared_experts.{name}"]
        each.append([*source_matrices(source, routed), *source_matrices(source, shared)])
    together = [matrix for of_an_expert in zip(*each, strict=True) for matrix in of_an_expert]
    fused = "gate_up_proj" if len(names) == 2 else projection
    path = f"{TEXT_PREFIX}{moe}.switch_mlp.{fused}"
    return new_module(source, path, specs[matrix.module], together, experts=len(each[0]))


def source_matrices(source: Checkpoint, matrix: Matrix) -> Iterator[SourceMatrix]:
    parts, spec = source.parts(matrix.module), source.spec(matrix.module)
    if not matrix.experts:
        yield SourceMatrix(matrix.module, spec, parts, matrix.outputs, matrix.inputs)
    for number in range(matrix.experts):
        one = {part: tensor.expert(number) for part, tensor in parts.items()}
        yield SourceMatrix(matrix.module, spec, one, matrix.outputs, matrix.inputs)


def new_module(
    source: Checkpoint, path: str, spec: Quantization, matrices: list[SourceMatrix], experts: int = 0
) -> NewModule:
    first = matrices[0]
    experts = experts or (len(matrices) if len(source.plan[f"{first.module}.weight"].shape) == 3 else 0)
    outputs = sum(matrix.outputs for matrix in matrices) // max(experts, 1)
    leading = (experts, outputs) if experts else (outputs,)
    stored = spec.parts((*leading, first.inputs), source.float_dtype(first.module))
    tensors = {part: NewTensor(f"{path}.{part}", *what) for part, what in stored.items()}
    return NewModule(path, spec, tuple(matrices), tensors)


def copied_module(source: Checkpoint, name: str, new_name: str, spec: Quantization) -> NewModule:
    """A norm, a bias, or a weight of the vision tower."""
    tensor = source.plan[name]
    inputs = tensor.shape[-1]
    outputs = math.prod(tensor.shape[:-1])
    parts = {"weight": tensor.reshape(outputs, inputs)}
    matrix = SourceMatrix(name, Quantization(), parts, outputs, inputs)
    tensors = {"weight": NewTensor(new_name, *spec.parts(tensor.shape, tensor.dtype)["weight"])}
    return NewModule(new_name.rpartition(".")[0], spec, (matrix,), tensors)


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
