"""A trained M3-nano as checkpoints: float under the published names, and converted by ``mlx-m3 convert``.

python examples/nano/export.py build/nano              # writes build/nano/float and build/nano/8bit
python examples/nano/export.py build/nano --package    # and puts the latter into mlx_m3_plugin
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import figures
import net
import torch
import vocabulary
from PIL import Image
from tokenizers import Tokenizer

from mlx_m3_plugin.cli import main as mlx_m3
from mlx_m3_plugin.toolbox.demo import NANO, PICTURE

sys.path.append(str(Path(__file__).parents[2]))
from tests.checkpoints import random_vision
from tests.checkpoints.random_model import m3_config

CARD = Path(__file__).with_name("model_card.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--recipe", default="8bit")
    parser.add_argument("--package", action="store_true", help="as the model that `mlx-m3 demo` writes")
    arguments = parser.parse_args()
    whole, made = arguments.directory / "float", arguments.directory / arguments.recipe
    for old in (whole, made):
        shutil.rmtree(old, ignore_errors=True)
    write_float(arguments.directory, whole)
    if mlx_m3(["convert", str(whole), str(made), "--recipe", arguments.recipe]):
        raise SystemExit(1)
    if arguments.package:
        # With the draft head, which is for these weights and no others.
        shutil.rmtree(NANO, ignore_errors=True)
        shutil.copytree(made, NANO)
        shutil.copyfile(CARD, NANO / "README.md")
        Image.fromarray(figures.picture((("red", "circle"), ("blue", "square")))).save(NANO / PICTURE)


def write_float(trained: Path, directory: Path) -> None:
    tokenizer = Tokenizer.from_file(str(trained / "tokenizer.json"))
    ids = tokenizer.get_vocab()
    model = net.build(len(ids), ids, seed=0)
    model.load_state_dict(torch.load(trained / "checkpoint.pt", weights_only=True)["model"])
    model.save_pretrained(directory)
    vocabulary.save(tokenizer, directory)
    # safetensors makes its files readable by the owner only.
    (directory / "model.safetensors").chmod(0o644)
    config = published_config(model.config, ids)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def published_config(config: Any, ids: dict[str, int]) -> dict[str, Any]:
    """As MiniMax spells it: all stock versions read that, and transformers too."""
    text, vision = config.text_config, config.vision_config
    made = m3_config(text.vocab_size, ids)
    own = made["text_config"]
    own |= {name: getattr(text, name) for name in own.keys() & text.to_dict().keys()}
    sparse = [int(kind == "minimax_m3_sparse") for kind in text.layer_types]
    own |= {
        "moe_layer_freq": [int(kind == "sparse") for kind in text.mlp_layer_types],
        "hidden_act": "swigluoai",
        "rope_theta": text.rope_parameters["rope_theta"],
        "partial_rotary_factor": text.rope_parameters["partial_rotary_factor"],
        "architectures": ["MiniMaxM3SparseForCausalLM"],
        "dtype": "float32",
    }
    own["sparse_attention_config"] |= {
        "sparse_attention_freq": sparse,
        "sparse_disable_index_value": sparse,
        "sparse_num_index_heads": text.index_n_heads,
        "sparse_index_dim": text.index_head_dim,
        "sparse_block_size": text.index_block_size,
        "sparse_topk_blocks": text.index_topk_blocks,
        "sparse_local_block": text.index_local_blocks,
    }
    made = random_vision.with_vision(made)
    seen = made["vision_config"]
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    seen |= {name: getattr(vision, name) for name in same}
    seen["rope_theta"] = vision.rope_parameters["rope_theta"]
    return made


if __name__ == "__main__":
    main()
