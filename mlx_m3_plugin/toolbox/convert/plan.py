"""What a conversion writes: modules, how they are quantized, and their files.

Made from headers alone: all sizes are known before a weight is read.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...weights.check import group_names, shorten
from ...weights.headers import DRAFT_FOLDER
from ...weights.names import TEXT_PREFIX, published_draft_name
from ...weights.quantization import quantization_entry
from ...weights.tensor import Tensor
from ..checkpoint import DRAFT_TENSORS, Checkpoint, draft_in_words
from ..draft_head import DraftHead, draft_shapes, open_draft_head
from ..parameters import StoredModel, text_shapes
from ..precision import Quantization
from ..shards import NewTensor
from .recipe import VISION, Matrix, Recipe, RecipeError, matrices_of

# The largest file, as in conversions by mlx-lm and mlx-vlm.
SHARD_BYTES = 5 << 30
# The first projection in a packed module -> the module's name, and all projections in it.
_PACKED = {
    "gate_proj": ("gate_up_proj", ("gate_proj", "up_proj")),
    "down_proj": ("down_proj", ("down_proj",)),
}
# Parts of a draft head's names -> a recipe's name for what is like it in the model.
_LIKE = {"self_attn": "attention", "mlp": "dense_mlp", "markov_w1": "embeddings", "markov_w2": "lm_head"}
_AS_STORED = Quantization()


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
    matrices: list[SourceMatrix]
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

    head: DraftHead | None = None
    modules: tuple[NewModule, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(module.nbytes for module in self.modules)


@dataclass(frozen=True)
class ConversionPlan:
    """A whole conversion.

    Attributes:
        packed: gate and up are fused, and the shared expert is one more of the experts.
        shards: modules by the name of their file.
        specs: module path without a prefix -> how it will be stored.
        draft: what is written of the source's draft head; None for nothing.
    """

    source: Checkpoint
    recipe: Recipe
    packed: bool
    shards: Mapping[str, list[NewModule]]
    specs: Mapping[str, Quantization]
    draft: DraftPlan | None = None

    @property
    def modules(self) -> Iterator[NewModule]:
        return (module for shard in self.shards.values() for module in shard)

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
    chosen = {
        path: _or_as_stored((specs or {}).get(path) or recipe.spec(matrix), source, path)
        for path, matrix in matrices.items()
    }
    _check_kept(source, recipe, chosen)
    packed = _can_pack(source, chosen)
    modules = list(_text_modules(source, matrices, chosen, packed))
    vision = next((rule.spec for rule in reversed(recipe.rules) if VISION in rule.parts), _AS_STORED)
    modules += [_copied(source, name, name, vision) for name in source.vision]
    return ConversionPlan(source, recipe, packed, _in_files(modules), chosen, draft)


def quantization_of(modules: Iterable[NewModule]) -> dict[str, Any] | None:
    """The ``quantization`` of the config to write."""
    return quantization_entry({m.path: m.spec.in_config() for m in modules if m.spec.bits is not None})


def _or_as_stored(spec: Quantization, source: StoredModel, path: str) -> Quantization:
    """What is quantized already and to be kept keeps its quantization."""
    return source.spec(path) if spec == _AS_STORED else spec


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
    layers = filter(config.is_moe, range(config.num_hidden_layers))
    blocks = [f"model.layers.{layer}.block_sparse_moe" for layer in layers]
    for moe in blocks:
        for _, projections in _PACKED.values():
            paths = [f"{moe}.{owner}.{p}" for p in projections for owner in ("switch_mlp", "shared_experts")]
            stored = {(specs[path], source.float_dtype(path)) for path in paths}
            # Unquantized, a fused matrix would have more elements than MLX can count.  Fused gate and up
            # would have one tensor scale.
            if len(stored) > 1 or specs[paths[0]].bits is None or specs[paths[0]].tensor_scales:
                return False
    return bool(blocks)


# --- modules ---


def _text_modules(
    source: Checkpoint, matrices: Mapping[str, Matrix], specs: Mapping[str, Quantization], packed: bool
) -> Iterator[NewModule]:
    for name in text_shapes(source.text_config, indexers=source.indexers):
        path, _, part = name.rpartition(".")
        matrix = matrices.get(path)
        if matrix is None or part != "weight":
            yield _copied(source, name, TEXT_PREFIX + name)
        elif not packed or matrix.part not in ("experts", "shared_expert"):
            yield _new_module(source, TEXT_PREFIX + path, specs[path], [[matrix]])
        elif matrix.part == "experts" and matrix.projection in _PACKED:
            moe = path.removesuffix(f".switch_mlp.{matrix.projection}")
            new_name, projections = _PACKED[matrix.projection]
            owners = ("switch_mlp", "shared_experts")
            rows = [[matrices[f"{moe}.{owner}.{p}"] for owner in owners] for p in projections]
            yield _new_module(source, f"{TEXT_PREFIX}{moe}.switch_mlp.{new_name}", specs[path], rows)


def _new_module(
    source: StoredModel, path: str, spec: Quantization, rows: Sequence[Sequence[Matrix]]
) -> NewModule:
    """``rows`` go one below the other.  A row is of the routed experts and, if packed, the shared one."""
    each = [[one for matrix in row for one in _source_matrices(source, matrix)] for row in rows]
    matrices = [one for of_an_expert in zip(*each, strict=True) for one in of_an_expert]
    outputs = sum(row[0].outputs for row in rows)
    shape = (len(each[0]), outputs) if rows[0][0].experts else (outputs,)
    stored = spec.parts((*shape, rows[0][0].inputs), source.float_dtype(rows[0][0].module))
    tensors = {part: NewTensor(f"{path}.{part}", *what) for part, what in stored.items()}
    return NewModule(path, spec, matrices, tensors)


def _source_matrices(source: StoredModel, matrix: Matrix) -> Iterator[SourceMatrix]:
    parts, spec = source.parts(matrix.module), source.spec(matrix.module)
    if not matrix.experts:
        yield SourceMatrix(matrix.module, spec, parts, matrix.outputs, matrix.inputs)
    for number in range(matrix.experts):
        one = {part: tensor.expert(number) for part, tensor in parts.items()}
        yield SourceMatrix(matrix.module, spec, one, matrix.outputs, matrix.inputs)


def _copied(source: StoredModel, name: str, new_name: str, spec: Quantization = _AS_STORED) -> NewModule:
    """A norm, a bias, or a weight of the vision tower."""
    tensor = source.plan[name]
    outputs, inputs = math.prod(tensor.shape[:-1]), tensor.shape[-1]
    matrix = SourceMatrix(name, _AS_STORED, {"weight": tensor.reshape(outputs, inputs)}, outputs, inputs)
    tensors = {"weight": NewTensor(new_name, *spec.parts(tensor.shape, tensor.dtype)["weight"])}
    return NewModule(new_name.rpartition(".")[0], spec, [matrix], tensors)


# --- the draft head ---


def plan_draft_head(source: Checkpoint, recipe: Recipe, *, keep: bool = False) -> DraftPlan | None:
    """What becomes of the draft head.  None where there is none that a recipe is for: it is left out.

    Args:
        keep: bit for bit.  So is the head where the recipe has a [plan]: sensitivity is not measured of it.

    Raises:
        ValueError: there is no draft head to keep, or the one to be quantized is not whole.
    """
    if keep:
        _check_can_keep_draft(source)
    elif DRAFT_FOLDER not in source.draft_folders:
        return None
    if keep or recipe.bit_targets:
        return DraftPlan()
    head = open_draft_head(source.directory / DRAFT_FOLDER)
    shapes = draft_shapes(head.config)
    return DraftPlan(head, tuple(_draft_module(head, recipe, *item) for item in shapes.items()))


def _check_can_keep_draft(source: Checkpoint) -> None:
    if draft_in_words(source.draft_folders, source.headers.tensors) is None:
        raise ValueError(f"--keep-draft: {source.name} has no draft head")
    if source.draft_tensors and DRAFT_TENSORS in source.draft_folders:
        raise ValueError(
            f"--keep-draft: {source.name} has draft tensors in its shards, which would be written into "
            f"{DRAFT_TENSORS}/, and that folder is there already: rename it"
        )


def _draft_module(head: DraftHead, recipe: Recipe, name: str, shape: tuple[int, ...]) -> NewModule:
    published = published_draft_name(name)
    if len(shape) == 1 or shape[0] == 1:
        # A norm, or the confidence head.
        return _copied(head, name, published)
    path = name.removesuffix(".weight")
    part = next((part for key, part in _LIKE.items() if key in name), "draft")
    matrix = Matrix(path, part, None, 0, *shape)
    spec = _or_as_stored(recipe.spec(matrix), head, path)
    return _new_module(head, published.removesuffix(".weight"), spec, [[matrix]])


# --- files ---


def _in_files(modules: list[NewModule]) -> dict[str, list[NewModule]]:
    """In order, each file as full as ``SHARD_BYTES`` allows; a module is never split."""
    shards: list[list[NewModule]] = [[]]
    size = 0
    for module in modules:
        if shards[-1] and size + module.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(module)
        size += module.nbytes
    names = (f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1))
    return dict(zip(names, shards, strict=True))
