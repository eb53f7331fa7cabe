"""What ``mlx_lm.evaluate`` asks a model: scores and texts.  lm-evaluation-harness itself is not installed."""

import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import generate
from packaging.version import Version

from tests.checkpoints.random_model import write_random_model

# No blank at the end, so that a question has the same tokens before any answer.
QUESTIONS = [" ".join(["Count the steps one by one, please."] * 4), "Name a tool."]
ANSWERS = [" You call tool 3, then tool 4.", " None", " Step by step."]


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``mlx_lm.evaluate`` with the three names that it takes from lm_eval."""
    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model")}
    registry = ModuleType("lm_eval.api.registry")
    modules["lm_eval.api.model"].LM = type("LM", (), {})  # type: ignore[attr-defined]
    registry.register_model = lambda name: lambda cls: cls  # type: ignore[attr-defined]
    for name, module in {**modules, registry.__name__: registry}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)
    import mlx_lm.evaluate as module

    yield module
    sys.modules.pop("mlx_lm.evaluate", None)


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=args) for args in arguments]


def test_scores_and_texts_are_those_of_one_forward_pass(evaluate: Any, tmp_path: Path) -> None:
    write_random_model(tmp_path / "m3")
    asked = evaluate.MLXLM(str(tmp_path / "m3"))
    model, tokenizer = asked._model, asked.tokenizer
    model.eval()

    def log_probabilities(tokens: list[int]) -> tuple[mx.array, mx.array]:
        """Of each token after the first, and whether it is the likeliest."""
        logits = model(mx.array([tokens]))[0, :-1]
        logits -= mx.logsumexp(logits, axis=-1, keepdims=True)
        following = mx.array(tokens[1:])
        return mx.take_along_axis(logits, following[:, None], -1)[:, 0], mx.argmax(logits, -1) == following

    def tokens_of(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    pairs = [(question, answer) for question in QUESTIONS for answer in ANSWERS]
    for (question, answer), (score, is_greedy) in zip(
        pairs, asked.loglikelihood(requests(*pairs)), strict=True
    ):
        start = len(tokens_of(question)) - 1
        scores, greedy = log_probabilities(tokens_of(question + answer))
        assert score == pytest.approx(scores[start:].sum().item(), abs=1e-3)
        assert is_greedy == greedy[start:].all().item()

    if Version(version("mlx-lm")) < Version("0.32"):
        # Before, it counted a token of the padding beside a longer row.
        asked._batch_size = 1
    texts = [question + answer for question, answer in pairs]
    for text, score in zip(
        texts, asked.loglikelihood_rolling(requests(*((text,) for text in texts))), strict=True
    ):
        assert score == pytest.approx(log_probabilities(tokens_of(text))[0].sum().item(), abs=1e-3)

    prompts = [
        (question, {"until": ["\n\n\n"], "max_gen_toks": 12, "max_gen_tokens": 12}) for question in QUESTIONS
    ]
    texts = [generate(model, tokenizer, tokens_of(question), max_tokens=12) for question in QUESTIONS]
    # Reasoning is left out.
    assert asked.generate_until(requests(*prompts)) == [text.rpartition("</mm:think>")[2] for text in texts]
