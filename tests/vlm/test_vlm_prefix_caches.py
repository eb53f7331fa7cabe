"""What a prompt shares with an earlier one is not computed again, and changes no token and no logit.

mlx-vlm takes M3's cache as a checkpoint: it reuses states as they were at one length, and any
other only from disk, where it cuts them.  Before 0.7 it takes none; a conversation's own cache
(``PromptCacheState``) is cut and reused by every version.
"""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests.vlm.vlm_runs import (
    VLM_VERSION,
    Answer,
    Prompt,
    Request,
    alone,
    assert_same_answer,
    has_checkpoints,
    streamed,
    text,
    together,
    with_images,
)

N_TOKENS = 6
IN_MSA_BLOCKS = 8
Manager = Callable[..., Any]


def continued(prompt: Prompt, more: list[int], n_kept: int | None = None) -> Prompt:
    return Prompt(prompt.tokens[:n_kept] + more, prompt.media)


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """Makes managers, with a directory for one that has a disk tier too."""
    from mlx_vlm import apc

    monkeypatch.setenv("APC_DISK_MIN_FREE_RAM_GB", "0")
    monkeypatch.setenv("APC_CHECKPOINT_ENTRIES", "16")
    made = []

    def make(directory: Path | None = None, block_size: int = 16) -> Any:
        disk = apc.DiskBlockStore(directory, namespace="test") if directory else None
        made.append(apc.APCManager(num_blocks=64, block_size=block_size, disk=disk))
        return made[-1]

    yield make
    for manager in made:
        manager.close()


def assert_warm_equals_cold(model: Any, prompt: Prompt, cached_tokens: int, **options: Any) -> None:
    answer = streamed(model, prompt, N_TOKENS, **options)
    assert answer.cached_tokens == cached_tokens
    assert_same_answer(answer, alone(model, prompt, N_TOKENS))


# --- a conversation's own cache ---


@pytest.mark.parametrize("n_shared", [150, 152, 9], ids=lambda n: f"{n} shared")
def test_a_conversation_that_shares_a_part(model: Any, n_shared: int) -> None:
    """Two of the lengths stop inside a block of index keys."""
    from mlx_vlm.generate.common import PromptCacheState

    state = PromptCacheState()
    streamed(model, text(203), N_TOKENS, prompt_cache_state=state)
    other = continued(text(203), [1, *text(70, 1).tokens], n_shared)
    assert_warm_equals_cold(model, other, n_shared, prompt_cache_state=state)


def test_turn_by_turn(model: Any) -> None:
    """Each prompt is the one before, what was answered, and more; images only in the first."""
    from mlx_vlm.generate.common import PromptCacheState

    state = PromptCacheState()
    prompt = with_images(90)
    for turn, n_more in enumerate((1, 61, 7)):
        answer = streamed(model, prompt, N_TOKENS, prompt_cache_state=state)
        assert_same_answer(answer, alone(model, prompt, N_TOKENS))
        assert (answer.cached_tokens > 0) == (turn > 0)
        prompt = continued(prompt, answer.tokens + text(n_more, turn + 7).tokens)


def test_a_conversation_that_shares_nothing(model: Any) -> None:
    from mlx_vlm.generate.common import PromptCacheState

    state = PromptCacheState()
    streamed(model, text(120), N_TOKENS, prompt_cache_state=state)
    other = Prompt([639, *text(90, 1).tokens])
    assert other.tokens[0] != text(120).tokens[0]
    assert_warm_equals_cold(model, other, 0, prompt_cache_state=state)


# --- the prefix cache, in memory ---


@has_checkpoints
def test_the_layout_is_understood(model: Any) -> None:
    from mlx_vlm import apc, apc_adapters

    check = apc.self_check_model_apc(model, log=False)
    assert check.ok, check.notes
    plan = apc_adapters.build_prefix_cache_plan(model.language_model)
    assert plan.restorable
    assert plan.strategy == "checkpoint"
    assert [kind.value for kind in plan.capabilities] == ["pageable", "checkpoint", "checkpoint"]
    assert apc.model_apc_mode(model.language_model) == "exact"


@pytest.mark.skipif(VLM_VERSION >= (0, 7, 0), reason="mlx-vlm takes M3's cache from 0.7 on")
def test_older_versions_leave_m3_out(model: Any, manager: Manager) -> None:
    """They say so, and answer right."""
    from mlx_vlm import apc

    assert apc.model_apc_mode(model.language_model) is None
    prefix_cache = manager()
    for _ in range(2):
        assert_warm_equals_cold(model, text(203), 0, apc_manager=prefix_cache)


@has_checkpoints
@pytest.mark.parametrize("prompt", [text(203), with_images(150)], ids=["text", "image"])
def test_full_hit(model: Any, manager: Manager, prompt: Prompt) -> None:
    """The same prompt again: all but its last token is there, up to the middle of a block."""
    prefix_cache, n_cached = manager(), len(prompt.tokens) - 1
    assert n_cached % IN_MSA_BLOCKS
    assert_warm_equals_cold(model, prompt, 0, apc_manager=prefix_cache)
    # Twice, for what is taken from the store must not change it.
    assert_warm_equals_cold(model, prompt, n_cached, apc_manager=prefix_cache)
    assert_warm_equals_cold(model, prompt, n_cached, apc_manager=prefix_cache)


@has_checkpoints
@pytest.mark.parametrize("prompt", [text(203), with_images(150)], ids=["text", "image"])
def test_partial_hit(model: Any, manager: Manager, prompt: Prompt) -> None:
    prefix_cache, n_cached = manager(), len(prompt.tokens) - 1
    assert_warm_equals_cold(model, prompt, 0, apc_manager=prefix_cache)
    for more in (text(3, 1).tokens, text(90, 2).tokens):
        prompt = continued(prompt, more)
        answer = streamed(model, prompt, N_TOKENS, apc_manager=prefix_cache)
        # 0.7.0 keeps no second state so close to the first one.
        assert n_cached <= answer.cached_tokens < len(prompt.tokens) - len(more)
        assert_same_answer(answer, alone(model, prompt, N_TOKENS))


@has_checkpoints
def test_misses(model: Any, manager: Manager) -> None:
    """Another first token; a divergence before the checkpoint; another image; another tenant."""
    prefix_cache, image = manager(), with_images(100)
    assert_warm_equals_cold(model, text(203), 0, apc_manager=prefix_cache)
    assert_warm_equals_cold(model, image, 0, apc_manager=prefix_cache)
    first, *rest = text(203).tokens
    other_pixels = {**image.media, "pixel_values": -image.media["pixel_values"]}
    for prompt in (
        Prompt([first + 1, *rest]),
        continued(text(203), text(30, 3).tokens, 120),
        Prompt(image.tokens, other_pixels),
    ):
        assert_warm_equals_cold(model, prompt, 0, apc_manager=prefix_cache)
    assert_warm_equals_cold(model, text(203), 0, apc_manager=manager(), apc_tenant="another")


@has_checkpoints
def test_checkpoints_on_the_way(model: Any, manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer versions keep states at multiples of a length; 60 is inside a block."""
    monkeypatch.setenv("APC_CHECKPOINT_INTERVAL_TOKENS", "60")
    prefix_cache = manager(block_size=20)
    if not hasattr(prefix_cache, "checkpoint_interval_tokens"):
        pytest.skip("this mlx-vlm keeps one state for each prompt")
    assert_warm_equals_cold(model, text(203), 0, apc_manager=prefix_cache)
    branch = continued(text(203), [1, *text(40, 4).tokens], 75)
    assert_warm_equals_cold(model, branch, 60, apc_manager=prefix_cache)


def semantic_hash(model: Any, prompt: Prompt) -> int:
    """As the server gives it to the batch generator, which cannot tell that embeddings are the tokens'."""
    from mlx_vlm import apc

    image_hash = apc.hash_image_payload(pixel_values=prompt.media.get("pixel_values"))
    return apc.semantic_extra_hash(tenant=None, image_hash=image_hash, media={}, model=model, processor=None)


@has_checkpoints
def test_warm_and_cold_rows_in_one_batch(model: Any, manager: Manager) -> None:
    prefix_cache, image = manager(), with_images(60)
    for prompt in (text(203), image):
        streamed_in_batch(model, [prompt], prefix_cache)
    lengths = (20, 90, 77, 161) if short_rows_may_end_first() else (20, 20, 20, 20)
    warm, cold, warm_image, another_cold = (text(n, n + row).tokens for row, n in enumerate(lengths))
    prompts = [
        continued(text(203), warm),
        Prompt(cold),
        continued(image, warm_image),
        Prompt(another_cold),
    ]
    matched = prefix_cache.stats.matched_tokens
    answers = streamed_in_batch(model, prompts, prefix_cache)
    n_known = len(text(203).tokens) + len(image.tokens)
    # 0.7.0 keeps the state after a prompt's last token too.
    assert n_known - 2 <= prefix_cache.stats.matched_tokens - matched <= n_known
    for answer, prompt in zip(answers, prompts, strict=True):
        assert_same_answer(answer, alone(model, prompt, N_TOKENS))


def short_rows_may_end_first() -> bool:
    """0.7.0 reads the logits of a row that ends in an earlier piece from before the array's start."""
    from mlx_vlm.generate import BatchGenerator

    file = inspect.getsourcefile(BatchGenerator)
    assert file is not None
    return "_finished_prompt_logits" in Path(file).read_text()


def streamed_in_batch(model: Any, prompts: list[Prompt], prefix_cache: Any) -> list[Answer]:
    requests = [Request(p, N_TOKENS, more={"_apc_semantic_hash": semantic_hash(model, p)}) for p in prompts]
    return together(model, requests, apc_manager=prefix_cache)


# --- on disk ---


@has_checkpoints
@pytest.mark.parametrize("prompt", [text(203), with_images(150)], ids=["text", "image"])
def test_disk_tier(model: Any, manager: Manager, tmp_path: Path, prompt: Prompt) -> None:
    """Written by one process, so to speak, and read by another."""
    first = manager(tmp_path)
    assert_warm_equals_cold(model, prompt, 0, apc_manager=first)
    first.close()
    assert list(tmp_path.rglob("*.safetensors"))
    n_cached = len(prompt.tokens) - 1
    assert_warm_equals_cold(model, prompt, n_cached, apc_manager=manager(tmp_path))
    more = continued(prompt, text(70, 1).tokens)
    assert_warm_equals_cold(model, more, n_cached, apc_manager=manager(tmp_path))


@has_checkpoints
def test_disk_tier_cut_inside_a_block(model: Any, manager: Manager, tmp_path: Path) -> None:
    first = manager(tmp_path, block_size=20)
    assert_warm_equals_cold(model, text(203), 0, apc_manager=first)
    first.close()
    branch = continued(text(203), [1, *text(40, 4).tokens], 155)
    answer = streamed(model, branch, N_TOKENS, apc_manager=manager(tmp_path, block_size=20))
    assert answer.cached_tokens in (0, 140)  # whether a stored state is cut is upstream's to decide
    assert_same_answer(answer, alone(model, branch, N_TOKENS))


# --- with K and V quantized ---


def quantized_reference(model: Any, prompt: Prompt, n_cached: int, options: dict[str, Any]) -> Answer:
    """The cached part in float, then quantized; all that follows is quantized as it comes."""
    from mlx_vlm.generate.common import maybe_quantize_kv_cache

    def quantize() -> None:
        maybe_quantize_kv_cache(
            cache,
            quantized_kv_start=0,
            kv_group_size=options["kv_group_size"],
            kv_bits=options["kv_bits"],
        )

    cache = model.make_cache()
    rows = model.get_input_embeddings(mx.array([prompt.tokens])).inputs_embeds
    pieces = [slice(0, n_cached), slice(n_cached, len(prompt.tokens) - 1)]
    for piece in [p for p in pieces if p.start < p.stop]:
        model.language_model(mx.array([prompt.tokens])[:, piece], inputs_embeds=rows[:, piece], cache=cache)
        quantize()
    answer, tokens = Answer([], []), prompt.tokens
    for _ in range(N_TOKENS):
        answer.logits.append(model.language_model(mx.array([tokens[-1:]]), cache=cache).logits[0, -1])
        quantize()
        answer.tokens.append(int(mx.argmax(answer.logits[-1])))
        tokens = answer.tokens
    return answer


def upstream_can_measure_its_quantized_cache() -> bool:
    """0.7.10 cannot where mx.quantize returns lists (mlx 0.32): with any model, with us or without."""
    from mlx_vlm.models.cache import KVCache

    plain, keys = KVCache(), mx.zeros((1, 1, 4, 32))
    plain.update_and_fetch(keys, keys)
    try:
        getattr(plain.to_quantized(group_size=32, bits=8), "memory_profile", int)(4)
    except AttributeError:
        return False
    return True


@has_checkpoints
@pytest.mark.skipif(
    not upstream_can_measure_its_quantized_cache(), reason="upstream's own QuantizedKVCache fails here"
)
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_kv_bits(model: Any, manager: Manager, tmp_path: Path, on_disk: bool) -> None:
    directory = tmp_path if on_disk else None
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    prompt = text(203)
    cold = quantized_reference(model, prompt, 202, options)
    prefix_cache = manager(directory)
    # 0.7.0 keeps nothing of a quantized cache on disk: a miss, and the same answer.
    reused = 0 if on_disk and VLM_VERSION < (0, 7, 10) else 202
    for n_cached in (0, reused):
        answer = streamed(model, prompt, N_TOKENS, apc_manager=prefix_cache, **options)
        assert answer.cached_tokens == n_cached
        assert_same_answer(answer, cold)
        if on_disk:
            prefix_cache.close()
            prefix_cache = manager(directory)
    more = continued(prompt, text(70, 1).tokens)
    answer = streamed(model, more, N_TOKENS, apc_manager=prefix_cache, **options)
    assert answer.cached_tokens == reused
    assert_same_answer(answer, quantized_reference(model, more, reused or len(more.tokens) - 1, options))
