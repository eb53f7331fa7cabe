"""Do several machines answer as one?  Without a download: every machine writes M3-nano.

    mlx.launch --hostfile hosts.json --backend ring check_machines.py        # or --backend jaccl
    mlx.launch -n 2 check_machines.py                                        # two processes on one machine

Each computes the logits of one prompt alone, then all together as a pipeline, and split by tensors where
their number divides the model's four KV heads.  Rank 0 says ``as one``, or ``WRONG`` where they differ by
more than rounding; look for that, as ``mlx.launch`` ends with 0 whatever its processes end with.
"""

import sys
import tempfile
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load, sharded_load

from mlx_m3_plugin.toolbox.demo import write_nano

# Past the block budget of 64 tokens; the last is computed after the others, from the cache.
TOKENS = [(7 * i * i + 3 * i) % 600 for i in range(121)]
# Logits are of the order of 1; GPUs multiply float32 with fewer bits than CPUs.
TOLERANCE = 1e-4 if mx.default_device() == mx.cpu else 1e-2


def main() -> int:
    group = mx.distributed.init()
    ways = {"pipeline": {"pipeline_group": group}}
    if 4 % group.size() == 0:
        ways["tensor parallel"] = {"tensor_group": group}
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "m3"
        write_nano(model)
        alone = logits(load(str(model))[0])
        differences = {
            name: mx.abs(logits(sharded_load(str(model), **groups)[0]) - alone).max().item()
            for name, groups in ways.items()
        }
    if group.rank() == 0:
        for name, difference in differences.items():
            verdict = "as one" if difference <= TOLERANCE else f"WRONG (more than {TOLERANCE:g})"
            print(
                f"{group.size()} processes, {name}: largest difference of logits {difference:.1e}, {verdict}"
            )
    return int(max(differences.values()) > TOLERANCE)


def logits(model) -> mx.array:
    cache = model.make_cache()
    prompt = model(mx.array([TOKENS[:-1]]), cache=cache)
    mx.eval(prompt)
    both = mx.concatenate([prompt, model(mx.array([TOKENS[-1:]]), cache=cache)], axis=1)
    mx.eval(both)
    return both


if __name__ == "__main__":
    sys.exit(main())
