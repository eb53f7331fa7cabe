"""Count the cases of one library, in a process of its own: stand-ins must come before all imports.

MLX_M3_PLUGIN=off python benchmarks/gpu_count.py mlx-lm < cases.json
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from gpu_layers import HIDDEN, Case, Layer, filled_entry, holders, make_layers
from graph_cost import ATTENTION, Work, as_on_a_gpu, count, given, given_like
from mlx.utils import tree_map

OURS, KERNELS, MLX_LM, MLX_VLM = "ours", "our kernels", "mlx-lm", "mlx-vlm"
# The host, and the environment that its process gets.
_OFF = {"MLX_M3_PLUGIN": "off"}
_PLAIN, _KERNELS = ({"MLX_M3_PLUGIN": "on", "MLX_M3_PLUGIN_ENGINE": mode} for mode in ("plain", "kernels"))
LIBRARIES = {
    OURS: ("mlx_lm", _PLAIN),
    KERNELS: ("mlx_lm", _KERNELS),
    MLX_LM: ("mlx_lm", _OFF),
    MLX_VLM: ("mlx_vlm", _OFF),
}
# The primitives of stock's attention.
ATTENDING = (ATTENTION, "minimax_m3_sparse_prefill")
# Arrays up to this size are evaluated, so that what a module computes of them once can be, too.
SMALL = 1 << 16
# Slots that a cache has left in decoding.
UNUSED_SLOTS = 128


@dataclass
class Counted:
    """The work of one layer, or why there is none.

    ``parts`` are our ``selection`` and ``attention`` alone, ``forms`` the ways to compute that attention.
    """

    case: Case
    total: Counter[Work] = field(default_factory=Counter)
    parts: dict[str, Counter[Work]] = field(default_factory=dict)
    forms: dict[str, Counter[Work]] = field(default_factory=dict)
    missing: str = ""

    @property
    def launches(self) -> int:
        return sum(n * work.launches for work, n in self.total.items())

    @property
    def expert_bytes(self) -> int:
        return bytes_of(Counter({work: n for work, n in self.total.items() if work.rate == "experts"}))

    @property
    def other_bytes(self) -> int:
        """Without routed experts, whose bytes follow from the number of tokens alone."""
        return bytes_of(self.total) - self.expert_bytes

    @property
    def fused_attention(self) -> Counter[Work]:
        """What the library's own attention multiplies and moves: a fused operation or a kernel."""
        return Counter({work: n for work, n in self.total.items() if work.primitive.startswith(ATTENDING)})

    @property
    def attention_flops(self) -> int:
        return sum(
            n * work.flops for work, n in (self.parts.get("attention") or self.fused_attention).items()
        )

    def by_primitive(self) -> list[tuple[str, int, int, int]]:
        """``(primitive, launches, bytes, operations)``, the most bytes first."""
        names = {work.primitive for work in self.total}
        rows = []
        for name in names:
            works = [(work, n) for work, n in self.total.items() if work.primitive == name]
            sums = [
                sum(n * getattr(work, what) for work, n in works) for what in ("launches", "bytes", "flops")
            ]
            rows.append((name, *sums))
        return sorted(rows, key=lambda row: (-row[2], row[0]))


def bytes_of(work: Counter[Work]) -> int:
    return sum(n * operation.bytes for operation, n in work.items())


# --- in the parent ---


def count_library(library: str, cases: Sequence[Case]) -> dict[Case, Counted]:
    """Every case of a library, in a process of its own."""
    environment = os.environ | LIBRARIES[library][1]
    child = subprocess.run(
        [sys.executable, __file__, library],
        input=json.dumps([asdict(case) for case in cases]),
        env=environment,
        capture_output=True,
        text=True,
    )
    if child.returncode:
        raise SystemExit(f"counting {library} failed:\n{child.stderr}")
    return {counted.case: counted for counted in map(from_json, json.loads(child.stdout))}


def to_json(counted: Counted) -> dict[str, Any]:
    def listed(work: Counter[Work]) -> list[Any]:
        return [[*astuple(operation), n] for operation, n in work.items()]

    return {
        "case": asdict(counted.case),
        "total": listed(counted.total),
        "parts": {name: listed(work) for name, work in counted.parts.items()},
        "forms": {name: listed(work) for name, work in counted.forms.items()},
        "missing": counted.missing,
    }


def from_json(data: dict[str, Any]) -> Counted:
    def unlisted(rows: list[Any]) -> Counter[Work]:
        return Counter({Work(*work): n for *work, n in rows})

    return Counted(
        Case(**data["case"]),
        unlisted(data["total"]),
        {name: unlisted(rows) for name, rows in data["parts"].items()},
        {name: unlisted(rows) for name, rows in data["forms"].items()},
        data["missing"],
    )


# --- in the child ---


def main() -> None:
    cases = [Case(**case) for case in json.load(sys.stdin)]
    host, environment = LIBRARIES[sys.argv[1]]
    with as_on_a_gpu():
        layers = {kind: make_layers(host, kind, 2) for kind in sorted({case.layer for case in cases})}
        for layer in (layer for pair in layers.values() for layer in pair):
            replace_weights(layer)
        if (environment != _OFF) != ("mlx_m3_plugin.model" in sys.modules):
            raise SystemExit(
                f"{sys.argv[1]} does not serve here: is mlx-m3-plugin installed? try mlx-m3 doctor"
            )
        if environment == _KERNELS:
            trust_kernels()
        counted = [count_case(layers[case.layer], case) for case in cases]
    json.dump([to_json(c) for c in counted], sys.stdout)


def trust_kernels() -> None:
    """As on a Mac where they have proved right."""
    engine = sys.modules["mlx_m3_plugin.msa.engine"]
    engine.configure("auto")
    engine.configure("kernels")
    engine.has_metal = lambda: True
    engine.examine = lambda setup: engine.Verdict()


def replace_weights(layer: Layer) -> None:
    """Weights that are there already, without their memory."""
    for module in layer.module.modules():
        for name, value in list(module.items()):
            if isinstance(value, mx.array):
                small = value.size <= SMALL
                module[name] = (
                    mx.zeros(value.shape, value.dtype) if small else given(value.shape, value.dtype)
                )
    evaluate_small(layer)


def evaluate_small(layer: Layer) -> None:
    arrays = [value for module in layer.module.modules() for value in module.values()]
    mx.eval([a for a in arrays if isinstance(a, mx.array) and a.size <= SMALL])


def count_case(layers: Sequence[Layer], case: Case) -> Counted:
    """The second layer's work: what a step does once for all layers is in the first."""
    try:
        parts, forms = parts_of(layers, case)
        one, two = (count_layers(layers[:n], case) for n in (1, 2))
    except (NotImplementedError, AttributeError) as error:
        # Stock mlx-vlm has quantized caches for dense layers, which it cannot use.
        if case.kv_bits == 16:
            raise
        return Counted(case, missing=str(error))
    if one - two:
        raise AssertionError(f"{case}: the first layer does what the second does not add to: {one - two}")
    return Counted(case, two - one, parts, forms)


def count_layers(layers: Sequence[Layer], case: Case) -> Counter[Work]:
    run, x = step(layers, case)
    return count(run, x)


def step(layers: Sequence[Layer], case: Case) -> tuple[Callable[[mx.array], mx.array], mx.array]:
    """A function of the hidden states ``[rows, queries, hidden]`` through ``layers``, with fresh caches."""
    entries = [with_room(filled_entry(layer, case, given), case) for layer in layers]
    x = given((case.rows, case.queries, HIDDEN), mx.bfloat16)
    mask = layers[0].make_mask(x, entries[0])
    mask = given_like(mask) if isinstance(mask, mx.array) else mask

    def run(x: mx.array) -> mx.array:
        for layer, entry in zip(layers, entries, strict=True):
            x = layer.module(x, mask, entry)
        return x

    return run, x


def with_room(entry: Any, case: Case) -> Any:
    """Its arrays without the operations that filled them; in decoding with unused slots, as in most steps."""
    more = UNUSED_SLOTS if case.queries == 1 else 0

    def grown(x: mx.array) -> mx.array:
        return given((*x.shape[:2], x.shape[2] + more, *x.shape[3:]), x.dtype)

    for holder in holders(entry):
        for name in ("keys", "values", "index_keys"):
            if getattr(holder, name, None) is not None:
                setattr(holder, name, tree_map(grown, getattr(holder, name)))
    return entry


def parts_of(
    layers: Sequence[Layer], case: Case
) -> tuple[dict[str, Counter[Work]], dict[str, Counter[Work]]]:
    """Work of ``msa``'s functions alone, as the first layer calls them, and of all forms of attention.

    Both are empty for stock's classes.
    """
    engine = sys.modules.get("mlx_m3_plugin.msa.engine")
    if engine is None:
        return {}, {}
    names = {"select_blocks": "selection", "attend": "attention"}
    originals = {name: getattr(engine, name) for name in names}
    calls = {}

    def recorder(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls[name] = (arguments, options)
            return originals[name](*arguments, **options)

        return call

    for name in names:
        setattr(engine, name, recorder(name))
    try:
        run, x = step(layers[:1], case)
        run(x)
    finally:
        for name, original in originals.items():
            setattr(engine, name, original)
    # What modules have computed once, and kept, is there from now on.
    evaluate_small(layers[0])
    calls = {
        name: ([settled(a) for a in arguments], {key: settled(a) for key, a in options.items()})
        for name, (arguments, options) in calls.items()
    }

    def alone(function: Callable[..., mx.array], name: str, **more: Any) -> Counter[Work]:
        arguments, options = calls[name]
        return count(lambda _: function(*arguments, **options | more), x)

    parts = {names[name]: alone(originals[name], name) for name in calls}
    if "attend" not in calls:
        return parts, {}
    plain = sys.modules["mlx_m3_plugin.msa.attend"]
    options = calls["attend"][1]
    calls["attend"] = (calls["attend"][0], options["setup"].attention)
    return parts, {form: alone(plain.attend, "attend", form=form) for form in plain.FORMS}


def settled(value: Any) -> Any:
    """An argument without the operations that made it; positions and paddings of rows keep their values."""
    if isinstance(value, mx.array):
        return value if value.ndim <= 1 else given_like(value)
    if isinstance(value, tuple):
        return type(value)(*map(settled, value)) if hasattr(value, "_fields") else tuple(map(settled, value))
    return value


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
