"""What measures M3-nano: whom it asks, in what environment, and what its pages say of the answers."""

import json
import sys
from pathlib import Path
from typing import Any, TextIO

import answers
import context
import plot_log
import plots
import pytest
import quality
import recall
import score
import tools
from case import Case, says, user
from tokenizers import Tokenizer

from mlx_m3_plugin.toolbox.checkpoint import Checkpoint, open_checkpoint
from mlx_m3_plugin.toolbox.convert.allocation import allocate_bits, scores_by_position
from mlx_m3_plugin.toolbox.convert.plan import ConversionPlan, plan_conversion
from mlx_m3_plugin.toolbox.convert.recipe import load_recipe
from mlx_m3_plugin.toolbox.demo import NANO
from mlx_m3_plugin.toolbox.precision import Quantization
from tests.hosts.native_mlx_lm import needs_native

PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def output(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    written = tmp_path / "docs"
    monkeypatch.setattr(plots, "OUTPUT", written)
    monkeypatch.setattr(plot_log, "OUTPUT", written)
    return written


def run(monkeypatch: pytest.MonkeyPatch, script: Any, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    script.main()


def test_a_reply_is_right_when_it_is_exactly_the_expected_one() -> None:
    case = Case("facts", [user("Who is the nurse?")], says("The nurse is Ben."))
    assert score.is_right(case, "</mm:think>The nurse is Ben.")
    assert score.is_right(case, "<mm:think>Let me see.</mm:think>The nurse is Ben.")
    assert not score.is_right(case, "</mm:think>The nurse is Ben. The dog")
    assert not score.is_right(case, "The nurse is Carl.")
    call = {"function": {"name": "get_weather", "arguments": {"city": "Rome", "days": 3}}}
    case = Case("call", [user("Rome?")], says("", tool_calls=[call]), [tools.TOOLS[0].schema()])
    begins, ends = ']<]minimax[>[<tool_call>\n]<]minimax[>[<invoke name="get_weather">', "]<]minimax[>["
    city, days = f"{ends}<city>Rome{ends}</city>", f"{ends}<days>3{ends}</days>"
    close = f"{ends}</invoke>\n{ends}</tool_call>"
    assert score.is_right(case, begins + city + days + close)
    assert not score.is_right(case, begins + city + close)
    assert not score.is_right(case, begins + city + f"{ends}<days>4{ends}</days>" + close)
    assert not score.is_right(case, "")


def test_held_out_cases_are_the_same_for_all_and_none_is_twice() -> None:
    drawn, again = (score.held_out(8, 5, lambda text: len(text.split())) for _ in range(2))
    for task, cases in drawn.items():
        assert [case.messages for case in cases] == [case.messages for case in again[task]]
        assert task.startswith(cases[0].task)
        shown = {repr((case.messages, [picture.tobytes() for picture in case.pictures])) for case in cases}
        assert len(shown) == len(cases)


def test_recall_asks_each_way_in_its_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, output: Path
) -> None:
    asked: list[tuple[str, Any]] = []

    def run_script(command: list[str], env: dict[str, str]) -> None:
        plugin = env.get("MLX_M3_PLUGIN", "on"), env.get("MLX_M3_PLUGIN_ATTENTION", "sparse")
        asked.append((command[command.index("--by") + 1], plugin))
        found = {f"needles {times}x": len(asked) / 10 for times in recall.LENGTHS}
        Path(command[command.index("--json") + 1]).write_text(json.dumps(found))

    monkeypatch.setattr(recall, "run", run_script)
    run(monkeypatch, recall, tmp_path, "--cases", 7)
    assert asked == [
        ("transformers", ("on", "sparse")),
        ("mlx_lm", ("on", "sparse")),
        ("mlx_vlm", ("on", "sparse")),
        ("mlx_lm", ("off", "sparse")),
        ("mlx_vlm", ("off", "sparse")),
        ("mlx_lm", ("on", "dense")),
    ]
    page = (output / "recall.md").read_text()
    assert "7 prompts of each length" in page
    assert "| stock mlx-vlm | 50.0% | 50.0% | 50.0% | 50.0% | 50.0% |" in page
    assert (output / "recall.png").read_bytes().startswith(PNG)


def test_recall_of_the_packaged_model() -> None:
    """The whole way, through a child process: a trained model finds its needles."""
    found = recall.recall(NANO, 2, "mlx_lm", {})
    assert list(found) == list(recall.LENGTHS)
    assert {found[times] for times in score.LENGTHS} == {1.0}


def test_quality_measures_every_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, output: Path) -> None:
    whole = tmp_path / "float"
    whole.symlink_to(NANO)
    commands: list[list[str]] = []

    def run_script(*arguments: str, output: TextIO | None = None) -> None:
        commands.append(list(arguments))
        if "convert" in arguments:
            Path(arguments[4]).mkdir()
            return
        against = {"kl_mean": 0.01 * len(commands), "top_1": 0.5} if "--reference" in arguments else None
        evaluation = {"bytes": 1 << 20, "perplexity": 1.5, "distributions": against}
        if output is not None:
            assert arguments[2] == "evaluate"
            json.dump(evaluation, output)
        else:
            scores = {"facts": 1.0, "sums": 0.5}
            Path(arguments[arguments.index("--json") + 1]).write_text(json.dumps(scores))

    monkeypatch.setattr(quality, "run", run_script)
    run(monkeypatch, quality, tmp_path, "--cases", 3)
    names = [*(f"plain-{bits}" for bits in quality.BITS), *quality.recipe_names()]
    page = (output / "quality.md").read_text()
    assert "| float32 | 1.00 | 1.5000 | - | - | 75.0% | 100% | 50% |" in page
    assert all(f"| {name} | " in page for name in names)
    assert "`config-i` is an 8-bit recipe here" in page
    assert (output / "quality.png").read_bytes().startswith(PNG)
    assert len(commands) == 2 + 3 * len(names)
    # What is finished is kept.
    run(monkeypatch, quality, tmp_path, "--cases", 3)
    assert len(commands) == 2 + 3 * len(names)
    config = open_checkpoint(NANO).text_config
    for name, file in quality.recipes(tmp_path).items():
        recipe = load_recipe(file, config)
        if name.startswith("plain"):
            assert f"{recipe.default.bits}" == name.removeprefix("plain-")


def test_what_the_page_says_of_recipes_that_nano_cannot_tell_apart() -> None:
    nano = open_checkpoint(NANO)
    precisions = {name: precisions_of(nano, name) for name in quality.recipe_names()}
    assert precisions["oq2"] == precisions["oq2.5"] == precisions["oq2.7"]
    assert precisions["oq3"] == precisions["oq3.5"]
    different = {path for path, spec in precisions["config-i"].items() if spec != precisions["8bit"][path]}
    assert {path.rpartition(".")[2] for path in different} == {"gate", "index_q_proj", "index_k_proj"}
    assert {spec.bits for spec in precisions["config-i"].values()} == {8, None}
    for bits in (2, 3, 4, 5, 6):
        raised = {path for path, spec in precisions[f"oq{bits}"].items() if spec.bits not in (bits, None)}
        # What its rules protect, whatever the budget.
        assert raised, bits
        assert all("shared_expert" in path or "index_" in path for path in raised), bits
    assert f"{plan_of(nano, 'oq2').bits_per_weight:.1f} bits" == "6.4 bits"
    page = (Path(__file__).parents[2] / "docs" / "nano" / "quality.md").read_text()
    assert quality.WHAT_FOUR_LAYERS_HIDE in page


def plan_of(checkpoint: Checkpoint, recipe: str) -> ConversionPlan:
    wanted = load_recipe(recipe, checkpoint.text_config)
    layers = checkpoint.text_config.num_hidden_layers
    specs = allocate_bits(checkpoint, wanted, scores_by_position(layers)) if wanted.bit_targets else None
    return plan_conversion(checkpoint, wanted, specs)


def precisions_of(checkpoint: Checkpoint, recipe: str) -> dict[str, Quantization]:
    return dict(plan_of(checkpoint, recipe).specs)


def test_each_window_of_the_held_out_text_begins_a_conversation() -> None:
    text = quality.held_out_text(NANO)
    ids = Tokenizer.from_file(str(NANO / "tokenizer.json")).encode(text).ids
    assert len(ids) == quality.CONVERSATIONS * quality.WINDOW
    assert len(set(ids[:: quality.WINDOW])) == 1
    assert text.count("]~!b[") == quality.CONVERSATIONS
    assert "image" not in text
    assert text == quality.held_out_text(NANO)


@pytest.mark.parametrize("environment", [{}, pytest.param(context.OFF, marks=needs_native)])
def test_context_measures_time_and_memory(environment: dict[str, str]) -> None:
    seconds, mib = context.in_a_child(NANO, "mlx_lm", 300, environment)
    assert 0 < seconds < 100
    assert 1 < mib < 10_000


def test_context_asks_all_in_turn(monkeypatch: pytest.MonkeyPatch, output: Path) -> None:
    monkeypatch.setattr(context, "in_a_child", lambda _, library, tokens, environment: (tokens / 1000, 20.0))
    run(monkeypatch, context, NANO)
    assert (
        "| 4,096 | 4.10 s, 20 | 4.10 s, 20 | 4.10 s, 20 | 4.10 s, 20 |" in (output / "context.md").read_text()
    )
    assert (output / "context.png").read_bytes().startswith(PNG)


def test_the_log_of_a_training_is_drawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, output: Path
) -> None:
    line = {"seconds": 1, "tokens": 5, "index": 0.5, "prompt": 1.0, "facts": 2.0}
    lines = [json.dumps(line | {"step": step}) for step in range(1, 12)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    run(monkeypatch, plot_log, tmp_path)
    assert (output / "training.jsonl").read_text() == "\n".join(lines)
    assert (output / "training.png").read_bytes().startswith(PNG)
    steps, losses = plot_log.smoothed([json.loads(line) for line in lines], "facts")
    assert (steps, losses) == ([5, 10, 11], [2.0, 2.0, 2.0])


def test_batches_answer_as_one_at_a_time() -> None:
    cases = score.held_out(2, 9, lambda text: len(text.split()))
    mixed = [case for task in ("facts", "call", "needles 2x") for case in cases[task]]
    assert answers.by_mlx_lm_in_batches(NANO)(mixed) == answers.by_mlx_lm(NANO)(mixed)
