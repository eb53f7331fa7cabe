"""Kernel launches, bytes and floating-point operations of an MLX graph, counted from its shapes.

Nothing is computed, so a graph of any size is counted in milliseconds, as on a GPU, whatever device is here:

    with as_on_a_gpu():                 # before the modules that call mx.compile are imported
        work = count(function, given((1, 4096), mx.bfloat16))

``mx.export_function`` gives every primitive of a graph. It takes apart what one kernel does on a GPU
(``mx.fast``, quantizing, compiled functions), so stand-ins put one node in the place of each. What counts:

* A view takes nothing. A reshape that strides do not allow is a copy.
* Every other primitive is one launch that reads its inputs and writes its outputs once. A broadcast input is
  read as it is stored, but a vector times a matrix reads the matrix for each entry of the batch.
* A gather reads and writes what it takes; an update of a slice reads and writes the slice.
* Grouped products read a block or an expert once if their pairs are sorted, and for each pair if not.
* Matrix products count ``2 m n k`` operations; elementwise arithmetic counts none.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
from kernel_costs import Kernel, cost_of_kernel
from mlx.utils import tree_flatten, tree_map

# Draws of distinct experts are made four at a time, as M3 routes tokens.
EXPERTS_PER_TOKEN = 4
# Grouped products of rows from this length on are of experts, others of blocks of keys.
WIDE = 1024


@dataclass(frozen=True)
class Work:
    """One operation: what it moves through memory, and multiplies at which rate.

    ``rate`` names one of ``gpu_forecast.py``: "16 bits", "4 bits", "experts", "float32" or "kernel".
    """

    primitive: str
    bytes: int
    flops: int = 0
    rate: str = ""
    launches: int = 1


class Node(NamedTuple):
    """A primitive of an exported graph; an array is ``(name, shape, dtype)``."""

    name: str
    inputs: list[Any]
    outputs: list[Any]
    arguments: list[Any]


# --- counting ---


def count(function: Callable[..., Any], *arguments: Any) -> Counter[Work]:
    """The work of ``function(*arguments)``, whose arrays are never read."""
    nodes, _ = exported(function, *arguments)
    return Counter(work for work in works_of(nodes) if work.launches)


def exported(function: Callable[..., Any], *arguments: Any) -> tuple[list[Node], set[str]]:
    """The primitives of a graph in order, and the names of its outputs."""
    nodes, outputs = [], set()

    def see(record: dict[str, Any]) -> None:
        if record["type"] == "primitive":
            nodes.append(Node(*(record[key] for key in Node._fields)))
        elif record["type"] == "outputs":
            outputs.update(name for name, *_ in record["outputs"])

    mx.export_function(see, lambda *arrays: [a for _, a in tree_flatten(function(*arrays))], *arguments)
    return nodes, outputs


def works_of(nodes: Sequence[Node]) -> Iterator[Work]:
    layouts = Layouts()
    for node in nodes:
        yield from work_of(node, layouts)


def work_of(node: Node, layouts: "Layouts") -> Iterator[Work]:
    if (tag := tag_of(node)) is not None:
        layouts.new(node)
        done = {CONTIGUOUS} if layouts.of(node.inputs[1]).in_order else {}
        yield from (work for work in STANDING_IN[tag] if work.primitive not in done)
    elif node.name in VIEWS:
        if not layouts.view(node):
            yield Work("Copy", layouts.read(node.inputs) + sizes(node.outputs))
    elif sizes(node.outputs):
        yield COSTS.get(node.name, elementwise)(node, layouts)
        layouts.new(node)


class Layout(NamedTuple):
    """Strides in elements; 0 where an axis repeats one."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def stored(self) -> int:
        """Elements in memory."""
        return math.prod(n for n, stride in zip(*self, strict=True) if stride or not n)

    @property
    def in_order(self) -> bool:
        axes = zip(*self, contiguous(self.shape).strides, strict=True)
        return all(n == 1 or stride == wanted for n, stride, wanted in axes)


class Layouts:
    """The strides of every array so far, which say what a view needs and what a broadcast stores."""

    def __init__(self) -> None:
        self.by_name: dict[str, Layout] = {}

    def of(self, array: Any) -> Layout:
        name, shape, _ = array
        return self.by_name.setdefault(name, contiguous(shape))

    def new(self, node: Node) -> None:
        for array in node.outputs:
            self.of(array)

    def view(self, node: Node) -> bool:
        """Add the outputs of a view; False if they must be copies."""
        make = VIEWS[node.name]
        inputs = node.inputs * len(node.outputs) if node.name == "Split" else node.inputs
        for array, (name, shape, _) in zip(inputs, node.outputs, strict=False):
            strides = make(self.of(array), tuple(shape), node.arguments)
            if strides is None:
                return False
            self.by_name[name] = Layout(tuple(shape), tuple(strides))
        return True

    def read(self, arrays: Sequence[Any]) -> int:
        """Bytes of ``arrays`` as they are stored, each once."""
        return sum(self.stored(array) for array in {array[0]: array for array in arrays}.values())

    def stored(self, array: Any) -> int:
        return array[2].size * self.of(array).stored


def contiguous(shape: Sequence[int]) -> Layout:
    return Layout(tuple(shape), tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))))


def reshaped(layout: Layout, shape: tuple[int, ...], _: Any) -> list[int] | None:
    """Strides of another shape of the same elements; None if there are none."""
    merged = [(1, 0)]
    for n, stride in zip(*layout, strict=True):
        size, step = merged[-1]
        if n != 1:
            merged[-1:] = (
                [(size * n, stride)] if step == n * stride and size > 1 else [(size, step), (n, stride)]
            )
    strides, size, step = [], 1, 0
    for n in reversed(shape):
        if n != 1 and size == 1:
            size, step = merged.pop()
        if n and size % n:
            return None
        strides.append(0 if n == 1 else step)
        size, step = size // max(n, 1), step * n
    return strides[::-1]


def broadcast(layout: Layout, shape: tuple[int, ...], _: Any) -> list[int]:
    missing = len(shape) - len(layout.shape)
    kept = [stride if n != 1 else 0 for n, stride in zip(*layout, strict=True)]
    return [0] * missing + kept


VIEWS: dict[str, Callable[[Layout, tuple[int, ...], list[Any]], Any]] = {
    **dict.fromkeys(["Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze"], reshaped),
    **dict.fromkeys(["Broadcast", "BroadcastAxes"], broadcast),
    **dict.fromkeys(
        ["Depends", "StopGradient", "CustomTransforms", "Copy", "Split"], lambda layout, *_: layout.strides
    ),
    "Transpose": lambda layout, _, arguments: [layout.strides[axis] for axis in arguments[0]],
    "Slice": lambda layout, _, arguments: [a * b for a, b in zip(layout.strides, arguments[2], strict=True)],
    "AsStrided": lambda _, __, arguments: arguments[1],
}


def sizes(arrays: Sequence[Any]) -> int:
    """Bytes of arrays with all their elements."""
    return sum(dtype.size * math.prod(shape) for _, shape, dtype in arrays)


# --- the cost of each primitive ---


def elementwise(node: Node, layouts: Layouts) -> Work:
    return Work(node.name, layouts.read(node.inputs) + sizes(node.outputs))


def gather(node: Node, layouts: Layouts) -> Work:
    return Work(node.name, layouts.read(node.inputs[1:]) + 2 * sizes(node.outputs))


def slice_update(node: Node, layouts: Layouts) -> Work:
    return Work(node.name, layouts.stored(node.inputs[1]) + sizes(node.inputs[1:2]))


def scatter(node: Node, layouts: Layouts) -> Work:
    """Source, indices, values: the source is written in place, as MLX does with what nothing else reads."""
    values = node.inputs[-1:]
    return Work(node.name, layouts.read(node.inputs[1:]) + sizes(values))


def matmul(node: Node, layouts: Layouts) -> Work:
    (_, left, dtype), (_, right, _) = node.inputs[:2]
    m, k, n = left[-2], left[-1], right[-1]
    # MLX makes one product of a batch that shares a matrix, but not where each entry is a vector.
    read = sizes(node.inputs) if min(m, n) == 1 else layouts.read(node.inputs)
    flops = 2 * k * math.prod(node.outputs[0][1])
    return Work(node.name, read + sizes(node.outputs), flops, "float32" if dtype == mx.float32 else "16 bits")


def quantized_matmul(node: Node, layouts: Layouts) -> Work:
    flops = 2 * node.inputs[0][1][-1] * math.prod(node.outputs[0][1])
    rate = "float32" if node.inputs[0][2] == mx.float32 else "4 bits"
    return Work(node.name, layouts.read(node.inputs) + sizes(node.outputs), flops, rate)


COSTS: dict[str, Callable[[Node, Layouts], Work]] = {
    **dict.fromkeys(["Gather", "GatherAxis", "DynamicSlice"], gather),
    **dict.fromkeys(["SliceUpdate", "DynamicSliceUpdate"], slice_update),
    **dict.fromkeys(["Scatter", "ScatterAxis"], scatter),
    **dict.fromkeys(["Matmul", "AddMM"], matmul),
    "QuantizedMatmul": quantized_matmul,
}

# --- stand-ins: one node in the place of what one kernel does on a GPU ---

# What each stand-in costs; its number is the length of an empty array that its node depends on.
STANDING_IN: list[tuple[Work, ...]] = []
_TAG = mx.uint64
ATTENTION, CONTIGUOUS = "FusedAttention", "Contiguous"


def stand_in(
    works: Sequence[Work], inputs: Sequence[mx.array], *outputs: tuple[Any, mx.Dtype]
) -> list[mx.array]:
    """Arrays ``(shape, dtype)`` that need ``inputs``, cost ``works`` and take no memory."""
    STANDING_IN.append(tuple(works))
    tag = mx.broadcast_to(mx.array(0, _TAG), (len(STANDING_IN) - 1, 0))
    made = [mx.broadcast_to(mx.array(0, dtype), shape) for shape, dtype in outputs]
    return mx.depends(made, [*inputs, tag])


def tag_of(node: Node) -> int | None:
    if node.name != "Depends":
        return None
    _, shape, dtype = node.inputs[-1]
    return shape[0] if dtype == _TAG and len(shape) == 2 and shape[1] == 0 else None


def given(shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """An array that is there already: a weight, a cache."""
    return stand_in((), (), (tuple(shape), dtype))[0]


def given_like(tree: Any) -> Any:
    return tree_map(lambda x: given(x.shape, x.dtype) if isinstance(x, mx.array) else x, tree)


def one_launch(
    name: str, inputs: Sequence[mx.array], outputs: Sequence[Any], flops: int = 0, rate: str = ""
) -> list[mx.array]:
    moved = sum(x.nbytes for x in inputs) + sum(dtype.size * math.prod(shape) for shape, dtype in outputs)
    return stand_in([Work(name, moved, flops, rate)], inputs, *outputs)


def rms_norm(x: mx.array, weight: mx.array | None, eps: float, **_: Any) -> mx.array:
    # MLX promotes, and casts what differs.
    kind = x.dtype if weight is None or weight.dtype == x.dtype else mx.float32
    inputs = [x.astype(kind)] + ([] if weight is None else [weight.astype(kind)])
    return one_launch("RMSNorm", inputs, [(x.shape, kind)])[0]


def rope(x: mx.array, dims: int, *, offset: Any = 0, freqs: mx.array | None = None, **_: Any) -> mx.array:
    inputs = [x, *(a for a in (offset, freqs) if isinstance(a, mx.array))]
    return one_launch("RoPE", inputs, [(x.shape, x.dtype)])[0]


def fused_attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None, **_: Any
) -> mx.array:
    length, n_keys = q.shape[2], k.shape[2]
    pairs = length * n_keys - (length * (length - 1) // 2 if isinstance(mask, str) else 0)
    flops = 2 * q.shape[0] * q.shape[1] * pairs * (k.shape[3] + v.shape[3])
    arrays = [q, k, v, *(a for a in (mask, sinks) if isinstance(a, mx.array))]
    # Few queries go to MLX's vector kernel, which has no matrix units.
    rate = "16 bits" if length > 8 and q.dtype != mx.float32 else "float32"
    return one_launch(ATTENTION, arrays, [((*q.shape[:-1], v.shape[3]), q.dtype)], flops, rate)[0]


def gather_mm(
    x: mx.array,
    blocks: mx.array,
    lhs_indices: mx.array | None = None,
    rhs_indices: mx.array | None = None,
    *,
    sorted_indices: bool = False,
) -> mx.array:
    columns = blocks.shape[-1]
    return grouped_product("GatherMM", x, [blocks], columns, lhs_indices, rhs_indices, sorted_indices)


def gather_qmm(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None = None,
    lhs_indices: mx.array | None = None,
    rhs_indices: mx.array | None = None,
    transpose: bool = True,
    group_size: int = 64,
    bits: int = 4,
    *,
    sorted_indices: bool = False,
    **_: Any,
) -> mx.array:
    columns = w.shape[-2] if transpose else w.shape[-1] * 32 // bits
    weights = [a for a in (w, scales, biases) if a is not None]
    return grouped_product("GatherQMM", x, weights, columns, lhs_indices, rhs_indices, sorted_indices)


def grouped_product(
    name: str,
    x: mx.array,
    weights: list[mx.array],
    columns: int,
    left: mx.array | None,
    right: mx.array | None,
    are_sorted: bool,
) -> mx.array:
    """``x[left] @ weights[right]``, with what the caller says of its pairs.

    The graph does not have it: where both indices are given, MLX drops the flag. Its kernel then reads a
    block for each pair, but sorted pairs find it in the cache.
    """
    left, right = (
        (
            mx.arange(math.prod(a.shape[:-2]), dtype=mx.uint32).reshape(a.shape[:-2]) if ids is None else ids
        ).astype(mx.uint32)
        for a, ids in ((x, left), (weights[0], right))
    )
    indices = mx.broadcast_arrays(left, right)[0].shape
    pairs, groups = math.prod(indices), math.prod(weights[0].shape[:-2])
    rows, width = x.shape[-2:]
    used = distinct(groups, pairs) if are_sorted else pairs
    read = pairs * rows * width * x.dtype.size + used * sum(a.nbytes for a in weights) / groups
    written = pairs * rows * columns * x.dtype.size
    rate = "float32" if x.dtype == mx.float32 else "experts" if width >= WIDE else "16 bits"
    moved = round(read) + left.nbytes + right.nbytes + written
    work = Work(name, moved, 2 * pairs * rows * width * columns, rate)
    return stand_in([work], [x, *weights, left, right], ((*indices, rows, columns), x.dtype))[0]


def distinct(groups: int, pairs: int) -> float:
    """How many of ``groups`` are expected among ``pairs``, drawn evenly, four different ones at a time."""
    together = min(EXPERTS_PER_TOKEN, groups, pairs)
    return groups * (1 - (1 - together / groups) ** (pairs / together))


def quantize(w: mx.array, group_size: int = 64, bits: int = 4, mode: str = "affine", **_: Any) -> Any:
    *leading, last = w.shape
    scales = ((*leading, last // group_size), w.dtype)
    return tuple(one_launch("Quantize", [w], [((*leading, last * bits // 32), mx.uint32), scales, scales]))


def dequantize(
    w: mx.array, scales: mx.array, biases: Any, group_size: int = 64, bits: int = 4, **_: Any
) -> mx.array:
    shape = (*w.shape[:-1], w.shape[-1] * 32 // bits)
    return one_launch("Dequantize", [w, scales, biases], [(shape, scales.dtype)])[0]


def contiguous_copy(x: mx.array, *_: Any, **__: Any) -> mx.array:
    """A copy unless strides are in order; ``mx.export_function`` has no state for ``mx.contiguous``."""
    return one_launch(CONTIGUOUS, [x], [(x.shape, x.dtype)])[0]


def compiled(function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
    """``mx.compile``: chains of elementwise operations in it are one launch each."""

    def call(*arguments: Any, **options: Any) -> Any:
        leaves = [x for _, x in tree_flatten([arguments, options]) if isinstance(x, mx.array)]

        def inner(*arrays: mx.array) -> Any:
            rest = iter(arrays)
            fresh = tree_map(
                lambda x: next(rest) if isinstance(x, mx.array) else x, [list(arguments), options]
            )
            return function(*fresh[0], **fresh[1])

        works = fused(*exported(inner, *(given(x.shape, x.dtype) for x in leaves)))
        outputs = function(*arguments, **options)
        shapes = [(x.shape, x.dtype) for _, x in tree_flatten(outputs)]
        nodes = iter(stand_in(works, leaves, *shapes))
        return tree_map(lambda _: next(nodes), outputs)

    return call


# What MLX's compiler puts together.
ELEMENTWISE = set(
    "Abs Add ArcCos ArcSin ArcTan ArcTan2 AsType BitwiseBinary BitwiseInvert Broadcast Ceil Cos Divide "
    "Equal Erf Exp Expm1 Floor FloorDivide Greater GreaterEqual Less LessEqual Log Log1p LogicalAnd "
    "LogicalNot LogicalOr Maximum Minimum Multiply Negative NotEqual Power Remainder Round Select "
    "Sigmoid Sign Sin Sqrt Square Subtract Tanh".split()
)


def fused(nodes: Sequence[Node], outputs: set[str]) -> Iterator[Work]:
    """Connected elementwise operations as one launch: reads what comes in, writes what is used outside."""
    group_of: dict[str, int] = {}
    for number, node in enumerate(nodes):
        if node.name in ELEMENTWISE:
            joined = {group_of[name] for name, *_ in node.inputs if name in group_of}
            group_of |= {name: number for name, group in group_of.items() if group in joined}
            group_of |= {name: number for name, *_ in node.outputs}
    layouts = Layouts()
    reads: dict[int, dict[str, Any]] = {}
    written: dict[int, int] = Counter()
    used_outside = set(outputs)
    for node in nodes:
        group = group_of.get(node.outputs[0][0])
        used_outside |= {name for name, *_ in node.inputs if group_of.get(name) != group}
    for node in nodes:
        group = group_of.get(node.outputs[0][0])
        works = list(work_of(node, layouts))
        if group is None:
            yield from works
            continue
        outside = [array for array in node.inputs if group_of.get(array[0]) != group]
        reads.setdefault(group, {}).update({array[0]: array for array in outside})
        written[group] += sizes([array for array in node.outputs if array[0] in used_outside])
    for group, arrays in reads.items():
        if written[group] and any(
            n.name != "Broadcast" and group_of.get(n.outputs[0][0]) == group for n in nodes
        ):
            yield Work("Compiled", layouts.read(list(arrays.values())) + written[group])


def metal_kernel(name: str, *_: Any, **__: Any) -> Callable[..., list[mx.array]]:
    """One launch that costs what ``kernel_costs.py`` says."""
    cost = cost_of_kernel(name)

    def call(*, inputs: Any, output_shapes: Any, output_dtypes: Any, template: Any = (), **_: Any) -> Any:
        arrays = [x for x in inputs if isinstance(x, mx.array)]
        outputs = list(zip(output_shapes, output_dtypes, strict=True))
        moved, flops = cost(Kernel(arrays, outputs, dict(template or ())))
        return stand_in([Work(name, moved, flops, "kernel")], arrays, *outputs)

    return call


class CustomFunction:
    """``mx.custom_function`` without its gradients."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def _keep(self, transform: Callable[..., Any]) -> Callable[..., Any]:
        return transform

    vjp = jvp = vmap = _keep


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Stand-ins in the place of MLX's functions, and a Mac's answers about its device."""
    replacements = [
        (mx, "compile", compiled),
        (mx, "gather_mm", gather_mm),
        (mx, "gather_qmm", gather_qmm),
        (mx, "quantize", quantize),
        (mx, "dequantize", dequantize),
        (mx, "contiguous", contiguous_copy),
        (mx, "custom_function", CustomFunction),
        (mx, "default_device", lambda: mx.Device(mx.gpu, 0)),
        (mx.metal, "is_available", lambda: True),
        (mx.fast, "rms_norm", rms_norm),
        (mx.fast, "rope", rope),
        (mx.fast, "scaled_dot_product_attention", fused_attention),
        (mx.fast, "metal_kernel", metal_kernel),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    for owner, name, replacement in replacements:
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
