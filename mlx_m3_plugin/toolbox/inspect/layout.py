"""What a checkpoint contains, from the names, shapes and dtypes of its tensors alone."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ...model.config import TextConfig
from ...weights.dtypes import name_of
from ...weights.formats import FOR_ACTIVATIONS, FOREIGN_PART
from ...weights.headers import Headers, StoredTensor
from ...weights.names import is_unused, is_vision
from ...weights.quantization import PARTS
from ...weights.tensor import Tensor
from ..parameters import OTHER, bytes_of_components, component_of
from ..precision import Quantization

# How the layers' names begin.
_NAMES_IN_WORDS = {
    "language_model.model.layers": "published names",
    "model.language_model.model.layers": "published names under an extra model.",
    "model.language_model.layers": "transformers' names",
    "model.layers": "text-only names",
}
_EXPERTS_IN_WORDS = {
    "one by one": "one tensor for each expert's projection",
    "stacked": "experts stacked ({0} rows), gate and up separate",
    "fused": "experts stacked ({0} rows), gate and up fused",
    "none": "no experts",
}
# In the names that transformers' modules have in memory.
_TRANSFORMERS_MODULES = (".self_attn.indexer.", ".mlp.experts.", ".mlp.gate.", ".mlp.gate_up_proj.")
_NUMBER = re.compile(r"\.\d+(?=\.)")
_OUTER = re.compile(r"^((?:model\.|language_model\.)*)(?:layers\.N|embed_tokens|norm)\.")


@dataclass(frozen=True)
class Layout:
    """How the tensors are named and arranged.

    Attributes:
        names: how the layers' names begin: one of the four known spellings, or several.
        modules: ``published``, or ``transformers`` for the names its modules have in memory.
        experts: ``one by one``, ``stacked``, ``fused`` (stacked, gate and up in one tensor) or ``none``.
        expert_rows: length of the stack.
        shared_expert: ``apart``, ``last row`` of the experts' stack, or ``none``.
        dense_under_moe: dense layers' MLPs are named ``block_sparse_moe``.
        unused: number of tensors that nothing reads, such as those of a draft head.
        foreign_parts: suffixes of tensors that are quantized in another library's format.
    """

    names: str
    modules: str
    experts: str
    expert_rows: int
    shared_expert: str
    indexer: bool
    vision: bool
    dense_under_moe: bool = False
    unused: int = 0
    foreign_parts: list[str] = field(default_factory=list)

    def in_words(self) -> list[str]:
        words = [f"{_NAMES_IN_WORDS.get(self.names, 'unknown names')} ({self.names})"]
        if self.modules == "transformers":
            words.append("transformers' in-memory module names")
        words.append(_EXPERTS_IN_WORDS[self.experts].format(self.expert_rows))
        if self.shared_expert == "last row":
            words.append("shared expert packed as the last row")
        if self.dense_under_moe:
            words.append("dense MLPs under block_sparse_moe")
        if self.unused:
            words.append(f"{self.unused} unused tensors")
        return words


@dataclass
class StoredDtype:
    """How much is stored in one dtype, by its safetensors name."""

    dtype: str
    tensors: int = 0
    bytes: int = 0


@dataclass
class Component:
    """A part of the model.

    Attributes:
        parameters: of the model, before they are packed.
        bytes: of all tensors, with scales and biases.
        stored_as: the precisions, most parameters first.
    """

    name: str
    parameters: int = 0
    bytes: int = 0
    stored_as: list[str] = field(default_factory=list)
    bits_per_weight: float | None = None


def recognise_layout(tensors: Mapping[str, StoredTensor], config: TextConfig | None) -> Layout:
    """Read the layout from the stored names; the number of routed experts is in ``config``."""
    kinds: dict[str, str] = {}
    for name in tensors:
        kinds.setdefault(_NUMBER.sub(".N", name), name)
    text = [kind for kind in kinds if not is_unused(kind) and not is_vision(kind)]
    outer = {match[1] for kind in text if (match := _OUTER.match(kind))}
    stacks = [
        kind for kind in text if _has(kind, (".switch_mlp.", ".experts.")) and ".experts.N." not in kind
    ]
    rows = max((tensors[kinds[kind]].shape[0] for kind in stacks if tensors[kinds[kind]].shape), default=0)
    foreign = {match[1] for kind in text if (match := FOREIGN_PART.search(kind))}
    apart = any(".shared_experts." in kind for kind in text)
    packed = not apart and config is not None and rows == config.num_local_experts + 1
    return Layout(
        names=" and ".join(sorted(f"{prefix}layers" for prefix in outer)) or "none",
        modules="transformers" if any(_has(kind, _TRANSFORMERS_MODULES) for kind in text) else "published",
        experts=_arrangement(text, stacks),
        expert_rows=rows,
        shared_expert="apart" if apart else "last row" if packed else "none",
        indexer=any(_has(kind, (".self_attn.index_", ".self_attn.indexer.")) for kind in text),
        vision=any(map(is_vision, kinds)),
        dense_under_moe=any(re.search(r"\.block_sparse_moe\.(gate|up|down)_proj\.", kind) for kind in text),
        unused=sum(map(is_unused, tensors)),
        foreign_parts=sorted(foreign - {*FOR_ACTIVATIONS}),
    )


def _arrangement(kinds: Iterable[str], stacks: Iterable[str]) -> str:
    if any(".experts.N." in kind for kind in kinds):
        return "one by one"
    if any(".gate_up_proj" in kind for kind in stacks):
        return "fused"
    return "stacked" if stacks else "none"


def _has(name: str, parts: Iterable[str]) -> bool:
    return any(part in name for part in parts)


def dtype_histogram(headers: Headers) -> list[StoredDtype]:
    """Most bytes first."""
    found: dict[str, StoredDtype] = {}
    for tensor in headers.tensors.values():
        entry = found.setdefault(tensor.stored_dtype, StoredDtype(tensor.stored_dtype))
        entry.tensors += 1
        entry.bytes += tensor.nbytes
    return sorted(found.values(), key=lambda entry: -entry.bytes)


@dataclass
class Precision:
    """How many modules and parameters are stored in one way; group_size is None for floats."""

    mode: str
    bits: int
    group_size: int | None
    modules: int = 0
    parameters: int = 0

    def __str__(self) -> str:
        return f"affine {self.bits}-bit g{self.group_size}" if self.mode == "affine" else self.mode


def measure(
    plan: Mapping[str, Tensor], quantized: Mapping[str, Quantization], headers: Headers
) -> tuple[list[Component], list[Precision]]:
    """Count parameters and bytes, by component and by precision."""
    sizes = bytes_of_components(headers, plan)
    components = {name: Component(name, bytes=size) for name, size in sizes.items()}
    by_component: dict[str, Counter[str]] = defaultdict(Counter)
    precisions: dict[str, Precision] = {}
    for name, tensor in plan.items():
        component = components[component_of(name)]
        module, _, part = name.rpartition(".")
        if part in PARTS[1:] and f"{module}.weight" in plan:
            continue
        parameters = math.prod(tensor.shape)
        precision = Precision(name_of(tensor.dtype), 8 * tensor.dtype.size, None)
        if part == "weight" and (spec := quantized.get(module)) and spec.bits:
            parameters = parameters * 32 // spec.bits
            precision = Precision(spec.mode, spec.bits, spec.group_size)
        entry = precisions.setdefault(str(precision), precision)
        entry.modules += 1
        entry.parameters += parameters
        component.parameters += parameters
        by_component[component.name][str(precision)] += parameters
    for name, stored_as in by_component.items():
        components[name].stored_as = [spec for spec, _ in stored_as.most_common()]
    components[OTHER].parameters += sum(
        math.prod(t.shape) for n, t in headers.tensors.items() if is_unused(n)
    )
    for component in components.values():
        if component.parameters:
            component.bits_per_weight = 8 * component.bytes / component.parameters
    return (
        [component for component in components.values() if component.bytes],
        sorted(precisions.values(), key=lambda entry: -entry.parameters),
    )
