"""Expert layers with gate and up apart, as this package keeps them, against fused into one.

    python benchmarks/experts.py

One M3 expert layer at real widths (6144 in, 3072 wide) with 4 of 16 experts per token; which
experts exist beside those that are read changes nothing.  The two forms hold the same values and
are timed in turns.  Both produce the same numbers, which is checked first.
"""

import argparse
from collections.abc import Callable

import mlx.core as mx
from kernels import medians

HIDDEN, WIDTH, EXPERTS, TOP_K = 6144, 3072, 16, 4
QUANTIZATIONS = {"2-bit": (64, 2, "affine"), "4-bit": (64, 4, "affine"), "mxfp8": (32, 8, "mxfp8")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print(f"# Gate and up: apart / fused, {mx.default_device()}, mlx {mx.__version__}\n")
    print("| quantization | tokens | apart, ms | fused, ms | fused / apart |\n|---|--:|--:|--:|--:|")
    for name, how in QUANTIZATIONS.items():
        apart, fused = make_forms(how)
        for tokens in args.tokens:
            x, experts = inputs(tokens)
            assert mx.allclose(apart(x, experts), fused(x, experts), rtol=1e-5, atol=1e-5)
            a, f = medians([lambda: apart(x, experts), lambda: fused(x, experts)], args.rounds)  # noqa: B023
            print(f"| {name} | {tokens} | {a * 1e3:.2f} | {f * 1e3:.2f} | {f / a:.3f} |", flush=True)


Form = Callable[[mx.array, mx.array], mx.array]


def make_forms(how: tuple[int, int, str]) -> tuple[Form, Form]:
    """``silu(gate) * up`` of the chosen experts, from two matrices or from one."""
    group_size, bits, mode = how
    weight = mx.random.normal((EXPERTS, 2 * WIDTH, HIDDEN)) * HIDDEN**-0.5
    fused = mx.quantize(weight, group_size, bits, mode=mode)
    gate, up = (
        [mx.contiguous(half) for half in halves] for halves in zip(*map(split_rows, fused), strict=True)
    )
    mx.eval(fused, gate, up)

    def product(x: mx.array, parts: list[mx.array], experts: mx.array) -> mx.array:
        sorted_indices = experts.ndim == 1
        return mx.gather_qmm(
            x,
            *parts,
            rhs_indices=experts,
            transpose=True,
            group_size=group_size,
            bits=bits,
            mode=mode,
            sorted_indices=sorted_indices,
        )

    def run_apart(x: mx.array, experts: mx.array) -> mx.array:
        return activate(product(x, gate, experts), product(x, up, experts))

    def run_fused(x: mx.array, experts: mx.array) -> mx.array:
        return activate(*mx.split(product(x, fused, experts), 2, axis=-1))

    return run_apart, run_fused


def split_rows(packed: mx.array) -> tuple[mx.array, mx.array]:
    return packed[:, :WIDTH], packed[:, WIDTH:]


def activate(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


def inputs(tokens: int) -> tuple[mx.array, mx.array]:
    """Tokens with their experts; from 64 choices on sorted by expert, as mlx-lm does."""
    x = mx.random.normal((tokens, 1, 1, HIDDEN))
    experts = mx.argsort(mx.random.uniform(shape=(tokens, EXPERTS)), axis=-1)[:, :TOP_K].astype(mx.uint32)
    if experts.size >= 64:
        order = mx.argsort(experts.flatten())
        x, experts = x[order // TOP_K, 0], experts.flatten()[order]
    mx.eval(x, experts)
    return x, experts


if __name__ == "__main__":
    main()
