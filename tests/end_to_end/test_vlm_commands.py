"""Every stock mlx-vlm command on the demo with vision, in child processes that import nothing of ours.

Below the block budget the answers are held against mlx-vlm's own M3 class, in an environment
that has never seen the plugin.  Above it that class attends to other blocks; there the commands
are held against each other and against mlx-lm.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints.random_model import write_random_model
from tests.checkpoints.tiny_layouts import LAYOUTS
from tests.end_to_end import vlm_commands as vlm
from tests.end_to_end.environments import SERVED_BY, Environment
from tests.end_to_end.vlm_commands import (
    MAX_TOKENS,
    QUESTION,
    Logits,
    Media,
    convert,
    generate,
    generate_in_python,
)
from tests.end_to_end.vlm_server import Server, serving

if find_spec("mlx_vlm") is None:
    pytest.skip("mlx-vlm is not installed here", allow_module_level=True)

NEEDS_MLX_LM = pytest.mark.skipif(find_spec("mlx_lm") is None, reason="mlx-lm is not installed here")
NATIVE = "mlx_vlm.models.minimax_m3_vl.minimax_m3_vl"
OURS = "mlx_vlm.models.minimax_m3_vl"
SHOWN = ("nothing", "one picture", "two pictures", "a video")
# Both classes hold the same weights; the rest is rounding.
TOLERANCE = 1e-3


def at_least(package: str, *wanted: int) -> bool:
    return tuple(int(n) for n in version(package).split(".")[: len(wanted)]) >= wanted


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("vision_demo") / "checkpoint"
    write_random_model(directory, vision=True)
    return directory


@pytest.fixture(scope="module")
def media(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Media:
    return vlm.make_media(tmp_path_factory.mktemp("media"), demo / "picture.png")


@pytest.fixture(scope="module")
def in_python(guest: Environment, demo: Path, media: Media) -> dict[str, dict[str, Any]]:
    """What mlx-vlm's Python interface answers, by what is shown."""
    return generate_in_python(guest, demo, media.keywords())


@pytest.fixture(scope="module")
def quantized(guest: Environment, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(guest, demo, tmp_path_factory.mktemp("quantized") / "checkpoint", "-q")


LogitsOf = Callable[[Environment, Path], Logits]


@pytest.fixture(scope="module")
def logits_of(media: Media, tmp_path_factory: pytest.TempPathFactory) -> LogitsOf:
    """The logits of a checkpoint in an environment, computed once."""

    @cache
    def computed(environment: Environment, model: Path) -> Logits:
        return vlm.logits(environment, model, media.picture, tmp_path_factory.mktemp("logits") / "file")

    return computed


class TestGenerate:
    @pytest.mark.some(2)
    @pytest.mark.parametrize("shown", SHOWN)
    def test_the_command_says_what_the_python_interface_says(
        self, guest: Environment, demo: Path, media: Media, in_python: dict[str, Any], shown: str
    ) -> None:
        text = generate(guest, demo, *media.options()[shown])
        assert text.strip()
        assert text == in_python[shown]["text"]

    def test_what_is_shown_is_seen(self, in_python: dict[str, Any]) -> None:
        assert len({answer["text"] for answer in in_python.values()}) == len(in_python) == 6
        tokens = {shown: answer["prompt_tokens"] for shown, answer in in_python.items()}
        assert tokens["nothing"] > 4 * 32
        assert tokens["one picture"] - tokens["nothing"] == Media.PICTURE_TOKENS
        assert tokens["two pictures"] - tokens["one picture"] == Media.OTHER_PICTURE_TOKENS
        # Their prompts are the same, so only the pixels can have made the difference.
        assert tokens["one picture"] == tokens["a lookalike"]
        assert tokens["a video"] == tokens["another video"]
        # Two frames make as many tokens as a picture of their size.
        assert tokens["a video"] - tokens["nothing"] >= 2 * Media.PICTURE_TOKENS

    def test_started_as_a_module(
        self, guest: Environment, demo: Path, media: Media, in_python: dict[str, Any]
    ) -> None:
        text = generate(guest, demo, *media.options()["two pictures"], module=True)
        assert text == in_python["two pictures"]["text"]

    @NEEDS_MLX_LM
    def test_text_is_mlx_lms(self, guest: Environment, demo: Path, in_python: dict[str, Any]) -> None:
        options = ("--prompt", QUESTION, "--max-tokens", str(MAX_TOKENS), "--temp", "0", "--verbose", "False")
        text = guest.run_script("mlx_lm.generate", "--model", demo, *options).stdout
        assert text.strip() == in_python["nothing"]["text"].strip()

    def test_it_was_served_by_our_file(self, guest: Environment, demo: Path) -> None:
        options = ("--model", demo, "--prompt", "Hello", "--max-tokens", "2")
        run = guest.run("-c", SERVED_BY, OURS, guest.script("mlx_vlm.generate"), *options)
        assert run.stdout.splitlines()[-1] == str(guest.plugin / "hosts/mlx_vlm/minimax_m3_vl.py")


class TestConvert:
    def test_quantized_it_opens_without_us(
        self, guest: Environment, stock: Environment, demo: Path, quantized: Path, logits_of: LogitsOf
    ) -> None:
        ours, native = logits_of(guest, quantized), logits_of(stock, quantized)
        assert (ours.served_by, native.served_by) == (OURS, NATIVE)
        assert_alike(ours, native)
        # Quantization costs something, so the two checkpoints were not mixed up.
        whole = logits_of(guest, demo)
        assert abs(vlm.loss(whole.seen, whole.tokens) - vlm.loss(ours.seen, ours.tokens)) > TOLERANCE

    @NEEDS_MLX_LM
    def test_quantized_it_opens_in_mlx_lm_without_us(
        self, guest: Environment, stock: Environment, quantized: Path, logits_of: LogitsOf, tmp_path: Path
    ) -> None:
        if not at_least("mlx-lm", 0, 32):
            pytest.skip("mlx-lm before 0.32 has no M3 class of its own")
        ours = logits_of(guest, quantized)
        native = vlm.lm_logits(stock, quantized, ours.tokens, tmp_path / "native")
        np.testing.assert_allclose(native, ours.read, atol=TOLERANCE, rtol=0)

    def test_what_it_writes_says_what_it_is(self, quantized: Path) -> None:
        config = json.loads((quantized / "config.json").read_text())
        assert config["model_type"] == "minimax_m3_vl"
        assert config["text_config"]["pack_shared_expert"] is True
        assert config["quantization"]["bits"] == 4
        assert config["quantization"]["language_model.model.layers.2.block_sparse_moe.gate"]["bits"] == 8
        for file in quantized.glob("*.json"):
            assert "plugin" not in file.read_text(), file.name

    def test_quantized_it_answers_with_and_without_us(
        self, guest: Environment, stock: Environment, media: Media, quantized: Path
    ) -> None:
        """All files that generating needs are there; the texts differ above the block budget."""
        shown = media.options()["one picture"]
        texts = [generate(environment, quantized, *shown) for environment in (guest, stock)]
        assert all(text.strip() for text in texts)

    def test_unquantized_every_value_is_kept(
        self, guest: Environment, stock: Environment, demo: Path, logits_of: LogitsOf, tmp_path: Path
    ) -> None:
        plain = convert(guest, demo, tmp_path / "plain")
        before, after = logits_of(guest, demo), logits_of(guest, plain)
        assert np.array_equal(before.seen, after.seen)
        native = logits_of(stock, plain)
        assert native.served_by == NATIVE
        assert_alike(after, native)

    @pytest.mark.some(1)
    @pytest.mark.parametrize(
        ("name", "since"),
        [
            ("mlx_fused_129_oq4", (0, 6, 4)),
            ("mlx_unfused_4bit_vision", (0, 6, 4)),
            # Its shared expert has other bits than the rest, so it cannot lie among them.
            ("mlx_shared_8bit_unpacked", (0, 6, 5)),
        ],
    )
    def test_quantized_weights_stay_as_they_are(
        self,
        guest: Environment,
        stock: Environment,
        logits_of: LogitsOf,
        tmp_path: Path,
        name: str,
        since: tuple[int, ...],
    ) -> None:
        LAYOUTS[name].write(tmp_path / "before")
        converted = convert(guest, tmp_path / "before", tmp_path / "after")
        assert vlm.quantized_bytes(converted) == vlm.quantized_bytes(tmp_path / "before") > 0
        ours, again = logits_of(guest, tmp_path / "before"), logits_of(guest, converted)
        assert_alike(ours, again)
        if at_least("mlx-vlm", *since):
            native = logits_of(stock, converted)
            assert native.served_by == NATIVE
            assert_alike(ours, native)


def assert_alike(ours: Logits, others: Logits) -> None:
    np.testing.assert_allclose(others.seen, ours.seen, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(others.read, ours.read, atol=TOLERANCE, rtol=0)
    # The picture makes a difference, or there was nothing to compare.
    assert np.abs(ours.seen - ours.read).max() > 100 * TOLERANCE


class TestServer:
    @pytest.fixture(scope="class")
    def server(
        self, guest: Environment, demo: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Server]:
        with serving(guest, demo, tmp_path_factory.mktemp("server") / "log.txt") as server:
            yield server

    def test_a_picture_in_a_chat(self, server: Server, media: Media, in_python: dict[str, Any]) -> None:
        answer = server.ask(QUESTION, media.picture, max_tokens=MAX_TOKENS)
        assert answer["message"]["content"].strip() == in_python["one picture"]["text"].strip()
        assert answer["usage"]["prompt_tokens"] == in_python["one picture"]["prompt_tokens"]

    def test_streamed_it_is_the_same(self, server: Server, media: Media, in_python: dict[str, Any]) -> None:
        pieces = server.ask_streamed(QUESTION, media.picture, media.other_picture, max_tokens=MAX_TOKENS)
        assert len([piece for piece in pieces if piece]) > MAX_TOKENS // 2
        assert "".join(pieces).strip() == in_python["two pictures"]["text"].strip()

    def test_requests_side_by_side_are_answered_as_alone(self, server: Server, media: Media) -> None:
        """Of several lengths, so that their rows are padded, with and without pictures."""
        pictures = [(), (media.picture,), (media.other_picture,), (media.picture, media.other_picture)]
        asked = [(f"{QUESTION} {'Look closely. ' * n}", *shown) for n in range(2) for shown in pictures]

        def content(request: tuple[Any, ...]) -> str:
            return server.ask(*request, max_tokens=MAX_TOKENS)["message"]["content"]

        alone = [content(request) for request in asked]
        assert len(set(alone)) == len(asked)
        with ThreadPoolExecutor(len(asked)) as pool:
            together = list(pool.map(content, asked))
        assert together == alone


class TestChat:
    def test_a_picture_and_a_second_turn(
        self, guest: Environment, demo: Path, media: Media, in_python: dict[str, Any]
    ) -> None:
        turns = (f"/image {media.picture}", QUESTION, "And the white square?", "/exit")
        options = ("--model", demo, "--max-tokens", str(MAX_TOKENS), "--temperature", "0")
        script = "".join(f"{turn}\n" for turn in turns)
        run = guest.run_script("mlx_vlm.chat", *options, input=script)
        _, *answers = run.stdout.split("Assistant: ")
        first, second = (answer.split("\nYou: ")[0].strip() for answer in answers)
        assert first == in_python["one picture"]["text"].strip()
        assert second
        # The chat prints exceptions and goes on.
        assert "Error" not in run.stdout


class TestOffAndGone:
    def test_switched_off_it_is_stock_byte_for_byte(
        self, guest: Environment, stock: Environment, demo: Path, media: Media
    ) -> None:
        shown = media.options()["one picture"]
        off = generate(guest, demo, *shown, env={"MLX_M3_PLUGIN": "off"})
        assert off.strip()
        assert off == generate(stock, demo, *shown)

    def test_uninstalled_it_is_gone(self, own_guest: Environment) -> None:
        served_by = f"import {OURS}; print({OURS}.__file__)"
        assert own_guest.run("-c", served_by).stdout.startswith(str(own_guest.plugin))
        own_guest.uninstall()
        there = own_guest.site_packages / "mlx_vlm"
        assert own_guest.run("-c", served_by).stdout.startswith(str(there))

    @pytest.mark.parametrize("preferred", ["plugin", "native"])
    def test_doctor_says_who_serves_mlx_vlm(self, guest: Environment, preferred: str) -> None:
        env = {"MLX_M3_PLUGIN_PREFER": preferred}
        diagnosis = json.loads(guest.run_script("mlx-m3", "doctor", "--json", env=env, check=False).stdout)
        modules = {m["name"]: m for m in diagnosis["modules"] if m["name"].startswith("mlx_vlm.models.")}
        assert set(modules) == {"mlx_vlm.models.minimax_m3_vl", "mlx_vlm.models.minimax_m3"}
        for module in modules.values():
            assert module["source"] == preferred
            assert ("mlx_m3_plugin" in module["path"]) == (preferred == "plugin")
        assert diagnosis["versions"]["mlx-vlm"] == version("mlx-vlm")
        assert "mlx_vlm.utils" in diagnosis["patches"]
        assert diagnosis["errors"] == []
