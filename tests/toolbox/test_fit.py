"""What fits: counted for the real M3, and a forecast held against what the attention layer takes."""

import gc
import json
import re
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_map

from mlx_m3_plugin.cli import main
from mlx_m3_plugin.hosts.mlx_lm.cache import make_layer_cache
from mlx_m3_plugin.hosts.mlx_lm.model import MLX_LM
from mlx_m3_plugin.model.attention import Attention
from mlx_m3_plugin.model.config import text_config_of
from mlx_m3_plugin.model.memory import attention_transient, stock_transients, wired_limit
from mlx_m3_plugin.msa.common import default_tile_bytes
from mlx_m3_plugin.toolbox import inspect as inspection
from mlx_m3_plugin.toolbox.common import parse_count, parse_memory, size_in_words
from mlx_m3_plugin.toolbox.fit import fit, fit_pipeline
from mlx_m3_plugin.toolbox.inspect import inspect
from tests.checkpoints import real_size
from tests.checkpoints.edits import edit_header
from tests.checkpoints.tiny_layouts import LAYOUTS

GIB = 1 << 30
REAL = text_config_of(real_size.CONFIG)
WEIGHTS = 241_477_881_856


@pytest.fixture(scope="module")
def four_bits() -> Path:
    return real_size.real("fused_4bit").path


def test_the_real_m3_in_four_bits(four_bits: Path) -> None:
    found = fit(four_bits, 256 * GIB)
    assert found.weights + found.vision == WEIGHTS
    assert found.per_token == 137_472
    assert found.fits
    # One more does not.
    assert not fit(four_bits, 256 * GIB, context=found.largest_context + 1).fits
    assert fit(four_bits, 256 * GIB, context=found.largest_context).fits
    assert found.total <= 256 * GIB - found.reserve
    assert found.wired_limit_mb == 240 * 1024


def test_quantized_caches_take_less(four_bits: Path) -> None:
    per_token = [fit(four_bits, 512 * GIB, kv_bits=bits).per_token for bits in (None, 8, 4)]
    # 122,880 values of K and V and 14,592 bytes of index keys; scales and biases of 64 values each.
    assert per_token == [137_472, 61_440 + 61_440 // 64 * 4 + 14_592, 30_720 + 61_440 // 64 * 4 + 14_592]
    with pytest.raises(ValueError, match=r"--kv-bits .* not 3"):
        fit(four_bits, 512 * GIB, kv_bits=3)


def test_what_does_not_fit(four_bits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(four_bits), "--memory", "128GB"]) == 1
    capsys.readouterr()
    assert main(["fit", str(four_bits), "--memory", "256GB", "--context", "1M"]) == 1
    assert "does NOT fit" in capsys.readouterr().out


def test_experts_on_disk(four_bits: Path) -> None:
    assert fit(four_bits, 256 * GIB).on_disk is None
    found = fit(four_bits, 128 * GIB)
    assert found.on_disk is not None
    one_of_each_layer = 57 * 3 * 6144 * 3072 * (4 + 0.5) / 8
    assert found.on_disk.in_memory == found.on_disk.memory // one_of_each_layer == 63
    assert found.on_disk.read == pytest.approx(4 * (1 - 63 / 128) * one_of_each_layer, 1e-6)
    # More context, fewer experts.
    at_512k = fit(four_bits, 128 * GIB, context=512 << 10).on_disk
    assert at_512k is not None
    assert at_512k.in_memory < 63
    # Not even one of each layer.
    assert fit(four_bits, 16 * GIB).on_disk is None


def test_how_much_is_missing(four_bits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = fit(four_bits, 256 * GIB, context=1 << 20)
    assert found.missing == found.total - 240 * GIB > 0
    assert fit(four_bits, 256 * GIB + found.missing * 16 // 15 + 16, context=1 << 20).fits
    main(["fit", str(four_bits), "--memory", "256", "--context", "1M"])
    assert f": {size_in_words(found.missing)} missing" in capsys.readouterr().out


def test_inspect_and_fit_show_the_same_context(four_bits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (256, 288, 512):
        monkeypatch.setattr(inspection, "machine_memory", lambda size=size: size * GIB)
        shown = inspect(four_bits).memory
        assert shown is not None
        for context, kv_bits in ((shown.context, None), (shown.context_kv_8, 8)):
            found = fit(four_bits, size * GIB, kv_bits=kv_bits)
            assert context == found.largest_context > 0
        assert (shown.weights, shown.reserve) == (found.weights, found.reserve)
        assert shown.wired_limit_mb == fit(four_bits, size * GIB).wired_limit_mb


@pytest.mark.parametrize("memory", ["1TB", "1TB,1TB"])
def test_more_context_than_the_model_knows(
    four_bits: Path, memory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the model cannot do does not fit, however much memory there is."""
    assert main(["fit", str(four_bits), "--memory", memory, "--context", "1M"]) == 0
    assert main(["fit", str(four_bits), "--memory", memory, "--context", "2M"]) == 1
    out = capsys.readouterr().out
    assert "only 1,048,576 tokens" in out
    assert "2,097,152" not in out


@pytest.mark.parametrize("size", [1, 8, 16, 32])
def test_no_limit_is_advised_that_does_not_help(tiny: Callable[[str], Path], size: int) -> None:
    """A wired limit is to be above macOS's own three quarters, or it only takes memory away."""
    for context in (None, 1 << 10, 1 << 17):
        limit = fit(tiny("published_float"), size * GIB, context=context).wired_limit_mb
        assert limit is None or limit << 20 > 0.75 * size * GIB
    assert wired_limit(8 * GIB, 7 * GIB) is None
    assert wired_limit(256 * GIB, 192 * GIB) is None
    assert wired_limit(256 * GIB, 193 * GIB) == 240 * 1024
    # Nothing helps what does not fit.
    assert wired_limit(256 * GIB, 241 * GIB) is None


@pytest.mark.parametrize("bandwidth", ["0", "-5", "nan", "inf", "0.5", "1e6"])
def test_no_bandwidth(four_bits: Path, bandwidth: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(four_bits), "--memory", "256GB", f"--bandwidth={bandwidth}"]) == 2
    assert "--bandwidth must be between 1 and 100,000 GB/s, not" in capsys.readouterr().err


def test_numbers_have_no_exponents(tiny: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", str(tiny("published_float")), "--memory", "64GB", "--context", "16"]
    for bandwidth in ([], ["--bandwidth", "100000"], ["--bandwidth", "1"]):
        main([*arguments, *bandwidth])
        assert re.search(r"\d[eE][+-]?\d", (out := capsys.readouterr().out).partition("\n")[2]) is None
        assert re.search(r"at most \d", out)


def test_a_token_reads_what_is_active(four_bits: Path) -> None:
    """Active are 24.73 B parameters with the head, nearly all in 4 bits."""
    found = fit(four_bits, 512 * GIB, context=1, bandwidth=819)
    assert found.touched == pytest.approx(24.73e9 * 4.5 / 8, rel=0.01)
    assert found.ceilings == {"819 GB/s": pytest.approx(819e9 / found.touched, abs=0.1)}
    # Of a long context: all index keys, 2,048 tokens of K and V on sparse layers, all on three dense ones.
    longer = fit(four_bits, 512 * GIB, context=1 << 20)
    read = 57 * 256 * (1 << 20) + 57 * 2048 * 2048 + 3 * 2048 * (1 << 20)
    assert longer.touched - found.touched == pytest.approx(read, rel=0.001)


def test_what_stock_takes_in_addition() -> None:
    assert stock_transients(REAL, 2048, 131_072) == {"mlx-lm": 20 * GIB, "mlx-vlm": 4.25 * GIB}
    assert stock_transients(REAL, 2048, 2048) == {"mlx-lm": 0, "mlx-vlm": 0}


@pytest.mark.some(1)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize(("queries", "context"), [(32, 4096), (48, 12_288)])
def test_the_forecast_is_what_the_layer_takes(queries: int, context: int, dtype: mx.Dtype) -> None:
    """At real sizes on the CPU, as ``benchmarks/msa.py`` measures it."""
    measured = transient_of_the_layer(queries, context, dtype)
    forecast = attention_transient(
        REAL, queries, context, itemsize=dtype.size, tile=default_tile_bytes(), copies_keys=True
    )
    assert forecast == pytest.approx(measured, rel=0.1)


# From docs/benchmarks/msa.md: MiB of a layer by queries and context.
BENCHMARKED = {(256, 8192): 41, (256, 32768): 53, (2048, 32768): 285, (2048, 131_072): 334}


@pytest.mark.parametrize(("case", "mebibytes"), BENCHMARKED.items())
def test_the_forecast_is_what_the_benchmark_says(case: tuple[int, int], mebibytes: int) -> None:
    found = attention_transient(REAL, *case, itemsize=4, tile=16 << 20, copies_keys=True)
    assert found / 2**20 == pytest.approx(mebibytes, rel=0.1)


def transient_of_the_layer(queries: int, context: int, dtype: mx.Dtype) -> int:
    layer = Attention(REAL, 3, MLX_LM).eval()
    layer.update(tree_map(lambda p: mx.full(p.shape, 0.02, dtype), layer.parameters()))
    cache, held = make_layer_cache(True), context - queries
    for part in (held, queries):
        MLX_LM.append_index_keys(cache, mx.random.normal((1, 1, part, 128), dtype))
        MLX_LM.kv_cache(cache).update_and_fetch(
            *(mx.random.normal((1, 4, part, 128), dtype) for _ in range(2))
        )
        mx.eval(cache.state)
    cache.trim(queries)
    x = mx.random.normal((1, queries, REAL.hidden_size), dtype)
    mx.eval(layer.parameters(), x)
    # What other tests have left behind would be given back while this one is measured.
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(layer(x, None, cache), cache.state)
    return mx.get_peak_memory() - before


def test_the_command_as_json(four_bits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", str(four_bits), "--memory", "512GiB", "--context", "128K", "--prefill-step", "4K"]
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["context"], printed["prefill_step"], printed["fits"]) == (131_072, 4096, True)
    assert main(arguments) == 0
    assert "131,072 tokens of 137,472 bytes" in capsys.readouterr().out


# Of 128 GB, and of 256 and 128 GB.
PAGES = {
    "128GB": """\
m3 (MiniMax-M3)
  weights                223.3 GiB  in mlx-lm; 1.6 GiB more in mlx-vlm
  context              137,472 bytes  1 token of 137,472 bytes each
  a chunk of a prompt  319,488 bytes  2,048 tokens at a time (estimate)
  total                  223.3 GiB  does NOT fit in 128.0 GiB minus 8.0 GiB reserved for the system: \
103.3 GiB missing
No context fits: the weights alone are too large.
A token reads 13.0 GiB: at most 57.4 on M2 Ultra, 58.8 on M3 Ultra, 39.2 on M4 Max, 44.1 on M5 Max \
tokens per second.
With experts on disk it runs: MLX_M3_PLUGIN_EXPERT_MEMORY=107.9GB keeps 63 of 128 experts of each layer \
in memory, beside 32,768 tokens of context.
If experts are chosen evenly, a token then reads 3.4 GiB from the disk: at most 1.9 tokens per second at \
7 GB/s.
""",
    "256GB,128GB": """\
m3, 1,029,352 tokens of context
rank   memory      layers      weights      context   a chunk     left over
   0 256.0 GiB     21-59      152.8 GiB     86.1 GiB   1.0 GiB  11,776 bytes
   1 128.0 GiB      0-20       71.7 GiB     45.6 GiB   1.0 GiB       1.6 GiB
The largest context that fits is 1,029,352 tokens.
To let the GPU of rank 0 use that much, on its Mac: sudo sysctl iogpu.wired_limit_mb=245760
To let the GPU of rank 1 use that much, on its Mac: sudo sysctl iogpu.wired_limit_mb=122880
On the machine of rank 0, with all of them in hosts.json in this order:
  mlx.launch --hostfile hosts.json --backend ring --env MLX_M3_PLUGIN_PIPELINE_SPLIT=39,21 \\
    $(which mlx_lm.server) --model m3 --pipeline
""",
}


@pytest.mark.parametrize("memory", PAGES)
def test_the_page(memory: str, four_bits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", str(four_bits), "--memory", memory])
    assert capsys.readouterr().out.replace(str(four_bits), "m3") == PAGES[memory]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", GIB),
        ("256", 256 * GIB),
        ("1048576kB", GIB),
        ("256GB", 256 * GIB),
        ("16TB", 16 * 1024 * GIB),
        ("1.5GiB", 3 * GIB // 2),
        ("64G", 64 * GIB),
        (" 2 TB ", 2048 * GIB),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1XB", "1.2.3", "many", "1e9"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="invalid size"):
        parse_memory(text)


@pytest.mark.parametrize("text", ["0", "0.5", "256B", "100MB", "17TB", "1000000"])
def test_no_machine_has_so_much_or_so_little(text: str) -> None:
    with pytest.raises(ValueError, match="must be between 1GB and 16TB"):
        parse_memory(text)


def test_counts_and_words() -> None:
    assert [parse_count(text) for text in ("5", "128K", "1m")] == [5, 131_072, 1 << 20]
    for text in ("0", "0.5", "1G", "x"):
        with pytest.raises(ValueError, match="invalid number of tokens"):
            parse_count(text)
    assert [size_in_words(n) for n in (5, 3 << 20, 5 << 29)] == ["5 bytes", "3.0 MiB", "2.5 GiB"]


# --- what is in the checkpoint ---


@pytest.mark.parametrize("machines", [1, 2])
def test_a_missing_tensor_is_named(machines: int, tmp_path: Path) -> None:
    """It would count as nothing, and fit anywhere."""
    LAYOUTS["mlx_unfused_4bit"].write(tmp_path / "m3")
    name = "language_model.model.layers.1.block_sparse_moe.switch_mlp.down_proj.weight"
    edit_header(tmp_path / "m3", name, lambda header, name: header.pop(name))
    with pytest.raises(ValueError, match=rf"its size is unknown:(.|\n)*{name}"):
        fit(tmp_path / "m3", 64 * GIB) if machines == 1 else fit_pipeline(tmp_path / "m3", [64 * GIB] * 2)


def test_a_draft_head_in_the_shards_is_loaded_by_neither(tiny: Callable[[str], Path]) -> None:
    without, with_draft = (
        fit(tiny(name), 64 * GIB) for name in ("m31_oq_keeping_nvfp4", "m31_oq_keeping_nvfp4_draft")
    )
    assert (with_draft.weights, with_draft.vision) == (without.weights, without.vision)
    assert without.vision > 0
    assert with_draft.model == "MiniMax-M3.1-Flash"


# --- several machines ---


def test_two_machines_get_the_split_that_leaves_the_most(four_bits: Path) -> None:
    """As even as whole layers allow; weights and caches add up to those of one machine."""
    memories, context = [256 * GIB, 128 * GIB], 131_072
    found = fit_pipeline(four_bits, memories, context=context)
    assert sum(found.split) == REAL.num_hidden_layers
    assert (found.stages[1].first, found.stages[0].last) == (0, 59)
    one = fit(four_bits, 512 * GIB, context=context)
    beside = found.stages[0].weights + found.stages[1].weights - one.weights
    assert sum(stage.cache for stage in found.stages) == one.cache
    # Embeddings, head (of 4.5 bits, as all the rest) and final norm are on both.
    assert beside == 2 * REAL.vocab_size * REAL.hidden_size * 9 // 16 + 2 * REAL.hidden_size
    spare = [s.memory - s.reserve - s.weights - s.cache - s.transient for s in found.stages]
    a_layer = (found.stages[0].weights - beside) // found.split[0]
    assert abs(spare[0] - spare[1]) <= a_layer + context * one.per_token // 60


def test_the_largest_context_of_two_machines_is_that_of_the_best_split(four_bits: Path) -> None:
    memories = [128 * GIB, 128 * GIB]
    largest = fit_pipeline(four_bits, memories).largest_context
    assert fit_pipeline(four_bits, memories, context=largest).fits
    assert not fit_pipeline(four_bits, memories, context=largest + 1).fits
    more_memory = fit_pipeline(four_bits, [128 * GIB, 160 * GIB])
    assert more_memory.largest_context > largest


def test_without_indexers_no_index_keys_are_kept(tmp_path: Path) -> None:
    LAYOUTS["mlx_no_indexer"].write(tmp_path / "m3")
    memories = [64 * GIB, 64 * GIB]
    found = fit_pipeline(tmp_path / "m3", memories, context=1000)
    assert sum(s.cache for s in found.stages) == fit(tmp_path / "m3", 64 * GIB, context=1000).cache


def test_several_machines_on_the_command_line(four_bits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(four_bits), "--memory", "256GB,128GB", "--context", "128K"]) == 0
    assert "MLX_M3_PLUGIN_PIPELINE_SPLIT=43,17" in capsys.readouterr().out
    assert main(["fit", str(four_bits), "--memory", "96GB,96GB", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["split"] == []


def test_how_much_each_of_several_machines_lacks(four_bits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memories = [96 * GIB, 96 * GIB]
    found = fit_pipeline(four_bits, memories, context=1 << 17)
    assert found.stages == []
    # A sixteenth of what is added is left to the system.
    more = found.missing * 16 // 15 + 16
    assert fit_pipeline(four_bits, [memory + more for memory in memories], context=1 << 17).fits
    less = found.missing - (2 << 20)
    assert not fit_pipeline(four_bits, [memory + less for memory in memories], context=1 << 17).fits
    main(["fit", str(four_bits), "--memory", "96,96", "--context", "128K"])
    assert f"each machine needs {size_in_words(found.missing)} more" in capsys.readouterr().out


def test_a_machine_without_room_for_a_layer(tiny: Callable[[str], Path]) -> None:
    """All layers would fit the first one, but each machine holds some."""
    assert fit_pipeline(tiny("published_float"), [64 * GIB, 9 * GIB]).fits
    assert not fit_pipeline(tiny("published_float"), [64 * GIB, 8 * GIB]).fits


def test_more_machines_than_layers(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="has 3 layers, fewer than 5 machines"):
        fit_pipeline(tiny("published_float"), [64 * GIB] * 5)
