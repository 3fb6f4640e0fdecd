"""Writing completions, beside transformers' `generate`.

    python benchmarks/decode.py MODEL --peer_python PYTHON [--batch 4] [--new_tokens 64] [--rounds 5]
    python benchmarks/decode.py MODEL --grow        # this project alone, over batch and length

PYTHON is one with torch and transformers. Float32, temperature 1, no stop token, so that every row is written to the end; the
same prompts, tokens given. Each side runs in a process of its own; its time is the median of several calls after the first.
"""

import argparse
import json
import resource
import statistics
import sys
import time

QUESTIONS = [
    "What is the capital of France?",
    "Explain photosynthesis in two sentences.",
    "Write a haiku about the sea.",
    "List three prime numbers greater than 10.",
]


def prompts(folder: str, batch: int) -> list[list[int]]:
    """Token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        for i in range(batch)
    ]


def report(call, calls: int, weights: int) -> None:
    """Times calls and prints the line that `side_by_side` reads."""
    call()
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(dict(seconds=statistics.median(seconds), peak_gb=peak, weights=weights)))


def ours(folder: str, batch: int, new_tokens: int, calls: int) -> None:
    """This project's sampler."""
    import jax
    import numpy as np
    from flax import nnx

    from gold_jax import load_model
    from gold_jax.rollout.sampler import SamplingEngine

    model = nnx.split(load_model(folder))
    ids = [np.asarray(x, np.int32) for x in prompts(folder, batch)]
    engine = SamplingEngine(batch)

    def call():
        drawn = engine.generate(model, ids, max_new_tokens=new_tokens, key=jax.random.key(0))
        assert all(len(d.ids) == new_tokens for d in drawn)

    report(call, calls, sum(x.nbytes for x in jax.tree.leaves(model[1])))


def peer(folder: str, batch: int, new_tokens: int, calls: int) -> None:
    """transformers'."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = prompts(folder, batch)
    width = max(map(len, ids))
    tokens = torch.tensor([[0] * (width - len(x)) + x for x in ids])
    mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in ids])
    settings = dict(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=True, temperature=1.0, top_p=1.0, top_k=0
    )

    def call():
        with torch.no_grad():
            model.generate(input_ids=tokens, attention_mask=mask, pad_token_id=0, **settings)

    report(call, calls, sum(p.numel() * p.element_size() for p in model.parameters()))


def read_bandwidth() -> float:
    """Bytes a second that two threads read from memory, as a sum of a large array does."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((64, 1 << 21), jnp.float32)
    total = jax.jit(lambda x: x.sum(1))
    total(x).block_until_ready()
    times = []
    for _ in range(9):
        start = time.perf_counter()
        total(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return x.nbytes / statistics.median(times)


def main() -> None:
    """Alternates, or is one of the sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--peer_python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--grow", action="store_true")
    parser.add_argument("--side", choices=["ours", "peer"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side = {"ours": ours, "peer": peer}[args.side]
        return side(args.model, args.batch, args.new_tokens, args.calls)
    from side_by_side import alternate, table

    def command(python, side, batch, new_tokens):
        sizes = ["--batch", str(batch), "--new_tokens", str(new_tokens), "--calls", str(args.calls)]
        return [python, __file__, args.model, *sizes, "--side", side]

    if args.grow:
        print("| batch | new tokens | seconds | ms a step | tokens a second |\n| --- | --- | --- | --- | --- |")
        for batch, new_tokens in [(b, 64) for b in (1, 2, 4, 8, 16, 32)] + [(4, n) for n in (16, 256, 1024)]:
            found = alternate({"ours": command(sys.executable, "ours", batch, new_tokens)}, 1)["ours"][0]["seconds"]
            rate = batch * new_tokens / found
            print(
                f"| {batch} | {new_tokens} | {found:.2f} | {1000 * found / new_tokens:.1f} | {rate:.0f} |", flush=True
            )
        return None
    sizes = args.batch, args.new_tokens
    commands = {
        "transformers": command(args.peer_python, "peer", *sizes),
        "ours": command(sys.executable, "ours", *sizes),
    }
    found = alternate(commands, args.rounds)
    print(table(found, "transformers"))
    once = statistics.median(row["seconds"] for row in found["ours"]) / args.new_tokens
    bandwidth = read_bandwidth()
    read = found["ours"][0]["weights"] / once
    print(
        f"weights read: {read / 1e9:.1f} GB/s, of {bandwidth / 1e9:.1f} GB/s that a sum reads ({read / bandwidth:.0%})"
    )


if __name__ == "__main__":
    main()
