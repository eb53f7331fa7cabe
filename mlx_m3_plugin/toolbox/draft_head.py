"""A DSpark draft head on the disk, such as M3.1's: a folder with a config and shards of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..model.config import TextConfig, text_part
from ..weights.check import shorten
from ..weights.headers import DRAFT_HEAD, Headers, is_draft_config, read_headers, weight_files
from ..weights.layouts import plan_draft
from ..weights.tensor import Tensor
from .common import read_json_object
from .parameters import Shapes, StoredModel, differences, quantized_modules
from .precision import Quantization

_NUMBERS = (
    *("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "dense_intermediate_size", "sliding_window", "dspark_block_size", "dspark_markov_rank"),
)
_LAYERS = "dspark_target_layer_ids"


@dataclass(frozen=True)
class DraftHead(StoredModel):
    """What its config and headers say.

    Attributes:
        whole_config: ``config.json``.  config: the part that describes the head.
        plan: parameter names of :mod:`~mlx_m3_plugin.hosts.mlx_vlm.drafter` -> how they are made.
        quantized: the modules that are quantized in one of MLX's modes.
    """

    directory: Path
    whole_config: dict[str, Any]
    config: dict[str, Any]
    headers: Headers
    plan: Mapping[str, Tensor]
    quantized: Mapping[str, Quantization]

    @property
    def block(self) -> int:
        """The most tokens that it drafts in a round."""
        return self.config["dspark_block_size"]

    @property
    def target_layers(self) -> list[int]:
        """The layers of the target whose output it reads."""
        return self.config[_LAYERS]

    @property
    def nbytes(self) -> int:
        return self.headers.nbytes

    @property
    def bytes_per_drafted(self) -> int:
        """Read for each drafted token: the Markov head's second matrix.  Of the first, it looks up a row."""
        return self._bytes_of("markov_w2")

    @property
    def bytes_per_round(self) -> int:
        """Read once in a round: all weights but the Markov head's."""
        return self.nbytes - self._bytes_of("markov_head")

    def cache_bytes(self, context: int | None = None) -> int:
        """Of K and V in 16 bits, of all layers, for ``context`` tokens; a full window is the most."""
        window = self.config["sliding_window"]
        width = 2 * self.config["num_key_value_heads"] * self.config["head_dim"]
        return 2 * self.config["num_hidden_layers"] * width * min(context or window, window)

    def _bytes_of(self, part: str) -> int:
        return sum(tensor.nbytes for name, tensor in self.headers.tensors.items() if f"{part}." in name)


def open_draft_head(directory: Path) -> DraftHead:
    """Read config and headers, and see that every weight is there.

    Raises:
        OSError: there is no such folder.
        ValueError: it holds no DSpark draft head, or not a whole one; says what is wrong.
    """
    whole = read_json_object(directory / "config.json")
    if not is_draft_config(whole):
        raise ValueError(
            f"{directory} is not a draft head of MiniMax-M3.1: the architectures in its config.json are "
            f"{whole.get('architectures')}, not {DRAFT_HEAD}"
        )
    config = dict(text_part(whole))
    wrong = [name for name in _NUMBERS if type(config.get(name)) is not int or config[name] < 1]
    if wrong:
        raise ValueError(f"{directory / 'config.json'}: {wrong[0]} must be a positive integer")
    if not isinstance(config.get(_LAYERS), list) or not config[_LAYERS]:
        raise ValueError(f"{directory / 'config.json'}: {_LAYERS} must be a list of layers")
    headers, shapes = read_headers(directory), draft_shapes(config)
    problems = headers.problems if weight_files(directory) else ["there are no safetensors files"]
    if not problems:
        sizes = ("num_attention_heads", "head_dim", "dense_intermediate_size", "hidden_size")
        plan = plan_draft(headers.tensors, TextConfig(**{name: config[name] for name in sizes}))
        quantized, problems = quantized_modules(plan, shapes)
        problems = problems or differences(plan, shapes, quantized)
    if problems:
        raise ValueError("\n  ".join([f"{directory} is not a whole draft head:", *shorten(problems)]))
    return DraftHead(directory, whole, config, headers, plan, quantized)


def draft_shapes(config: Mapping[str, Any]) -> Shapes:
    """Shapes of a head's parameters by their names; ``config``: the part that describes it."""
    hidden, rank, vocabulary = (config[n] for n in ("hidden_size", "dspark_markov_rank", "vocab_size"))
    wide, head = config["dense_intermediate_size"], config["head_dim"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    of_layer: Shapes = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    shapes: Shapes = {
        "fc.weight": (hidden, hidden * len(config[_LAYERS])),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
        "markov_head.markov_w1.weight": (vocabulary, rank),
        "markov_head.markov_w2.weight": (vocabulary, rank),
    }
    if config.get("enable_confidence_head"):
        inputs = hidden + (rank if config.get("confidence_head_with_markov", True) else 0)
        shapes |= {"confidence_head.proj.weight": (1, inputs), "confidence_head.proj.bias": (1,)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"layers.{layer}.{module}.weight": shape for module, shape in of_layer.items()}
    return shapes
