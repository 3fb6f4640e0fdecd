"""What the cores multiply in float32: the products of a 135M model's layers and head, by XLA and beside it by torch.

    python benchmarks/products.py [--peer_python PYTHON] [--rounds 3]

GFLOP/s, the median of 15 calls of 8 products each, every side in a process of its own, in turn. No step can be faster than
its products at these rates: docs/benchmarks.md counts them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

SHAPES = [(256, 576, 1536), (640, 576, 1536), (640, 1536, 576), (576, 640, 1536), (640, 576, 576), (64, 576, 49152)]


def rates(multiply) -> dict[str, float]:
    """GFLOP/s of each shape; `multiply(m, k, n)` makes what multiplies eight times and waits for it."""
    found = {}
    for m, k, n in SHAPES:
        run, seconds = multiply(m, k, n), []
        run()
        for _ in range(15):
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
        found[f"{m} x {k} x {n}"] = 8 * 2e-9 * m * k * n / statistics.median(seconds)
    return found


def ours() -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    product = jax.jit(jnp.matmul)

    def multiply(m, k, n):
        a, b = jnp.ones((m, k)), jnp.ones((k, n))
        return lambda: jax.block_until_ready([product(a, b) for _ in range(8)])

    return rates(multiply)


def peer() -> dict[str, float]:
    import torch

    def multiply(m, k, n):
        a, b = torch.ones(m, k), torch.ones(n, k).T  # as torch.nn.Linear keeps a matrix
        return lambda: [a @ b for _ in range(8)]

    return rates(multiply)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", help="one with torch; none: XLA alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=["ours", "peer"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps({"ours": ours, "peer": peer}[args.side]()))
        return
    pythons = {"XLA": (sys.executable, "ours")} | ({"torch": (args.peer_python, "peer")} if args.peer_python else {})
    found: dict[str, dict[str, list[float]]] = {name: {} for name in pythons}
    for _ in range(args.rounds):
        for name, (python, side) in pythons.items():
            command = [python, __file__, "--side", side]
            ran = subprocess.run(
                command, capture_output=True, text=True, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
            )
            for shape, rate in json.loads(ran.stdout.splitlines()[-1]).items():
                found[name].setdefault(shape, []).append(rate)
    print(f"| rows x inner x columns | {' | '.join(f'{name}, GFLOP/s' for name in found)} |")
    print("| --- " * (1 + len(found)) + "|")
    for shape in found["XLA"]:
        cells = (
            f"{statistics.median(x[shape]):.0f} ({min(x[shape]):.0f} to {max(x[shape]):.0f})" for x in found.values()
        )
        print(f"| {shape} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
