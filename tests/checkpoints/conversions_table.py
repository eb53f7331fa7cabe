"""Every way of converting every layout: what becomes of the values, and the table in ``docs/conversions.md``.

    python tests/checkpoints/conversions_table.py

tries all and writes the table anew.  It takes some minutes.
"""

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_m3_plugin.toolbox.checkpoint import Checkpoint, open_checkpoint
from mlx_m3_plugin.toolbox.precision import Quantization

sys.path.append(str(Path(__file__).parents[2]))
from tests.checkpoints import conversions
from tests.checkpoints.edits import edit_json
from tests.checkpoints.opens import why_not
from tests.checkpoints.tiny_layouts import LAYOUTS

PAGE = Path(__file__).parents[2] / "docs" / "conversions.md"
BEGIN, END = "<!-- table: tests/checkpoints/conversions_table.py -->", "<!-- end of table -->"
EXACT, CAST, QUANTIZED = "exact", "bfloat16", "quantized"
# Parts of a matrix are compared in float32.
ROUNDING, ROUNDING_BF16 = 2**-20, 2**-8
KEEP = '[default]\ndtype = "keep"\n'

# Checkpoint, directory to write.
Way = Callable[[Path, Path], object]
Weights = dict[str, mx.array]


# --- the ways ---


def with_library(library: str, **options: Any) -> Way:
    def convert(source: Path, made: Path) -> None:
        from importlib import import_module

        import_module(f"{library}.convert").convert(str(source), str(made), **options)

    return convert


def by_recipe(recipe: str) -> Way:
    def convert(source: Path, made: Path) -> None:
        path = recipe
        if recipe == "keep":
            (made.parent / "keep.toml").write_text(KEEP)
            path = str(made.parent / "keep.toml")
        conversions.converted(source, path, made)

    return convert


def fused(*options: str) -> Way:
    """``mlx_lm.fuse`` with adapters for every ``q_proj`` that change nothing."""

    def fuse(source: Path, made: Path) -> None:
        from mlx_lm import fuse
        from mlx_lm.tuner.utils import linear_to_lora_layers
        from mlx_lm.utils import load_model

        adapters = made.parent / "adapters"
        adapters.mkdir()
        model, _ = load_model(source, lazy=True)
        parameters = {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
        layers = len(model.layers)
        linear_to_lora_layers(model, layers, parameters)
        weights = {name: a for name, a in tree_flatten(model.parameters()) if ".lora_" in name}
        mx.save_safetensors(str(adapters / "adapters.safetensors"), weights)
        config = {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": parameters}
        (adapters / "adapter_config.json").write_text(json.dumps(config))
        with arguments("--model", source, "--adapter-path", adapters, "--save-path", made, *options):
            fuse.main()

    return fuse


@contextlib.contextmanager
def arguments(*given: str | Path) -> Iterator[None]:
    before = sys.argv
    sys.argv = ["mlx_lm.fuse", *map(str, given)]
    try:
        yield
    finally:
        sys.argv = before


# Column -> library or None, way.  Those that load are judged by their logits.
LOADS = {"mlx-lm loads": "mlx_lm", "mlx-vlm loads": "mlx_vlm"}
WAYS: dict[str, Way] = {
    "mlx_lm.convert": with_library("mlx_lm"),
    "-q": with_library("mlx_lm", quantize=True),
    "--dequantize": with_library("mlx_lm", dequantize=True),
    "mlx_vlm.convert": with_library("mlx_vlm"),
    "vlm -q": with_library("mlx_vlm", quantize=True),
    "vlm --dequantize": with_library("mlx_vlm", dequantize=True),
    "mlx-m3 keep": by_recipe("keep"),
    "4bit": by_recipe("4bit"),
    "keep-qat": by_recipe("keep-qat"),
    "mlx_lm.fuse": fused(),
    "fuse --dequantize": fused("--dequantize"),
}
OF_VLM = ("mlx_vlm.convert", "vlm -q", "vlm --dequantize", "mlx-vlm loads")
# Ways that may cast floats to the config's bfloat16, and those that leave no quantized matrix.
CASTING = ("mlx_lm.convert", "-q", "--dequantize", "mlx_vlm.convert", "vlm -q", "vlm --dequantize")
DEQUANTIZING = ("--dequantize", "vlm --dequantize", "fuse --dequantize")
QUANTIZING = ("-q", "vlm -q", "4bit", "keep-qat", "mlx_lm.fuse")


def answers(name: str, columns: list[str]) -> dict[str, str]:
    """``{column: cell}`` for one layout: what became of the values, or the refusal."""
    found = {}
    with tempfile.TemporaryDirectory() as directory, quiet():
        source = Path(directory) / "source"
        values = LAYOUTS[name].write(source)
        edit_json(source / "config.json", _in_bfloat16)
        for number, column in enumerate(columns):
            if column in LOADS:
                error, _ = why_not(LAYOUTS[name], LOADS[column])
                found[column] = EXACT if error is None else error
                continue
            made = Path(directory) / str(number) / "made"
            made.parent.mkdir()
            try:
                WAYS[column](source, made)
            except Exception as error:
                assert not (made / "config.json").exists(), "refused, and left a checkpoint behind"
                found[column] = f"refused: {error}"
            else:
                found[column] = verdict(source, values, made, column)
    return found


def columns_here() -> list[str]:
    columns = [*LOADS, *WAYS]
    return [c for c in columns if c not in OF_VLM or find_spec("mlx_vlm") is not None]


def _in_bfloat16(config: dict[str, Any]) -> None:
    """As published: floats are in bfloat16 by the config, so that stock converts them to it."""
    config |= {"torch_dtype": "bfloat16"}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


# --- what became of the values ---


def verdict(source: Path, values: Weights, made: Path, way: str) -> str:
    """The worst of all tensors, or the first that is wrong in a way that nobody asked for."""
    before, after = open_checkpoint(source), open_checkpoint(made)
    stored, new = conversions.parameters(source), conversions.parameters(made)
    words = {EXACT}
    for name, value in values.items():
        word = _of_matrix(name.removesuffix(".weight"), value, before, after, new, way)
        if word not in (EXACT, CAST, QUANTIZED):
            return word
        words.add(word)
    for name, array in stored.items():
        if name not in values and name in new and name.startswith(("vision", "multi_modal", "patch_merge")):
            word = _of_floats(name, array.astype(mx.float32), new[name], way in CASTING)
            if word not in (EXACT, CAST):
                return word
            words.add(word)
    return next(word for word in (QUANTIZED, CAST, EXACT) if word in words)


def _of_matrix(
    module: str, value: mx.array, before: Checkpoint, after: Checkpoint, new: Weights, way: str
) -> str:
    was, now = before.spec(module), after.spec(module)
    if now.bits is None:
        may_round = way in DEQUANTIZING if was.bits is not None else way in CASTING
        return _of_floats(module, value, new[_weight_of(module, new)], may_round)
    found = _dequantized(module, now, new)
    error = mx.abs(found - value)
    if not bool(mx.any(error > ROUNDING * mx.abs(value).max())):
        return EXACT
    if way not in QUANTIZING or (was == now and way != "mlx_lm.fuse"):
        return f"WRONG: {module} is {error.max().item():.2g} off"
    within = bool(mx.all(error <= _bound(module, value, now, new)))
    return QUANTIZED if within else f"WRONG: {module} is {error.max().item():.2g} off, more than {now} can be"


def _of_floats(name: str, value: mx.array, found: mx.array, may_round: bool) -> str:
    error = mx.abs(found.astype(mx.float32) - value)
    if not bool(mx.any(error > ROUNDING * mx.abs(value).max())):
        return EXACT
    if may_round and found.dtype == mx.bfloat16 and bool(mx.all(error <= ROUNDING_BF16 * mx.abs(value))):
        return CAST
    return f"WRONG: {name} is {error.max().item():.2g} off in {found.dtype}"


def _weight_of(module: str, new: Weights) -> str:
    """Biases of the router have no module of their own."""
    return f"{module}.weight" if f"{module}.weight" in new else module


def _dequantized(module: str, spec: Quantization, new: Weights) -> mx.array:
    parts = [new.get(f"{module}.{part}") for part in ("scales", "biases")]
    floats = [p if p is None or p.dtype == mx.uint8 else p.astype(mx.float32) for p in parts]
    made = mx.dequantize(new[f"{module}.weight"], *floats, **spec.as_quantization(), dtype=mx.float32)
    if f"{module}.global_scale" in new:
        # 6 * 448, the largest value that NVFP4's elements and scales make.
        made = made * (new[f"{module}.global_scale"] / 2688)[..., None, None]
    return made


def _bound(module: str, value: mx.array, spec: Quantization, new: Weights) -> mx.array:
    """The largest error of each element that its format explains."""
    largest = mx.abs(value).reshape(*value.shape[:-1], -1, spec.group_size).max(-1)
    if spec.mode == "affine":
        # A step, where the range of a group is cut off because zero is one of the steps.  And what bfloat16
        # rounds by 2^-9 each: the value, its offset, and the group's range of twice the largest value.
        bound = mx.abs(new[f"{module}.scales"]).astype(mx.float32) + 4 * 2**-9 * largest
    else:
        # MLX before 0.32 rounds scales to the nearest power of two, by sqrt(2) too small at most, and cuts
        # off what is larger than they reach.  Of bfloat16 it takes their logarithms in bfloat16, which is
        # 2^-5 off for scales between 2^-16 and 2^-8.
        bound = (1 - 2 ** -(0.5 + 2**-5)) * largest
    return mx.repeat(bound, spec.group_size, -1)


# --- the page ---


def read_table() -> dict[str, dict[str, str]]:
    """``{layout: {column: cell}}``."""
    lines = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    table = [dict(zip(header, row, strict=True)) for row in rows]
    return {row["layout"].strip("`"): row for row in table}


def cell(answer: str) -> str:
    return answer.partition(":")[0]


def write_table(table: dict[str, dict[str, str]]) -> None:
    columns = list(next(iter(table.values())))
    lines = ["| " + " | ".join(["layout", *columns]) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in table.items():
        lines.append(f"| `{name}` | " + " | ".join(cell(row[column]) for column in columns) + " |")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after, text = rest.partition(END)[2], "\n".join(lines)
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main(*names: str) -> None:
    table = {name: answers(name, columns_here()) for name in names or LAYOUTS}
    for name, row in table.items():
        others = {column: word for column, word in row.items() if word not in (EXACT, CAST, QUANTIZED)}
        if others:
            print(name, json.dumps(others, indent=1))
    if not names:
        write_table(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
