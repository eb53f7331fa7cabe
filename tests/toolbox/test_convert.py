"""Conversions: bit for bit MLX's own quantization, whatever the memory; and what is beside the weights."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_m3_plugin.cli import main
from mlx_m3_plugin.toolbox.checkpoint import open_checkpoint
from mlx_m3_plugin.toolbox.checksums import verify
from mlx_m3_plugin.toolbox.convert import plan as planning
from mlx_m3_plugin.toolbox.convert.config_and_card import model_card
from mlx_m3_plugin.toolbox.convert.recipe import recipe_names
from mlx_m3_plugin.toolbox.inspect import inspect
from mlx_m3_plugin.toolbox.stock import why_not_opened
from mlx_m3_plugin.weights.dtypes import name_of
from mlx_m3_plugin.weights.names import is_draft
from mlx_m3_plugin.weights.quantization import PARTS
from tests.checkpoints.conversions import (
    MEMORY,
    SOURCES,
    Written,
    converted,
    dequantized,
    digest,
    one_of_each,
    parameters,
    planned,
)
from tests.checkpoints.corruptions import Shards
from tests.checkpoints.edits import edit_header, edit_json
from tests.checkpoints.tiny_layouts import LAYOUTS

IS_NEWEST = not version("mlx-lm").startswith("0.31.")


def same(one: mx.array, other: mx.array) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bool(mx.array_equal(one, other))


def test_tensors_are_mlxs_own_quantization_of_the_source(
    tiny: Written, tmp_path: Path, count: Callable[[int, int], int]
) -> None:
    pairs = [(recipe, source) for recipe in recipe_names() for source in SOURCES]
    for recipe, source in pairs if count(0, 1) else one_of_each(pairs):
        check_tensors(tiny(source), recipe, tmp_path / f"{recipe} of {source}")


def check_tensors(source: Path, recipe: str, made: Path) -> None:
    plan = converted(source, recipe, made)
    before, after = parameters(source), parameters(made)
    checkpoint = open_checkpoint(source)
    for module, spec in plan.specs.items():
        stored = checkpoint.spec(module)
        if spec == stored:
            expected = {part: before.get(f"{module}.{part}") for part in PARTS}
        else:
            values = dequantized(before, module, stored)
            if spec.bits is None:
                kept = values if spec.dtype == "keep" else values.astype(getattr(mx, spec.dtype))
                expected = {"weight": kept}
            else:
                assert f"{module}.global_scale" not in after
                parts = mx.quantize(values, **spec.as_quantization())
                expected = dict(zip(("weight", "scales", "biases"), parts, strict=False))
        for part, array in expected.items():
            found = after.get(f"{module}.{part}")
            assert (found is None and array is None) or same(found, array), f"{module}.{part}"
    assert inspect(made).problems == []
    written = open_checkpoint(made)
    for module, spec in plan.specs.items():
        dtype = name_of(written.plan[f"{module}.weight"].dtype)
        assert written.spec(module) == spec if spec.bits is not None else spec.dtype in (dtype, "keep")
    # Norms, biases and vision are as they were, or in the dtype that the recipe names.
    others = {n: a for n, a in before.items() if n.rpartition(".")[0] not in plan.specs}
    assert others.keys() == {n for n in after if n.rpartition(".")[0] not in plan.specs}
    for name, array in others.items():
        found = after[name]
        assert same(found, array) or same(found, array.astype(mx.bfloat16)), name


def test_the_config_says_whether_the_shared_expert_is_packed(tiny: Written, tmp_path: Path) -> None:
    for recipe, packed in (("4bit", True), ("selector-safe", False)):
        plan = converted(tiny("published_float"), recipe, tmp_path / recipe)
        config = json.loads((tmp_path / recipe / "config.json").read_text())
        names = parameters_stored(tmp_path / recipe)
        assert plan.packed is packed
        assert config["text_config"]["pack_shared_expert"] is packed
        assert any("switch_mlp.gate_up_proj" in name for name in names) is packed
        assert any("shared_experts" in name for name in names) is not packed
        assert "quantization_config" not in config["text_config"]


def parameters_stored(directory: Path) -> list[str]:
    return list(json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"])


@pytest.mark.parametrize("source", ["published_float", "mlx_fused_129_4bit"])
def test_memory_and_files_make_no_difference_to_the_tensors(
    tiny: Written, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted(tiny(source), "selector-safe", tmp_path / "roomy")
    # Pieces of a few rows.
    converted(tiny(source), "selector-safe", tmp_path / "narrow", memory=200_000)
    assert digest(tmp_path / "roomy") == digest(tmp_path / "narrow")
    monkeypatch.setattr(planning, "SHARD_BYTES", 100_000)
    plan = converted(tiny(source), "selector-safe", tmp_path / "many")
    assert len(plan.shards) > 5
    one, many = parameters(tmp_path / "roomy"), parameters(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(same(one[name], many[name]) for name in one)


def test_pass_through_moves_bytes_alone(tiny: Written, tmp_path: Path) -> None:
    """MXFP8 as MiniMax publishes it: what MLX unpacks is what was stored."""
    plan = converted(tiny("mxfp8_official"), "mxfp8", tmp_path / "made")
    assert plan.nbytes == sum(
        t.nbytes for t in open_checkpoint(tiny("mxfp8_official")).headers.tensors.values()
    )


# With tensor scales: of experts, of every matrix, and stacked.
SCALED = ("nvfp4_modelopt_mixed", "nvfp4_everywhere_compressed_tensors", "mlx_unfused_nvfp4_tensor_scales")


@pytest.mark.parametrize("memory", [MEMORY, 200_000])
@pytest.mark.parametrize("layout", SCALED)
def test_keep_keeps_tensor_scales(tiny: Written, tmp_path: Path, layout: str, memory: int) -> None:
    check_kept(tiny(layout), tmp_path, memory)


def test_keep_keeps_every_layout(tiny: Written, tmp_path: Path, layout_name: str) -> None:
    check_kept(tiny(layout_name), tmp_path)


def check_kept(source: Path, work: Path, memory: int = MEMORY) -> None:
    (work / "keep.toml").write_text('[default]\ndtype = "keep"\n')
    converted(source, str(work / "keep.toml"), work / "made", memory)
    before, after = parameters(source), parameters(work / "made")
    assert before.keys() == after.keys()
    assert [name for name, array in before.items() if not same(array, after[name])] == []
    assert inspect(work / "made").problems == []


def test_keep_stops_where_it_cannot_keep(tiny: Written, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny("mlx_unfused_4bit"), tmp_path / "source"))
    name = "language_model.model.layers.1.self_attn.q_proj.biases"
    file = source / json.loads((source / "model.safetensors.index.json").read_text())["weight_map"][name]
    weights = dict(mx.load(str(file)))
    mx.eval(weights)
    mx.save_safetensors(str(file), weights | {name: weights[name].astype(mx.bfloat16)}, {"format": "mlx"})
    with pytest.raises(ValueError, match=r"keep-qat: .* model\.layers\.1\.self_attn\.q_proj\.biases"):
        planned(source, "keep-qat")


def test_keep_qat_leaves_what_was_trained_quantized(tiny: Written, tmp_path: Path) -> None:
    plan = converted(tiny("nvfp4_modelopt_mixed"), "keep-qat", tmp_path / "made")
    before, after = parameters(tiny("nvfp4_modelopt_mixed")), parameters(tmp_path / "made")
    changed = {
        name.rpartition(".")[0] for name in after if name not in before or not same(before[name], after[name])
    }
    assert changed == {"model.embed_tokens", "lm_head"}
    assert {str(plan.specs[path]) for path in changed} == {"8-bit g64"}
    assert after["model.layers.1.block_sparse_moe.gate.weight"].dtype == mx.float32


def test_the_card_says_what_stock_libraries_get_wrong(tiny: Written, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny("nvfp4_modelopt_mixed"), tmp_path / "source"))
    for init_blocks, recipe in ((0, "4bit"), (1, "keep-qat")):
        edit_json(
            source / "config.json",
            lambda config, n=init_blocks: config["text_config"]["sparse_attention_config"].update(
                sparse_init_block=n
            ),
        )
        card = model_card(planned(source, recipe), has_effort=bool(init_blocks))
        name = "MiniMax-M3.1-Flash" if init_blocks else "MiniMax-M3"
        assert f"\nbase_model: MiniMaxAI/{name}\n" in card
        assert f"\n# {name}, {recipe}\n" in card
        assert ("MLX_M3_PLUGIN_REASONING_EFFORT=max mlx_lm.chat" in card) == bool(init_blocks)
        assert ("ten times the tokens" in " ".join(card.split())) == bool(init_blocks)
        assert "Past 32 tokens they are not right alone: " in card
        assert "mlx-vlm (it selects the same blocks for all groups of heads)" in card
        assert ("mlx-lm (it ignores sparse_init_block)" in card) == bool(init_blocks)
        assert ("tensor scales on some GPUs; stock mlx-vlm does not" in card) == (recipe == "keep-qat")


def test_what_is_beside_the_weights(tiny: Written, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny("published_float"), tmp_path / "source"))
    (source / "LICENSE").write_text("MiniMax Community License")
    (source / "preprocessor_config.json").write_text("{}")
    (source / "hf_quant_config.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"x")
    (source / "chat_template.jinja").unlink()
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"tool_parser_type": "json_tools"}))
    converted(source, "config-i", tmp_path / "made")
    made = tmp_path / "made"
    copied = {"LICENSE", "preprocessor_config.json", "tokenizer.json", "generation_config.json"}
    assert copied <= {file.name for file in made.iterdir()}
    assert not {"hf_quant_config.json", "pytorch_model.bin"} & {file.name for file in made.iterdir()}
    assert "tool_parser_type" not in json.loads((made / "tokenizer_config.json").read_text())
    assert "<mm:think>" in (made / "chat_template.jinja").read_text()
    card = (made / "README.md").read_text()
    assert "mlx_vlm.generate --model path/to/this --image photo.jpg" in card
    assert "greedy decoding" in card
    for words in (
        "Built with MiniMax M3.**",
        "`config-i` of mlx-m3-plugin",
        "mlx 0.",
        "8-bit g64",
        "[default]",
    ):
        assert words in card
    assert card.startswith("---\nlicense: other\n")


@pytest.mark.parametrize("layout", ["published_text_only", "mlx_unfused_4bit", "published_float"])
def test_processor_files_stay_with_the_vision_tower(layout: str, tiny: Written, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny(layout), tmp_path / "source"))
    files = {"preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"}
    for name in files:
        (source / name).write_text("{}")
    plan = converted(source, "4bit", tmp_path / "made")
    copied = files & {file.name for file in (tmp_path / "made").iterdir()}
    assert copied == (files if plan.source.vision else set())


def test_a_dry_run_reads_headers_and_writes_nothing(
    tiny: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(tiny("published_float")), "--recipe", "oq4", "--dry-run", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["bytes"] == planned(tiny("published_float"), "oq4").nbytes
    assert printed["sensitivity"] == "by position: nothing was measured"
    assert main(["convert", str(tiny("published_float")), "--recipe", "4bit", "--dry-run"]) == 0
    assert "total" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_fixed_bits_are_planned_without_mlx_lm(tiny: Written) -> None:
    """Its import takes longer than the plan."""
    arguments = ["convert", str(tiny("published_float")), "--recipe", "4bit", "--dry-run"]
    code = (
        f"import sys; from mlx_m3_plugin.cli import main; print(main({arguments}), 'mlx_lm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere", "made", "--recipe", "4bit"], "nowhere is neither a directory nor a repository id"),
        (["{m3}", "made", "--recipe", "5bit"], "5bit"),
        (["{m3}", "made"], "convert needs SRC, DST and --recipe"),
        (["{m3}", "--recipe", "4bit"], "convert needs SRC, DST and --recipe"),
        (["{m3}", "there", "--recipe", "4bit"], "there exists already"),
        (["{m3}", "{m3}", "--recipe", "4bit"], "exists already"),
        (
            ["{m3}", "made", "--recipe", "4bit", "--sensitivity", "position"],
            "--sensitivity does not",
        ),
        (["{m3}", "made", "--recipe", "oq4", "--sensitivity", "there/x"], "there/x is not a sensitivity map"),
        (["there", "made", "--recipe", "4bit"], "there has no config.json"),
    ],
)
def test_what_cannot_be_converted_says_why(
    tiny: Written,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("{}")
    before = digest(tiny("published_float"))
    assert main(["convert", *(a.format(m3=tiny("published_float")) for a in arguments)]) == 2
    assert complaint in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there"]
    assert digest(tiny("published_float")) == before


def test_a_source_with_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    LAYOUTS["published_float"].write(tmp_path / "m3")
    from tests.checkpoints.edits import edit_header

    name = "language_model.model.layers.1.block_sparse_moe.experts.2.w2.weight"
    edit_header(tmp_path / "m3", name, lambda header, name: header.pop(name))
    with pytest.raises(ValueError, match=r"is not a whole MiniMax-M3:\n  missing: .*down_proj"):
        open_checkpoint(tmp_path / "m3")


# --- draft heads ---


def stored_bytes(directory: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of every tensor in a directory's files."""
    return {
        name: (entry["dtype"], entry["shape"], data)
        for tensors in Shards.read(directory, {}).files.values()
        for name, (entry, data) in tensors.items()
    }


@pytest.mark.parametrize(
    ("layout", "where", "kept"),
    [
        ("m31_published", "dspark/", "dspark/"),
        ("m31_oq_keeping_nvfp4_draft", "14 tensors in the shards", "draft/"),
    ],
)
def test_a_draft_head_is_kept_where_asked(
    layout: str, where: str, kept: str, tiny: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(tiny(layout), tmp_path / "source"))
    if kept == "draft/":
        name = "language_model.model.dspark.layers.0.decoder_layer.self_attn.q_proj.weight"
        edit_header(source, name, lambda header, name: header[name].update(dtype="F8_E4M3"))
    expected = stored_bytes(source if kept == "draft/" else source / "dspark")
    expected = {name: tensor for name, tensor in expected.items() if is_draft(name)}
    arguments = ["convert", str(source), "--recipe", "4bit"]
    assert main([*arguments, str(tmp_path / "without"), "--no-draft"]) == 0
    assert f"draft head ({where}): left out; --keep-draft keeps it\n" in capsys.readouterr().out
    assert inspect(tmp_path / "without").draft is None

    made, again = tmp_path / "made", tmp_path / "again"
    assert main([*arguments, str(made), "--keep-draft"]) == 0
    assert f"draft head ({where}): kept bit for bit\n" in capsys.readouterr().out
    assert stored_bytes(made / kept) == expected
    assert main(["convert", str(made), "--recipe", "4bit", str(again), "--keep-draft"]) == 0
    assert stored_bytes(again / kept) == expected
    found = inspect(made)
    assert (found.draft, found.problems) == (kept, [])
    assert verify(made, lambda *_: lambda *_: None).problems == []
    if kept == "draft/":
        # Libraries look for no weights in it: what they say does not change.
        said = {library: why_not_opened(library, made, tmp_path / "without") for library in found.opens}
        assert said["mlx-lm"] == (["", ""] if IS_NEWEST else 2 * said["mlx-lm"][:1])
        assert said["mlx-vlm"] == 2 * said["mlx-vlm"][:1]
        shard = made / "draft" / "model.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
        (problem,) = verify(made, lambda *_: lambda *_: None).problems
        assert problem.startswith("draft/model.safetensors: its content has changed")


def test_there_must_be_a_draft_head_to_keep(
    tiny: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(tiny("published_float"))
    assert main(["convert", source, "--recipe", "4bit", str(tmp_path / "made"), "--keep-draft"]) == 2
    assert f"--keep-draft: {source} has no draft head" in capsys.readouterr().err
