"""Peak resident memory and time of converting and evaluating one mixture-of-experts layer of real size.

    python benchmarks/toolbox.py [--tokens 256] [--keep DIRECTORY]

Written first are a published checkpoint and an MXFP8 one with MiniMax-M3's true dimensions and vocabulary,
with random values: six layers, of which one has experts and an indexer and is neither among the first two
nor the last two.  Each command runs in a process of its own.  Takes 45 GB of disk.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

sys.path.append(str(Path(__file__).parents[1]))

from mlx_m3_plugin.weights.headers import read_headers
from tests.checkpoints import real_size
from tests.checkpoints.random_model import write_tokenizer

SOURCES = ("published", "mxfp8")
RECIPES = ("config-i", "oq4")
# Of the layers written, the whole model's layer that each is like; 3 is the first with experts.
LIKE = (0, 1, 2, 3, 0, 1)
# Elements of random numbers at a time.
CHUNK = 1 << 25
GENERATOR = np.random.default_rng(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256, help="to evaluate")
    parser.add_argument("--keep", type=Path, help="directory for the checkpoints, which stay there")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_command(arguments.child)
        return
    with tempfile.TemporaryDirectory() as temporary:
        measure_all(arguments.keep or Path(temporary), arguments.tokens)


def measure_all(directory: Path, tokens: int) -> None:
    print("| command | checkpoint | GB read | GB written | peak, GiB | seconds |\n|---|---|--:|--:|--:|--:|")
    for name in SOURCES:
        source = directory / name
        if not source.exists():
            write_source(source, name)
        for recipe in RECIPES:
            made = directory / f"{recipe} of {name}"
            if not made.exists():
                # Sensitivity by position: measuring it walks all layers, as evaluating does.
                given = ["--sensitivity", "position"] if recipe.startswith("oq") else []
                report(
                    f"convert --recipe {recipe}",
                    ["convert", str(source), str(made), "--recipe", recipe, *given],
                )
        text = ["--tokens", str(tokens), "--cache", str(directory / "cache"), "--reference", str(source)]
        report(
            f"evaluate --reference --tokens {tokens}",
            ["evaluate", str(directory / f"config-i of {name}"), *text],
        )


def report(words: str, command: list[str]) -> None:
    started = time.perf_counter()
    child = [sys.executable, __file__, "--child", *command]
    run = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - started
    peak = json.loads(run.stdout.splitlines()[-1])
    paths = [Path(argument) for argument in command if argument.startswith("/")]
    read, written = (
        (size_of(paths[0]), size_of(paths[1]))
        if command[0] == "convert"
        else (size_of(paths[0]) + size_of(paths[-1]), 0)
    )
    cells = [f"{read / 1e9:.1f}", f"{written / 1e9:.1f}", f"{peak / 2**30:.2f}", f"{seconds:.0f}"]
    print(f"| {words} | {paths[0].name} | " + " | ".join(cells) + " |", flush=True)


def size_of(checkpoint: Path) -> int:
    return sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))


def run_command(command: list[str]) -> None:
    from mlx_m3_plugin.cli import main as mlx_m3

    status = mlx_m3(command)
    if status:
        sys.exit(status)
    print("\n" + json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


# --- the sources ---


def write_source(directory: Path, layout: str) -> None:
    parameters = list(some_layers()) + real_size.vision_model("F32")
    config, stored = real_size.CONFIG, parameters
    if layout == "mxfp8":
        config, stored = real_size.MXFP8_CONFIG, list(real_size.in_mxfp8(parameters))
    only_one = [int(like >= real_size.N_DENSE) for like in LIKE]
    sparse = {k: only_one if isinstance(v, list) else v for k, v in real_size.SPARSE_ATTENTION_CONFIG.items()}
    text = config["text_config"] | {
        "num_hidden_layers": len(LIKE),
        "moe_layer_freq": only_one,
        "sparse_attention_config": sparse,
    }
    unfinished = directory.with_name(directory.name + ".unfinished")
    real_size.write_sparse(unfinished, parameters, stored, config | {"text_config": text})
    write_tokenizer(unfinished, config["text_config"]["max_position_embeddings"])
    fill(unfinished)
    unfinished.rename(directory)


def some_layers() -> Iterator[real_size.Tensor]:
    whole = real_size.text_model(real_size.experts_one_by_one)
    for layer, like in enumerate(LIKE):
        part = f"model.layers.{like}."
        yield from (
            t._replace(name=t.name.replace(part, f"model.layers.{layer}.")) for t in whole if part in t.name
        )
    yield from (tensor for tensor in whole if "model.layers." not in tensor.name)


def fill(directory: Path) -> None:
    """Random values into the matrices of the text model; what is left are zeros."""
    stored = read_headers(directory).tensors
    for name, tensor in stored.items():
        wanted = tensor.stored_dtype in ("BF16", "F32", "F8_E4M3") and len(tensor.shape) == 2
        if not wanted or any(part in name for part in ("vision_tower", "merge_mlp", "projector")):
            continue
        places = [tensor]
        if tensor.stored_dtype == "F8_E4M3":
            places.append(stored[name.removesuffix("weight") + "weight_scale_inv"])
        rows, columns = tensor.shape
        for begin in range(0, rows, CHUNK // columns):
            shape = (min(CHUNK // columns, rows - begin), columns)
            for place, data in zip(places, random_bytes(tensor.stored_dtype, shape), strict=True):
                with (directory / place.file).open("r+b") as stream:
                    stream.seek(place.start + begin * (len(data) // shape[0]))
                    stream.write(data)


def random_bytes(dtype: str, shape: tuple[int, int]) -> list[bytes]:
    # numpy's numbers come four times as fast as MLX's on a CPU.
    values = mx.array(GENERATOR.standard_normal(shape, np.float32)) * 0.02
    if dtype == "F8_E4M3":
        return [np.array(part).tobytes() for part in mx.quantize(values, mode="mxfp8")]
    return [np.array(values.astype(mx.bfloat16).view(mx.uint16) if dtype == "BF16" else values).tobytes()]


if __name__ == "__main__":
    main()
