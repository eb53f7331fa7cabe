"""Names of tensors: every spelling in circulation is read into the published one.

``model.layers...``, ``model.embed_tokens``, ``model.norm`` and ``lm_head`` for the text model,
``vision_tower.vision_model...``, ``multi_modal_projector...`` and ``patch_merge_mlp...`` for
vision.  The prefixes that stand before them differ between libraries and versions; what
transformers names otherwise in memory is in its ``conversion_mapping``.
"""

import re

from ..model.config import TextConfig

# Before the text model's names, as the published checkpoint and both libraries' conversions write them.
TEXT_PREFIX = "language_model."
# An expert's projections: the published name -> MLX's.
EXPERT_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

_TEXT = re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?((?:layers|embed_tokens|norm)\..*)$")
_HEAD = re.compile(r"^(?:model\.)?(?:language_model\.)?(lm_head\..*)$")
_VISION = re.compile(r"^(?:model\.)?((?:vision_tower|multi_modal_projector|patch_merge_mlp)\..*)$")
_STACKED = re.compile(r"^(?:experts|switch_mlp)\.(gate_up_proj|gate_proj|up_proj|down_proj)(?:\.(\w+))?$")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")

# Heads for predicting several tokens, which the config promises and no release has.
_UNUSED = re.compile(r"^(?:model\.|language_model\.)*mtp\.")

_VISION_OF_TRANSFORMERS = {
    "vision_tower.embeddings.proj.": "vision_tower.vision_model.embeddings.patch_embedding.",
    "vision_tower.layers.": "vision_tower.vision_model.encoder.layers.",
    "vision_tower.pre_layrnorm.": "vision_tower.vision_model.pre_layrnorm.",
    "multi_modal_projector.merge_linear_": "patch_merge_mlp.linear_",
}


def is_unused(name: str) -> bool:
    return _UNUSED.match(name) is not None


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
    stacked = _STACKED.match(name)
    # transformers holds stacked experts as parameters, not as modules with a weight.
    return f"switch_mlp.{stacked[1]}.{stacked[2] or 'weight'}" if stacked else name
