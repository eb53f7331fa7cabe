"""One process of several: loads models as the stock libraries do, and writes what they put out.

    mlx.launch -n 2 python worker.py JOBS

JOBS is a JSON list of :class:`jobs.Job`.  Every rank writes its results beside it, so that a rank
whose answer differs is seen.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

SPLIT = "MLX_M3_PLUGIN_PIPELINE_SPLIT"


def main() -> None:
    file = Path(sys.argv[1])
    group = mx.distributed.init()
    for number, job in enumerate(json.loads(file.read_text())):
        try:
            results = run(job, group)
        except ValueError as error:
            results = {"error": np.array(str(error))}
        np.savez(file.with_name(f"{number}-{group.rank()}.npz"), **results)


def run(job: dict[str, Any], group: Any) -> dict[str, np.ndarray]:
    os.environ.pop(SPLIT, None)
    if split := job["splits"].get(str(group.rank()), job["split"]):
        os.environ[SPLIT] = ",".join(map(str, split))
    pipelined = job["kind"] == "pipeline"
    groups = {("pipeline_group" if pipelined else "tensor_group"): group}
    checkpoint = job["checkpoint"].format(rank=group.rank())
    model, tokenizer = load(job["library"], checkpoint, groups)
    results = {"logits": logits(model, job), "layers": np.array([len(model.layers)])}
    if job["generate"]:
        results["tokens"] = np.array(greedy(model, tokenizer, job))
    return results


def load(library: str, checkpoint: str, groups: dict[str, Any]) -> tuple[Any, Any]:
    if library == "mlx_lm":
        from mlx_lm.utils import sharded_load

        return sharded_load(checkpoint, **groups)
    from mlx_vlm.utils import sharded_load

    model, processor = sharded_load(checkpoint, **groups)
    return model.language_model, processor


def logits(model: Any, job: dict[str, Any]) -> np.ndarray:
    """Of a prompt given in parts, then token by token."""
    cache, tokens, found = model.make_cache(), job["tokens"], []
    edges = [*job["parts"], *range(len(tokens) - job["decoded"], len(tokens) + 1)]
    for first, last in zip([0, *edges], edges, strict=False):
        if last > first:
            out = model(mx.array([tokens[first:last]]), cache=cache)
            found.append(getattr(out, "logits", out))
            mx.eval(found[-1], [entry.state for entry in cache])
    return np.array(mx.concatenate(found, axis=1).astype(mx.float32))


def greedy(model: Any, tokenizer: Any, job: dict[str, Any]) -> list[int]:
    from mlx_lm import stream_generate
    from mlx_lm.generate import generation_stream

    made = stream_generate(model, tokenizer, job["tokens"], max_tokens=job["generate"], prefill_step_size=48)
    tokens = []
    for response in made:
        tokens.append(response.token)
        print("token", len(tokens), os.getpid(), flush=True)
    # It has begun on one token more.  What the next job sends must not get between.
    with mx.stream(generation_stream):
        mx.synchronize()
    return tokens


if __name__ == "__main__":
    main()
