"""M3-nano's draft head, as it is packaged: a real one, trained on what M3-nano says."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import needles
import numpy as np
import pytest
from answers import prompt_of
from draft_scores import Count, Drafts
from score import held_out

from mlx_m3_plugin.cli import main
from mlx_m3_plugin.model.draft_cost import counted_experts, distinct_experts
from mlx_m3_plugin.model.moe import SparseMoeBlock
from mlx_m3_plugin.toolbox.demo import NANO
from mlx_m3_plugin.toolbox.draft_head import open_draft_head
from mlx_m3_plugin.toolbox.stock import why_not_opened
from mlx_m3_plugin.weights.headers import DRAFT_FOLDER
from mlx_m3_plugin.weights.names import draft_parameter

pytest.importorskip("mlx_vlm.speculative.drafters.dspark", reason="this mlx-vlm has no DSpark")


@pytest.fixture(scope="module")
def drafts() -> Drafts:
    return Drafts(NANO, NANO / DRAFT_FOLDER)


def test_it_halves_the_forward_passes_and_changes_no_answer(
    drafts: Drafts, count: Callable[[int, int], int], fresh_seed: int
) -> None:
    """Of held-out exercises; :meth:`Drafts.count` compares the answers."""
    drawn = held_out(count(1, 5), fresh_seed, needles.token_counter(NANO))
    # All prompts are past the block budget of 64 tokens; longer ones and long answers are slow.
    tasks = ("facts", "sums", "no call", "result", "picture", *drawn)[: count(5, 5 + len(drawn))]
    counts = [drafts.count(drawn[task], (2, 7)) for task in dict.fromkeys(tasks)]
    by_twos, by_sevens = (sum(each, Count()) for each in zip(*counts, strict=True))
    assert by_twos.tokens_per_pass >= 1.8
    assert by_sevens.tokens_per_pass > by_twos.tokens_per_pass


def test_it_is_small_and_described(capsys: pytest.CaptureFixture[str]) -> None:
    head = open_draft_head(NANO / DRAFT_FOLDER)
    assert head.nbytes < 1_000_000
    assert (head.block, head.target_layers) == (7, [0, 1, 2, 3])
    assert main(["inspect", str(NANO)]) == 0
    assert "dspark/, for mlx-vlm's --draft-model" in capsys.readouterr().out
    assert main(["fit", str(NANO), "--memory", "16GB", "--draft"]) == 0
    assert "tokens per forward pass" in capsys.readouterr().out


@pytest.mark.parametrize("bits", ["8", "4"])
def test_the_demo_writes_it(bits: str, tmp_path: Path) -> None:
    assert main(["demo", str(tmp_path / "nano"), "--bits", bits]) == 0
    head = open_draft_head(tmp_path / "nano" / DRAFT_FOLDER)
    assert {spec.bits for spec in head.quantized.values()} == {int(bits)}


def test_training_and_drafting_compute_the_same(drafts: Drafts, fresh_seed: int) -> None:
    """Many blocks at once in torch, and one at a time in mlx-vlm."""
    torch = pytest.importorskip("torch")
    from draft_net import DraftHead

    head, random = drafts.head, np.random.default_rng(fresh_seed)
    head.bind(drafts.model)
    config = open_draft_head(NANO / DRAFT_FOLDER).config
    modules, net = dict(head.named_modules()), DraftHead(config)
    for name, parameter in net.named_parameters():
        path, _, part = draft_parameter(name).rpartition(".")
        parameter.data = torch.from_numpy(float_values(modules[path], part))
    embedding = torch.from_numpy(float_values(head.embed_tokens, "weight"))
    length, anchors = 30, [4, 17, 29]
    features = random.standard_normal((1, length, head.fc.scales.shape[1] * head.fc.group_size))
    features, ids = features.astype(np.float32), random.integers(0, config["vocab_size"], (1, length))
    with torch.inference_mode():
        together = net.blocks(
            torch.from_numpy(features), torch.from_numpy(ids), torch.tensor([anchors]), embedding
        )
    for number, anchor in enumerate(anchors):
        before = mx.array(features[:, :anchor])
        noise = [head.config.mask_token_id] * (head.config.proposal_length - 1)
        alone = head._hidden(mx.array([[ids[0, anchor].item(), *noise]]), before, head.make_cache())
        assert np.abs(np.array(alone[0]) - together[0, number].numpy()).max() < 1e-4


def float_values(module: Any, part: str) -> np.ndarray:
    array = module[part].astype(mx.float32) if "scales" not in module else None
    if array is None:
        scales = (module.scales.astype(mx.float32), module.biases.astype(mx.float32))
        array = mx.dequantize(module.weight, *scales, group_size=module.group_size, bits=module.bits)
    return np.array(array)


def test_real_routing_chooses_fewer_experts_than_an_even_one(
    drafts: Drafts, monkeypatch: pytest.MonkeyPatch, fresh_seed: int
) -> None:
    """Successive tokens have favourites, so verifying costs less than the even router of ``fit`` says."""
    route, seen = SparseMoeBlock.route, []

    def recorded(block: Any, x: mx.array) -> Any:
        made = route(block, x)
        seen.append(made[0].tolist())
        return made

    monkeypatch.setattr(SparseMoeBlock, "route", recorded)
    drawn = held_out(1, fresh_seed, needles.token_counter(NANO), ())
    for task in ("facts", "sums", "result"):
        prompt = prompt_of(drafts.processor.tokenizer, drawn[task][0])
        drafts.model(mx.array([drafts.processor.tokenizer.encode(prompt)]))
    for tokens in (2, 3, 4, 8):
        counted = np.mean([counted_experts(choices, tokens) for choices in seen])
        assert 2 < counted < distinct_experts(8, 2, tokens)
    for choices in seen:
        assert counted_experts(choices, 1) == 2


def test_libraries_without_us_do_not_see_it(tmp_path: Path) -> None:
    without = shutil.copytree(NANO, tmp_path / "without", ignore=shutil.ignore_patterns(DRAFT_FOLDER))
    for library in ("mlx-lm", "mlx-vlm"):
        with_it, without_it = why_not_opened(library, NANO, without)
        assert with_it == without_it
