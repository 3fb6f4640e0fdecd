"""How many programs a run compiles: the shapes of its steps, without taking them.

    python benchmarks/shapes.py ASSETS DATA.jsonl [--steps 200] [--batch 4] [--max_length 512] [--new_tokens 64]
        [--length_buckets 12]

DATA has GSM8K's columns. Off-policy, completions are the data's; for on-policy their first `--new_tokens` tokens stand in
for what the student would write, which may be shorter but is never longer. Printed with it: how many tokens are computed
to one that is there, in lines as they are and in rows padded to the longest of a batch; and the same with as many shapes
as buckets make of the lengths, without the bound of `--length_buckets`.
"""

import argparse
import itertools
import json
import pathlib

import jax
import numpy as np


def main() -> None:
    """Counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets")
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--length_buckets", type=int, default=12)
    args = parser.parse_args()
    from gold_jax.bucketing import ShapeSet, power_of_two
    from gold_jax.loading import load_tokenizer
    from gold_jax.text.batch import align_rows, build_batches, encode_rows
    from gold_jax.text.chat import ChatTokenizer
    from gold_jax.text.detokenize import completion_from_ids
    from gold_jax.training.batches import RowOrder

    student, teacher = (
        ChatTokenizer(load_tokenizer(f"{args.assets}/{name}"))
        for name in ("smollm2-135m-gpt2tok", "smollm2-135m-instruct")
    )
    rows = [json.loads(line) for line in pathlib.Path(args.data).read_text(encoding="utf-8").splitlines()]
    order = RowOrder(range(len(rows)), args.batch, 42)
    print(
        "| completions | shapes | teacher's programs | student's programs | tokens to one, in lines | in padded rows |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for mode, limit in itertools.product(("off", "on"), (args.length_buckets, None)):
        shapes = limit and ShapeSet(limit)
        programs, computed, padded, there = (set(), set()), 0, 0, 0
        for step in range(args.steps):
            chosen = [rows[i] for i in order(step)]
            prompts = [[{"role": "user", "content": row["question"]}] for row in chosen]
            completions = [row["answer"] for row in chosen]
            if mode == "on":
                drawn = [
                    student.encode_completion(c, after=p).ids[: args.new_tokens] for c, p in zip(completions, prompts)
                ]
                completions = [completion_from_ids(student, ids, after=p) for ids, p in zip(drawn, prompts)]
            encoded = encode_rows(student, teacher, prompts, completions)
            made = align_rows(encoded, (student.stop_id, teacher.stop_id), max_length=args.max_length)
            (batch,) = build_batches(made, args.batch, merge="chain", groups="all", shapes=shapes)
            read = power_of_two(batch.teacher.packed.tokens.size)
            programs[0].add(str(jax.tree.map(np.shape, batch.teacher.packed)))
            programs[1].add(
                str(jax.tree.map(np.shape, (batch.student.packed, batch.teacher._replace(packed=None), read)))
            )
            for side in (batch.student.packed, batch.teacher.packed):
                lengths = side.mask.reshape(args.batch, -1).sum(1)
                computed += side.tokens.size
                padded += args.batch * int(lengths.max())
                there += int(lengths.sum())
        counts = f"{limit or 'all'} | {len(programs[0])} | {len(programs[1])}"
        print(f"| {mode}-policy | {counts} | {computed / there:.2f} | {padded / there:.2f} |")


if __name__ == "__main__":
    main()
