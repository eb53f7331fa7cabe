"""The configs that mlx-vlm asks for: upstream's, with our text config in them."""

from dataclasses import dataclass, field
from typing import Any

from mlx_m3_plugin.hosts.loading import text_config_as_set

from . import parts

upstream: Any = parts.upstream("config")


class VisionConfig(upstream.VisionConfig):
    """Reads transformers' spelling too."""

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> "VisionConfig":
        params = dict(params)
        flat = {key: params[key] for key in ("spatial_merge_size", "temporal_patch_size") if key in params}
        params["img_token_compression_config"] = {
            **flat,
            **(params.get("img_token_compression_config") or {}),
        }
        rope = params.get("rope_parameters") or {}
        params.setdefault("rope_theta", rope.get("rope_theta", cls.rope_theta))
        return super().from_dict(params)


@dataclass
class ModelConfig(upstream.ModelConfig):
    """``config.json`` of a checkpoint with ``text_config`` and ``vision_config``.

    Attributes:
        loader_config: the dict that mlx-vlm's loader read, and reads again after ``sanitize``.
    """

    loader_config: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> "ModelConfig":
        made = super().from_dict(params)
        made.text_config = text_config_as_set(params)
        made.vision_config = VisionConfig.from_dict(params.get("vision_config") or {})
        made.loader_config = params
        # We read quantization from the tensors.  Left here, it would make mlx-vlm unpack some formats
        # before our layouts see them, and look for modules that are not there any more.
        made.quantization = made.quantization_config = None
        params.pop("quantization_config", None)
        if isinstance(params.get("text_config"), dict):
            params["text_config"].pop("quantization_config", None)
        return made
