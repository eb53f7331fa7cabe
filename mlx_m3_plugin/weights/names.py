"""Names of tensors: every spelling in circulation is read into the published one.

``model.layers...``, ``model.embed_tokens``, ``model.norm`` and ``lm_head`` for the text model,
``vision_tower.vision_model...``, ``multi_modal_projector...`` and ``patch_merge_mlp...`` for
vision.  The prefixes that stand before them differ between libraries and versions; what
transformers names otherwise in memory is in its ``conversion_mapping``.
"""

import re
from collections.abc import Iterable

from ..model.config import TextConfig

# Before the text model's names, as the published checkpoint and both libraries' conversions write them.
TEXT_PREFIX = "language_model."
# An expert's projections: the published name -> MLX's.
EXPERT_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

# Some tools add a prefix to names that have it already.
_PREFIXES = r"^(?:model\.|language_model\.)*"
_TEXT = re.compile(_PREFIXES + r"((?:layers|embed_tokens|norm)\..*)$")
_HEAD = re.compile(_PREFIXES + r"(lm_head\..*)$")
_VISION = re.compile(_PREFIXES + r"((?:vision_tower|multi_modal_projector|patch_merge_mlp)\..*)$")
_EXPERT = re.compile(rf"^experts\.(\d+)\.({'|'.join(EXPERT_PROJECTIONS.values())})\.")
_STACKED = re.compile(r"^(?:experts|switch_mlp)\.(gate_up_proj|gate_proj|up_proj|down_proj)(?:\.(\w+))?$")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")

# Heads that draft several tokens; M3.1's DSpark head is published in a folder of its own.
_DRAFT = re.compile(_PREFIXES + r"(?:mtp|dspark)\.")
DRAFT_PREFIX = "language_model.model.dspark."
# What other engines store and nothing needs: the config gives rotary frequencies, and the KV cache here
# has scales of its own.
_EXTRA = re.compile(
    r"(?:^|\.)rotary_emb\.inv_freq$|\.self_attn\.(?:attn\.|[kv]_proj\.)?(?:[kv]_scale|kv_scale|output_scale)$"
)

_VISION_OF_TRANSFORMERS = {
    "vision_tower.embeddings.proj.": "vision_tower.vision_model.embeddings.patch_embedding.",
    "vision_tower.layers.": "vision_tower.vision_model.encoder.layers.",
    "vision_tower.pre_layrnorm.": "vision_tower.vision_model.pre_layrnorm.",
    "multi_modal_projector.merge_linear_": "patch_merge_mlp.linear_",
}


def is_unused(name: str) -> bool:
    """Whether a stored tensor belongs to no part of the model that we run."""
    return is_draft(name) or _EXTRA.search(name) is not None


def is_draft(name: str) -> bool:
    return _DRAFT.match(name) is not None


def draft_parameter(name: str) -> str:
    """A stored name in a DSpark draft head, as that model has it: ``layers.0.self_attn.q_proj.weight``."""
    return _DRAFT.sub("", name).replace(".decoder_layer.", ".").replace("final_norm.", "norm.")


def published_draft_name(parameter: str) -> str:
    """What :func:`draft_parameter` reads as ``parameter``, as MiniMax spells it."""
    name = f"final_{parameter}" if parameter.startswith("norm.") else parameter
    return DRAFT_PREFIX + re.sub(r"^(layers\.\d+\.)", r"\1decoder_layer.", name)


def unused_in_words(names: Iterable[str]) -> list[str]:
    """One line for each kind of unused tensor among stored names."""
    unused = [name for name in names if is_unused(name)]
    prefixes = [match[0] for name in unused if (match := _DRAFT.match(name))]
    lines = []
    if prefixes:
        listed = ", ".join(f"{prefix}*" for prefix in sorted(set(prefixes)))
        lines.append(f"draft tensors are not used: {len(prefixes)} ({listed})")
    if extras := len(unused) - len(prefixes):
        lines.append(f"rotary frequencies and scales of FP8 caches are not used: {extras} tensors")
    return lines


def is_text(published: str) -> bool:
    return published.startswith(("model.", "lm_head."))


def is_vision(published: str) -> bool:
    return _VISION.match(published) is not None


def layer_of(published: str) -> int | None:
    layer = _LAYER.match(published)
    return int(layer[1]) if layer else None


def published_name(name: str, config: TextConfig) -> str:
    """The published spelling of a stored name, without a prefix; unknown names stay as they are."""
    if text := _TEXT.match(name):
        return _in_layer(f"model.{text[1]}", config)
    if head := _HEAD.match(name):
        return head[1]
    if vision := _VISION.match(name):
        for theirs, published in _VISION_OF_TRANSFORMERS.items():
            if vision[1].startswith(theirs):
                return published + vision[1].removeprefix(theirs)
        return vision[1]
    return name


def _in_layer(name: str, config: TextConfig) -> str:
    layer = layer_of(name)
    if layer is None or layer >= config.num_hidden_layers:
        return name
    base, separator, rest = name.partition(f".layers.{layer}.")
    if rest.startswith("self_attn.indexer."):
        rest = rest.replace("self_attn.indexer.", "self_attn.index_")
    elif rest.startswith(("mlp.", "block_sparse_moe.")):
        rest = rest.partition(".")[2]
        # Some store a dense MLP under the name of the mixture, or the other way round.
        rest = f"block_sparse_moe.{_in_moe(rest)}" if config.is_moe(layer) else f"mlp.{rest}"
    return base + separator + rest


def _in_moe(name: str) -> str:
    if name == "gate.e_score_correction_bias":
        return "e_score_correction_bias"
    if expert := _EXPERT.match(name):
        stored = next(w for w, projection in EXPERT_PROJECTIONS.items() if projection == expert[2])
        return f"experts.{expert[1]}.{stored}.{name.removeprefix(expert[0])}"
    stacked = _STACKED.match(name)
    # transformers holds stacked experts as parameters, not as modules with a weight.
    return f"switch_mlp.{stacked[1]}.{stacked[2] or 'weight'}" if stacked else name
