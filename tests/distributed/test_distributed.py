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

import numpy as np
import pytest

from mlx_m3_plugin.hosts.mlx_lm.sharded import shards_with
from mlx_m3_plugin.model.config import text_config_of
from tests.checkpoints.random_model import write_random_model, write_tokenizer
from tests.checkpoints.sharded import N_SHARDS
from tests.checkpoints.small_model import VOCAB
from tests.checkpoints.tiny_layouts import LAYOUTS
from tests.distributed.jobs import Job, command, launch, launcher, start, stop, wait_for_tokens

# The demo model attends to four blocks of eight tokens.
LENGTH, LAYERS = 110, 6
# Float matrices as published and fused; 4 bits fused; several widths, which stay apart.
KINDS = ("published", "fused", "4bit", "selector-safe")
EVEN = {2: (3, 3), 4: (2, 2, 1, 1)}
UNEVEN = {2: [(5, 1), (1, 5), (4, 2)], 4: [(1, 1, 1, 3), (3, 1, 1, 1), (1, 2, 2, 1)]}

# Seconds, for what takes milliseconds on an idle machine.
BOUND = 60

Checkpoint = Callable[[str], Path]
Count = Callable[[int, int], int]


def prompt(rng: random.Random, vocabulary: int = 300) -> list[int]:
    return [rng.randrange(vocabulary) for _ in range(LENGTH)]


def in_one_process(jobs: list[Job], directory: Path) -> list[dict[str, np.ndarray]]:
    return [ranks[0] for ranks in launch([replace(job, split=None) for job in jobs], directory, 1)]


def check_same(
    found: list[list[dict[str, np.ndarray]]], expected: list[dict[str, np.ndarray]], jobs: list[Job]
) -> None:
    for job, ranks, one in zip(jobs, found, expected, strict=True):
        for rank, result in enumerate(ranks):
            assert "error" not in result, (job, rank, str(result["error"]))
            scale = np.abs(one["logits"]).max()
            assert np.abs(result["logits"] - one["logits"]).max() <= 1e-4 * max(1, scale), (job, rank)
            if job.generate:
                assert result["tokens"].tolist() == one["tokens"].tolist(), (job, rank)


def test_several_processes_answer_as_one(
    checkpoint: Checkpoint, tmp_path: Path, fresh_seed: int, count: Count
) -> None:
    """Prefill in parts and decoding past the block budget, in every layout; greedy tokens too."""
    rng = random.Random(fresh_seed)
    for processes in rng.sample(sorted(UNEVEN), count(1, len(UNEVEN))):
        directory = tmp_path / str(processes)
        directory.mkdir()
        check_processes(processes, checkpoint, directory, rng, count)


def check_processes(
    processes: int, checkpoint: Checkpoint, directory: Path, rng: random.Random, count: Count
) -> None:
    jobs = []
    for kind in rng.sample(KINDS, count(1, len(KINDS))):
        tokens, parts = prompt(rng), sorted(rng.sample(range(1, LENGTH - 8), 2))
        job = Job(str(checkpoint(kind)), "tensor", tokens, parts, decoded=6, generate=12)
        jobs += [job, replace(job, kind="pipeline")]
        jobs += [replace(job, kind="pipeline", split=list(split)) for split in UNEVEN[processes]]
    found = launch(jobs, directory / "several", processes)
    check_same(found, in_one_process(jobs, directory / "one"), jobs)
    for job, ranks in zip(jobs, found, strict=True):
        held = [result["layers"].item() for result in ranks]
        assert held == ([LAYERS] * processes if job.kind == "tensor" else list(job.split or EVEN[processes]))


def test_every_layout_can_be_shared(tmp_path: Path, fresh_seed: int, count: Count) -> None:
    rng = random.Random(fresh_seed)
    jobs = []
    # Of the pruned one, transformers refuses the config where a tokenizer is loaded.
    names = sorted(LAYOUTS.keys() - {"published_pruned"})
    for name in rng.sample(names, count(3, len(names))):
        directory = tmp_path / "layouts" / name
        LAYOUTS[name].write(directory)
        write_tokenizer(directory, 131_072)
        jobs += [Job(str(directory), kind, prompt(rng, VOCAB), [50], 3) for kind in ("tensor", "pipeline")]
    found = launch(jobs, tmp_path / "several", 2)
    check_same(found, in_one_process(jobs, tmp_path / "one"), jobs)


def test_tensor_scales_of_every_matrix_can_be_shared(tmp_path: Path, fresh_seed: int) -> None:
    """A matrix is cut; its scale is of the whole."""
    LAYOUTS["nvfp4_everywhere_compressed_tensors"].write(tmp_path / "m3")
    write_tokenizer(tmp_path / "m3", 131_072)
    jobs = [
        Job(
            str(tmp_path / "m3"), "tensor", prompt(random.Random(fresh_seed), VOCAB), [50], 3, library=library
        )
        for library in ("mlx_lm", "mlx_vlm")
    ]
    found = launch(jobs, tmp_path / "several", 2)
    check_same(found, in_one_process(jobs, tmp_path / "one"), jobs)


def test_mlx_vlm_shares_too(tmp_path: Path, fresh_seed: int) -> None:
    write_random_model(tmp_path / "m3", vision=True)
    tokens = prompt(random.Random(fresh_seed))
    job = Job(str(tmp_path / "m3"), "tensor", tokens, [40], decoded=4, library="mlx_vlm")
    jobs = [job, replace(job, kind="pipeline"), replace(job, kind="pipeline", split=[1, 5])]
    found = launch(jobs, tmp_path / "several", 2)
    check_same(found, in_one_process(jobs, tmp_path / "one"), jobs)


# --- what a stage needs ---


def test_a_stage_needs_no_shards_but_its_own(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The published layout, whose shards end within layers; the others are not on this machine."""
    source, split = checkpoint("published"), [2, 4]
    config = text_config_of(json.loads((source / "config.json").read_text()))
    for rank, layers in enumerate([range(4, 6), range(4)]):
        wanted = shards_with(source, config, layers)
        assert wanted is not None
        shutil.copytree(source, tmp_path / f"m3-{rank}")
        for shard in source.glob("*.safetensors"):
            if shard.name not in wanted:
                (tmp_path / f"m3-{rank}" / shard.name).unlink()
    assert len(list((tmp_path / "m3-0").glob("*.safetensors"))) < N_SHARDS
    tokens = prompt(random.Random(0))
    job = Job(str(tmp_path / "m3-{rank}"), "pipeline", tokens, [40], 4, split)
    found = launch([job], tmp_path / "several", 2)
    whole = replace(job, checkpoint=str(source))
    check_same(found, in_one_process([whole], tmp_path / "one"), [job])


def test_what_a_stage_lacks_is_told(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Never random weights, and never dense attention for want of an indexer."""
    source = checkpoint("published")
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    lost = index["language_model.model.layers.5.self_attn.q_proj.weight"]
    shutil.copytree(source, tmp_path / "m3")
    (tmp_path / "m3" / lost).unlink()
    job = Job(str(tmp_path / "m3"), "pipeline", [1, 2, 3], split=[1, 5])
    for result in launch([job, replace(job, kind="tensor")], tmp_path / "several", 2)[1]:
        assert lost in str(result["error"])


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


def test_splits_that_do_not_fit_are_refused_by_all(checkpoint: Checkpoint, tmp_path: Path) -> None:
    job = Job(str(checkpoint("published")), "pipeline", [1, 2, 3])
    wrong = {
        "cannot split 6 layers over 2 processes as [6, 0]": replace(job, split=[6, 0]),
        "cannot split 6 layers over 2 processes as [3, 2]": replace(job, split=[3, 2]),
        "cannot split 6 layers over 2 processes as [2, 2, 2]": replace(job, split=[2, 2, 2]),
        "the processes disagree": replace(job, splits={"0": [5, 1], "1": [4, 2]}),
    }
    for (words, _), ranks in zip(
        wrong.items(), launch(list(wrong.values()), tmp_path / "several", 2), strict=True
    ):
        for result in ranks:
            assert words in str(result["error"])


def test_heads_that_do_not_divide_are_refused_by_all(checkpoint: Checkpoint, tmp_path: Path) -> None:
    jobs = [Job(str(checkpoint("4bit")), "tensor", [1, 2, 3])]
    for result in launch(jobs, tmp_path / "several", 3)[0]:
        assert "do not divide by 3 processes" in str(result["error"])


def test_machines_can_be_checked_without_a_download() -> None:
    script = Path(__file__).parents[2] / "examples" / "check_machines.py"
    run = subprocess.run([*launcher(2), str(script)], capture_output=True, text=True, timeout=5 * BOUND)
    assert run.stdout.count("as one") == 2, run.stdout + run.stderr
    assert "WRONG" not in run.stdout
