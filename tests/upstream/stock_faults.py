"""What the stock libraries get wrong with M3: run with ``MLX_M3_PLUGIN=off``.

    python stock_faults.py ASKED OUT

Each function measures one fault of ``docs/upstream.md``.  ASKED is a JSON list of ``[function, model]``; OUT
becomes one of what they return, or of ``{"failed": traceback}``.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

PROMPT = [7 + (31 * i * i + 17 * i) % 250 for i in range(120)]
# Not a multiple of the block size, which is 8 in the demo model.
PADDING = 5


def lm(model: str) -> Any:
    from mlx_lm.utils import load_model

    return load_model(Path(model))[0]


def vlm(model: str) -> Any:
    from mlx_vlm.utils import load_model

    return load_model(Path(model)).language_model


def logits(model: Any, tokens: list[int], cache: Any = None) -> mx.array:
    found = model(mx.array([tokens]), cache=cache)
    return getattr(found, "logits", found)[0].astype(mx.float32)


def vlm_logits(model: str) -> list[float]:
    return np.array(logits(vlm(model), PROMPT)).tolist()


def lm_logits(model: str) -> list[float]:
    return np.array(logits(lm(model), PROMPT)).tolist()


def lm_blocks_start_at_slots(model: str) -> float:
    from mlx_lm.models.cache import BatchKVCache, CacheList

    return moved_by_padding(lm(model), lambda c: CacheList(*(BatchKVCache([PADDING]) for _ in c.caches)))


def vlm_blocks_start_at_slots(model: str) -> float:
    loaded = vlm(model)
    from mlx_vlm.models.cache import BatchKVCache

    return moved_by_padding(
        loaded, lambda c: c.to_batch([PADDING]) if hasattr(c, "to_batch") else BatchKVCache([PADDING])
    )


def moved_by_padding(model: Any, padded_cache: Callable[[Any], Any]) -> float:
    """How far the logits of a row move by padding it on the left."""
    alone = logits(model, PROMPT, model.make_cache())
    cache = [padded_cache(entry) for entry in model.make_cache()]
    padded = logits(model, [0] * PADDING + PROMPT, cache)[PADDING:]
    return mx.abs(padded - alone).max().item()


def lm_ignores_kv_bits(model: str) -> bool:
    """Whether ``--kv-bits 4`` is taken and changes nothing."""
    from mlx_lm.generate import generate_step

    loaded = lm(model)
    found = []
    for options in ({}, {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 0}):
        steps = generate_step(mx.array(PROMPT), loaded, max_tokens=4, **options)
        found.append([np.array(logprobs.astype(mx.float32)) for _, logprobs in steps])
    return all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


def lm_tool_parser(model: str) -> str | None:
    """What is inferred from the two words of the published template that are looked for."""
    from mlx_lm.tokenizer_utils import _infer_tool_parser
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{# <mm:think> <tool_call> #}{{ tool_call.name }}"
    return _infer_tool_parser(tokenizer)


def lm_think_marker(model: str) -> str | None:
    from mlx_lm.utils import load_tokenizer

    return load_tokenizer(Path(model)).think_start


def lm_roles_of_deltas(model: str) -> list[str | None]:
    """Of two pieces of a reply that streams."""
    from mlx_lm.server import APIHandler

    handler: Any = SimpleNamespace(stream=True, object_type="chat.completion.chunk")
    vars(handler).update(dict.fromkeys(("request_id", "system_fingerprint", "requested_model", "created")))
    deltas = [APIHandler.generate_response(handler, text, None)["choices"][0]["delta"] for text in "ab"]
    return [delta.get("role") for delta in deltas]


def lm_masks_grow_with_heads(model: str) -> float:
    """Bytes that a chunk's peak grows by with the context, for each pair of query and key."""
    loaded, chunk, peaks = lm(model), 128, []
    contexts = (512, 1536)
    for context in contexts:
        cache = loaded.make_cache()
        mx.eval(logits(loaded, (PROMPT * 30)[: context - chunk], cache)[-1])
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(logits(loaded, (PROMPT * 3)[:chunk], cache)[-1])
        peaks.append(mx.get_peak_memory() - before)
    return (peaks[1] - peaks[0]) / (chunk * (contexts[1] - contexts[0]))


def lm_leaves_weights_random(model: str) -> bool:
    """Whether ``sharded_load`` takes a checkpoint that lacks a projection.  Spoils the checkpoint."""
    from mlx_lm.utils import sharded_load

    for file in Path(model).glob("*.safetensors"):
        weights = mx.load(str(file))
        lacking = {name: a for name, a in weights.items() if "layers.3.self_attn.o_proj" not in name}
        if len(lacking) < len(weights):
            mx.eval(lacking)
            mx.save_safetensors(str(file), lacking, {"format": "pt"})
    sharded_load(model, tensor_group=mx.distributed.init())
    return True


def vlm_think_marker(model: str) -> list[str | None]:
    """Reasoning and content of a reply, with the server's own settings."""
    from mlx_vlm.server.app import _split_thinking
    from mlx_vlm.server.generation import get_server_thinking_end_token, get_server_thinking_start_token

    reply = "<mm:think>because</mm:think>answer"
    return list(_split_thinking(reply, get_server_thinking_start_token(), get_server_thinking_end_token()))


def vlm_module_of_draft_head(model: str) -> str:
    from mlx_vlm.utils import get_model_and_args

    config = {"architectures": ["DSparkMiniMaxDraftModel"], "model_type": "minimax_m3_vl"}
    return get_model_and_args(config)[0].__name__


def vlm_tokens_of_cache(model: str) -> int:
    """Of the tokens of a cache that has four of five, as a round of drafts leaves it."""
    from mlx_vlm.generate.common import PromptCacheState

    target = vlm(model)
    cache = target.make_cache()
    target(mx.array([PROMPT[:4]]), cache=cache)
    state = PromptCacheState()
    state.update(PROMPT[:5], cache)
    return state.find_prefix_length(PROMPT)


def vlm_processed_with_drafts(model: str) -> int:
    """How many of eight drafted tokens a logits processor sees."""
    from mlx_vlm.generate import generate_step
    from mlx_vlm.speculative.drafters.qwen3_dflash import Model, ModelConfig
    from mlx_vlm.utils import load_model

    target, seen = load_model(Path(model)), []
    text = target.language_model.args
    sizes = {"hidden_size": text.hidden_size, "intermediate_size": 64, "vocab_size": text.vocab_size}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    reads = {"target_layer_ids": [0, 2], "num_target_layers": text.num_hidden_layers}
    drafter = Model(ModelConfig(**sizes, **heads, **reads, num_hidden_layers=1, mask_token_id=1))
    options = {"temperature": 0, "max_tokens": 8, "draft_model": drafter, "draft_kind": "dflash"}
    processor = lambda tokens, logits: seen.append(1) or logits  # type: ignore[func-returns-value]
    ids = mx.array([PROMPT[:20]])
    said = list(generate_step(ids, target, None, None, logits_processors=[processor], **options))
    assert len(said) == 8
    return len(seen)


def vlm_cannot_be_shared(model: str) -> str:
    from mlx_vlm.utils import sharded_load

    try:
        sharded_load(model, tensor_group=mx.distributed.init())
    except ValueError as error:
        return str(error)
    return ""


def vlm_trains_without_tools(model: str) -> bool:
    from mlx_vlm.trainer.vlm.sft.dataset import VisionDataset

    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"messages": [{"role": "user", "content": "Hi"}], "tools": tools}
    dataset, rendered_with = VisionDataset([row], {}, None), {}

    def render(*args: Any, **options: Any) -> str:
        rendered_with.update(options)
        raise InterruptedError

    dataset._apply_chat_template = render
    with suppress(InterruptedError):
        dataset.process(row)
    return bool(rendered_with) and "tools" not in rendered_with


def lm_dequantizes_without_tensor_scales(model: str) -> bool:
    """Whether ``dequantize_model`` gives the same values for other tensor scales."""
    import mlx.nn as nn
    from mlx_lm.models.switch_layers import SwitchLinear
    from mlx_lm.utils import dequantize_model

    layer = SwitchLinear(64, 32, 2, bias=False).to_quantized(16, 4, "nvfp4", global_scale=True)
    values = []
    for factor in (1, 2):
        holder = nn.Module()
        holder.experts = layer
        layer.global_scale = factor * layer.global_scale
        values.append(dequantize_model(holder).experts.weight)
    return bool(mx.array_equal(*values))


def lm_drafts_leave_out_the_last_token(model: str) -> bool:
    """Whether a cache has fewer tokens after a request with a draft model than after one without."""
    from mlx_lm.generate import generate_step, speculative_generate_step
    from mlx_lm.models.cache import make_prompt_cache

    target, prompt, lengths = lm(model), mx.array(PROMPT[:9]), []
    for step, *draft in ((generate_step, target), (speculative_generate_step, target, target)):
        cache = [entry for each in draft for entry in make_prompt_cache(each)]
        # With a draft model, two drafted tokens and one that is not.
        assert len(list(step(prompt, *draft, max_tokens=3, prompt_cache=cache))) == 3
        lengths.append(cache[0].caches[0].offset)
    return lengths[1] < lengths[0]


def measured(fault: str, model: str) -> Any:
    try:
        return globals()[fault](model)
    except Exception:
        return {"failed": traceback.format_exc()}


if __name__ == "__main__":
    assert os.environ["MLX_M3_PLUGIN"] == "off"
    asked, out = map(Path, sys.argv[1:])
    out.write_text(json.dumps([measured(*each) for each in json.loads(asked.read_text())]))
