"""The loss alone, forward and backward, beside TRL's: from logits, or from hidden states and heads.

    python benchmarks/loss.py STUDENT_VOCABULARY TEACHER_VOCABULARY ANSWER_TOKENS --peer_python PYTHON [--hidden] [--rounds 5]
    python benchmarks/loss.py 32000 49152 128 --grow      # this project alone, over tokens and vocabularies

PYTHON is one with torch and TRL. Batch 2, logits (or hidden states of width 576 and 640, and heads) from a standard normal,
a prompt of 8 tokens, student tokens of 4 bytes, teacher tokens of 2, 2, 4 and 8 bytes in turn, three quarters of the
student's vocabulary shared. Both sides get the same numbers; each runs in a process of its own. Its time is the median of
several calls after the first, its memory what a call adds at its peak to the process at rest, inputs in place.
"""

import argparse
import ctypes
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Iterable

import numpy as np

BATCH, PROMPT = 2, 8
WIDTHS = 576, 640
CHUNK = 32  # positions whose logits are held at once
WAYS = {
    "exact": ("chain", "hybrid", dict(matched_weight=1.0, unmatched_weight=1.0)),
    "top-k 1024": ("chain", "hybrid", dict(matched_weight=1.0, unmatched_weight=1.0, top_k=1024)),
    "projected": ("boundary", "projected", {}),
    "events": ("boundary", "events", {}),
}


def inputs(student: int, teacher: int, answer: int, hidden: bool):
    """Logits, or hidden states and heads, and token ids of both sides; and the bytes at which each answer token ends."""
    rng, length = np.random.default_rng(0), PROMPT + answer
    heads = [None, None]
    if hidden:
        states = [rng.standard_normal((BATCH, length, width), dtype=np.float32) for width in WIDTHS]
        heads = [
            rng.standard_normal((size, width), dtype=np.float32) / width**0.5
            for size, width in zip((student, teacher), WIDTHS)
        ]
    else:
        states = [rng.standard_normal((BATCH, length, size), dtype=np.float32) for size in (student, teacher)]
    ids = [rng.integers(0, size, (BATCH, length)) for size in (student, teacher)]
    ends = [np.cumsum(np.resize(lengths, answer)) for lengths in ([4], [2, 2, 4, 8])]
    return states, heads, ids, ends


def resident(kind: str = "VmRSS") -> int:
    """KiB of this process: now, or (`VmHWM`) at most since it was last reset."""
    return int(pathlib.Path("/proc/self/status").read_text().split(kind + ":")[1].split()[0])


def measured(call, calls: int, **more) -> None:
    """Calls once to warm up and then several times, and prints the line that `side_by_side` reads."""
    found = call()
    times, cpu = [], []
    del found
    ctypes.CDLL(None).malloc_trim(0)
    rest = resident()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for _ in range(calls):
        value = gradient = None  # those of the call before are no part of this one
        start, used = time.perf_counter(), time.process_time()
        value, gradient = call()
        times.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    added = (resident("VmHWM") - rest) / 2**20
    print(
        json.dumps(
            dict(
                seconds=statistics.median(times),
                cpu_seconds=min(cpu),
                peak_gb=added,
                loss=float(value),
                gradient=gradient(),
                **more,
            )
        )
    )


def ours(student: int, teacher: int, answer: int, hidden: bool, way: str, calls: int) -> None:
    """This project's loss and its gradient with respect to the student's logits, or hidden states and head."""
    import jax
    import jax.numpy as jnp

    from gold_jax import cpu
    from gold_jax.losses.compare import COMPARISONS, Overlap
    from gold_jax.losses.distill import Head, distill_loss
    from gold_jax.text.align import group_ends
    from gold_jax.text.batch import Row, SideTokens, build_batches

    merge, compare, options = WAYS[way]
    states, heads, ids, ends = inputs(student, teacher, answer, hidden)
    *groups, count = group_ends(*ends)
    rows = [
        Row(*(SideTokens(x[i, :PROMPT], x[i, PROMPT:], g) for x, g in zip(ids, groups)), count, "", False)
        for i in range(BATCH)
    ]
    (batch,) = build_batches(rows, BATCH, merge=merge, groups="all", text=compare == "events", normalization="row_mean")
    shared = student - student // 4
    first = np.arange(student // 4, student)
    orders = [np.r_[first, np.arange(student // 4)], np.arange(teacher)]
    rng = np.random.default_rng(1)
    routes = [np.sort(rng.integers(0, shared + 1, size - shared)) for size in (student, teacher)]
    bound = COMPARISONS[compare].bind(beta=0.0, **options)
    laid = []
    for side, x in zip((batch.student, batch.teacher), states):  # as the lines of the batch hold them
        line = np.zeros((side.packed.tokens.size, x.shape[-1]), np.float32)
        line[side.packed.gather_index[side.packed.mask]] = x.reshape(-1, x.shape[-1])
        laid.append(jnp.asarray(line))
    maps = [
        Head(
            None,
            jnp.asarray(np.argsort(o)),
            prefix_of_unmatched=jnp.asarray(r, jnp.int32),
            column_order=jnp.asarray(o) if k == 0 else None,
        )
        for k, (o, r) in enumerate(zip(orders, routes))
    ]
    weights = [None if w is None else jnp.asarray(w) for w in heads]
    batch = jax.tree.map(jnp.asarray, batch._replace(student=batch.student._replace(packed=None), teacher=batch.teacher._replace(packed=None), labels=None))  # fmt: skip
    del states, heads, rows

    def loss(student_state, student_weight, teacher_state, teacher_weight, batch, maps):
        return distill_loss(
            student_state, maps[0]._replace(weight=student_weight, softcap=None, temperature=1.0), batch.student,
            teacher_state, maps[1]._replace(weight=teacher_weight, softcap=None, temperature=1.0), batch.teacher,
            batch.weight, compare=bound, overlap=Overlap(shared), merge=merge, chunk=CHUNK,
        )[0]  # fmt: skip

    step = jax.jit(jax.value_and_grad(loss, (0, 1) if hidden else 0))
    arguments = laid[0], weights[0], laid[1], weights[1], batch, maps

    def call():
        value, gradient = jax.block_until_ready(step(*arguments))
        return value, lambda: float(jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient))))

    with cpu.enabled():
        measured(call, calls)


def uld_loss(student: Iterable, teacher: Iterable, device=None):
    """TRL's hybrid loss, merged by the chain rule, of two vocabularies by what their entries spell."""
    from trl.experimental.gold.gold_trainer import ULDLoss

    settings = types.SimpleNamespace(
        beta=0.0, use_extended_uld=True, uld_use_hybrid_loss=True, uld_token_merge_strategy="bayesian",
        uld_crossentropy_weight=0.0, uld_distillation_weight=1.0, uld_student_temperature=1.0,
        uld_teacher_temperature=1.0, uld_skip_student_eos=False, uld_skip_teacher_eos=False,
        uld_hybrid_unmatched_weight=1.0, uld_hybrid_matched_weight=1.0,
    )  # fmt: skip

    def tokenizer(entries):
        ids = {f"entry {entry}": i for i, entry in enumerate(entries)}
        return types.SimpleNamespace(get_vocab=lambda: ids)

    return ULDLoss(settings, tokenizer(student), tokenizer(teacher), device)


def peer(student: int, teacher: int, answer: int, hidden: bool, calls: int) -> None:
    """TRL's hybrid loss on the same numbers, merged by the chain rule."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch

    states, heads, ids, ends = inputs(student, teacher, answer, hidden)

    def spans(end):
        answer = np.stack([np.r_[0, end[:-1]], end], -1)
        return torch.tensor(np.concatenate([np.zeros((PROMPT, 2), np.int64), answer])[None].repeat(BATCH, 0))

    def labels(x):
        y = torch.tensor(x)
        y[:, :PROMPT] = -100
        return y

    loss = uld_loss(range(student), range(student // 4, student // 4 + teacher))
    ours, theirs = torch.tensor(states[0], requires_grad=True), torch.tensor(states[1])
    weights = [None if w is None else torch.tensor(w, requires_grad=k == 0) for k, w in enumerate(heads)]
    leaves = [ours] + ([weights[0]] if hidden else [])
    del states, heads
    arguments = [*map(labels, ids), *map(torch.tensor, ids), *map(spans, ends)]

    def call():
        for leaf in leaves:
            leaf.grad = None
        logits = [x if w is None else x @ w.T for x, w in zip((ours, theirs), weights)]
        value = loss(*logits, *arguments)
        value.backward()
        return value, lambda: float(sum((leaf.grad**2).sum() for leaf in leaves) ** 0.5)

    measured(call, calls)


def grow(ways: list[str], calls: int) -> None:
    """A table of this project's times and memory over answer tokens and vocabularies, from hidden states and heads."""
    sizes = [(32000, 49152, n) for n in (128, 256, 512, 1024, 2048, 4096)]
    sizes += [(n, n, 128) for n in (32000, 65536, 131072, 262144)]
    print(
        "| student × teacher entries | answer tokens a row | "
        + " | ".join(ways)
        + " |\n"
        + "| --- " * (2 + len(ways))
        + "|"
    )
    for student, teacher, answer in sizes:
        cells = []
        for way in ways:
            command = [
                sys.executable,
                __file__,
                *map(str, (student, teacher, answer)),
                "--hidden",
                "--calls",
                str(calls),
            ]
            ran = subprocess.run([*command, "--side", way], capture_output=True, text=True, check=True)
            found = json.loads(ran.stdout.strip().splitlines()[-1])
            cells.append(f"{found['seconds']:.3f} s, {found['peak_gb']:.2f} GB")
        print(f"| {student:,} × {teacher:,} | {answer} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Alternates, or is one of the sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("student", "teacher", "answer"):
        parser.add_argument(name, type=int)
    parser.add_argument("--peer_python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--hidden", action="store_true", help="start from hidden states and heads")
    parser.add_argument("--no_peer", action="store_true", help="this project alone")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--grow", action="store_true", help="this project alone, from hidden states")
    parser.add_argument("--side", choices=["peer", *WAYS])
    args = parser.parse_args()
    sizes = args.student, args.teacher, args.answer
    if args.side == "peer":
        return peer(*sizes, args.hidden, args.calls)
    if args.side:
        return ours(*sizes, args.hidden, args.side, args.calls)
    from side_by_side import alternate, table

    if args.grow:
        return grow(args.ways, args.calls)
    tail = [__file__, *map(str, sizes), "--calls", str(args.calls), *(["--hidden"] if args.hidden else []), "--side"]
    commands = {} if args.no_peer else {"TRL": [args.peer_python, *tail, "peer"]}
    commands |= {way: [sys.executable, *tail, way] for way in args.ways}
    found = alternate(commands, args.rounds)
    print(table(found, "TRL"), flush=True)
    for name, runs in found.items():
        print(f"{name}: loss {runs[0]['loss']:.6f}, gradient norm {runs[0]['gradient']:.6f}")


if __name__ == "__main__":
    main()
