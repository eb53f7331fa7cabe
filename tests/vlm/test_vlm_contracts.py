"""What hosts take for granted of M3 in mlx-vlm, with stand-ins for their code."""

import logging
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlx_m3_plugin
from mlx_m3_plugin.chat.markers import NAMESPACE, TOOL_CALL_END, TOOL_CALL_START
from mlx_m3_plugin.hosts import patching
from mlx_m3_plugin.hosts.mlx_vlm import parts
from mlx_m3_plugin.hosts.mlx_vlm.patches import PATCHES
from tests.checkpoints.tiny_model import published_config
from tests.end_to_end.environments import here
from tests.hosts.upstream_copies import apply, copy_of
from tests.vlm.vlm_runs import BUDGET, TOLERANCE, Prompt, difference, fresh_logits, text

BLOCK = 16
PROMPT = text(5 * BUDGET)


def filled(model: Any, tokens: list[int]) -> list[Any]:
    cache = model.make_cache()
    model.language_model(mx.array([tokens]), cache=cache)
    return cache


def next_logits(model: Any, cache: list[Any], tokens: list[int]) -> mx.array:
    return model.language_model(mx.array([tokens]), cache=cache).logits[0]


# --- caches: oMLX's prefix cache stores blocks of their states, and makes upstream's class anew ---


def test_names_and_states_of_caches(model: Any) -> None:
    cache = filled(model, PROMPT.tokens)
    assert [type(entry).__name__ for entry in cache] == ["KVCache"] + ["MiniMaxM3KVCache"] * 2
    for entry in cache[1:]:
        (keys, values), index = entry.state
        assert keys.shape[2] == values.shape[2] == index.shape[2] == entry.index_offset == len(PROMPT.tokens)
        batch = type(entry).merge([entry, entry])
        assert type(batch).__name__ == "MiniMaxM3BatchKVCache"
        (*kv, offset, padding), index = batch.state
        assert [array.shape[0] for array in (*kv, offset, padding, index)] == [2] * 5


def restored(cache: list[Any], n: int) -> list[Any]:
    """As a host does it: upstream's classes, filled with blocks of the states."""
    upstream, plain = parts.upstream("language"), import_module("mlx_vlm.models.cache")

    def joined(array: mx.array) -> mx.array:
        return mx.concatenate([array[:, :, at : at + BLOCK] for at in range(0, n, BLOCK)], axis=2)

    made = []
    for entry in cache:
        if type(entry).__name__ == "KVCache":
            new = plain.KVCache()
            new.state = tuple(map(joined, entry.state))
        else:
            kv, index = entry.state
            new = upstream.MiniMaxM3KVCache()
            new.kv_cache.state = tuple(map(joined, kv))
            new.index_keys, new.index_offset = joined(index), n
        made.append(new)
    return made


def test_upstreams_caches_restored_from_blocks_go_on(model: Any) -> None:
    n_known = 4 * BUDGET
    cache = restored(filled(model, PROMPT.tokens), n_known)
    logits = next_logits(model, cache, PROMPT.tokens[n_known:])
    assert difference(logits, fresh_logits(model, PROMPT)[n_known:]) <= TOLERANCE


def test_rows_are_merged_and_taken_out(model: Any) -> None:
    """Two requests of different lengths run in one batch for a step, then each goes on alone."""
    prompts = [PROMPT.tokens, PROMPT.tokens[: 3 * BUDGET + 5]]
    caches = [filled(model, tokens) for tokens in prompts]
    # Cold, and restored from blocks, in one batch.
    caches[0] = restored(caches[0], len(prompts[0]))
    batch = [_merged(rows) for rows in zip(*caches, strict=True)]
    model.language_model(mx.array([[7], [7]]), cache=batch)
    for row, tokens in enumerate(prompts):
        alone = [entry.extract(row) for entry in batch]
        logits = next_logits(model, alone, [8])
        assert difference(logits, fresh_logits(model, Prompt([*tokens, 7, 8]))[-1:]) <= TOLERANCE


def _merged(rows: Any) -> Any:
    upstream, plain = parts.upstream("language"), import_module("mlx_vlm.models.cache")
    if isinstance(rows[0], upstream.MiniMaxM3KVCache):
        return upstream.MiniMaxM3BatchKVCache.merge(list(rows))
    return plain.BatchKVCache.merge(list(rows))


# --- the model: what adapters read, set and call ---


def test_attributes_that_adapters_use(model: Any) -> None:
    """oMLX reads these, sets positions before each step, and measures layers one by one."""
    language = model.language_model
    assert model.config.text_config.model_type
    assert len(language.model.layers) == len(language.make_cache()) == language.args.num_hidden_layers
    tokens = mx.array([PROMPT.tokens])
    expected = language(tokens).logits
    language._position_ids, language._rope_deltas = mx.full((1, 3), 5), mx.array(9)
    assert mx.array_equal(language(tokens, position_ids=mx.full((1, tokens.size), 3)).logits, expected)
    h = language.model.embed_tokens(tokens)
    mask = import_module("mlx_vlm.models.base").create_attention_mask(h, None)
    for layer in language.model.layers:
        h = layer(h, mask, None)
    assert difference(language.lm_head(language.model.norm(h)), expected) <= TOLERANCE


@pytest.mark.parametrize("missing", ["rope_utils", "switch_layers"])
def test_parts_that_older_mlx_vlm_takes_from_mlx_lm(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"mlx_vlm.models.{missing}", None)
    monkeypatch.delattr(import_module("mlx_vlm.models"), missing, raising=False)
    rope, experts = parts.rope_and_experts()
    made = {"rope_utils": rope, "switch_layers": experts}
    assert made[missing].__module__ == f"mlx_lm.models.{missing}"


def test_loaders_that_ask_a_flat_config_for_its_text_config() -> None:
    """mlx-vlm 0.6.3 overwrites it first, where there is one, and asks for it afterwards."""
    module = import_module("mlx_vlm.models.minimax_m3")
    config = module.ModelConfig.from_dict({**published_config()["text_config"], "model_type": "minimax_m3"})
    config.text_config = {}
    assert config.text_config is config
    assert config.num_hidden_layers == 3
    assert "text_config" not in config.to_dict()


def test_hosts_with_an_old_mlx_vlm_see_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-openai-server and mlx-omni-server take 0.4.4, and no M3 from it."""
    monkeypatch.setattr(patching, "_installed_release", lambda module: (0, 4, 4))
    old = copy_of("mlx_vlm.utils")
    for name in ("sharded_load", "ThinkingBudgetCriteria"):
        vars(old).pop(name, None)
    applied, errors = apply(PATCHES, old)
    assert "load_model checks the files of M3 checkpoints" in applied
    assert errors == []


# Arguments: a directory for the host's own package.
_BEFORE_UPSTREAM = """
import shutil, sys
import mlx_vlm.models
vendored = sys.argv[1]
name = "minimax_m3_vl"
shutil.copytree(f"{mlx_vlm.models.__path__[0]}/{name}", f"{vendored}/{name}", dirs_exist_ok=True)
mlx_vlm.models.__path__.insert(0, vendored)
from mlx_vlm.models import minimax_m3_vl
from mlx_vlm.models.minimax_m3_vl import language
print(minimax_m3_vl.__file__, sys.modules[minimax_m3_vl.Model.__module__].__file__, language.__file__)
"""


def test_a_class_that_a_host_puts_before_upstreams(tmp_path: Path) -> None:
    """Newest oMLX: our class serves, with the host's caches; the switch gives back all that is the host's."""

    def files(**switch: str) -> list[str]:
        return here().run("-c", _BEFORE_UPSTREAM, tmp_path, env=switch).stdout.split()

    theirs = [
        str(tmp_path / "minimax_m3_vl" / name) for name in ("__init__.py", "minimax_m3_vl.py", "language.py")
    ]
    ours = str(Path(mlx_m3_plugin.__file__).parent / "hosts" / "mlx_vlm" / "minimax_m3_vl.py")
    assert files() == [ours, ours, theirs[2]]
    assert files(MLX_M3_PLUGIN_PREFER="native") == theirs


# --- the tool parser, called with the text alone ---


def test_a_parser_that_gets_no_tools(caplog: pytest.LogCaptureFixture) -> None:
    """oMLX gives the whole reply, and types nothing afterwards."""
    names = ("mlx_vlm.tools.parsers.minimax_m3", "mlx_vlm.tool_parsers.minimax_m3")
    parent = "mlx_vlm.tools.parsers" if _has("mlx_vlm.tools.parsers") else "mlx_vlm.tool_parsers"
    (name,) = (name for name in names if name.rpartition(".")[0] == parent)
    parser = import_module(name)
    assert (parser.tool_call_start, parser.tool_call_end) == (TOOL_CALL_START, TOOL_CALL_END)
    n = NAMESPACE
    call = f'{n}<invoke name="f">{n}<days>3{n}</days>{n}<code>\tx = 1\n{n}</code>{n}</invoke>'
    expected = {"name": "f", "arguments": {"days": 3, "code": "\tx = 1\n"}}
    with caplog.at_level(logging.DEBUG, "mlx_m3_plugin"):
        for reply in (call, f"<mm:think>Which?</mm:think>I ask.{TOOL_CALL_START}{call}{TOOL_CALL_END}"):
            assert parser.parse_tool_call(reply) == expected
    assert caplog.records == []


def _has(name: str) -> bool:
    try:
        import_module(name)
    except ModuleNotFoundError:
        return False
    return True
