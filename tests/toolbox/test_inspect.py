"""``mlx-m3 inspect``: parameters and bytes to the unit, and every kind of problem by its name."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.minimax_m3_vl import Model, ModelArgs

from mlx_m3_plugin.cli import main
from mlx_m3_plugin.model.config import TextConfig
from mlx_m3_plugin.toolbox.inspect import inspect, lines_of
from mlx_m3_plugin.toolbox.parameters import text_shapes
from tests.checkpoints.edits import edit_header, edit_json, stored_names
from tests.checkpoints.random_model import write_random_model
from tests.checkpoints.real_size import REAL_LAYOUTS, real
from tests.checkpoints.small_model import CONFIG
from tests.checkpoints.tiny_layouts import LAYOUTS, UNREPRESENTABLE

# The components of the released model; sums of the table in the specification.
REAL_COMPONENTS = {
    "embeddings": 1_229_193_216,
    "attention": 60 * 106_955_008,
    "indexer": 57 * 3_932_416,
    "dense MLP": 3 * 226_492_416,
    "router": 57 * (786_432 + 128),
    "routed experts": 413_122_166_784,
    "shared expert": 3_227_516_928,
    "norms": (2 * 60 + 1) * 6144,
    "lm_head": 1_229_193_216,
    "vision tower": 631_185_920,
    "projector": 45_625_344,
    "patch merge": 188_755_968,
}


# --- counts ---


@pytest.mark.some(4)
@pytest.mark.parametrize("name", REAL_LAYOUTS)
def test_real_sizes_are_counted_to_the_unit(name):
    written = real(name)
    found = inspect(written.path)
    assert (found.tensors, found.bytes, found.parameters) == (
        written.tensors,
        written.bytes,
        written.parameters,
    )
    assert sum(component.bytes for component in found.components) == written.bytes
    counted = {component.name: component.parameters for component in found.components}
    if name == "m31":
        assert counted == REAL_COMPONENTS | {"indexer": 60 * 3_932_416}
        assert found.model == "MiniMax-M3.1-Flash"
    elif name == "text_only_6bit":
        gone = ("indexer", "vision tower", "projector", "patch merge")
        assert counted == {part: n for part, n in REAL_COMPONENTS.items() if part not in gone}
    else:
        assert counted == REAL_COMPONENTS
        assert found.parameters == 427_040_140_160
    # Nothing but what these directories lack.
    assert [problem.partition(":")[0] for problem in found.problems] == [
        "tokenizer_config.json is missing",
        "no chat template",
    ]
    assert found.memory.per_token == {"text_only_6bit": 122_880, "m31": 138_240}.get(name, 137_472)


def test_the_official_mxfp8_checkpoint():
    found = inspect(real("mxfp8").path)
    assert (found.tensors, found.files) == (45_838, 31)
    assert {(entry.dtype, entry.tensors) for entry in found.dtypes} >= {("F8_E4M3", 22_422), ("U8", 22_422)}
    assert [str(precision) for precision in found.precisions] == ["mxfp8", "bfloat16", "float32"]
    assert found.attention.with_indexer == list(range(3, 60))
    assert (found.attention.budget, found.attention.context) == (2048, 1048576)
    experts = next(component for component in found.components if component.name == "routed experts")
    assert experts.bits_per_weight == 8.25


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"use_qk_norm": False}])
def test_the_expected_parameters_are_those_of_the_model(changes):
    config = TextConfig(**{**vars(CONFIG), **changes})
    parameters = dict(tree_flatten(Model(ModelArgs(config)).parameters()))
    expected = {f"language_model.{name}": shape for name, shape in text_shapes(config).items()}
    assert expected == {name: array.shape for name, array in parameters.items()}


# --- problems ---

Q_PROJ = "language_model.model.layers.0.self_attn.q_proj.weight"
EXPERT = "language_model.model.layers.1.block_sparse_moe.experts.2.w1.weight"
PROJECTOR = "multi_modal_projector.linear_1.bias"


def drop(header: dict[str, Any], name: str) -> None:
    del header[name]


def rename(header: dict[str, Any], name: str) -> None:
    header[name.replace("q_proj", "qq_proj")] = header.pop(name)


def transpose(header: dict[str, Any], name: str) -> None:
    header[name]["shape"].reverse()


def make_integer(header: dict[str, Any], name: str) -> None:
    header[name]["dtype"] = "I32"


@pytest.mark.parametrize(
    ("name", "edit", "problem"),
    [
        (Q_PROJ, drop, f"missing: {Q_PROJ}"),
        (EXPERT, drop, "missing: language_model.model.layers.1.block_sparse_moe.switch_mlp.gate_proj.weight"),
        (
            EXPERT,
            drop,
            "left over: language_model.model.layers.1.block_sparse_moe.experts.{0-1,3}.w1.weight (3)",
        ),
        (Q_PROJ, rename, f"left over: {Q_PROJ.replace('q_proj', 'qq_proj')}"),
        (Q_PROJ, transpose, f"{Q_PROJ} is float[128, 256], not float[256, 128]"),
        (Q_PROJ, make_integer, f"{Q_PROJ} is int32[256, 128], not float[256, 128]"),
    ],
)
def test_wrong_tensors_are_named(name, edit, problem, checkpoint):
    edit_header(checkpoint, name, edit)
    found = inspect(checkpoint)
    assert problem in found.problems
    assert found.opens == {"mlx-lm": False, "mlx-vlm": False}
    assert found.commands == []


def test_a_missing_vision_tensor_does_not_concern_mlx_lm(checkpoint):
    edit_header(checkpoint, PROJECTOR, drop)
    found = inspect(checkpoint)
    assert found.problems == [f"missing: {PROJECTOR}"]
    assert found.opens == {"mlx-lm": True, "mlx-vlm": False}
    assert any("mlx_lm" in command for command in found.commands)
    assert not any("mlx_vlm" in command for command in found.commands)


def test_scales_that_fit_no_quantization(tmp_path):
    LAYOUTS["mlx_unfused_4bit"].write(tmp_path / "m3")

    def narrow(header: dict[str, Any], name: str) -> None:
        rows, width = header[name]["shape"]
        header[name]["shape"] = [4 * rows, width // 4]

    edit_header(tmp_path / "m3", Q_PROJ, narrow)
    (problem,) = inspect(tmp_path / "m3").problems
    assert problem.startswith("model.layers.0.self_attn.q_proj: a weight of shape (1024, 4)")
    assert "128 inputs" in problem


def test_a_truncated_shard_is_the_only_problem(checkpoint):
    file = checkpoint / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    (problem,) = inspect(checkpoint).problems
    assert problem.startswith(f"{file.name}: ")
    assert "1,000 bytes" in problem
    assert not any(inspect(checkpoint).opens.values())


def test_a_missing_shard_is_the_only_problem(checkpoint):
    (checkpoint / "model-00003-of-00003.safetensors").unlink()
    (problem,) = inspect(checkpoint).problems
    assert "model-00003-of-00003.safetensors" in problem
    assert "model.safetensors.index.json" in problem


def test_a_tensor_in_two_files(checkpoint):
    copy = checkpoint / "model-00004-of-00004.safetensors"
    copy.write_bytes((checkpoint / "model-00001-of-00003.safetensors").read_bytes())
    assert any(copy.name in problem for problem in inspect(checkpoint).problems)


@pytest.mark.parametrize("name", UNREPRESENTABLE)
def test_what_cannot_be_represented_is_a_problem(name, tiny):
    found = inspect(tiny(name))
    (problem,) = found.problems
    assert UNREPRESENTABLE[name].offender in problem
    assert not any(found.opens.values())


def test_a_broken_config_leaves_what_headers_say(checkpoint, capsys):
    edit_json(checkpoint / "config.json", lambda config: config["text_config"].update(swiglu_alpha=0))
    found = inspect(checkpoint)
    assert found.problems == ["config.json: swiglu_alpha must be a positive number, not 0"]
    assert found.components is None
    assert found.tensors == len(stored_names(checkpoint))
    assert found.commands == []
    assert main(["inspect", str(checkpoint)]) == 1
    assert "swiglu_alpha must be a positive number" in capsys.readouterr().out


def no_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer_config.json").unlink()


def stale_parser(checkpoint: Path) -> None:
    file = checkpoint / "tokenizer_config.json"
    edit_json(file, lambda config: config.update(tool_parser_type="json_tools"))


def broken_tokenizer_config(checkpoint: Path) -> None:
    (checkpoint / "tokenizer_config.json").write_text("[]")


def no_template(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()


def foreign_template(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}<think>")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (no_tokenizer, "tokenizer_config.json"),
        (stale_parser, "tool_parser_type is json_tools"),
        (broken_tokenizer_config, "tokenizer_config.json is not a JSON object"),
        (no_template, "no chat template"),
        (foreign_template, "it has no <mm:think>"),
    ],
)
def test_tokenizer_settings(damage, problem, checkpoint):
    damage(checkpoint)
    (shown,) = inspect(checkpoint).problems
    assert problem in shown


@pytest.mark.parametrize("where", ["chat_template.json", "tokenizer_config.json"])
def test_a_chat_template_may_be_elsewhere(where, checkpoint):
    template = (checkpoint / "chat_template.jinja").read_text()
    no_template(checkpoint)
    (checkpoint / where).write_text(json.dumps({"chat_template": template}))
    assert inspect(checkpoint).problems == []


# --- which model it is ---


def test_m31_by_its_name(tiny, capsys):
    assert main(["inspect", str(tiny("m31_published"))]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"model +MiniMax-M3\.1-Flash\n", printed)
    assert re.search(r"block budget +32 tokens, 4 blocks of 8, always 1 initial and 1 local\n", printed)
    words = " ".join(printed.split())
    assert (
        "dspark/, for mlx-vlm's --draft-model: 568,962 bytes, up to 7 tokens a round, after layers 0, 2"
        in words
    )
    assert "--top-k" not in printed


@pytest.mark.parametrize(
    ("name", "draft"),
    [
        ("m31_oq_keeping_nvfp4", None),
        ("m31_oq_keeping_nvfp4_draft", "14 tensors in the shards"),
        ("m31_published_text_only", None),
    ],
)
def test_conversions_of_m31(name, draft, tiny):
    found = inspect(tiny(name))
    assert (found.model, found.draft, found.attention.initial) == ("MiniMax-M3.1-Flash", draft, 1)
    assert len(found.notes) == bool(draft)


@pytest.mark.parametrize("name", ["published_float", "published_pruned", "mlx_no_indexer", "mxfp8_official"])
def test_m3_by_its_name(name, tiny):
    found = inspect(tiny(name))
    assert (found.model, found.draft, found.attention.initial) == ("MiniMax-M3", None, 0)


def test_the_effort_of_reasoning(checkpoint):
    assert inspect(checkpoint).efforts == []
    with (checkpoint / "chat_template.jinja").open("a") as file:
        file.write("{% if reasoning_effort %}<effort>{{ reasoning_effort }}</effort>{% endif %}")
    found = inspect(checkpoint)
    assert found.efforts == ["low", "medium", "high", "xhigh", "max"]
    options = [command.partition("--chat-template-")[2] for command in found.commands]
    assert options[0] == """config '{"reasoning_effort": "max"}'"""
    assert options[2] == """args '{"reasoning_effort": "max"}'"""
    assert [c.split()[0] for c in found.commands[1::2]] == ["MLX_M3_PLUGIN_REASONING_EFFORT=max"] * 2
    assert "ten times the tokens" in " ".join(" ".join(lines_of(found)).split())


# --- what is stored and not used ---


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("published_with_mtp", "draft tensors are not used: 2 (mtp.*)"),
        (
            "m31_oq_keeping_nvfp4_draft",
            "draft tensors are not used: 14 (language_model.model.dspark.*, mtp.*)",
        ),
        ("mxfp8_with_extras", "rotary frequencies and scales of FP8 caches are not used: 15 tensors"),
        (
            "published_pruned",
            "the config describes more layers than num_hidden_layers: of moe_layer_freq, "
            "sparse_attention_freq, the first entries count",
        ),
    ],
)
def test_notes(name, note, tiny):
    assert inspect(tiny(name)).notes == [note]


def test_a_file_that_no_index_lists_is_noted(checkpoint):
    file = checkpoint / "model-extra.safetensors"
    (checkpoint / "model-00001-of-00003.safetensors").rename(file)
    names = stored_names(checkpoint)
    edit_json(
        checkpoint / "model.safetensors.index.json",
        lambda index: index.update(
            weight_map={n: f for n, f in index["weight_map"].items() if "00001-of" not in f}
        ),
    )
    assert len(stored_names(checkpoint)) < len(names)
    found = inspect(checkpoint)
    assert found.problems == []
    assert found.notes[0].startswith("model.safetensors.index.json does not list model-extra.safetensors")


# --- the command ---


def test_a_sound_checkpoint(tmp_path, capsys):
    write_random_model(tmp_path / "it's a demo")
    assert main(["inspect", str(tmp_path / "it's a demo")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"total +2,730,304 +10,921,216 +32\.00", printed)
    assert re.search(r"Problems\n +none", printed)
    # Ready to paste, with any path.
    assert f"""mlx_lm.chat --model '{tmp_path}/it'"'"'s a demo' """ in printed


# Without its last parts, which name this machine's memory and mlx-vlm's version.
PAGE = """\
m3
  model         MiniMax-M3.1-Flash
  model type    minimax_m3_vl
  layout        published names (language_model.model.layers); experts stacked (4 rows), gate and up
                separate; 14 unused tensors
  opens in      mlx-lm and mlx-vlm, with this plugin
  without it    not right past 32 tokens without the plugin, where it opens: mlx-lm (it ignores
                sparse_init_block) and mlx-vlm (it selects the same blocks for all groups of heads)
  stored as     F32 86 tensors, 1.3 MiB; U32 35 tensors, 1.1 MiB; U8 37 tensors, 136,320 bytes
  size          158 tensors in 3 files, 2,675,592 bytes (2.6 MiB)
  quantization  nvfp4 786,432, mxfp8 626,688, affine 8-bit g64 180,224; not quantized: float32
                162,088
  vision        yes
  indexer       3 of 3 layers (0-2)
  block budget  32 tokens, 4 blocks of 8, always 1 initial and 1 local
  context       1,048,576 tokens
  draft head    14 tensors in the shards, not used

Component       parameters      bytes  bits/weight  stored as
embeddings          90,112    101,376         9.00  8-bit g64
attention          245,952    254,208         8.27  mxfp8, float32
indexer             37,056     38,784         8.37  mxfp8, float32
dense MLP          147,456    152,064         8.25  mxfp8
router               1,032      4,128        32.00  float32
routed experts     786,432    442,464         4.50  nvfp4
shared expert      196,608    202,752         8.25  mxfp8
norms                  896      3,584        32.00  float32
lm_head             90,112    101,376         9.00  8-bit g64
vision tower        56,864    227,456        32.00  float32
projector           20,736     82,944        32.00  float32
patch merge         82,176    328,704        32.00  float32
other              234,626    735,752        25.09
total            1,990,058  2,675,592        10.76

Memory
  context costs 960 bytes per token, 624 with --kv-bits 8 --kv-group-size 32
"""


def test_the_page(tiny):
    found = inspect(tiny("m31_oq_keeping_nvfp4_draft"))
    found.name = "m3"
    assert "\n".join(lines_of(found)).startswith(PAGE)


def test_json_holds_everything(checkpoint, capsys):
    no_template(checkpoint)
    assert main(["inspect", str(checkpoint), "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    found = inspect(checkpoint)
    assert printed == json.loads(json.dumps({**vars(found), "is_sound": False}, default=vars))
    assert printed["components"][0]["parameters"] == found.components[0].parameters
    assert printed["opens"] == {"mlx-lm": True, "mlx-vlm": True}


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda path: path / "nothing" / "here", "neither a directory nor a repository"),
        (lambda path: path, "no config.json"),
        (lambda path: write(path / "config.json", "{}"), "model_type None"),
        (lambda path: write(path / "config.json", "{"), "is not JSON"),
        (lambda path: write(path / "config.json", '{"model_type": "minimax_m3"}'), "no .safetensors"),
        (lambda path: write(path / "config.json", "{}") / "config.json", "is a file"),
    ],
)
def test_bad_input(make, complaint, tmp_path, capsys):
    assert main(["inspect", str(make(tmp_path))]) == 2
    assert complaint in capsys.readouterr().err


def write(file: Path, text: str) -> Path:
    file.write_text(text)
    return file.parent


def test_it_imports_neither_mlx_lm_nor_transformers(tiny):
    code = (
        "import sys\n"
        "from mlx_m3_plugin.cli import main\n"
        "code = main(['inspect', sys.argv[1]])\n"
        "assert not {'mlx_lm', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    subprocess.run([sys.executable, "-c", code, tiny("published_float")], check=True, capture_output=True)
