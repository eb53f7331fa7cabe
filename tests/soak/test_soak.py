"""Stock servers under load and bad requests: every answer right, nothing leaked, nothing down."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlx_m3_plugin.startup.settings import EXPERT_MEMORY
from tests.checkpoints.random_model import write_random_model
from tests.end_to_end.environments import Environment, build_wheel, make_environment
from tests.end_to_end.server_process import server_process
from tests.soak.clients import GOOD, KINDS, Load, mixed
from tests.soak.memory import late_slope, memory_of
from tests.soak.prompts import TOKENS, write_prompts

CLIENTS = 32
# Bytes that a prompt of this length takes in the caches of the demo model; a request that leaves a tenth of
# them behind is a leak.
ONE_CACHE = 500 * 4 * (6 * 2 * 4 * 32 + 4 * 32)


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = make_environment(tmp_path_factory.mktemp("guest"))
    environment.install(build_wheel(tmp_path_factory.mktemp("wheel")))
    return environment


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "m3"
    write_random_model(directory, vision=True)
    config = json.loads((directory / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 1024
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("experts", ["off", "1MB"])
@pytest.mark.parametrize("script", ["mlx_lm.server", "mlx_vlm.server"])
def test_it_stays_up_and_stays_right(
    script: str,
    experts: str,
    guest: Environment,
    model: Path,
    tmp_path: Path,
    fresh_seed: int,
    count: Callable[[int, int], int],
) -> None:
    prompts = write_prompts(model, count(4, 40), fresh_seed)
    variables = {EXPERT_MEMORY: experts}
    with server_process(guest, script, model, tmp_path / "log", env=variables) as address:
        load = Load(address, "default_model" if script == "mlx_lm.server" else str(model), prompts, TOKENS)
        load.learn()
        kinds = mixed(count(16, 2000), fresh_seed)
        memory: list[tuple[int, int]] = []
        wrong, seen = [], Counter()
        with memory_of(address, memory, seen):
            for outcome in load.run(kinds, CLIENTS, fresh_seed):
                seen[outcome.kind] += 1
                expected = load.expected[outcome.prompt]
                if outcome.kind in GOOD and (outcome.status != 200 or outcome.text != expected):
                    wrong.append((outcome, expected))
                if outcome.kind == "leaves" and not expected.startswith(outcome.text):
                    wrong.append((outcome, expected))
        assert not wrong, (len(wrong), wrong[:3])
        assert set(seen) == set(KINDS)
        # After all that: each kind of bad request once more, and a good one after it.
        for kind in KINDS:
            load.ask(kind, 0)
            assert load.ask("streamed", 1).text == load.expected[1], kind
    np.save(tmp_path / f"{script}.npy", np.array(memory))
    if len(kinds) >= 1000:
        assert late_slope(np.array(memory)) < ONE_CACHE / 10, "bytes a request"
        print(f"memory of {script}:", tmp_path / f"{script}.npy")
