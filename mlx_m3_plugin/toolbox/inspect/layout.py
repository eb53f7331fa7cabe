"""What a checkpoint contains, from the names, shapes and dtypes of its tensors alone."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from types import SimpleNamespace

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
_NUMBER = re.compile(r"\.\d+(?=\.)")
_OUTER = re.compile(r"^((?:model\.|language_model\.)*)(?:layers\.N|embed_tokens|norm)\.")
# In the names that transformers' modules have in memory.
_TRANSFORMERS_MODULE = re.compile(r"\.self_attn\.indexer\.|\.mlp\.(experts|gate|gate_up_proj)\.")
_STACK = re.compile(r"\.(switch_mlp|experts)\.")
_INDEXER = re.compile(r"\.self_attn\.(index_|indexer\.)")
_DENSE_UNDER_MOE = re.compile(r"\.block_sparse_moe\.(gate|up|down)_proj\.")


class Layout(SimpleNamespace):
    """How the tensors are named and arranged.

    Attributes:
        names: how the layers' names begin: one of the four known spellings, or several.
        modules: ``published``, or ``transformers`` for the names its modules have in memory.
        experts: ``one by one``, ``stacked``, ``fused`` (stacked, gate and up in one tensor) or ``none``.
        expert_rows: length of the stack.
        shared_expert: ``apart``, ``last row`` of the experts' stack, or ``none``.
        indexer, vision: whether there are tensors of them.
        dense_under_moe: dense layers' MLPs are named ``block_sparse_moe``.
        unused: number of tensors that nothing reads, such as those of a draft head.
        foreign_parts: suffixes of tensors that are quantized in another library's format.
    """

    def in_words(self) -> list[str]:
        words = {
            f"{_NAMES_IN_WORDS.get(self.names, 'unknown names')} ({self.names})": True,
            "transformers' in-memory module names": self.modules == "transformers",
            _EXPERTS_IN_WORDS[self.experts].format(self.expert_rows): True,
            "shared expert packed as the last row": self.shared_expert == "last row",
            "dense MLPs under block_sparse_moe": self.dense_under_moe,
            f"{self.unused} unused tensors": self.unused,
        }
        return [phrase for phrase, holds in words.items() if holds]


def recognise_layout(tensors: Mapping[str, StoredTensor], config: TextConfig | None) -> Layout:
    """Read the layout from the stored names; the number of routed experts is in ``config``."""
    # Of layers and experts, one of each kind of tensor.
    kinds: dict[str, str] = {}
    for name in tensors:
        kinds.setdefault(_NUMBER.sub(".N", name), name)
    text = [kind for kind in kinds if not is_unused(kind) and not is_vision(kind)]
    outer = {match[1] for kind in text if (match := _OUTER.match(kind))}
    one_by_one = any(".experts.N." in kind for kind in text)
    stacks = [kind for kind in _with(_STACK, text) if ".experts.N." not in kind]
    fused = any(".gate_up_proj" in kind for kind in stacks)
    rows = max((shape[0] for kind in stacks if (shape := tensors[kinds[kind]].shape)), default=0)
    foreign = {match[1] for kind in text if (match := FOREIGN_PART.search(kind))}
    apart = any(".shared_experts." in kind for kind in text)
    packed = not apart and config is not None and rows == config.num_local_experts + 1
    return Layout(
        names=" and ".join(sorted(f"{prefix}layers" for prefix in outer)) or "none",
        modules="transformers" if _with(_TRANSFORMERS_MODULE, text) else "published",
        experts="one by one" if one_by_one else "fused" if fused else "stacked" if stacks else "none",
        expert_rows=rows,
        shared_expert="apart" if apart else "last row" if packed else "none",
        indexer=bool(_with(_INDEXER, text)),
        vision=any(map(is_vision, kinds)),
        dense_under_moe=bool(_with(_DENSE_UNDER_MOE, text)),
        unused=sum(map(is_unused, tensors)),
        foreign_parts=sorted(foreign - {*FOR_ACTIVATIONS}),
    )


def _with(part: re.Pattern[str], names: Iterable[str]) -> list[str]:
    return list(filter(part.search, names))


def dtype_histogram(headers: Headers) -> list[SimpleNamespace]:
    """How many ``tensors`` and ``bytes`` are stored in each ``dtype``, by its safetensors name.

    Most bytes first.
    """
    tensors, sizes = Counter[str](), Counter[str]()
    for tensor in headers.tensors.values():
        tensors[tensor.stored_dtype] += 1
        sizes[tensor.stored_dtype] += tensor.nbytes
    return [SimpleNamespace(dtype=d, tensors=tensors[d], bytes=size) for d, size in sizes.most_common()]


class Precision(SimpleNamespace):
    """How many ``modules`` and ``parameters`` are stored in one way.

    Attributes:
        mode: of MLX, or the name of a float dtype.  bits: of a value.  group_size: None for floats.
    """

    def __str__(self) -> str:
        return f"affine {self.bits}-bit g{self.group_size}" if self.mode == "affine" else self.mode


def measure(
    plan: Mapping[str, Tensor], quantized: Mapping[str, Quantization], headers: Headers
) -> tuple[list[SimpleNamespace], list[Precision]]:
    """Count parameters and bytes.

    Returns:
        Components: ``name``, ``parameters`` of the model, before they are packed, ``bytes`` of all tensors,
            with scales and biases, ``stored_as``: the precisions, most parameters first, ``bits_per_weight``.
        Precisions, most parameters first.
    """
    stored: dict[str, Counter[str]] = defaultdict(Counter)
    precisions: dict[str, Precision] = {}
    for name, tensor in plan.items():
        module, _, part = name.rpartition(".")
        if part in PARTS[1:] and f"{module}.weight" in plan:
            continue
        parameters = math.prod(tensor.shape)
        stored_as = {"mode": name_of(tensor.dtype), "bits": 8 * tensor.dtype.size, "group_size": None}
        if part == "weight" and (spec := quantized.get(module)) and spec.bits:
            parameters = parameters * 32 // spec.bits
            stored_as = {"mode": spec.mode, "bits": spec.bits, "group_size": spec.group_size}
        precision = Precision(**stored_as, modules=0, parameters=0)
        precision = precisions.setdefault(str(precision), precision)
        precision.modules += 1
        precision.parameters += parameters
        stored[component_of(name)][str(precision)] += parameters
    unused = sum(math.prod(t.shape) for name, t in headers.tensors.items() if is_unused(name))
    components = []
    for name, size in bytes_of_components(headers, plan).items():
        parameters = stored[name].total() + (unused if name == OTHER else 0)
        component = SimpleNamespace(
            name=name,
            parameters=parameters,
            bytes=size,
            stored_as=[spec for spec, _ in stored[name].most_common()],
            bits_per_weight=8 * size / parameters if parameters else None,
        )
        components += [component] if size else []
    return components, sorted(precisions.values(), key=lambda precision: -precision.parameters)
