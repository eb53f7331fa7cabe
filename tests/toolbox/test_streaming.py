"""A model computed from its files equals the one in memory, for every layout."""

from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

from mlx_m3_plugin.toolbox.checkpoint import open_checkpoint
from mlx_m3_plugin.toolbox.precision import Quantization
from mlx_m3_plugin.toolbox.streaming import Embedding, Head, StreamedLayer
from mlx_m3_plugin.weights.byte_ranges import TensorReader
from tests.checkpoints.conversions import Written

# Three times the block budget.
TOKENS = [(7 * i * i + 3 * i) % 700 for i in range(96)]


def streamed(directory: Path, cut: int, step: int) -> mx.array:
    checkpoint = open_checkpoint(directory)
    with TensorReader(directory, checkpoint.headers.tensors) as reader:
        h = Embedding(checkpoint, reader)(TOKENS)
        for number in range(checkpoint.text_config.num_hidden_layers):
            layer = StreamedLayer(checkpoint, reader, number)
            h = mx.concatenate(list(layer.attend(h[None], step)), axis=1)[0]
            h = mx.concatenate([layer.feed_forward(h[:cut]), layer.feed_forward(h[cut:])])
        return Head(checkpoint)(h)


def test_it_equals_the_model_in_memory(tiny: Written, layout_name: str) -> None:
    check_that_it_equals_the_model_in_memory(tiny, layout_name)


def check_that_it_equals_the_model_in_memory(tiny: Written, layout: str) -> None:
    model, _ = load_model(tiny(layout))
    expected = model(mx.array([TOKENS]), cache=model.make_cache())[0]
    for cut, step in ((50, 96), (1, 29)):
        difference = mx.abs(streamed(tiny(layout), cut, step) - expected).max().item()
        assert difference < 2e-5


@pytest.mark.some(3)
@pytest.mark.parametrize(
    "layout",
    [
        "published_float",
        "mlx_fused_129_4bit",
        "mxfp8_official",
        "mxfp4_quark",
        "nvfp4_modelopt_mixed",
        "nvfp4_everywhere_compressed_tensors",
    ],
)
def test_so_it_does_with_mlx_kernels(tiny: Written, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where matrices stay quantized in memory."""

    monkeypatch.setattr("mlx_m3_plugin.toolbox.streaming.computes_in_float32", lambda: False)
    check_that_it_equals_the_model_in_memory(tiny, layout)


def test_other_bits_are_tried_without_being_written(tiny: Written) -> None:
    checkpoint = open_checkpoint(tiny("published_float"))
    with TensorReader(checkpoint.directory, checkpoint.headers.tensors) as reader:
        h = Embedding(checkpoint, reader)(TOKENS)
        plain, coarse = (
            StreamedLayer(checkpoint, reader, 1, change).feed_forward(h)
            for change in (lambda path, spec: spec, lambda path, spec: Quantization(2))
        )
    error = (mx.square(plain - coarse).mean() / mx.square(plain).mean()).item()
    assert 1e-4 < error < 1
