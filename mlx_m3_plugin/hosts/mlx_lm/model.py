"""What mlx-lm's two M3 modules share: the library as a host, the config, and the base of the models."""

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.rope_utils import initialize_rope
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_m3_plugin.hosts.loading import CheckpointMixin, text_config_as_set
from mlx_m3_plugin.model.config import TextConfig
from mlx_m3_plugin.model.host import Host

from . import cache

MLX_LM = Host(
    SwitchGLU=SwitchGLU,
    initialize_rope=initialize_rope,
    attention_mask=create_attention_mask,
    attention=scaled_dot_product_attention,
    kv_cache=cache.kv_cache,
    append_index_keys=cache.append_index_keys,
    adopt=cache.adopt,
)


class TextArgs(TextConfig):
    """mlx-lm's name of it."""

    host = MLX_LM


@dataclass
class ModelArgs:
    """``config.json`` of a checkpoint, published or re-saved: with a ``text_config``, or flat."""

    text_config: TextConfig
    model_type: str = "minimax_m3_vl"
    loader_config: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.text_config, dict):
            self.text_config = TextArgs.from_dict(self.text_config)

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> "ModelArgs":
        text = text_config_as_set(params, TextArgs)
        return cls(text, params.get("model_type", cls.model_type), params)


class MlxLmModel(CheckpointMixin):
    """Base of the two ``Model`` classes; they differ in where the text model is."""

    args: ModelArgs

    @property
    def model_type(self) -> str:
        return self.args.model_type

    @property
    def loader_config(self) -> dict[str, Any]:
        return self.args.loader_config

    def make_cache(self) -> list[cache.CacheList]:
        return [cache.make_layer_cache(layer.self_attn.is_sparse_attn) for layer in self.layers]

    @property
    def cache_list_head_counts(self) -> list[list[int]]:
        """KV heads of each cache of each layer; vmlx's prefix cache asks for them."""
        heads = [self.args.text_config.num_key_value_heads, 1]
        return [heads[: len(entry.caches)] for entry in self.make_cache()]

    def pipeline(self, group: mx.distributed.Group, split: list[int] | None = None) -> None:
        self.language_model.model.pipeline(group, split)
