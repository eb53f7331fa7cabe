"""Ways to damage a checkpoint directory, and what an error about each has to name."""

import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ELEMENT = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "U8": 1, "F8_E4M3": 1}
# A dtype of the same width that no M3 checkpoint has there.
WRONG_DTYPE = {"F32": "I32", "F16": "I16", "BF16": "I16", "U32": "F32", "U8": "I8", "F8_E4M3": "BOOL"}

# What the model is computed with, in both spellings.
CONFIG_KEYS = {
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "dense_intermediate_size",
    "shared_intermediate_size",
    "vocab_size",
    "num_local_experts",
    "num_experts_per_tok",
    "rms_norm_eps",
    "rope_theta",
    "routed_scaling_factor",
    "swiglu_alpha",
    "swiglu_limit",
    "moe_layer_freq",
    "mlp_layer_types",
    "layer_types",
    "sparse_attention_config",
    "sparse_attention_freq",
    "sparse_num_index_heads",
    "sparse_index_dim",
    "sparse_block_size",
    "sparse_topk_blocks",
    "sparse_local_block",
    "index_n_heads",
    "index_head_dim",
    "index_block_size",
    "index_topk_blocks",
    "index_local_blocks",
    "rope_parameters",
}
WRONG_VALUES = ("text", [], {"a": 1}, True, -1)
FLOAT_KEYS = ("rms_norm_eps", "rope_theta", "routed_scaling_factor", "swiglu_alpha", "swiglu_limit")
# Where they are left out, transformers has the same default, and no tensor shows another value.
HAVE_DEFAULTS = {
    *FLOAT_KEYS,
    *("num_experts_per_tok", "moe_layer_freq", "mlp_layer_types", "rope_parameters"),
    *("sparse_block_size", "sparse_topk_blocks", "sparse_local_block"),
    *("index_block_size", "index_topk_blocks", "index_local_blocks"),
}
# Without them no layer has an indexer.
NAMED_INSTEAD = dict.fromkeys(
    ("sparse_attention_config", "layer_types", "sparse_attention_freq"), ("index_q_proj", "indexer")
)


@dataclass
class Damage:
    """What was done: any of ``names`` in an error's text tells it."""

    what: str
    names: list[str] = field(default_factory=list)

    def is_named_in(self, error: str) -> bool:
        return any(name in error or _grouped(name).search(error) for name in self.names)


def _grouped(name: str) -> re.Pattern[str]:
    """``layers.2.x`` as a grouped error line may tell it: ``layers.{1-2}.x``."""
    parts = [re.escape(part) for part in re.split(r"\.\d+\.", name)]
    return re.compile(r"\.(?:\d+|\{[\d,-]+\})\.".join(parts))


@dataclass
class Shards:
    """All of a checkpoint's tensors in memory, to be changed and written again.

    ``made_from`` tells for a stored name the parameters that it takes part in: an error about a
    tensor may name what it would have become.
    """

    directory: Path
    files: dict[str, dict[str, tuple[dict[str, Any], bytes]]]
    made_from: dict[str, list[str]]

    @staticmethod
    def read(directory: Path, made_from: dict[str, list[str]]) -> "Shards":
        files = {}
        for path in sorted(directory.glob("*.safetensors")):
            data = path.read_bytes()
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
            header.pop("__metadata__", None)
            files[path.name] = {
                name: (entry, data[8 + length :][slice(*entry["data_offsets"])])
                for name, entry in header.items()
            }
        return Shards(directory, files, made_from)

    def where(self, name: str) -> str:
        return next(file for file, tensors in self.files.items() if name in tensors)

    def write(self, file: str) -> None:
        header, blocks, offset = {}, [], 0
        for name, (entry, block) in self.files[file].items():
            header[name] = {**entry, "data_offsets": [offset, offset + len(block)]}
            blocks.append(block)
            offset += len(block)
        text = json.dumps(header).encode()
        (self.directory / file).write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blocks))

    def text_tensors(self) -> list[str]:
        """Those that a text model is made from, in a fixed order."""
        return sorted(name for tensors in self.files.values() for name in tensors if name in self.made_from)

    def damage(self, what: str, name: str) -> Damage:
        names = [name, *self.made_from.get(name, [])]
        # An error about how a module is quantized names the module.
        return Damage(f"{what} {name}", names + [name.rpartition(".")[0] for name in names])


Corruption = Callable[[Shards, random.Random], Damage | None]


def drop(shards: Shards, rng: random.Random) -> Damage:
    name = rng.choice(shards.text_tensors())
    file = shards.where(name)
    del shards.files[file][name]
    shards.write(file)
    index = shards.directory / "model.safetensors.index.json"
    if rng.random() < 0.5:
        content = json.loads(index.read_text())
        del content["weight_map"][name]
        index.write_text(json.dumps(content))
    return shards.damage("drop", name)


def double(shards: Shards, rng: random.Random) -> Damage:
    """In another file, or under another spelling of its name."""
    name = rng.choice(shards.text_tensors())
    file = shards.where(name)
    others = [other for other in shards.files if other != file]
    new, target = (name, rng.choice(others)) if rng.random() < 0.5 else (other_spelling(name), file)
    shards.files[target][new] = shards.files[file][name]
    shards.write(target)
    return shards.damage("double", name)


def other_spelling(name: str) -> str:
    return name.removeprefix("model.") if name.startswith("model.language_model.") else f"model.{name}"


def transpose(shards: Shards, rng: random.Random) -> Damage:
    names = [n for n in shards.text_tensors() if _is_not_square(shards.files[shards.where(n)][n][0]["shape"])]
    name = rng.choice(names)
    entry, _ = shards.files[shards.where(name)][name]
    *rest, rows, columns = entry["shape"]
    entry["shape"] = [*rest, columns, rows]
    shards.write(shards.where(name))
    return shards.damage("transpose", name)


def _is_not_square(shape: list[int]) -> bool:
    return len(shape) > 1 and shape[-1] != shape[-2]


def wrong_dtype(shards: Shards, rng: random.Random) -> Damage:
    name = rng.choice(shards.text_tensors())
    entry, _ = shards.files[shards.where(name)][name]
    entry["dtype"] = WRONG_DTYPE[entry["dtype"]]
    shards.write(shards.where(name))
    return shards.damage("dtype of", name)


def wrong_length(shards: Shards, rng: random.Random) -> Damage:
    """A header whose shape does not fit the bytes."""
    name = rng.choice(shards.text_tensors())
    file = shards.where(name)
    entry, _ = shards.files[file][name]
    entry["shape"] = [*entry["shape"][:-1], entry["shape"][-1] + 1] if entry["shape"] else [2]
    shards.write(file)
    return shards.damage("length of", name)


def truncate(shards: Shards, rng: random.Random) -> Damage:
    file = rng.choice(sorted(shards.files))
    path = shards.directory / file
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])
    return Damage(f"truncate {file}", [file])


def absurd_header(shards: Shards, rng: random.Random) -> Damage:
    file = rng.choice(sorted(shards.files))
    path = shards.directory / file
    data = path.read_bytes()
    length = rng.choice([0, 1, 7, len(data), 2**31, 2**63, 2**64 - 1, rng.randrange(2**64)])
    path.write_bytes(length.to_bytes(8, "little") + data[8:])
    return Damage(f"header length {length} of {file}", [file])


def lfs_pointer(shards: Shards, rng: random.Random) -> Damage:
    """What a clone without Git LFS leaves."""
    file = rng.choice(sorted(shards.files))
    size = (shards.directory / file).stat().st_size
    (shards.directory / file).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{rng.randbytes(32).hex()}\nsize {size}\n"
    )
    return Damage(f"LFS pointer {file}", [f"{file}: a Git LFS pointer"])


def stale_shard(shards: Shards, rng: random.Random) -> Damage:
    """One of an earlier upload, which was cut into more files."""
    file = rng.choice(sorted(shards.files))
    stale = file.replace("-of-00003", f"-of-{rng.randrange(4, 60):05}")
    (shards.directory / stale).write_bytes((shards.directory / file).read_bytes())
    return Damage(f"stale {stale}", [f"does not list {stale}"])


def remove_shard(shards: Shards, rng: random.Random) -> Damage:
    file = rng.choice(sorted(shards.files))
    (shards.directory / file).unlink()
    return Damage(f"remove {file}", [file])


def nan_scale(shards: Shards, rng: random.Random) -> Damage | None:
    """None for a checkpoint without scales."""
    kinds = ("scales", "weight_scale_inv", "weight_scale", "weight_scale_2", "biases", "norm.weight")
    names = [n for n in shards.text_tensors() if n.endswith(kinds)]
    name = rng.choice(names)
    file = shards.where(name)
    entry, block = shards.files[file][name]
    values = bytearray(block)
    at = rng.randrange(math.prod(entry["shape"])) * ELEMENT[entry["dtype"]]
    values[at : at + ELEMENT[entry["dtype"]]] = nan_bytes(entry["dtype"], name)
    shards.files[file][name] = (entry, bytes(values))
    shards.write(file)
    return shards.damage("NaN in", name)


def nan_bytes(dtype: str, name: str) -> bytes:
    if dtype == "F32":
        return np.float32(np.nan).tobytes()
    if dtype == "F16":
        return np.float16(np.nan).tobytes()
    if dtype == "BF16":
        return np.float32(np.nan).tobytes()[2:]
    # E8M0 has one code that is no number, and it is NaN in e4m3 as well.
    return b"\xff"


def expert_count(shards: Shards, rng: random.Random) -> Damage:
    change = rng.choice([-1, 1, 60])
    path = shards.directory / "config.json"
    config = json.loads(path.read_text())
    config.get("text_config", config)["num_local_experts"] += change
    path.write_text(json.dumps(config))
    return Damage(f"expert count {change:+}", ["num_local_experts", "block_sparse_moe", "experts"])


def config_key(shards: Shards, rng: random.Random) -> Damage:
    """Missing, or of a wrong type."""
    path = shards.directory / "config.json"
    config = json.loads(path.read_text())
    text = config.get("text_config", config)
    holders = [text, *(text[key] for key in ("sparse_attention_config", "rope_parameters") if key in text)]
    holder, key = rng.choice([(h, key) for h in holders for key in h if key in CONFIG_KEYS])
    wrong = (*WRONG_VALUES, *(() if key in FLOAT_KEYS else (1.5,)))
    value = rng.choice(wrong if key in HAVE_DEFAULTS else (None, *wrong))
    if value is None:
        del holder[key]
    else:
        holder[key] = value
    path.write_text(json.dumps(config))
    # A size that is missing shows in the tensors that have it.
    return Damage(f"config {key} = {value!r}", [key, *NAMED_INSTEAD.get(key, ()), "do not fit this"])


CORRUPTIONS: dict[str, Corruption] = {
    corruption.__name__: corruption
    for corruption in (
        drop,
        double,
        transpose,
        wrong_dtype,
        wrong_length,
        truncate,
        absurd_header,
        lfs_pointer,
        stale_shard,
        remove_shard,
        nan_scale,
        expert_count,
        config_key,
    )
}
