"""The DSpark draft head of MiniMax-M3.1 as a drafter of mlx-vlm.

A few dense layers read the target's hidden states after some of its layers, and propose a block of
tokens in one forward pass.  Rounds, rollback, the Markov and the confidence head are mlx-vlm's own DSpark.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_vlm.speculative.drafters.dspark import DSparkDraftModel, VanillaMarkov
from mlx_vlm.speculative.drafters.dspark.config import DSparkConfig

from mlx_m3_plugin.hosts.loading import describe_to_loader
from mlx_m3_plugin.model.attention import Attention
from mlx_m3_plugin.model.config import text_part
from mlx_m3_plugin.model.decoder import DecoderLayer
from mlx_m3_plugin.model.draft_cost import EXPECTED_ACCEPTANCE, DraftCost, best_length
from mlx_m3_plugin.model.norm import make_norm
from mlx_m3_plugin.weights.check import check_values, check_weights, group_names, shorten
from mlx_m3_plugin.weights.layouts import plan_draft

from .language import TextConfig

__all__ = ["Model", "ModelConfig"]

_REQUIRED = (
    *("num_hidden_layers", "sliding_window", "dspark_block_size", "dspark_target_layer_ids"),
    *("dspark_noise_token_id", "dspark_markov_rank"),
)
# Options of other heads, with the value that is computed here.
_ONLY_KNOWN_VALUE = {"dspark_use_dense_ffn": True, "dspark_hybrid_context_fusion": False, "use_qk_norm": True}
# Attributes of the text config that mlx-vlm's config has as well.
_SAME_KEYS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("rms_norm_eps", "vocab_size"),
)
# Where the target's hidden states are taken: after the listed layers; the same, but after the final norm
# for the last layer, which hidden states of transformers are; or before the listed layers.
FEATURES = ("output", "normed_output", "input")
# What mlx-vlm asks for where the user asks for no length: each round then drafts as many tokens as pay.
_BY_COST = 1 << 20
# As so many drafts counts the acceptance that is expected before any was; each position then expects what
# the one before it has.
_EXPECTED_COUNTS_AS = 4
_RECENT_ROUNDS = 32


@dataclass
class ModelConfig(DSparkConfig):
    """``config.json`` of a draft head, as MiniMax published it.

    Raises:
        ValueError: a key is missing, or has a value that this head does not compute.

    Attributes:
        text: the head's own layers; no mixture of experts, no indexer.
        features: one of ``FEATURES``; ``dspark_features`` in the config.
        is_causal: whether rows of a block see only rows before them; ``dspark_causal`` in the config.
        target_layer_ids: what the target is asked for, by the numbers of its ``capture_layer_ids``.
        block_size: tokens that are verified at most: the newest token and ``proposal_length`` drafts.
        loader_config: the dict that mlx-vlm's loader read, and reads again after ``sanitize``.
    """

    text: Any = None
    features: str = FEATURES[0]
    loader_config: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> "ModelConfig":  # type: ignore[override]
        given = {**(params.get("dspark_config") or {}), **text_part(params)}
        _check(given)
        dense = given.get("moe_layer_freq") or [0] * given["num_hidden_layers"]
        own = {"layer_types": None, "moe_layer_freq": dense, "dense_intermediate_size": _width(given)}
        text = TextConfig(**{**given, **own})
        ids, drafts = given["dspark_target_layer_ids"], given["dspark_block_size"]
        made = cls(
            **{key: getattr(text, key) for key in _SAME_KEYS},
            backbone_model_type="minimax_m3",
            architectures=list(params.get("architectures") or ()),
            intermediate_size=text.dense_intermediate_size,
            layer_types=["sliding_attention"] * text.num_hidden_layers,
            sliding_window=given["sliding_window"],
            is_causal=bool(given.get("dspark_causal", False)),
            block_size=drafts + 1,
            proposal_length=drafts,
            mask_token_id=given["dspark_noise_token_id"],
            target_layer_ids=ids,
            num_target_layers=ids[-1] + 1,
            markov_rank=given["dspark_markov_rank"],
            markov_head_type=given.get("dspark_markov_head_type", "vanilla"),
            enable_confidence_head=bool(given.get("enable_confidence_head", False)),
            confidence_head_with_markov=bool(given.get("confidence_head_with_markov", True)),
            text=text,
            features=given.get("dspark_features", FEATURES[0]),
            loader_config=params,
        )
        # After the constructor, which accepts numbers of layers alone.
        if made.features == "input":
            made.target_layer_ids = [number - 1 for number in ids]
        elif made.features == "normed_output":
            made.target_layer_ids = [*ids[:-1], ids[-1] + 1]
        params.pop("quantization_config", None)
        return made


def _check(given: Mapping[str, Any]) -> None:
    for key in _REQUIRED:
        if given.get(key) is None:
            raise ValueError(f"draft head: its config.json lacks {key}")
    ids, kinds = given["dspark_target_layer_ids"], given.get("layer_types")
    dense, features = given.get("dense_intermediate_size"), given.get("dspark_features", FEATURES[0])
    are_ascending = isinstance(ids, list) and ids == sorted(set(ids)) and min(ids, default=-1) >= 0
    checks = {key: (given.get(key, known) == known, repr(known)) for key, known in _ONLY_KNOWN_VALUE.items()}
    checks |= {
        "layer_types": (set(kinds or ()) <= {"sliding_attention"}, "'sliding_attention' for each layer"),
        "dspark_ffn_hidden_size": (dense in (None, _width(given)), f"dense_intermediate_size ({dense})"),
        "sparse_attention_config": (not given.get("sparse_attention_config"), "null"),
        "moe_layer_freq": (not any(given.get("moe_layer_freq") or ()), "0 for each layer"),
        **{
            key: (isinstance(given[key], int) and given[key] > 0, "a positive integer")
            for key in ("sliding_window", "dspark_block_size")
        },
        "dspark_features": (features in FEATURES, f"one of {', '.join(FEATURES)}"),
        "dspark_target_layer_ids": (are_ascending, "ascending numbers of layers"),
    }
    for key, (holds, what) in checks.items():
        if not holds:
            raise ValueError(f"draft head: {key} in its config.json must be {what}, not {given.get(key)!r}")


def _width(given: Mapping[str, Any]) -> Any:
    return given.get("dspark_ffn_hidden_size") or given.get("dense_intermediate_size")


class Context:
    """K and V of the newest context tokens, as many as a block can see, in order.

    Attributes:
        layers: K and V ``[B, G, S, D]`` of each layer.
        offset: context tokens so far, which is the position of the first row of a block.
    """

    def __init__(self, longest: int):
        self.layers: list[tuple[mx.array, mx.array]] = []
        self.offset = 0
        self._longest = longest

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def append(self, new: list[tuple[mx.array, mx.array]], n_tokens: int) -> None:
        """The last ones of ``n_tokens`` more tokens, or all."""
        if self.layers:
            pairs = zip(self.layers, new, strict=True)
            new = [(self._joined(k, more_k), self._joined(v, more_v)) for (k, v), (more_k, more_v) in pairs]
        self.layers = new
        self.offset += n_tokens

    def _joined(self, held: mx.array, new: mx.array) -> mx.array:
        # Copies at most a window, which is little beside the weights that a round reads.
        joined = mx.concatenate([held, new], axis=2)
        return joined[:, :, max(0, joined.shape[2] - self._longest) :]


class DraftAttention(Attention):
    """Attention of the rows of a block to the context before it, and to each other."""

    def project(self, x: mx.array, offset: int) -> tuple[mx.array, mx.array]:
        """K and V ``[B, G, L, D]`` of tokens ``[B, L, hidden]`` at ``offset`` and on."""
        values = mx.unflatten(self.v_proj(x), -1, (self.num_key_value_heads, -1)).swapaxes(1, 2)
        return self._rotated(self.k_proj(x), self.num_key_value_heads, self.k_norm, offset), values

    def __call__(  # type: ignore[override]
        self, x: mx.array, context: tuple[mx.array, mx.array], offset: int, mask: mx.array | None
    ) -> mx.array:
        batch, length, _ = x.shape
        queries = self._rotated(self.q_proj(x), self.num_attention_heads, self.q_norm, offset)
        own_keys, own_values = self.project(x, offset)
        keys = mx.concatenate([context[0], own_keys], axis=2)
        values = mx.concatenate([context[1], own_values], axis=2)
        out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.scale, mask=mask)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, -1))

    def _rotated(self, projected: mx.array, n_heads: int, norm: Any, offset: int) -> mx.array:
        # In float32 from the norm through the rotation, as the head was trained.
        heads = mx.unflatten(projected.astype(mx.float32), -1, (n_heads, -1))
        return self.rope(norm(heads).swapaxes(1, 2), offset=offset).astype(projected.dtype)


class DraftLayer(DecoderLayer):
    self_attn: DraftAttention

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config.text, layer)
        self.self_attn = DraftAttention(config.text, layer)

    def __call__(  # type: ignore[override]
        self, x: mx.array, context: tuple[mx.array, mx.array], offset: int, mask: mx.array | None
    ) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), context, offset, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class MarkovHead(VanillaMarkov):  # type: ignore[misc]
    def apply_step_logits(self, logits: mx.array, token_ids: mx.array) -> mx.array:
        # In the dtype of the logits, which may be wider than that of the tables.
        return logits + self.markov_w2(self.markov_w1(token_ids).astype(logits.dtype))


def cost_of_rounds(target: Any, drafter: Any) -> DraftCost | None:
    """Counted from the weights in memory, with the K and V of the blocks that a token selects.

    None where experts are on disk.  Whatever else a context costs is read once for all tokens of a pass,
    so that leaving it out makes drafts look dearer than they are.
    """
    text = target.args
    routed = sum(_size(layer.block_sparse_moe.switch_mlp) for layer in target.layers if layer.is_moe)
    if not routed and "sparse" in text.mlp_layer_types:
        return None
    embedding = _size(target.model.embed_tokens)
    selected = sum(map(text.is_sparse_attention, range(text.num_hidden_layers))) * text.budget
    layers = sum(map(_size, (drafter.fc, drafter.hidden_norm, *drafter.layers, drafter.norm)))
    return DraftCost(
        shared=_size(target) - routed - (0 if text.tie_word_embeddings else embedding),
        per_token=selected * 2 * text.num_key_value_heads * text.head_dim * 2,
        routed=routed,
        experts=text.num_local_experts,
        experts_per_token=text.num_experts_per_tok,
        draft=layers + (embedding if text.tie_word_embeddings else _size(target.lm_head)),
        per_drafted=_size(drafter.markov_head.markov_w2),
    )


def _size(module: nn.Module) -> int:
    """Bytes of its parameters."""
    arrays: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    return sum(array.nbytes for array in arrays.values())


class Model(DSparkDraftModel):  # type: ignore[misc]
    """Proposes tokens from the newest one and the target's hidden states before it.

    It has no embedding and no language-model head of its own: :meth:`bind` takes the target's.
    """

    layer_class = DraftLayer
    default_runtime_block_size = _BY_COST

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.cost: DraftCost | None = None
        self._is_by_cost = False
        self._n_rows = 0
        self._earlier: list[tuple[float, int]] = []
        self.hidden_norm = make_norm(config.text, config.hidden_size)
        self.norm = make_norm(config.text, config.hidden_size)
        self.markov_head = MarkovHead(config.vocab_size, config.markov_rank)
        # Each layer has its own.
        self.rope = None

    # --- the target ---

    def validate_target_compatibility(self, target: Any) -> None:
        """Raises: ValueError: the target has other widths, another vocabulary, or too few layers."""
        language_model = getattr(target, "language_model", target)
        text = getattr(language_model, "args", None)
        if not isinstance(text, TextConfig):
            raise ValueError("this draft head is for MiniMax-M3.1, which the model is not")
        for key in ("hidden_size", "vocab_size"):
            own, its = getattr(self.config, key), getattr(text, key)
            if own != its:
                raise ValueError(f"this draft head is for a model with {key} {own}, not {its}")
        last, n_layers = self.config.num_target_layers - 1, text.num_hidden_layers
        if last >= n_layers:
            raise ValueError(f"this draft head reads layer {last} of a model that has {n_layers} layers")
        if self.config.features == "normed_output" and last != n_layers - 1:
            raise ValueError(
                f"dspark_features is 'normed_output', but layer {last} is not the last of {n_layers}"
            )
        self.cost = cost_of_rounds(language_model, self)

    def bind(self, target: Any) -> "Model":
        self.embed_tokens = None
        super().bind(target)
        return self

    # --- how many tokens to draft ---

    def reset(self, target: Any) -> "Context":  # type: ignore[override]
        self._earlier = self._rounds()
        cache = super().reset(target)
        # For a batch mlx-vlm then makes one for each row.
        self._n_rows = 0
        return cache  # type: ignore[no-any-return]

    def choose_block_ceiling(self, context_length: int, requested_block_size: int) -> int:
        """Raises: ValueError: less than one draft is asked for."""
        if requested_block_size < 2:
            raise ValueError(
                f"--draft-block-size {requested_block_size}: a block is the newest token and its drafts, so "
                "it has at least 2; leave --draft-model out to draft nothing"
            )
        self._is_by_cost = requested_block_size == _BY_COST
        return min(requested_block_size, self.config.block_size)

    def next_block_size(self, most: int) -> int:
        """Tokens that the next round verifies, the newest one included; at least one draft."""
        return min(most, 1 + max(1, self.best_length(max(1, self._n_rows)))) if self._is_by_cost else most

    def best_length(self, rows: int = 1) -> int:
        """How many tokens to draft by cost and acceptance, for each of ``rows``; 0 where no length pays."""
        return 1 if self.cost is None else best_length(self.cost, self.acceptance(), rows)

    def acceptance(self) -> list[float]:
        """Of each draft of a block, the probability that it is accepted if all before it were."""
        found, expected = [], EXPECTED_ACCEPTANCE
        for position in range(self.config.proposal_length):
            tried = sum(n > position and accepted >= position for accepted, n in self._rounds())
            accepted = sum(accepted > position for accepted, _ in self._rounds())
            weight = tried + _EXPECTED_COUNTS_AS
            expected = (accepted + _EXPECTED_COUNTS_AS * expected) / weight
            found.append(expected)
        return found

    def _rounds(self) -> list[tuple[float, int]]:
        """Accepted and drafted tokens of the newest rounds, those of earlier answers included."""
        newest = zip(self.accept_lens, self.draft_lens, strict=True)
        return [*self._earlier, *newest][-_RECENT_ROUNDS:]

    # --- a round ---

    @property
    def longest_context(self) -> int:
        """Tokens before a block that its first row sees."""
        return self.config.sliding_window - 1

    def make_cache(self) -> Context:  # type: ignore[override]
        self._n_rows += 1
        return Context(self.longest_context)

    def _hidden(self, inputs: mx.array, target_hidden: mx.array, cache: Context) -> mx.array:
        """Normed hidden states ``[B, L, D]`` of ``inputs`` ``[B, L]``, the first tokens of a block.

        All tokens that the head was trained with are computed, also where fewer are drafted: they see each
        other.

        Args:
            target_hidden: the target's hidden states ``[B, S, layers * D]`` of the ``S >= 1`` tokens before
                the block that ``cache`` does not have yet.
        """
        self.append_context(target_hidden, cache)
        n_drafts, length = inputs.shape[1], self.config.proposal_length
        block = mx.pad(inputs, [(0, 0), (0, length - n_drafts)], constant_values=self.config.mask_token_id)
        mask = self.mask(length, cache)
        h = self._embed_input_tokens(block)
        for layer, context in zip(self.layers, cache.layers, strict=True):
            h = layer(h, context, cache.offset, mask)
        return self.norm(h)[:, :n_drafts]

    def append_context(self, target_hidden: mx.array, cache: Context) -> None:
        """Add K and V of the tokens with these hidden states ``[B, S, layers * hidden_size]``."""
        n_tokens = target_hidden.shape[1]
        # Older ones are out of every row's window.
        seen = target_hidden[:, max(0, n_tokens - self.longest_context) :]
        context = self.hidden_norm(self.fc(seen))
        offset = cache.offset + n_tokens - seen.shape[1]
        cache.append([layer.self_attn.project(context, offset) for layer in self.layers], n_tokens)

    def mask(self, n_rows: int, cache: Context) -> mx.array | None:
        """Which of the context's tokens and of a block's rows each row sees; None where it is all.

        The window counts from each row's own position.
        """
        oldest = cache.offset + n_rows - self.config.sliding_window
        first = cache.offset - cache.length
        if first >= oldest and not self.config.is_causal:
            return None
        rows = mx.arange(cache.offset, cache.offset + n_rows)[:, None]
        keys = mx.arange(first, cache.offset + n_rows)
        last = rows if self.config.is_causal else cache.offset + n_rows
        return (keys > rows - self.config.sliding_window) & (keys <= last)

    # --- loading ---

    def sanitize(self, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Map the tensors of a published or converted head to this model's parameter names.

        Raises:
            ValueError: a tensor is missing, is there twice, or is in a format that MLX cannot compute with.
        """
        plan = plan_draft(weights, self.config.text)
        parameters = dict(tree_flatten(self.parameters()))
        # mlx-vlm would go on without a module that has no weights.
        if missing := parameters.keys() - plan.keys():
            raise ValueError(f"this draft head lacks {', '.join(shorten(group_names(missing)))}")
        describe_to_loader(self.config.loader_config, plan, parameters)
        return {name: tensor.make(weights) for name, tensor in plan.items()}

    def load_weights(self, weights: list[tuple[str, mx.array]], strict: bool = True) -> Any:
        """Raises: ValueError: when ``strict``, tensors are left over, or of the wrong shape or dtype."""
        if strict:
            check_weights(dict(weights), dict(tree_flatten(self.parameters())))
        super().load_weights(weights, strict=strict)
        return self

    def check_values(self) -> None:
        """See :func:`~mlx_m3_plugin.weights.check_values`."""
        check_values(self)
