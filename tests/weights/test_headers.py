"""What is wrong with a checkpoint's files is told from their headers, all of it at once."""

import mlx.core as mx
import pytest

from mlx_m3_plugin.weights.dtypes import mlx_reads
from mlx_m3_plugin.weights.headers import INDEX, check_files, is_m3, read_header, read_headers
from tests.checkpoints.edits import edit_header
from tests.checkpoints.opens import TOKENS, load_language_model, logits_of
from tests.checkpoints.tiny_layouts import LAYOUTS

FIRST, SECOND, THIRD = (f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))


@pytest.fixture
def checkpoint(tmp_path):
    LAYOUTS["mxfp8_official"].write(tmp_path)
    return tmp_path


def test_a_sound_checkpoint_has_no_problems(checkpoint):
    headers = read_headers(checkpoint)
    assert headers.problems == []
    assert headers.files == [FIRST, SECOND, THIRD]
    gate = headers.tensors["language_model.model.layers.0.mlp.gate_proj.weight"]
    assert gate.stored_dtype == "F8_E4M3"
    assert gate.dtype == mx.uint8
    assert gate.nbytes == gate.shape[0] * gate.shape[1]


def test_every_problem_is_told_at_once(checkpoint):
    (checkpoint / FIRST).unlink()
    data = (checkpoint / SECOND).read_bytes()
    (checkpoint / SECOND).write_bytes(data[:-10])
    (checkpoint / "model-extra.safetensors").write_bytes((checkpoint / THIRD).read_bytes())
    problems = "\n".join(read_headers(checkpoint).problems)
    assert f"{FIRST} is listed in model.safetensors.index.json and absent; it holds" in problems
    assert f"{SECOND}: truncated: 10 bytes are missing, of 1 tensors" in problems
    assert f"are in two files: {THIRD} and model-extra.safetensors" in problems
    # What an absent or truncated file would hold is not told tensor by tensor.
    assert "is listed in model.safetensors.index.json and not in" not in problems
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        check_files(checkpoint)


def test_a_shard_that_no_index_lists_is_named(checkpoint):
    """Of an upload before: mlx-lm would load it as well, and whichever tensor comes last would win."""
    old = "model-00001-of-00007.safetensors"
    (checkpoint / old).write_bytes((checkpoint / FIRST).read_bytes())
    count = len(read_header(checkpoint / FIRST))
    (problem,) = read_headers(checkpoint).problems
    assert problem.startswith(f"{count} tensors (")
    assert f"are in two files: {FIRST} and {old}; {INDEX} does not list {old}: remove it" in problem
    assert read_headers(checkpoint).unlisted == [old]


def test_a_git_lfs_pointer_is_named(checkpoint):
    (checkpoint / SECOND).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
    )
    with pytest.raises(ValueError, match=rf"{SECOND}: a Git LFS pointer .* `git lfs pull`"):
        check_files(checkpoint)


@pytest.mark.parametrize("outside", ["../m3-outside.safetensors", "a/../../m3-outside.safetensors", "/tmp/x"])
def test_an_index_does_not_lead_out_of_the_directory(outside, checkpoint):
    moved = checkpoint.parent / "m3-outside.safetensors"
    (checkpoint / FIRST).rename(moved)
    index = checkpoint / INDEX
    index.write_text(index.read_text().replace(FIRST, outside))
    try:
        headers = read_headers(checkpoint)
        assert headers.files == [SECOND, THIRD]
        assert [p for p in headers.problems if f"{outside} is listed in {INDEX} and is not in the" in p]
    finally:
        moved.unlink()


@pytest.mark.parametrize("library", ["mlx_lm", "mlx_vlm"])
def test_exponents_may_have_a_dtype_of_their_own(library, checkpoint):
    """F8_E8M0, which MLX gives as bytes."""
    pytest.importorskip(library)
    with_u8 = logits_of(load_language_model(library, checkpoint)(TOKENS))
    scales = [n for n, t in read_headers(checkpoint).tensors.items() if n.endswith("weight_scale_inv")]
    for name in scales:
        edit_header(checkpoint, name, lambda header, name: header[name].update(dtype="F8_E8M0"))
    assert {read_headers(checkpoint).tensors[name].stored_dtype for name in scales} == {"F8_E8M0"}
    if library == "mlx_lm" and not mlx_reads("F8_E8M0"):
        with pytest.raises(ValueError, match=r"F8_E8M0.*upgrade mlx"):
            load_language_model(library, checkpoint)
    else:
        assert mx.array_equal(logits_of(load_language_model(library, checkpoint)(TOKENS)), with_u8)


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}} x', "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"a": 1}', "a: its entry in the header is malformed"),
        ('{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}', "a: its entry"),
        ('{"a": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}', "a: its entry"),
        ('{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}}', "a: MLX does not read .* F4"),
        ('{"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}', "a: MLX does not read .* F64"),
        ('{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', "a: 8 bytes do not make a F32"),
        (
            '{"a": {"dtype": "U8", "shape": [5], "data_offsets": [0, 5]},'
            ' "b": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}',
            "a and b overlap",
        ),
        (
            '{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},'
            ' "a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}',
            "a is twice in the header",
        ),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_header_is_not_believed(header, told, tmp_path):
    text = header.encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    problems = read_headers(tmp_path).problems
    assert len(problems) == 1
    with pytest.raises(ValueError, match=f"model.safetensors: .*{told}"):
        check_files(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_is_not_believed(index, checkpoint):
    (checkpoint / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        read_headers(checkpoint)


@pytest.mark.parametrize(
    ("config", "answer"),
    [
        ('{"model_type": "minimax_m3_vl"}', True),
        ('{"model_type": "minimax_m3"}', True),
        ('{"model_type": "llama"}', False),
        ("{}", False),
        ("[]", False),
        ("{", False),
    ],
)
def test_what_is_m3(config, answer, tmp_path):
    (tmp_path / "config.json").write_text(config)
    assert is_m3(tmp_path) is answer
    assert is_m3(tmp_path / "nowhere") is False
