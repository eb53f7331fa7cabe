"""Peak resident memory of loading and converting checkpoints with layers of real size.

    python benchmarks/loading.py

The checkpoints are the first layers of the tests' sparse files (``tests/checkpoints/real_size.py``): real
headers, holes for data, so that every tensor is read, as zeros.  Each case runs in a process of its own.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

# Layout, layers kept (3 of them dense), experts kept, what is done.
CASES = (
    ("fused_4bit", 4, 128, "load"),
    ("fused_4bit", 5, 128, "load"),
    ("fused_4bit", 6, 128, "load"),
    ("oq4", 5, 128, "load"),
    ("mxfp8", 4, 128, "load"),
    ("published", 4, 32, "load"),
    ("published", 4, 32, "convert -q"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", nargs=2, metavar=("DIRECTORY", "WHAT"), help=argparse.SUPPRESS)
    child = parser.parse_args().child
    if child:
        print(json.dumps(run_case(Path(child[0]), child[1])))
        return
    print("| checkpoint | MoE layers | experts | | weights, GB | a MoE layer, GB | peak beyond them, GB |")
    print("|---|--:|--:|---|--:|--:|--:|")
    for layout, layers, experts, what in CASES:
        with tempfile.TemporaryDirectory() as directory:
            source = write_first_layers(layout, Path(directory), layers, experts)
            result = measure(source, what)
        told = [f"{result[key] / 1e9:.2f}" for key in ("weights", "layer", "beyond")]
        print(f"| {layout} | {layers - 3} | {experts} | {what} | " + " | ".join(told) + " |", flush=True)


def measure(source: Path, what: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", str(source), what]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.strip().splitlines()[-1])


def run_case(source: Path, what: str) -> dict[str, float]:
    """Peak memory over what the imports took; of a conversion, over nothing: it keeps no weights."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.convert import convert
    from mlx_lm.utils import load_model

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model, _ = load_model(source, lazy=what != "load")
    arrays = dict(tree_flatten(model.parameters()))
    weights = sum(array.nbytes for array in arrays.values())
    layer = sum(array.nbytes for name, array in arrays.items() if ".layers.3." in name)
    if what != "load":
        del model, arrays
        mx.clear_cache()
        convert(str(source), str(source.parent / "converted"), quantize=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"weights": weights, "layer": layer, "beyond": peak - (weights if what == "load" else 0)}


def write_first_layers(layout: str, directory: Path, layers: int, experts: int) -> Path:
    """A sparse checkpoint of the first layers, and of the first experts where each has its tensors."""
    from tests.checkpoints.random_model import write_tokenizer
    from tests.checkpoints.real_size import REAL_LAYOUTS

    whole, target = directory / "whole", directory / "first"
    REAL_LAYOUTS[layout](whole)
    target.mkdir()
    for file in sorted(whole.glob("*.safetensors")):
        _write_filtered(file, target / file.name, layers, experts)
    config = json.loads((whole / "config.json").read_text())
    text = config["text_config"]
    text.update(num_hidden_layers=layers, num_local_experts=experts)
    _cut_lists(text, layers)
    (target / "config.json").write_text(json.dumps(config))
    write_tokenizer(target, text["max_position_embeddings"])
    return target


def _write_filtered(source: Path, target: Path, layers: int, experts: int) -> None:
    with source.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    kept, end = {}, 0
    for name, entry in header.items():
        numbers = [int(n) for n in re.findall(r"\.(?:layers|experts)\.(\d+)\.", name)]
        wanted = [n < limit for n, limit in zip(numbers, (layers, experts), strict=False)]
        if name == "__metadata__" or "vision_tower" in name or not all(wanted):
            continue
        if re.search(r"\.gate\.weight$|e_score_correction_bias$", name):
            rows = entry["shape"][0]
            size = (entry["data_offsets"][1] - entry["data_offsets"][0]) // rows * experts
            entry["shape"][0] = experts
        else:
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
        kept[name] = {**entry, "data_offsets": [end, end + size]}
        end += size
    if kept:
        text = json.dumps(kept).encode()
        text += b" " * (-len(text) % 8)
        with target.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)


def _cut_lists(text: dict[str, Any], layers: int) -> None:
    for holder in (text, text["sparse_attention_config"]):
        holder.update({key: value[:layers] for key, value in holder.items() if type(value) is list})


if __name__ == "__main__":
    main()
