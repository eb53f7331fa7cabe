"""What M3-nano is trained with: its masks, lessons and batches, on an untrained one."""

import json
import random
from pathlib import Path
from typing import Any

import conversations
import net
import pytest
import torch
import train
from conversations import Encoded
from muon import orthogonal
from sizes import BUDGET
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as m3

MARKERS = ("]~b]", "[e~[", "]<]image[>[", "]<]video[>[")


@pytest.fixture(scope="module")
def model() -> Any:
    return net.build(64, {marker: 60 + n for n, marker in enumerate(MARKERS)}, seed=0)


@pytest.fixture
def ids(fresh_seed: int) -> torch.Tensor:
    # Three budgets and part of a block.
    return torch.randint(0, 60, (2, 3 * BUDGET + 5), generator=torch.Generator().manual_seed(fresh_seed))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=ids).logits


def test_choosing_blocks_in_training_is_transformers_choice(model: Any, ids: torch.Tensor) -> None:
    as_it_is = logits(net.build(64, dict.fromkeys(MARKERS, 60), seed=0), ids)
    net.attend_densely(model, False)
    assert torch.equal(logits(model, ids), as_it_is)
    net.attend_densely(model, True)
    dense = logits(model, ids)
    # The same up to the budget, and not past it.
    torch.testing.assert_close(dense[:, :BUDGET], as_it_is[:, :BUDGET], rtol=0, atol=1e-5)
    assert (dense[:, 2 * BUDGET :] - as_it_is[:, 2 * BUDGET :]).abs().max() > 1e-3
    net.attend_densely(model, False)
    assert torch.equal(logits(model, ids), as_it_is)


def test_the_indexer_learns_and_teaches_nothing_else(ids: torch.Tensor) -> None:
    model = net.build(64, dict.fromkeys(MARKERS, 60), seed=0).train()
    lessons = net.Lessons(model)
    net.attend_densely(model, True)
    with lessons.of_one_pass(torch.ones_like(ids, dtype=torch.bool)) as losses:
        model(input_ids=ids)
    assert len(losses) == net.LAYERS - net.DENSE
    assert all(loss > 0 for loss in losses)
    torch.stack(losses).sum().backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learned == {name for name, _ in model.named_parameters() if ".indexer." in name}


def test_what_the_indexer_is_taught_is_the_attention_of_its_group(model: Any, ids: torch.Tensor) -> None:
    """Against the weights that eager attention gives, summed over blocks and averaged over the group."""
    seen: dict[str, torch.Tensor] = {}
    attention = next(
        m for m in model.modules() if isinstance(m, m3.MiniMaxM3VLAttention) and m.indexer is not None
    )

    def keep(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        at = torch.arange(ids.shape[1]).expand(len(ids), -1)
        hidden, positions = kwargs["hidden_states"], kwargs["position_embeddings"]
        seen["taught"] = net._block_attention(attention, hidden, positions, at)
        seen["weights"] = output[1]

    net.attend_densely(model, True)
    model.set_attn_implementation("eager")
    hook = attention.register_forward_hook(keep, with_kwargs=True)
    logits(model, ids)
    hook.remove()
    model.set_attn_implementation("sdpa")
    batch, heads, length, _ = seen["weights"].shape
    groups = seen["taught"].shape[1]
    of_group = seen["weights"].view(batch, groups, heads // groups, length, length).mean(2)
    padded = torch.nn.functional.pad(of_group, (0, -length % net.BLOCK))
    expected = padded.unflatten(-1, (-1, net.BLOCK)).sum(-1)
    torch.testing.assert_close(seen["taught"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (3, 48, 40)])
def test_muon_makes_updates_orthogonal(shape: tuple[int, ...], fresh_seed: int) -> None:
    update = orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(fresh_seed)))
    values = torch.linalg.svdvals(update)
    # The polynomial's own promise: about 1, not exactly.
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_every_conversation_gets_into_a_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    encoder = train.make_encoder(tmp_path, seed=0)
    drawn: list[Encoded] = []
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda *a, **k: drawn.append(encode(*a, **k)) or drawn[-1])
    batches = train.make_batches(encoder, random.Random(0), lambda: 0.5)
    rows = 0
    while rows < train.POOL:
        batch = next(batches)
        rows += len(batch.ids)
        assert batch.ids.numel() <= max(train.TOKENS_PER_STEP, batch.ids.shape[1])
        assert batch.said.any(1).all()
    assert rows == train.POOL == len(drawn)
    assert {one.task for one in drawn} >= {"echo", "facts", "sums", "call", "needles", "picture", "video"}
    assert conversations.SHARES.keys() == conversations.QUESTIONS.keys()


def test_going_on_ends_where_one_run_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, small in {"POOL": 8, "TOKENS_PER_STEP": 600, "LOG_EVERY": 1, "SAVE_EVERY": 2}.items():
        monkeypatch.setattr(train, name, small)

    def training(name: str) -> train.Training:
        encoder = train.make_encoder(tmp_path / name, seed=0)
        ids = encoder.tokenizer.get_vocab()
        return train.Training(net.build(len(ids), ids, 0), encoder, tmp_path / name, steps=5, seed=0)

    def one_step_of(begun: train.Training, batch: train.Batch) -> None:
        if begun.step == 3:
            raise KeyboardInterrupt
        train.Training.one_step(begun, batch)

    whole = training("whole")
    whole.run()
    begun = training("twice")
    monkeypatch.setattr(begun, "one_step", lambda batch: one_step_of(begun, batch))
    with pytest.raises(KeyboardInterrupt):
        begun.run()
    assert steps_in(begun.log) == [1, 2, 3]
    resumed = training("twice")
    assert resumed.step == 2
    resumed.run()
    assert steps_in(resumed.log) == [1, 2, 3, 4, 5]
    of_resumed = resumed.model.state_dict()
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(parameter, of_resumed[name]), name


def steps_in(log: Path) -> list[int]:
    return [json.loads(line)["step"] for line in log.read_text().splitlines()]
