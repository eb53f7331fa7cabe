"""M3 over several processes with MLX's ring: the same as in one."""

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import sharded_load

from mlx_m3_plugin.hosts.mlx_lm.sharded import shards_with
from mlx_m3_plugin.model.config import text_config_of
from tests.checkpoints.random_model import write_random_model, write_tokenizer
from tests.checkpoints.sharded import N_SHARDS
from tests.checkpoints.small_model import VOCAB
from tests.checkpoints.tiny_layouts import LAYOUTS
from tests.distributed import worker
from tests.distributed.jobs import Job, command, launch, launcher, start, stop, wait_for_tokens

# The demo model attends to four blocks of eight tokens.
LENGTH, LAYERS = 110, 6
# Float matrices as published and fused; 4 bits fused; several widths, which stay apart.
KINDS = ("published", "fused", "4bit", "selector-safe")
EVEN = {2: (3, 3), 4: (2, 2, 1, 1)}
UNEVEN = {2: [(5, 1), (1, 5), (4, 2)], 4: [(1, 1, 1, 3), (3, 1, 1, 1), (1, 2, 2, 1)]}

STAGES = [2, 4]
LOST = "language_model.model.layers.5.self_attn.q_proj.weight"
SPLIT = Job("", "pipeline", [1, 2, 3])
WRONG = {
    "cannot split 6 layers over 2 processes as [6, 0]": replace(SPLIT, split=[6, 0]),
    "cannot split 6 layers over 2 processes as [3, 2]": replace(SPLIT, split=[3, 2]),
    "cannot split 6 layers over 2 processes as [2, 2, 2]": replace(SPLIT, split=[2, 2, 2]),
    "the processes disagree": replace(SPLIT, splits={"0": [5, 1], "1": [4, 2]}),
}

# Seconds, for what takes milliseconds on an idle machine.
BOUND = 60

Checkpoint = Callable[[str], Path]
Count = Callable[[int, int], int]
# By job and rank.
Found = list[list[dict[str, np.ndarray]]]
Two = dict[str, tuple[list[Job], Found]]


def prompt(rng: random.Random, vocabulary: int = 300) -> list[int]:
    return [rng.randrange(vocabulary) for _ in range(LENGTH)]


def in_one_process(jobs: list[Job]) -> list[dict[str, np.ndarray]]:
    group = mx.distributed.init()
    return [worker.run(asdict(replace(job, split=None)), group) for job in jobs]


def check_same(found: Found, expected: list[dict[str, np.ndarray]], jobs: list[Job]) -> None:
    for job, ranks, one in zip(jobs, found, expected, strict=True):
        for rank, result in enumerate(ranks):
            assert "error" not in result, (job, rank, str(result["error"]))
            scale = np.abs(one["logits"]).max()
            assert np.abs(result["logits"] - one["logits"]).max() <= 1e-4 * max(1, scale), (job, rank)
            if job.generate:
                assert result["tokens"].tolist() == one["tokens"].tolist(), (job, rank)


@pytest.fixture(scope="module")
def rng() -> random.Random:
    return random.Random(os.environ.get("M3_SEED"))


@pytest.fixture(scope="module")
def two(
    checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory, rng: random.Random, count: Count
) -> Two:
    """What two processes find of all jobs, by what is tested: to start them takes longer than most jobs."""
    directory = tmp_path_factory.mktemp("two")
    stage, lacking = directory / "stage", directory / "lacking"
    keep_what_a_stage_needs(checkpoint("published"), stage)
    lose_a_shard(checkpoint("published"), lacking)
    jobs = {
        "kinds": of_kinds(2, checkpoint, rng, count),
        "layouts": of_layouts(directory / "layouts", rng, count),
        "tensor scales": of_tensor_scales(directory / "scales", rng),
        "mlx-vlm": of_mlx_vlm(directory / "vlm", rng),
        "stage": [Job(str(stage / "{rank}"), "pipeline", prompt(rng), [40], 4, STAGES)],
        "wrong splits": [replace(job, checkpoint=str(checkpoint("published"))) for job in WRONG.values()],
        # The last: the other stage of the pipeline waits for the one that refuses.
        "lacking": [Job(str(lacking), kind, [1, 2, 3], split=[1, 5]) for kind in ("pipeline", "tensor")],
    }
    found = iter(launch([job for each in jobs.values() for job in each], directory / "found", 2))
    return {name: (each, [next(found) for _ in each]) for name, each in jobs.items()}


def of_kinds(processes: int, checkpoint: Checkpoint, rng: random.Random, count: Count) -> list[Job]:
    jobs = []
    for kind in rng.sample(KINDS, count(1, len(KINDS))):
        tokens, parts = prompt(rng), sorted(rng.sample(range(1, LENGTH - 8), 2))
        job = Job(str(checkpoint(kind)), "tensor", tokens, parts, decoded=6, generate=12)
        jobs += [job, replace(job, kind="pipeline")]
        splits = rng.sample(UNEVEN[processes], count(1, len(UNEVEN[processes])))
        jobs += [replace(job, kind="pipeline", split=list(split)) for split in splits]
    return jobs


def check_kinds(jobs: list[Job], found: Found, processes: int) -> None:
    """Prefill in parts and decoding past the block budget; greedy tokens too."""
    check_same(found, in_one_process(jobs), jobs)
    for job, ranks in zip(jobs, found, strict=True):
        held = [result["layers"].item() for result in ranks]
        assert held == ([LAYERS] * processes if job.kind == "tensor" else list(job.split or EVEN[processes]))


def test_two_processes_answer_as_one(two: Two) -> None:
    check_kinds(*two["kinds"], 2)


def test_four_processes_answer_as_one(
    checkpoint: Checkpoint, tmp_path: Path, rng: random.Random, count: Count
) -> None:
    jobs = of_kinds(4, checkpoint, rng, count)
    if not count(0, 1):
        # On two cores, what four processes tell each other takes long.
        jobs = [replace(job, decoded=1, generate=0) for job in (jobs[0], jobs[-1])]
    check_kinds(jobs, launch(jobs, tmp_path / "four", 4), 4)


def of_layouts(directory: Path, rng: random.Random, count: Count) -> list[Job]:
    jobs = []
    # Of the pruned one, transformers refuses the config where a tokenizer is loaded.
    names = sorted(LAYOUTS.keys() - {"published_pruned"})
    for name in rng.sample(names, count(3, len(names))):
        LAYOUTS[name].write(directory / name)
        write_tokenizer(directory / name, 131_072)
        ways = ("tensor", "pipeline")
        jobs += [Job(str(directory / name), kind, prompt(rng, VOCAB), [50], 3) for kind in ways]
    return jobs


def test_every_layout_can_be_shared(two: Two) -> None:
    jobs, found = two["layouts"]
    check_same(found, in_one_process(jobs), jobs)


def of_tensor_scales(directory: Path, rng: random.Random) -> list[Job]:
    LAYOUTS["nvfp4_everywhere_compressed_tensors"].write(directory)
    write_tokenizer(directory, 131_072)
    job = Job(str(directory), "tensor", prompt(rng, VOCAB), [50], 3)
    return [job, replace(job, library="mlx_vlm")]


def test_tensor_scales_of_every_matrix_can_be_shared(two: Two) -> None:
    """A matrix is cut; its scale is of the whole."""
    jobs, found = two["tensor scales"]
    check_same(found, in_one_process(jobs), jobs)


def of_mlx_vlm(directory: Path, rng: random.Random) -> list[Job]:
    write_random_model(directory, vision=True)
    job = Job(str(directory), "tensor", prompt(rng), [40], decoded=4, library="mlx_vlm")
    return [job, replace(job, kind="pipeline"), replace(job, kind="pipeline", split=[1, 5])]


def test_mlx_vlm_shares_too(two: Two) -> None:
    jobs, found = two["mlx-vlm"]
    check_same(found, in_one_process(jobs), jobs)


# --- what a stage needs ---


def keep_what_a_stage_needs(source: Path, directory: Path) -> None:
    """Of the published layout, whose shards end within layers; the others are not on this machine."""
    config = text_config_of(json.loads((source / "config.json").read_text()))
    for rank, layers in enumerate([range(4, 6), range(4)]):
        wanted = shards_with(source, config, layers)
        assert wanted is not None
        shutil.copytree(source, directory / str(rank))
        for shard in source.glob("*.safetensors"):
            if shard.name not in wanted:
                (directory / str(rank) / shard.name).unlink()
    assert len(list((directory / "0").glob("*.safetensors"))) < N_SHARDS


def test_a_stage_needs_no_shards_but_its_own(two: Two, checkpoint: Checkpoint) -> None:
    (job,), found = two["stage"]
    check_same(found, in_one_process([replace(job, checkpoint=str(checkpoint("published")))]), [job])


def lose_a_shard(source: Path, directory: Path) -> None:
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    shutil.copytree(source, directory)
    (directory / index[LOST]).unlink()


def test_what_a_stage_lacks_is_told(two: Two, checkpoint: Checkpoint) -> None:
    """Never random weights, and never dense attention for want of an indexer."""
    index = json.loads((checkpoint("published") / "model.safetensors.index.json").read_text())["weight_map"]
    _, (of_pipeline, of_tensors) = two["lacking"]
    # Of a pipeline, by the stage that needs it alone.
    for result in (of_pipeline[0], *of_tensors):
        assert index[LOST] in str(result["error"])


# --- faults ---


@pytest.mark.some(1)
@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
@pytest.mark.parametrize("victim", [min, max])
def test_when_a_process_is_killed_all_end_soon(
    kind: str, victim: Callable[[set[int]], int], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """In the midst of generating.  It takes MLX's launcher: without it some wait for ever."""
    job = Job(str(checkpoint("published")), kind, [1] * LENGTH, generate=100_000)
    (tmp_path / "jobs.json").write_text(json.dumps([asdict(job)]))
    launcher = start(command(2, tmp_path / "jobs.json"))
    try:
        ids = wait_for_tokens(launcher, 2)
        os.kill(victim(ids), signal.SIGKILL)
        output, _ = launcher.communicate(timeout=BOUND)
        assert "exited with code -9" in output
        assert not [number for number in ids if Path(f"/proc/{number}").exists()]
    finally:
        stop(launcher)


# --- refusals ---


def test_splits_that_do_not_fit_are_refused_by_all(two: Two) -> None:
    _, found = two["wrong splits"]
    for words, ranks in zip(WRONG, found, strict=True):
        for result in ranks:
            assert words in str(result["error"])


@pytest.mark.parametrize("rank", range(3))
def test_heads_that_do_not_divide_are_refused_by_all(rank: int, checkpoint: Checkpoint) -> None:
    group: Any = SimpleNamespace(size=lambda: 3, rank=lambda: rank)
    with pytest.raises(ValueError, match="do not divide by 3 processes"):
        sharded_load(str(checkpoint("4bit")), tensor_group=group)


def test_machines_can_be_checked_without_a_download() -> None:
    script = Path(__file__).parents[2] / "examples" / "check_machines.py"
    run = subprocess.run([*launcher(2), str(script)], capture_output=True, text=True, timeout=5 * BOUND)
    assert run.stdout.count("as one") == 2, run.stdout + run.stderr
    assert "WRONG" not in run.stdout
