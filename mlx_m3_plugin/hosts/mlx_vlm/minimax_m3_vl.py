"""``mlx_vlm.models.minimax_m3_vl``: MiniMax-M3 with images and video.

mlx-vlm executes this file under its own module name, as a package whose sub-modules stay
upstream's, so every import is absolute.
"""

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_m3_plugin.hosts.mlx_vlm.parts import check_parts

check_parts()

from mlx_vlm.models.minimax_m3_vl.config import ModelConfig as UpstreamModelConfig  # noqa: E402
from mlx_vlm.models.minimax_m3_vl.config import VisionConfig as UpstreamVisionConfig  # noqa: E402
from mlx_vlm.models.minimax_m3_vl.minimax_m3_vl import MiniMaxProjector  # noqa: E402
from mlx_vlm.models.minimax_m3_vl.minimax_m3_vl import Model as UpstreamModel  # noqa: E402
from mlx_vlm.models.minimax_m3_vl.processing_minimax_m3_vl import (  # noqa: E402
    MiniMaxM3VLImageProcessor,
    MiniMaxM3VLProcessor,
    MiniMaxM3VLVideoProcessor,
    MiniMaxVLProcessor,
)
from mlx_vlm.models.minimax_m3_vl.vision import VisionModel  # noqa: E402

from mlx_m3_plugin.hosts.loading import text_config_as_set  # noqa: E402
from mlx_m3_plugin.hosts.mlx_vlm.cache import QuantizedMiniMaxM3KVCache  # noqa: E402
from mlx_m3_plugin.hosts.mlx_vlm.language import LanguageModel, TextConfig  # noqa: E402
from mlx_m3_plugin.hosts.mlx_vlm.model import MlxVlmModel, refuse_pixels  # noqa: E402

__all__ = [
    "LanguageModel",
    "MiniMaxM3VLImageProcessor",
    "MiniMaxM3VLProcessor",
    "MiniMaxM3VLVideoProcessor",
    "MiniMaxVLProcessor",
    "Model",
    "ModelConfig",
    "QuantizedMiniMaxM3KVCache",
    "TextConfig",
    "VisionConfig",
    "VisionModel",
]

VISION_PARTS = ("vision_tower", "multi_modal_projector", "patch_merge_mlp")


class VisionConfig(UpstreamVisionConfig):
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
class ModelConfig(UpstreamModelConfig):
    """``config.json`` of a checkpoint with ``text_config`` and ``vision_config``.

    Attributes:
        loader_config: the dict that mlx-vlm's loader read, and reads again after ``sanitize``.
    """

    loader_config: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> "ModelConfig":
        made = super().from_dict(params)
        made.text_config = text_config_as_set(params, TextConfig)
        made.vision_config = VisionConfig.from_dict(params.get("vision_config") or {})
        made.loader_config = params
        # We read quantization from the tensors.  Left here, it would make mlx-vlm unpack some formats
        # before our layouts see them.
        params.pop("quantization_config", None)
        if isinstance(params.get("text_config"), dict):
            params["text_config"].pop("quantization_config", None)
        return made


class Model(MlxVlmModel, UpstreamModel):
    """Upstream's vision tower, projectors and merging around our language model."""

    takes_vision = True

    def __init__(self, config: ModelConfig):
        nn.Module.__init__(self)
        if config.loader_config:
            # The loader has replaced our text config with its own.
            config.text_config = text_config_as_set(config.loader_config, TextConfig)
        text, vision = config.text_config, config.vision_config
        layers = config.vision_feature_layer
        self.config = config
        self.model_type = config.model_type
        self.vision_feature_layer = layers
        self.vision_feature_select_strategy = config.vision_feature_select_strategy
        self.vision_tower = VisionModel(vision)
        self.language_model = LanguageModel(text, config)
        self.multi_modal_projector = MiniMaxProjector(
            vision.hidden_size * (1 if isinstance(layers, int) else len(layers)),
            config.projector_hidden_size,
            text.hidden_size,
            config.multimodal_projector_bias,
            config.projector_hidden_act,
        )
        self.patch_merge_mlp = MiniMaxProjector(
            text.hidden_size * vision.spatial_merge_size**2,
            text.hidden_size,
            text.hidden_size,
            config.patch_merge_bias,
            config.projector_hidden_act,
        )

    def __call__(
        self,
        input_ids: mx.array,
        pixel_values: mx.array | None = None,
        mask: mx.array | None = None,
        cache: Any = None,
        inputs_embeds: mx.array | None = None,
        **kwargs: Any,
    ) -> Any:
        """Token ids ``[B, L]`` with pixel values to ``LanguageModelOutput``.

        Raises:
            ValueError: both pixels and ``inputs_embeds``, which hold the images already.
        """
        if inputs_embeds is not None and pixel_values is not None:
            raise ValueError("give either pixel_values or inputs_embeds, not both")
        if inputs_embeds is None:
            made = self.get_input_embeddings(input_ids, pixel_values, **kwargs).to_dict()
            kwargs = {**kwargs, **made}
            inputs_embeds = kwargs.pop("inputs_embeds")
        return self.language_model(input_ids, inputs_embeds=inputs_embeds, mask=mask, cache=cache, **kwargs)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """As :meth:`CheckpointMixin.sanitize`; without any vision tensor this becomes a text model.

        Raises:
            ValueError: as there, and when some vision parts have tensors and others have none.
        """
        if not isinstance(self, Model):
            # Some tools give an object that has the configs alone.
            return UpstreamModel.sanitize(self, weights)
        mapped = super().sanitize(weights)
        absent = [p for p in VISION_PARTS if not any(name.startswith(f"{p}.") for name in mapped)]
        # Tools that map a few tensors at a time leave most of everything out.
        if f"{self.text_prefix}model.embed_tokens.weight" in mapped and absent:
            if len(absent) < len(VISION_PARTS):
                raise ValueError(f"this checkpoint has vision tensors, but none of {', '.join(absent)}")
            for part in VISION_PARTS:
                setattr(self, part, None)
        return mapped

    def get_input_embeddings(
        self, input_ids: mx.array | None = None, pixel_values: mx.array | None = None, **kwargs: Any
    ) -> Any:
        """Token embeddings, with image and video features in the place of their tokens.

        Raises:
            ValueError: there are pixels, and this checkpoint has no vision tower.
        """
        if self.vision_tower is None:
            refuse_pixels(pixel_values, kwargs)
        cached = kwargs.get("cached_image_features")
        if isinstance(cached, (list, tuple)):
            kwargs["cached_image_features"] = mx.concatenate(list(cached), axis=0)
        elif cached is None:
            self._use_vision_cache(pixel_values, kwargs)
        return super().get_input_embeddings(input_ids, pixel_values, **kwargs)

    def _use_vision_cache(self, pixel_values: mx.array | None, kwargs: dict[str, Any]) -> None:
        """The server gives a cache of image features and the key of this request's images."""
        cache, key = kwargs.pop("vision_cache", None), kwargs.pop("_image_key", None)
        grid = kwargs.get("image_grid_thw")
        if cache is None or key is None or pixel_values is None or grid is None:
            return
        features = cache.get(key)
        if features is None:
            features = self._compute_visual_features(pixel_values, grid)
            cache.put(key, features)
        kwargs["cached_image_features"] = features

    def encode_image(self, pixel_values: mx.array, image_grid_thw: mx.array | None = None) -> Any:
        """Features ``[image tokens, D]``.  None without the grid, which some callers do not pass:
        the features are then made with the embeddings."""
        return None if image_grid_thw is None else self._compute_visual_features(pixel_values, image_grid_thw)

    def encode_images(
        self, pixel_values: mx.array, image_grid_thw: mx.array | None = None, **kwargs: Any
    ) -> list[mx.array]:
        """The features of each image, to be cached one by one."""
        if image_grid_thw is None:
            raise ValueError("MiniMax-M3 needs image_grid_thw to encode images")
        features = self._compute_visual_features(pixel_values, image_grid_thw)
        merge = self.config.vision_config.spatial_merge_size
        counts = image_grid_thw.prod(axis=1) // merge**2
        splits: Any = mx.cumsum(counts).tolist()
        return list(mx.split(features, splits[:-1], axis=0))
