"""What goes beside the weights: config, tokenizer, template, processor, licence, and the model card."""

import json
import shutil
from pathlib import Path
from typing import Any

from ...chat.template import CHAT_TEMPLATE
from ...weights import with_quantization
from ...weights.headers import INDEX
from ..checksums import SUMS
from ..inspect.source import CHAT_TEMPLATE_FILES
from ..new_directory import LOCK, STATE
from ..text_files import read_json_object
from .card import model_card
from .plan import Plan

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".npz")
# Written anew, or about weights that are not these.
_NOT_COPIED = (
    "config.json",
    "README.md",
    INDEX,
    "hf_quant_config.json",
    "offload_index.json",
    SUMS,
    LOCK,
    STATE,
)
_LARGEST = 200 << 20


def write_settings(directory: Path, plan: Plan) -> None:
    source = plan.source.directory
    for file in sorted(source.iterdir()):
        if _is_copied(file) and (plan.source.vision or not _is_for_vision(file)):
            shutil.copyfile(file, directory / file.name)
    _write_json(directory / "config.json", new_config(plan))
    _forget_wrong_parser(directory / "tokenizer_config.json")
    if not _has_template(directory):
        (directory / CHAT_TEMPLATE_FILES[0]).write_text(CHAT_TEMPLATE, encoding="utf-8")
    (directory / "README.md").write_text(model_card(plan), encoding="utf-8")


def _is_copied(file: Path) -> bool:
    return (
        file.is_file()
        and not file.name.startswith(".")
        and file.suffix not in _WEIGHTS
        and file.name not in _NOT_COPIED
        and not file.name.endswith(".index.json")
        and file.stat().st_size <= _LARGEST
    )


def _is_for_vision(file: Path) -> bool:
    """Of the processors of images and videos, which a model without a vision tower must not ask for."""
    return file.name.endswith("processor_config.json")


def new_config(plan: Plan) -> dict[str, Any]:
    """The source's ``config.json`` with what is true of the new weights."""
    config = with_quantization(plan.source.config, plan.quantization())
    # For mlx-vlm, which packs unless it is told not to.
    packed = {"pack_shared_expert": plan.packed}
    nested = config.get("text_config")
    if not isinstance(nested, dict):
        return _around(config, packed)
    return {**config, "text_config": with_quantization(nested, None) | packed}


# What mlx-lm's and mlx-vlm's classes read outside of ``text_config``.
_OUTER = (
    "quantization",
    "quantization_config",
    "tie_word_embeddings",
    "eos_token_id",
    "transformers_version",
)


def _around(flat: dict[str, Any], packed: dict[str, bool]) -> dict[str, Any]:
    """A text-only model's config as that of ``minimax_m3_vl``, the only M3 that mlx-lm knows."""
    text = {k: v for k, v in with_quantization(flat, None).items() if k != "architectures"}
    return {
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
        "model_type": "minimax_m3_vl",
        **{k: flat[k] for k in _OUTER if k in flat},
        "text_config": text | packed,
    }


def _forget_wrong_parser(file: Path) -> None:
    """An older mlx-lm has written ``json_tools``, with which calls are dropped, into its conversions."""
    try:
        settings = read_json_object(file)
    except FileNotFoundError:
        return
    if settings.pop("tool_parser_type", None) is not None:
        _write_json(file, settings)


def _has_template(directory: Path) -> bool:
    if any((directory / name).exists() for name in CHAT_TEMPLATE_FILES):
        return True
    file = directory / "tokenizer_config.json"
    return file.exists() and bool(read_json_object(file).get("chat_template"))


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
