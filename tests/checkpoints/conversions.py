"""Conversions made for tests, and what their tensors are compared with."""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_m3_plugin.model.config import text_config_of
from mlx_m3_plugin.toolbox.checkpoint import open_checkpoint
from mlx_m3_plugin.toolbox.convert.allocation import allocate_bits, scores_by_position
from mlx_m3_plugin.toolbox.convert.plan import ConversionPlan, plan_conversion
from mlx_m3_plugin.toolbox.convert.recipe import load_recipe
from mlx_m3_plugin.toolbox.convert.run import write
from mlx_m3_plugin.toolbox.new_directory import new_directory
from mlx_m3_plugin.toolbox.precision import Quantization
from mlx_m3_plugin.weights.headers import weight_files
from tests.checkpoints.layouts.reading import map_weights

# Every kind of source that the issue of converting names.
SOURCES = (
    "published_float",
    "mxfp8_official",
    "transformers_in_memory",
    "mlx_fused_129_4bit",
    "mlx_config_i",
    "nvfp4_modelopt_mixed",
    "nvfp4_everywhere_compressed_tensors",
    "published_text_only",
)
MEMORY = 1 << 30


def planned(source: Path, recipe: str) -> ConversionPlan:
    """With bits allocated by position, where the recipe has a [plan]."""
    checkpoint = open_checkpoint(source)
    loaded = load_recipe(recipe, checkpoint.text_config)
    specs = None
    if loaded.bit_targets:
        layers = checkpoint.text_config.num_hidden_layers
        specs = allocate_bits(checkpoint, loaded, scores_by_position(layers))
    return plan_conversion(checkpoint, loaded, specs)


def convert(plan: ConversionPlan, destination: str | Path, **options: Any) -> dict[str, Any]:
    """As the command does once it has a plan."""
    with new_directory(Path(destination), "convert", resumable=True) as unfinished:
        return {**plan.summary(), "resumed": write(plan, unfinished, **options)}


def converted(source: Path, recipe: str, destination: Path, memory: int = MEMORY) -> ConversionPlan:
    plan = planned(source, recipe)
    convert(plan, destination, memory=memory, progress=lambda module, count: None)
    return plan


def parameters(directory: Path) -> dict[str, mx.array]:
    """By published name, experts stacked, in whatever precision they are stored: as mlx loads them."""
    config = text_config_of(json.loads((directory / "config.json").read_text()))
    weights = {n: a for file in weight_files(directory) for n, a in mx.load(str(file)).items()}
    return map_weights(weights, config, "", vision=True)


def dequantized(found: dict[str, mx.array], module: str, spec: Quantization) -> mx.array:
    if spec.bits is None:
        return found[f"{module}.weight"]
    words = spec.as_quantization()
    made = mx.dequantize(
        found[f"{module}.weight"], found[f"{module}.scales"], found.get(f"{module}.biases"), **words
    )
    if f"{module}.global_scale" in found:
        # 6 * 448, the largest value that NVFP4's elements and scales make.
        scale = found[f"{module}.global_scale"][..., None, None] / 2688
        return (made.astype(mx.float32) * scale).astype(mx.bfloat16)
    return made


def text_values(directory: Path, plan: ConversionPlan) -> dict[str, mx.array]:
    """In float32, by name: what the tensors of a conversion stand for, without the vision tower."""
    # In float32 before anything is computed: dequantized in bf16, values would be rounded once more.
    found = {
        name: array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
        for name, array in parameters(directory).items()
    }
    made = {f"{module}.weight": dequantized(found, module, spec) for module, spec in plan.specs.items()}
    others = {name: a for name, a in found.items() if name.rpartition(".")[0] not in plan.specs}
    texts = {n: a for n, a in (others | made).items() if n.startswith(("model.", "lm_head."))}
    return {name: array.astype(mx.float32) for name, array in texts.items()}


def one_of_each(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each recipe and each source at least once, with a partner of chance."""
    shuffled = random.SystemRandom().sample(pairs, len(pairs))
    recipes = {recipe: (recipe, source) for recipe, source in shuffled}
    sources = {source: (recipe, source) for recipe, source in shuffled}
    return sorted({*recipes.values(), *sources.values()})


def after(modules: int, do: Callable[[], None]) -> Callable[[Any, int], None]:
    """A conversion's progress that does something else in the midst of it, once."""
    count = 0

    def progress(module: Any, size: int) -> None:
        nonlocal count
        count += 1
        if count == modules:
            do()

    return progress


def interrupt() -> None:
    raise KeyboardInterrupt


def digest(directory: Path) -> dict[str, str]:
    """Of every file."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


Written = Callable[[str], Path]
