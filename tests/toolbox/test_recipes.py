"""Recipes: what they may say, what they say of M3, and budgets."""

import contextlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_m3_plugin.model.config import text_config_of
from mlx_m3_plugin.toolbox.convert.recipe import (
    PARTS,
    Recipe,
    RecipeError,
    load_recipe,
    matrices_of,
    parse_recipe,
    recipe_names,
)
from mlx_m3_plugin.toolbox.precision import Quantization
from tests.checkpoints import real_size
from tests.checkpoints.conversions import planned

REAL = text_config_of(real_size.CONFIG)
DEFAULT = "[default]\nbits = 4\n"


def recipe(text: str) -> Recipe:
    return parse_recipe("mine", text, REAL)


def specs(name: str) -> dict[str, Quantization]:
    loaded = load_recipe(name, REAL)
    return {matrix.module: loaded.spec(matrix) for matrix in matrices_of(REAL)}


def layer(number: int, path: str) -> str:
    return f"model.layers.{number}.{path}"


def test_every_matrix_of_m3_has_a_part() -> None:
    matrices = matrices_of(REAL)
    assert sum(matrix.size for matrix in matrices) > 0.999 * 426_174_572_928
    assert {matrix.part for matrix in matrices} == {part for part in PARTS if "." not in part} - {"vision"}
    assert len(matrices) == 2 + 60 * 4 + 3 * 3 + 57 * (2 + 1 + 3 + 3)


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_that_come_with_the_package_fit_m3(name: str) -> None:
    loaded = load_recipe(name, REAL)
    assert loaded.summary
    assert len(specs(name)) == len(matrices_of(REAL))
    # An explanation at the top, for who copies it.
    assert loaded.text.startswith("# ")


def test_config_i_is_what_it_was_published_as() -> None:
    found = specs("config-i")
    for number in (0, 1, 58, 59):
        assert found[layer(number, "self_attn.o_proj")] == Quantization(8)
    assert found[layer(58, "block_sparse_moe.switch_mlp.down_proj")] == Quantization(8)
    for number in (3, 30, 57):
        moe = layer(number, "block_sparse_moe")
        assert found[f"{moe}.switch_mlp.gate_proj"] == found[f"{moe}.switch_mlp.up_proj"] == Quantization(2)
        assert found[f"{moe}.switch_mlp.down_proj"] == Quantization(3)
        assert found[layer(number, "self_attn.q_proj")] == Quantization(4)
        assert found[f"{moe}.gate"] == Quantization(dtype="float16")
        assert found[layer(number, "self_attn.index_q_proj")] == Quantization(dtype="bfloat16")
    assert found["model.embed_tokens"] == found["lm_head"] == Quantization(8)


def test_selector_safe_keeps_router_and_indexer() -> None:
    found = specs("selector-safe")
    for path, spec in found.items():
        if path.endswith(("block_sparse_moe.gate", "index_q_proj", "index_k_proj")):
            assert spec == Quantization(dtype="keep")
        elif ".switch_mlp." in path:
            assert spec == Quantization(4)
        else:
            assert (spec.bits or 16) >= 6


def test_the_last_rule_that_fits_decides() -> None:
    found = recipe(
        DEFAULT
        + '[[rule]]\nparts = ["attention"]\nbits = 8\n'
        + '[[rule]]\nparts = ["attention.o_proj"]\nlayers = ["1-2", -1]\nbits = 3\n'
    )
    by_path = {matrix.module: found.spec(matrix) for matrix in matrices_of(REAL)}
    assert by_path[layer(0, "self_attn.o_proj")] == Quantization(8)
    assert [by_path[layer(n, "self_attn.o_proj")].bits for n in (1, 2, 3, 58, 59)] == [3, 3, 8, 8, 3]
    assert by_path[layer(1, "self_attn.q_proj")] == Quantization(8)
    assert by_path["lm_head"] == Quantization(4)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "mine: the table \\[default\\]"),
        ("[default", "mine: not valid TOML"),
        ("[default]\nbits = 7\n", "affine must be 2 or 3 or 4 or 5 or 6 or 8, not 7"),
        ("[default]\ngroup_size = 64\n", "bits of affine must be .*, not None"),
        ("[default]\nbits = 4\ngroup_size = 48\n", "group_size of affine must be 32 or 64 or 128, not 48"),
        ('[default]\nmode = "int4"\n', "affine, mxfp8, mxfp4, nvfp4, not 'int4'"),
        ('[default]\nmode = "mxfp4"\ngroup_size = 64\n', "group_size of mxfp4 must be 32, not 64"),
        ('[default]\ndtype = "int8"\n', "dtype must be one of bfloat16"),
        ('[default]\ndtype = "keep"\nbits = 4\n', "dtype must be one of"),
        ("[default]\nbit = 4\n", r"key bit \(did you mean bits\?\); .* bits"),
        (DEFAULT + "[rules]\n", "key rules"),
        (DEFAULT + "[rule]\nbits = 4\n", r"\[\[rule\]\]"),
        (DEFAULT + "[[rule]]\nbits = 4\n", "rule 1: parts"),
        (DEFAULT + '[[rule]]\nparts = ["mlp"]\nbits = 4\n', "rule 1: .* mlp; .* embeddings,"),
        (DEFAULT + '[[rule]]\nparts = ["experts.w1"]\nbits = 4\n', "rule 1: .* experts.w1"),
        (DEFAULT + '[[rule]]\nparts = ["attention"]\nlayers = [60]\nbits = 4\n', "60 layers, and 60 "),
        (DEFAULT + '[[rule]]\nparts = ["attention"]\nlayers = ["5-3"]\nbits = 4\n', "60 layers, and 5-3 "),
        (DEFAULT + '[[rule]]\nparts = ["attention"]\nlayers = ["all"]\nbits = 4\n', "rule 1: .* layer 'all'"),
        (DEFAULT + '[[rule]]\nparts = ["vision"]\nbits = 4\n', "rule 1: the vision tower"),
        (DEFAULT + '[plan]\nmethod = "oq"\nbudget = 4\n', r"\[plan\]: .* budget; .* base_bits"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_followed_says_why(text: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        recipe(text)


def test_there_is_no_such_recipe() -> None:
    with pytest.raises(RecipeError, match=r"5bit.* 4bit, 6bit,"):
        load_recipe("5bit", REAL)


def test_groups_have_to_divide_the_inputs() -> None:
    narrow = replace(REAL, hidden_size=96)
    loaded = parse_recipe("mine", DEFAULT, narrow)
    with pytest.raises(RecipeError, match=r"mine: .* 96 inputs.* 64"):
        [loaded.spec(matrix) for matrix in matrices_of(narrow)]


@settings(max_examples=1000, deadline=None)
@given(st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 99), st.text("a[]=\n\"' -0.", max_size=9)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["default", "rule", "plan", "parts", "layers", "bits", "mode", "dtype", "x"]), inner, max_size=4),
    max_leaves=12))  # fmt: skip
def test_whatever_a_file_holds_the_answer_is_a_recipe_or_its_error(content: Any) -> None:
    def toml(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key} = {toml(v)}" for key, v in value.items()) + "}"
        return json.dumps(value) if value is not None else '"none"'

    entries = content.items() if isinstance(content, dict) else [("default", content)]
    with contextlib.suppress(RecipeError):
        recipe("\n".join(f"{key} = {toml(value)}" for key, value in entries))


def test_keep_qat_of_m31_has_the_published_size() -> None:
    """kszlachcikowski/MiniMax-M3.1-Flash-oQ4e, by the same policy, has 230.8 GiB."""
    written = real_size.real("m31")
    # Published: 427.052 B parameters, 250.12 GB with the draft's small files.
    assert written.parameters == 427_051_937_408
    assert abs(written.bytes / 250.12e9 - 1) < 1e-3
    plan = planned(written.path, "keep-qat")
    assert plan.parameters == written.parameters
    assert round(plan.nbytes / 2**30, 1) == 230.8
    stored = {str(spec) for spec in plan.specs.values()}
    assert stored == {"nvfp4 with tensor scales", "mxfp8", "8-bit g64", "float32"}


def test_sizes_of_precisions() -> None:
    assert Quantization(4).bytes_of(6400) == 3200 + 100 * 4
    assert Quantization(4, 32, "mxfp4").bytes_of(6400) == 3200 + 200
    assert Quantization(4, 16, "nvfp4").bytes_of(6400) == 3200 + 400
    assert Quantization().bytes_of(100) == 200
    assert Quantization(dtype="float32").bytes_of(100) == 400
