"""One sparse attention layer of MiniMax-M3 three times: ours, mlx-lm's and mlx-vlm's.

All three get the same weights and the same cache contents, and each is called the way its own
decoder calls it: with its own cache class and the mask that its own model makes.  What a call
must touch and compute, whoever does it, follows from the shapes and is at the end.
"""

import importlib
import importlib.util
import io
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_m3_plugin.hosts.mlx_lm.minimax_m3 import Model, ModelArgs

# Head sizes of the released checkpoints; hidden_size is 6144 there, which would only make the
# projections, the same in all three, larger.
HIDDEN, HEADS, GROUPS, HEAD_DIM = 512, 64, 4, 128
BLOCK, TOPK = 128, 16
BUDGET = BLOCK * TOPK
CONFIG = {
    "model_type": "minimax_m3",
    "vocab_size": 512,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD_DIM,
    "rotary_dim": 64,
    "rope_theta": 5000000.0,
    "rms_norm_eps": 1e-6,
    "use_qk_norm": True,
    "use_gemma_norm": True,
    "moe_layer_freq": [0],
    # Of what is never evaluated here.
    "dense_intermediate_size": 512,
    "intermediate_size": 64,
    "shared_intermediate_size": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 2.0,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "sparse_attention_config": {
        "use_sparse_attention": True,
        "sparse_attention_freq": [1],
        "sparse_disable_index_value": [1],
        "sparse_num_index_heads": GROUPS,
        "sparse_index_dim": HEAD_DIM,
        "sparse_block_size": BLOCK,
        "sparse_topk_blocks": TOPK,
        "sparse_local_block": 1,
        "sparse_init_block": 0,
        "sparse_score_type": "max",
    },
}
FLOAT_BYTES = 4
MOST_REPETITIONS = 500
OURS, MLX_LM, MLX_VLM = "mlx-m3-plugin", "mlx-lm", "mlx-vlm"


@dataclass(frozen=True)
class Contents:
    """What a cache holds: ``[1, G, S, D]`` keys and values, ``[1, 1, S, D]`` index keys."""

    keys: mx.array
    values: mx.array
    index_keys: mx.array


@dataclass(frozen=True)
class Layer:
    """An attention module and how its own decoder treats it.

    Attributes:
        new_cache: an empty cache of the class that the module's own model makes.
        append: ``(cache, contents)``; puts keys, values and index keys behind what is there.
        mask: ``(x, cache)`` -> what its own model would pass to the module.
        buffers: ``(cache)`` -> the arrays that a step has to have written at its end.
    """

    name: str
    attention: nn.Module
    new_cache: Callable[[], Any]
    append: Callable[[Any, Contents], Any]
    mask: Callable[[mx.array, Any], Any]
    buffers: Callable[[Any], Any]

    def __call__(self, x: mx.array, cache: Any) -> mx.array:
        return self.attention(x, self.mask(x, cache), cache)

    def filled_cache(self, contents: Contents, new_tokens: int) -> Any:
        """A cache that holds all but the last ``new_tokens`` of ``contents``.

        It has held them all before: the room for the new tokens is there already, so that no
        measured step pays for the growth of the buffers, which comes once in many steps.
        """
        cache = self.new_cache()
        held = contents.keys.shape[2] - new_tokens
        # In two steps: MLX would take arrays that fill a new buffer exactly in place of it, and
        # a buffer that several caches share is copied at the next write.
        for part in (slice(held), slice(held, None)):
            arrays = (contents.keys, contents.values, contents.index_keys)
            self.append(cache, Contents(*(array[:, :, part] for array in arrays)))
            mx.eval(self.buffers(cache))
        cache.trim(new_tokens)
        return cache

    def run(self, x: mx.array, cache: Any) -> "Run":
        """One call with the evaluation of its output and cache, and the cache as it was before."""
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        begin = time.perf_counter()
        output = self(x, cache)
        mx.eval(output, self.buffers(cache))
        seconds = time.perf_counter() - begin
        cache.trim(x.shape[1])
        return Run(seconds, mx.get_peak_memory() - held, output)

    def count_operations(self, x: mx.array, cache: Any) -> int:
        """Nodes of the graph behind one call; what a layer evaluates inside the call is not in it."""
        output = self(x, cache)
        written = [leaf for _, leaf in tree_flatten(self.buffers(cache)) if isinstance(leaf, mx.array)]
        dot = io.StringIO()
        mx.export_to_dot(dot, output, *written)
        mx.eval(output, written)
        cache.trim(x.shape[1])
        return dot.getvalue().count("shape=rectangle")


@dataclass(frozen=True)
class Run:
    """One call: its time, the peak of memory above inputs and caches, and what came out."""

    seconds: float
    transient_bytes: int
    output: mx.array


def take_turns(
    layers: dict[str, Layer], caches: dict[str, Any], x: mx.array, first: dict[str, Run], seconds: float
) -> dict[str, list[Run]]:
    """Repeat each layer for about ``seconds``, in random order and all over the same stretch of time."""
    counts = {name: min(max(int(seconds / run.seconds), 1), MOST_REPETITIONS) for name, run in first.items()}
    # Next to a second of work the extra cost of a first time is nothing, and a repetition is dear.
    runs = {name: [run] if run.seconds > 1 else [] for name, run in first.items()}
    rounds = max(counts.values())
    for number in range(rounds):
        due = [name for name, n in counts.items() if (number + 1) * n // rounds > number * n // rounds]
        random.shuffle(due)
        for name in due:
            runs[name].append(layers[name].run(x, caches[name]))
    return runs


def build_layers() -> dict[str, Layer]:
    """Ours, and those of the two upstream libraries that are installed, by name."""
    layers = {OURS: our_layer()}
    for name, build in ((MLX_LM, mlx_lm_layer), (MLX_VLM, mlx_vlm_layer)):
        try:
            version(name)
        except PackageNotFoundError:
            print(f"{name} is not installed and is left out", file=sys.stderr)
        else:
            layers[name] = build()
    weights = random_weights(layers[OURS].attention)
    for layer in layers.values():
        layer.attention.load_weights(weights, strict=True)
        layer.attention.eval()
        mx.eval(layer.attention.parameters())
    return layers


def our_layer() -> Layer:
    # The rest of the model is never evaluated.
    model = Model(ModelArgs.from_dict(CONFIG))
    attention = model.layers[0].self_attn
    host = attention.host

    def append(cache: Any, contents: Contents) -> None:
        host.append_index_keys(cache, contents.index_keys)
        host.kv_cache(cache).update_and_fetch(contents.keys, contents.values)

    return Layer(
        OURS,
        attention,
        new_cache=lambda: model.make_cache()[0],
        append=append,
        mask=lambda x, cache: host.attention_mask(x, host.kv_cache(cache)),
        buffers=lambda cache: cache.state,
    )


def mlx_lm_layer() -> Layer:
    upstream = upstream_module("mlx_lm.models", "minimax_m3_vl.py")

    def append(cache: Any, contents: Contents) -> None:
        cache[0].update_and_fetch(contents.keys, contents.values)
        cache[1].update_and_fetch(contents.index_keys, mx.zeros((*contents.index_keys.shape[:-1], 0)))

    return Layer(
        MLX_LM,
        upstream.Attention(upstream.TextArgs.from_dict(CONFIG), 0),
        new_cache=lambda: upstream.CacheList(upstream.KVCache(), upstream.KVCache()),
        append=append,
        mask=lambda x, cache: upstream.create_attention_mask(x, cache[0]),
        buffers=lambda cache: cache.state,
    )


def mlx_vlm_layer() -> Layer:
    upstream = upstream_module("mlx_vlm.models", "minimax_m3_vl/language.py")

    def append(cache: Any, contents: Contents) -> None:
        cache.update_and_fetch(contents.keys, contents.values)
        cache.update_index_and_fetch(contents.index_keys)

    return Layer(
        MLX_VLM,
        upstream.MiniMaxAttention(upstream.TextConfig.from_dict(CONFIG), 0),
        new_cache=upstream.MiniMaxM3KVCache,
        append=append,
        mask=upstream.create_attention_mask,
        buffers=lambda cache: (cache.kv_cache.keys, cache.kv_cache.values, cache.index_keys),
    )


def upstream_module(package: str, file: str) -> ModuleType:
    """Upstream's own file, under a name that no plugin answers to; its relative imports work."""
    path = Path(next(iter(importlib.import_module(package).__path__)), file)
    parents = Path(file).parts[:-1]
    for part in parents:
        package = f"{package}.upstream_{part}"
        # Stands in for the package that a plugin may serve: the same files, not its __init__.
        namespace = ModuleType(package)
        namespace.__path__ = [str(path.parent)]
        sys.modules[package] = namespace
    name = f"{package}.{path.stem}" if parents else f"{package}.upstream_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def random_weights(attention: nn.Module) -> list[tuple[str, mx.array]]:
    """Matrices that keep the scale of their input, norm weights that are not all the same."""
    weights = []
    for name, parameter in tree_flatten(attention.parameters()):
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.1
        weights.append((name, scale * mx.random.normal(parameter.shape)))
    mx.eval(weights)
    return weights


def random_contents(length: int) -> Contents:
    """Unit variance, no structure: every query chooses other blocks, the worst case for reuse."""

    def unit(heads: int) -> mx.array:
        array = mx.random.uniform(-(3**0.5), 3**0.5, (1, heads, length, HEAD_DIM))
        # One at a time: at 1M tokens the temporaries of one are gigabytes.
        mx.eval(array)
        return array

    return Contents(unit(GROUPS), unit(GROUPS), unit(1))


@dataclass(frozen=True)
class Case:
    """``queries`` new tokens at the end of a context of ``context`` tokens, themselves included."""

    queries: int
    context: int

    @classmethod
    def parse(cls, text: str) -> "Case":
        """``QUERIES@CONTEXT`` or ``CONTEXT``: ``131K`` and ``128K`` are 131072, ``100K`` is 100000."""
        queries, _, context = text.rpartition("@")
        unit = {"K": 1000, "M": 1 << 20}.get(context[-1:].upper())
        length = int(context[:-1]) * unit if unit else int(context)
        power = 1 << (length - 1).bit_length()
        return cls(int(queries or 1), power if unit and power < 1.03 * length else length)

    @property
    def length_name(self) -> str:
        if self.context & (self.context - 1) or self.context < 1000:
            return f"{self.context:,}"
        return f"{self.context // 1000}K" if self.context < 1 << 20 else f"{self.context >> 20}M"

    def __str__(self) -> str:
        return f"{self.queries} at {self.length_name}"

    def positions(self) -> range:
        return range(self.context - self.queries, self.context)

    @property
    def drops_blocks(self) -> bool:
        return self.context > BUDGET


def weight_count(attention: nn.Module) -> int:
    return sum(p.size for _, p in tree_flatten(attention.parameters()))


def needed_bytes(case: Case, n_weights: int) -> int:
    """Bytes that MSA has to read: weights, index keys once, and the keys and values chosen.

    With several queries the chosen blocks overlap; counted are as many as can be distinct.
    """
    chosen = min(case.context, case.queries * BUDGET)
    keys_values = 2 * GROUPS * chosen * HEAD_DIM
    index_keys = case.context * HEAD_DIM if case.drops_blocks else 0
    return FLOAT_BYTES * (n_weights + index_keys + keys_values)


def needed_flops(case: Case, n_weights: int) -> int:
    """Multiplications and additions of the matrix products of MSA, without hidden keys."""
    projections = 2 * case.queries * n_weights
    visible = sum(p + 1 for p in case.positions())
    scores = 2 * GROUPS * HEAD_DIM * visible if case.drops_blocks else 0
    attention = 2 * 2 * HEADS * HEAD_DIM * sum(map(_attended, case.positions()))
    return projections + scores + attention


def _attended(position: int) -> int:
    """Keys of the chosen blocks that a query sees: its own block is chosen and half hidden."""
    if position < BUDGET:
        return position + 1
    return (TOPK - 1) * BLOCK + position % BLOCK + 1


def upstream_bytes(name: str, case: Case) -> dict[str, int]:
    """The largest temporaries of an upstream layer by their shapes, which is what it needs at least.

    ``selection`` is there on every backend: float32 scores ``[G, L, S]`` and a bool mask, one
    plane per query head in mlx-lm and one in all in mlx-vlm.  ``attention`` is the float32
    scores ``[H, L, S]``, which backends without a fused kernel for such masks write out.
    """
    pairs = case.queries * case.context
    masks = {MLX_LM: HEADS, MLX_VLM: 1}[name]
    # mlx-vlm gathers the chosen blocks for one token when the context is 64 budgets long.
    gathers = name == MLX_VLM and case.queries == 1 and case.context >= 64 * BUDGET
    return {
        "selection": pairs * (GROUPS * FLOAT_BYTES + masks) if case.drops_blocks else 0,
        "attention": HEADS * FLOAT_BYTES * (BUDGET if gathers else pairs),
    }
