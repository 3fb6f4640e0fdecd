"""The loss alone, from logits, forward and backward, beside TRL's.

    python benchmarks/loss.py STUDENT_VOCABULARY TEACHER_VOCABULARY ANSWER_TOKENS --peer_python PYTHON [--rounds 5]

PYTHON is one with torch and TRL. Batch 2, logits from a standard normal, a prompt of 8 tokens, student tokens of 4
bytes, teacher tokens of 2, 2, 4 and 8 bytes in turn, three quarters of the student's vocabulary shared. Both sides
get the same numbers; each runs in a process of its own, and its time is the median of several calls after the first.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time

import numpy as np

BATCH, PROMPT = 2, 8
WAYS = {
    "exact": ("chain", "hybrid", 0),
    "top-k 1024": ("chain", "hybrid", 1024),
    "projected": ("boundary", "projected", 0),
    "events": ("boundary", "events", 0),
}


def inputs(student: int, teacher: int, answer: int):
    """Logits and token ids of both sides, and the bytes at which each answer token ends."""
    rng, length = np.random.default_rng(0), PROMPT + answer
    logits = [rng.standard_normal((BATCH, length, size), dtype=np.float32) for size in (student, teacher)]
    ids = [rng.integers(0, size, (BATCH, length)) for size in (student, teacher)]
    ends = [np.cumsum(np.resize(lengths, answer)) for lengths in ([4], [2, 2, 4, 8])]
    return logits, ids, ends


def report(seconds: list[float], **more) -> None:
    """The line that `side_by_side` reads."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(dict(seconds=statistics.median(seconds), peak_gb=peak, **more)))


def ours(student: int, teacher: int, answer: int, way: str, calls: int) -> None:
    """This project's loss and its gradient with respect to the student's logits."""
    import jax
    import jax.numpy as jnp

    from gold_jax.losses.compare import CompareOptions
    from gold_jax.losses.distill import Head, distill_loss
    from gold_jax.text.align import group_ends
    from gold_jax.text.batch import Half, Row, build_batches

    merge, compare, top_k = WAYS[way]
    logits, ids, ends = inputs(student, teacher, answer)
    *groups, count = group_ends(*ends)
    rows = [
        Row(*(Half(x[i, :PROMPT], x[i, PROMPT:], g) for x, g in zip(ids, groups)), count, "", False)
        for i in range(BATCH)
    ]
    (batch,) = build_batches(rows, BATCH, merge=merge, groups="all", text=compare == "events", normalization="row_mean")
    batch = jax.tree.map(jnp.asarray, batch)
    shared = student - student // 4
    first = np.arange(student // 4, student)
    orders = [np.r_[first, np.arange(student // 4)], np.arange(teacher)]
    rng = np.random.default_rng(1)
    routes = [np.sort(rng.integers(0, shared + 1, size - shared)) for size in (student, teacher)]
    heads = [
        Head(
            None, jnp.argsort(jnp.asarray(o)), route=jnp.asarray(r, jnp.int32), order=jnp.asarray(o) if k == 0 else None
        )
        for k, (o, r) in enumerate(zip(orders, routes))
    ]
    options = CompareOptions(shared, 0.0, 1.0, 1.0, top_k)

    def loss(student_logits, teacher_logits, batch, places, routes, order):
        student_head = heads[0]._replace(place=places[0], route=routes[0], order=order)
        teacher_head = heads[1]._replace(place=places[1], route=routes[1])
        return distill_loss(
            student_logits, student_head, batch.student, teacher_logits, teacher_head, batch.teacher, batch.weight,
            compare=compare, options=options, merge=merge, chunk=64,
        )[0]  # fmt: skip

    step = jax.jit(jax.value_and_grad(loss))
    widths = [batch.student.tokens.shape[1], batch.teacher.tokens.shape[1]]
    padded = [jnp.pad(jnp.asarray(x), [(0, 0), (0, w - x.shape[1]), (0, 0)]) for x, w in zip(logits, widths)]
    del logits
    arguments = (*padded, batch, [h.place for h in heads], [h.route for h in heads], heads[0].order)
    times = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        value, gradient = jax.block_until_ready(step(*arguments))
        times.append(time.perf_counter() - start)
    report(times[1:], loss=float(value), gradient=float(jnp.linalg.norm(gradient)))


def peer(student: int, teacher: int, answer: int, calls: int) -> None:
    """TRL's hybrid loss on the same numbers, merged by the chain rule."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import types

    import torch
    from trl.experimental.gold.gold_trainer import ULDLoss

    logits, ids, ends = inputs(student, teacher, answer)
    settings = types.SimpleNamespace(
        beta=0.0, use_extended_uld=True, uld_use_hybrid_loss=True, uld_token_merge_strategy="bayesian",
        uld_crossentropy_weight=0.0, uld_distillation_weight=1.0, uld_student_temperature=1.0,
        uld_teacher_temperature=1.0, uld_skip_student_eos=False, uld_skip_teacher_eos=False,
        uld_hybrid_unmatched_weight=1.0, uld_hybrid_matched_weight=1.0,
    )  # fmt: skip

    def tokenizer(first, size):
        names = {f"entry{first + i}": i for i in range(size)}
        return types.SimpleNamespace(get_vocab=lambda: names)

    def spans(end):
        answer = np.stack([np.r_[0, end[:-1]], end], -1)
        return torch.tensor(np.concatenate([np.zeros((PROMPT, 2), np.int64), answer])[None].repeat(BATCH, 0))

    def labels(x):
        y = torch.tensor(x)
        y[:, :PROMPT] = -100
        return y

    loss = ULDLoss(settings, tokenizer(0, student), tokenizer(student // 4, teacher))
    ours, theirs = torch.tensor(logits[0], requires_grad=True), torch.tensor(logits[1])
    del logits
    times = []
    for _ in range(calls + 1):
        ours.grad = None
        start = time.perf_counter()
        value = loss(ours, theirs, *map(labels, ids), *map(torch.tensor, ids), *map(spans, ends))
        value.backward()
        times.append(time.perf_counter() - start)
    report(times[1:], loss=value.item(), gradient=ours.grad.norm().item())


def main() -> None:
    """Alternates, or is one of the sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("student", "teacher", "answer"):
        parser.add_argument(name, type=int)
    parser.add_argument("--peer_python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--side", choices=["peer", *WAYS])
    args = parser.parse_args()
    sizes = args.student, args.teacher, args.answer
    if args.side == "peer":
        return peer(*sizes, args.calls)
    if args.side:
        return ours(*sizes, args.side, args.calls)
    from side_by_side import alternate, table

    tail = [__file__, *map(str, sizes), "--calls", str(args.calls), "--side"]
    commands = {"TRL": [args.peer_python, *tail, "peer"]} | {way: [sys.executable, *tail, way] for way in WAYS}
    found = alternate(commands, args.rounds)
    print(table(found, "TRL"))
    print(f"loss and gradient norm: TRL {found['TRL'][0]['loss']:.6f} {found['TRL'][0]['gradient']:.6f}, "
          f"exact {found['exact'][0]['loss']:.6f} {found['exact'][0]['gradient']:.6f}")  # fmt: skip


if __name__ == "__main__":
    main()
