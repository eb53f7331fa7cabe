"""mlx-lm's ``--draft-model`` with an M3 for an M3, past the block budget of 24 tokens."""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import server
from mlx_lm.generate import generate_step, speculative_generate_step, stream_generate
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors
from mlx_lm.utils import load, load_model

from mlx_m3_plugin.toolbox.demo import NANO
from tests.end_to_end.chat_hosts import mlx_lm_server
from tests.end_to_end.chat_server import ChatServer
from tests.hosts.native_mlx_lm import our_model, tokens

STEPS = 12
# What a turn adds to the context after an answer.
TURN = [5, 17, 3, 60, 31]


def perturbed(seed: int) -> Any:
    """A model whose guesses are often, but not always, those of ``our_model()``."""
    model = our_model()
    noise = mx.random.normal(model.language_model.lm_head.weight.shape, key=mx.random.key(seed))
    model.language_model.lm_head.weight += 0.1 * noise
    return model


def close(a: mx.array, b: mx.array) -> bool:
    return a.shape == b.shape and mx.abs(a - b).max().item() < 1e-4


def lengths(cache: list[Any]) -> set[int]:
    return {part.offset for entry in cache for part in entry.caches}


def test_drafts_closed_at_any_token_leave_whole_caches(
    count: Callable[[int, int], int], fresh_seed: int
) -> None:
    """After each, the next turn on the same caches is that of a cold run, with a draft and without."""
    model, poor = our_model(), perturbed(3)
    prompt = tokens(60)[0]
    said = [int(token) for token, _ in generate_step(prompt, model, max_tokens=STEPS)]
    rng, accepted = random.Random(fresh_seed), set()
    cases = list(product((model, poor), range(9), range(1, STEPS + 1), (True, False)))
    # With the first two, some drafts are accepted and some are not.
    always = [(model, 3, STEPS, True), (poor, 3, STEPS, True)]
    for draft, n_drafted, closed_at, ends in always + rng.sample(cases, count(10, len(cases))):
        cache = make_prompt_cache(model) + make_prompt_cache(draft)
        generated = speculative_generate_step(
            prompt,
            model,
            draft,
            num_draft_tokens=n_drafted,
            max_tokens=closed_at if ends else STEPS,
            prompt_cache=cache,
        )
        found = [next(generated) for _ in range(closed_at)]
        if ends:
            assert next(generated, None) is None
        generated.close()
        assert [int(token) for token, _, _ in found] == said[:closed_at]
        accepted |= {(draft is model, from_draft) for _, _, from_draft in found}
        read = [*prompt.tolist(), *said[:closed_at]]
        assert lengths(cache) == {len(read)}, (n_drafted, closed_at, ends)
        turn = mx.array(TURN)
        for either, its_cache in ((model, cache[:4]), (draft, cache[4:])):
            expected = either(mx.array([read + TURN]))[0, -len(TURN) :]
            copy = [type(entry)(*map(copied, entry.caches)) for entry in its_cache]
            assert close(either(turn[None], copy)[0], expected), (n_drafted, closed_at, ends)
        cold = [int(token) for token, _ in generate_step(mx.array(read + TURN), model, max_tokens=4)]
        warm = speculative_generate_step(
            turn, model, draft, num_draft_tokens=rng.randrange(4), max_tokens=4, prompt_cache=cache
        )
        assert [int(token) for token, *_ in warm] == cold, (n_drafted, closed_at, ends)
    assert accepted >= {(True, True), (False, True), (False, False)}


def copied(cache: Any) -> Any:
    made = type(cache)()
    made.state = cache.state
    return made


def test_a_cache_of_the_model_alone_is_refused() -> None:
    model = our_model()
    cache = make_prompt_cache(model)
    generated = speculative_generate_step(tokens(30)[0], model, model, prompt_cache=cache)
    with pytest.raises(ValueError, match="4 entries, the model's alone, and none for the draft model"):
        next(generated)


def test_processors_see_what_was_said() -> None:
    """A penalty of repetition changes what is said, and drafts do not change that again."""
    model, poor, prompt = our_model(), perturbed(3), tokens(40)[0]
    plain, penalized = (
        [int(token) for token, _ in generate_step(prompt, model, max_tokens=20, logits_processors=processors)]
        for processors in (None, make_logits_processors(repetition_penalty=1.5))
    )
    assert penalized != plain
    for draft in (model, poor):
        generated = speculative_generate_step(
            prompt,
            model,
            draft,
            num_draft_tokens=3,
            max_tokens=20,
            logits_processors=make_logits_processors(repetition_penalty=1.5),
        )
        assert [int(token) for token, *_ in generated] == penalized


def test_no_limit_is_no_limit() -> None:
    """``--max-tokens -1``, of which upstream drafts -1 tokens."""
    loaded, tokenizer = load(str(NANO))[:2]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is 68 - 25?"}], tokenize=False)
    texts = [
        "".join(part.text for part in stream_generate(loaded, tokenizer, prompt + "]~b]ai\n", **options))
        for options in ({"max_tokens": 100}, {"max_tokens": -1, "draft_model": loaded})
    ]
    assert texts[0] == texts[1]
    assert texts[0].endswith("43")


class Stored(server.LRUPromptCache):
    """Sees that a cache holds the tokens that it is stored for."""

    def insert_cache(self, model: Any, tokens: list[int], prompt_cache: list[Any], **more: Any) -> None:
        assert lengths(prompt_cache) == {len(tokens)}
        super().insert_cache(model, tokens, prompt_cache, **more)


@contextmanager
def serving(*options: str) -> Iterator[ChatServer]:
    """mlx-lm's server with M3-nano, in this process."""
    with pytest.MonkeyPatch.context() as patch, mlx_lm_server(NANO, patch, Stored(10), *options) as address:
        yield ChatServer(address, NANO, "default_model")


def test_the_server_goes_on_from_drafts(fresh_seed: int) -> None:
    """Conversations whose turns draft any number of tokens or none, and stop anywhere."""
    rng = random.Random(fresh_seed)
    world = "Anna lives in Rome. The nurse is Ben. Ben likes rice. The dog belongs to Anna. "
    questions = ("Whose is the dog?", "Where does Anna live?", "Who is the nurse?", "What does Ben like?")
    with serving("--draft-model", str(NANO)) as drafting, serving("--prompt-cache-size", "0") as plain:
        for conversation in range(3):
            messages: list[Any] = [{"role": "user", "content": world + rng.choice(questions)}]
            for turn in range(3):
                limit = {"max_tokens": rng.randrange(3, 9), "logprobs": True}
                expected = plain.ask(messages, **limit)
                answer = drafting.ask(messages, **limit, extra_body={"num_draft_tokens": rng.randrange(5)})
                assert answer.said == expected.said
                assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
                assert (answer.cached > 0) == (conversation + turn > 0)
                messages += [answer.message, {"role": "user", "content": rng.choice(questions)}]


@pytest.mark.parametrize("model_type", [None, "minimax_m3_vl", "dspark"])
def test_a_draft_head_is_refused(model_type: str | None, tmp_path: Path) -> None:
    """What ``mlx_lm.generate --draft-model CHECKPOINT/dspark`` and the server load."""
    config = {"architectures": ["DSparkMiniMaxDraftModel"], "text_config": {"hidden_size": 8}}
    config |= {} if model_type is None else {"model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"fc.weight": mx.ones((8, 8))})
    for loader in (load, lambda path: load_model(Path(path))):
        with pytest.raises(ValueError, match=rf"mlx_vlm\.generate .* --draft-model {tmp_path}$"):
            loader(str(tmp_path))
