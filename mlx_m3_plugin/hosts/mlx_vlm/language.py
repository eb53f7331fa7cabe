"""The language model as mlx-vlm calls it: with embeddings, an output object, and drafted tokens."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_vlm.models.base import LanguageModelOutput, create_attention_mask, scaled_dot_product_attention

from mlx_m3_plugin.model import config, decoder
from mlx_m3_plugin.model.host import Host
from mlx_m3_plugin.model.kv_cache import is_batch
from mlx_m3_plugin.model.sharding import shard_layers

from . import cache as caches
from . import parts

# Arguments that other models take.  Ignoring them would make the answer wrong.
_NOT_TAKEN = (
    "attention_mask_4d",
    "cross_attention_mask",
    "cross_attention_states",
    "decoder_inputs_embeds",
    "deepstack_visual_embeds",
    "full_text_row_masked_out_mask",
    "input_embeddings",
    "per_layer_inputs",
)

# Tokens of a prompt that is not given in pieces to an EAGLE-3 head.
_LONGEST_WHOLE = 8192

upstream: Any = parts.upstream("language")


def attention(queries: mx.array, keys: Any, values: Any, *, cache: Any, scale: float, mask: Any) -> mx.array:
    """mlx-vlm's fused attention, for layers and steps that attend to everything.

    Raises:
        NotImplementedError: a batch with quantized K and V.  mlx-vlm has no such cache for
            MiniMax-M3, and would go on with wrong masks.
    """
    # until: mlx-vlm 0.7
    if is_batch(cache) and "Quant" in type(cache).__name__:
        raise NotImplementedError(
            "MiniMax-M3 cannot quantize K and V in a batch: leave --kv-bits out, or send one request "
            "at a time"
        )
    return scaled_dot_product_attention(queries, keys, values, cache=cache, scale=scale, mask=mask)


initialize_rope, SwitchGLU = parts.rope_and_experts()

MLX_VLM = Host(
    SwitchGLU=SwitchGLU,
    initialize_rope=initialize_rope,
    attention_mask=create_attention_mask,
    attention=attention,
    kv_cache=caches.kv_cache,
    append_index_keys=caches.append_index_keys,
    adopt=caches.adopt,
)


class TextConfig(config.TextConfig):
    host = MLX_VLM


class TextModel(decoder.TextModel):
    """With mlx-vlm's names for embeddings, and hidden states of layers for drafters."""

    def __call__(  # type: ignore[override]
        self,
        inputs: mx.array,
        inputs_embeds: mx.array | None = None,
        mask: mx.array | None = None,
        cache: Any = None,
        capture_layer_ids: Sequence[int] | None = None,
        hidden_sink: list[mx.array] | None = None,
        position_ids: mx.array | None = None,
    ) -> mx.array:
        """Token ids ``[B, L]`` or embeddings ``[B, L, D]`` -> normed hidden states ``[B, L, D]``.

        Args:
            mask: ``[B, L]``, 1 for tokens and 0 for padding.  Without a ``cache`` padding may be on
                both sides.  With one it is on the left, and an empty ``cache`` becomes that of a
                padded batch, in place; see :func:`.cache.add_padding`.
            capture_layer_ids: layers whose output goes into ``hidden_sink``, in their order; -1 for the
                embeddings, and the number of layers for the hidden states after the final norm.
                Without them it gets the last hidden states before that norm.
            position_ids: ignored; positions follow from the cache, in content.

        Raises:
            ValueError: ``mask`` has other values than padding, or does not fit the cache.
        """
        h = self.embed_tokens(inputs) if inputs_embeds is None else inputs_embeds
        if mask is not None and cache is None:
            cache = caches.cache_for_padding(self.make_cache(), mask, h.shape[:2])
        elif mask is not None:
            self.host.adopt(cache)
            caches.add_padding(cache, mask, h.shape[:2])
        captured = set(capture_layer_ids or ())

        def capture(layer: int, output: mx.array) -> None:
            if layer in captured and hidden_sink is not None:
                hidden_sink.append(output)

        capture(-1, h)
        h = self.run_layers(h, cache, capture)
        if hidden_sink is not None and not captured:
            hidden_sink.append(h)
        normed = self.norm(h)
        capture(self.config.num_hidden_layers, normed)
        return normed

    def make_cache(self) -> list[Any]:
        return [caches.make_layer_cache(layer.self_attn.is_sparse_attn) for layer in self.pipeline_layers]


class LanguageModel(decoder.LanguageModel):
    """Token ids ``[B, L]`` or embeddings to :class:`LanguageModelOutput`.

    It has no ``get_rope_index``: mlx-vlm would ask it for the positions of a whole prompt and
    pass them for the part that is not cached.
    """

    model: TextModel

    # Rows of a batch that accept different numbers of drafted tokens cannot be rolled back.
    requires_uniform_batch_acceptance = True

    def __init__(self, args: config.TextConfig, config: Any = None):
        super().__init__(args, MLX_VLM, TextModel)
        self.args = args
        # Drafters read it: the whole model's config.
        self.config = config or args
        self.model_type = args.model_type

    def __call__(  # type: ignore[override]
        self,
        inputs: mx.array,
        inputs_embeds: mx.array | None = None,
        mask: mx.array | None = None,
        cache: Any = None,
        capture_layer_ids: Sequence[int] | None = None,
        return_hidden: bool = False,
        return_shared_kv: bool = False,
        skip_logits: bool = False,
        hidden_sink: list[mx.array] | None = None,
        attention_mask: mx.array | None = None,
        logits_to_keep: int | None = None,
        **kwargs: Any,
    ) -> LanguageModelOutput:
        """Token ids ``[B, L]`` or embeddings ``[B, L, D]`` to logits ``[B, L, vocab_size]`` and more.

        Args:
            attention_mask: another name of ``mask``; see :class:`TextModel`.
            logits_to_keep: logits of that many last tokens only, ``[B, n, vocab_size]``; of all
                without it, and for 0.
            kwargs: arguments that mlx-vlm passes to every model, such as image grids.  Not needed:
                the embeddings hold the images, and positions follow from the cache.

        Raises:
            ValueError: the mask has other values than padding or does not fit the cache, or an
                argument is given that M3 would ignore though it changes the answer.
        """
        for name in _NOT_TAKEN:
            if kwargs.get(name) is not None:
                raise ValueError(f"MiniMax-M3 does not support {name}: leave it out")
        if hidden_sink is None and (capture_layer_ids is not None or return_hidden):
            hidden_sink = []
        h = self.model(
            inputs,
            inputs_embeds=inputs_embeds,
            mask=attention_mask if mask is None else mask,
            cache=cache,
            capture_layer_ids=capture_layer_ids,
            hidden_sink=hidden_sink,
        )
        if logits_to_keep:
            h = h[:, -logits_to_keep:]
        return LanguageModelOutput(
            logits=None if skip_logits else self.logits(h),
            hidden_states=hidden_sink,
            # K and V are not shared between layers.
            shared_kv_states={} if return_shared_kv else None,
        )

    @staticmethod
    def chunked_prefill_policy(
        input_ids: mx.array | None = None, draft_model: Any = None, draft_kind: str | None = None, **_: Any
    ) -> bool:
        """Whether mlx-vlm may give a prompt in pieces.

        With a drafter it may where it keeps the hidden states that the drafter reads of all pieces.  Of an
        EAGLE-3 head it then keeps the states but not the tokens, so that few drafts are accepted.
        """
        if draft_model is None:
            return True
        if not parts.keeps_hidden_states():
            return False
        is_long = input_ids is None or input_ids.shape[1] > _LONGEST_WHOLE
        return draft_kind == "dflash" or (draft_kind == "eagle3" and is_long)

    @property
    def layers(self) -> list[decoder.DecoderLayer]:
        """The layers that this process runs."""
        return self.model.pipeline_layers

    @property
    def head_dim(self) -> int:
        return self.args.head_dim

    @property
    def n_kv_heads(self) -> int:
        return self.args.num_key_value_heads

    def make_cache(self) -> list[Any]:
        return self.model.make_cache()

    def shard(self, group: mx.distributed.Group | None = None) -> None:
        shard_layers(self.layers, group or mx.distributed.init())

    # No ``logits_from_hidden``: with it, mlx-vlm verifies drafts of EAGLE-3 heads that know a part of the
    # vocabulary by the embedding, as if that were the head.

    def speculative_logits_from_hidden(self, hidden: mx.array) -> mx.array:
        """From what ``hidden_sink`` gets: hidden states before the final norm."""
        return self.logits(self.model.norm(hidden))

    def speculative_argmax_from_hidden(self, hidden: mx.array) -> mx.array:
        return mx.argmax(self.speculative_logits_from_hidden(hidden), axis=-1)

    def rollback_speculative_cache(self, caches: Any, gdn_states: Any, accepted: Any, block_size: int) -> int:
        """Remove drafted tokens that were not accepted; returns the number of accepted ones.

        Raises:
            RuntimeError: rows of a batch have accepted different numbers, of which some versions
                of mlx-vlm would leave traces in the cache.
        """
        counts: Any = mx.array(accepted).reshape(-1).tolist()
        if len(set(counts)) > 1:
            raise RuntimeError(
                f"MiniMax-M3 needs uniform acceptance, but the rows of a batch accepted {counts} tokens"
            )
        return upstream.LanguageModel.rollback_speculative_cache(
            self, caches, gdn_states, accepted, block_size
        )
