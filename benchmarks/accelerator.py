"""What an accelerator does with this project, in one command of a few minutes: random weights, no download.

    python benchmarks/accelerator.py [--seconds 480] [--json FILE] [--only NAME ...]     # on the card
    python benchmarks/accelerator.py --small                                            # tiny shapes, to try it on a CPU
    python benchmarks/accelerator.py --write_reference                                  # on a CPU: the run that cards are compared with

Sections run in the order of their worth and stop at the time given; each is timed, none takes the others down. The table has a
pass mark where there is a right answer (values against a CPU of the same process, memory, state after a skipped update) and a
figure beside what the hardware can do where there is none. The file of `--json` is rewritten after every section.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

REFERENCE = pathlib.Path(__file__).parent / "results" / "quickstart_on_cpu.json"
GIB = 2**30
KNOWN = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, by the datasheets

LLAMA_1B = dict(
    model_type="llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_theta=500000.0,
)  # fmt: skip
QWEN_4B = dict(
    model_type="qwen3", hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True, rms_norm_eps=1e-6, rope_theta=1000000.0,
)  # fmt: skip
TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16)  # fmt: skip


class Bench:
    """Shapes, results and the clock of one call."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.small = args, args.small
        self.start, self.rows, self.results = time.perf_counter(), [], {}
        device = jax.devices()[0]
        self.device, self.peak = device, next((v for k, v in KNOWN.items() if k in device.device_kind), None)
        self.bandwidth: float | None = None

    def left(self) -> float:
        """Seconds until no further section begins."""
        return self.args.seconds - (time.perf_counter() - self.start)

    def add(self, section: str, what: str, value: Any, unit: str = "", passed: bool | None = None, **more) -> None:
        """One line of the table, printed at once."""
        mark = {None: "", True: "pass", False: "FAIL"}[passed]
        shown = f"{value:,.4g}" if isinstance(value, float) else str(value)
        row = dict(section=section, what=what, value=value, unit=unit, mark=mark, **more)
        self.rows.append(row)
        extra = ", ".join(f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in more.items())
        print(f"| {section} | {what} | {shown} {unit} | {extra} | {mark} |", flush=True)

    def write(self) -> None:
        """The JSON file."""
        if self.args.json:
            about = dict(
                device=self.device.device_kind,
                platform=jax.default_backend(),
                jax=jax.__version__,
                small=self.small,
                seconds=round(time.perf_counter() - self.start, 1),
            )
            pathlib.Path(self.args.json).write_text(json.dumps(dict(about=about, rows=self.rows), indent=1) + "\n")


def timed(call: Callable[[], Any], calls: int = 5, warm: int = 1) -> tuple[float, float]:
    """Median and spread (largest less smallest) of the seconds of a call, waited for."""
    for _ in range(warm):
        jax.block_until_ready(call())
    seconds = []
    for _ in range(calls):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), max(seconds) - min(seconds)


def peak_bytes(device) -> int | None:
    """The most that was in use on a device so far, where it says."""
    stats = device.memory_stats() or {}
    return stats.get("peak_bytes_in_use")


# 0


def ceilings(bench: Bench) -> None:
    """The largest product and copy that JAX reaches."""
    n = 512 if bench.small else 8192
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    product = jax.jit(lambda a, b: a @ b)
    seconds, _ = timed(lambda: [product(a, b) for _ in range(20)], 3)  # waited for once, as in a program
    reached = 20 * 2 * n**3 / seconds
    bench.add(
        "0 ceilings", f"bfloat16 product {n}³", reached / 1e12, "TFLOP/s", peak=bench.peak / 1e12 if bench.peak else 0.0
    )
    x = jnp.ones(((1 << 22) if bench.small else (1 << 30),), jnp.float32)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)

    def copies():
        nonlocal x
        for _ in range(20):
            x = copy(x)
        return x

    seconds, _ = timed(copies, 3)
    bench.bandwidth = 20 * 2 * x.nbytes / seconds
    bench.add("0 ceilings", "copy, bytes read and written", bench.bandwidth / 1e9, "GB/s")


# the step


def decoder_configs(bench: Bench):
    """Student and teacher."""
    from transformers import AutoConfig

    from gold_jax.models.config import DecoderConfig

    found = []
    for fields in (LLAMA_1B, QWEN_4B):
        fields = dict(fields) | (dict(TINY, vocab_size=1000 + 24 * len(found)) if bench.small else {})
        found.append(DecoderConfig.from_hf(AutoConfig.for_model(fields.pop("model_type"), **fields)))
    return found


def random_model(config, seed: int, **settings):
    """`(graphdef, params)` with random weights, made on the device."""
    from gold_jax.models.decoder import Decoder
    from gold_jax.models.functional import split

    graph, _ = split(Decoder.abstract(config, **settings))
    params = jax.jit(lambda: split(Decoder.from_config(config, seed, **settings))[1])()
    return graph, jax.block_until_ready(params)


def random_rows(sizes, rows: int, prompt: int, answer: int):
    """Of each row both sides' token ids, and the bytes at which each token of the answer ends.

    Tokens have one to five bytes; every fourth pair of them is cut at another byte by the teacher.
    """
    rng = np.random.default_rng(0)
    for _ in range(rows):
        lengths = rng.integers(1, 6, answer)
        other = lengths.copy()
        for i in range(0, answer - 1, 4):
            both = lengths[i] + lengths[i + 1]
            other[i] = 1 + lengths[i] % (both - 1)
            other[i + 1] = both - other[i]
        ids = [rng.integers(0, size, prompt + answer).astype(np.int32) for size in sizes]
        yield ids, (np.cumsum(lengths), np.cumsum(other))


def random_batch(configs, rows: int, prompt: int, answer: int, merge: str, text: bool):
    """A batch of random tokens whose groups are 1:1 for half of the text."""
    from gold_jax.text.align import group_ends
    from gold_jax.text.batch import Row, SideTokens, build_batches

    made = []
    for ids, ends in random_rows([config.vocab_size for config in configs], rows, prompt, answer):
        *groups, count = group_ends(*ends)
        halves = [SideTokens(x[:prompt], x[prompt:], g) for x, g in zip(ids, groups)]
        made.append(Row(*halves, groups=count, text="", stopped=True))
    (batch,) = build_batches(made, rows, merge=merge, groups="all", text=text)
    return batch


class StepUnderTest:
    """A distillation step of random models, as training calls it."""

    def __init__(self, bench: Bench, loss: str = "gold"):
        from gold_jax.config import GOLDConfig
        from gold_jax.loading import LoadedModel
        from gold_jax.models.functional import count, merge
        from gold_jax.text.vocabulary import VocabularyMap
        from gold_jax.training.build import Match, build_run
        from gold_jax.training.step import init_state

        self.configs = student, teacher = decoder_configs(bench)
        self.rows, self.prompt, self.answer = (2, 8, 24) if bench.small else (4, 512, 512)
        dtype = "float32" if bench.small else "bfloat16"
        args = GOLDConfig(output_dir=tempfile.gettempdir(), loss=loss, learning_rate=1e-5, gradient_checkpointing=True)
        models = (
            random_model(student, 0, dtype=dtype, remat=True),
            random_model(teacher, 1, dtype=dtype, param_dtype=dtype),
        )
        self.sizes = [count(params) for _, params in models]
        matched = int(0.7 * student.vocab_size)
        orders = [
            np.random.default_rng(i).permutation(c.vocab_size).astype(np.int32) for i, c in enumerate(self.configs)
        ]
        routes = [np.full(c.vocab_size - matched, matched, np.int32) for c in self.configs]
        vocabulary = VocabularyMap(*orders, matched, matched, student.vocab_size, teacher.vocab_size, *routes)
        sides = [LoadedModel(merge(*model), None, "") for model in models]
        del models
        run = build_run(args, *sides, total_steps=1000, match=Match(vocabulary, ((1, 2), (3, 4)), False))
        del sides
        self.step, self.constants = run.step, run.step.constants
        self.state = init_state(run.optimizer, run.params)
        self.batch = random_batch(self.configs, self.rows, self.prompt, self.answer, run.spec.merge, run.spec.of_text)

    def train(self):
        """One update; its metrics."""
        self.state, metrics = self.step(self.state, [self.batch])
        return metrics

    def flops(self) -> float:
        """Of one update, recomputation not counted: 6 for a student's weight and token, 2 for a teacher's, and the heads
        at the positions that are compared; attention over half of each row's pairs."""
        tokens, positions = self.rows * (self.prompt + self.answer), self.rows * self.answer
        total = 0.0
        for config, size, factor in zip(self.configs, self.sizes, (6, 2)):
            head = config.vocab_size * config.width
            total += factor * (size - head * (1 if config.tied else 2)) * tokens + factor * head * positions
            pairs = self.rows * (self.prompt + self.answer) ** 2 / 2
            total += factor * 2 * pairs * config.heads * config.head_dim * config.layers
        return total


def full_step(bench: Bench) -> None:
    """An off-policy update of the whole pair."""
    under = StepUnderTest(bench)
    begin = time.perf_counter()
    first = jax.block_until_ready(under.train())
    bench.add("4 step", "compiling and the first update", time.perf_counter() - begin, "s")
    seconds, spread = timed(under.train, 8, 2)
    tokens = under.rows * (under.prompt + under.answer)
    bench.add("4 step", "update, gold", seconds * 1e3, "ms", spread=spread * 1e3)
    bench.add("4 step", "tokens a second", tokens / seconds, "tokens/s")
    if bench.peak:
        bench.add("4 step", "model FLOPs of the peak", 100 * under.flops() / seconds / bench.peak, "%")
    for name, call in {
        "teacher's forward pass": lambda: under.step.programs["teacher_forward"](
            under.constants, under.batch.teacher.packed
        )
    }.items():
        seconds, spread = timed(call, 5, 1)
        bench.add("4 step", name, seconds * 1e3, "ms", spread=spread * 1e3)
    measured = peak_bytes(bench.device)
    given = under.state, under.constants, _with_teacher(under), under.step.learning_rate(under.state)
    compiled = under.step.programs["fused"].lower(*given).compile()
    about = compiled.memory_analysis()
    alone = (
        about.argument_size_in_bytes + about.temp_size_in_bytes + about.output_size_in_bytes - about.alias_size_in_bytes
    )
    bench.add(
        "4 step",
        "most bytes in use",
        measured / GIB if measured else "not reported",
        "GiB",
        arguments=about.argument_size_in_bytes / GIB,
        temporaries=about.temp_size_in_bytes / GIB,
        together=alone / GIB,
    )
    bench.add("4 step", "loss is a number", float(first["loss"]), "nats", passed=bool(np.isfinite(first["loss"])))
    bench.under = under


def _with_teacher(under: StepUnderTest):
    return under.step.objective.with_teacher(under.constants, under.batch)


def decoding(bench: Bench) -> None:
    """Tokens drawn from the student, after the prompts were read."""
    from gold_jax.models.quantization import vector_bytes
    from gold_jax.rollout.sampler import SamplingEngine
    from gold_jax.values import QUANTIZATIONS

    config, _ = decoder_configs(bench)
    dtype = "float32" if bench.small else "bfloat16"
    model = random_model(config, 0, dtype=dtype, param_dtype=dtype)
    weights = sum(x.nbytes for x in jax.tree.leaves(model[1]))
    prompt, rng = 8 if bench.small else 128, np.random.default_rng(0)
    sampled = {f"temperature 1, {name}".removesuffix(", none"): (name, {}) for name in QUANTIZATIONS} | {
        "greedy": ("none", dict(temperature=0.0)),
        "top-p 0.95": ("none", dict(top_p=0.95)),
    }
    # In the last keys and values are two fifths of what is read.
    for rows, new in ((2, 16),) if bench.small else ((4, 128), (32, 128), (128, 128), (128, 512)):
        prompts = [rng.integers(0, config.vocab_size, prompt).astype(np.int32) for _ in range(rows)]
        for name, (quantization, options) in sampled.items():
            if not name.startswith("temperature 1") and (rows, new) not in ((32, 128), (2, 16)):
                continue
            engine = SamplingEngine(rows, quantization)

            def call(options=options, engine=engine, prompts=prompts, new=new):
                return engine.generate(model, prompts, max_new_tokens=new, key=jax.random.key(0), **options)

            seconds, spread = timed(call, 3, 1)
            itemsize = jnp.dtype(dtype).itemsize
            vector = vector_bytes(config.head_dim, itemsize, quantization)
            cache = 2 * config.layers * config.kv_heads * rows * (prompt + new / 2) * vector
            moved = cache + (weights if quantization == "none" else weights / itemsize)
            share = {"of the copy's bandwidth": f"{100 * moved / (seconds / new) / bench.bandwidth:.1f} %"}
            bench.add("6 decoding", f"{rows} rows of {new}, {name}", 1e3 * seconds / new, "ms a token",
                      spread=1e3 * spread / new, rate=rows * new / seconds, **share)  # fmt: skip


def losses_by_time(bench: Bench) -> None:
    """The loss from hidden states and heads, with its gradient, by comparison and chunk."""
    student, teacher = decoder_configs(bench)
    rows, prompt, answer = (2, 8, 24) if bench.small else (4, 512, 512)
    dtype = jnp.float32 if bench.small else jnp.bfloat16
    matched = int(0.7 * student.vocab_size)
    gold = dict(beta=0.0, matched_weight=1.0, unmatched_weight=1.0)
    ways = {
        "gold": ("chain", "hybrid", gold),
        "gold, top-k 1,024": ("chain", "hybrid", gold | dict(top_k=16 if bench.small else 1024)),
        "projected": ("boundary", "projected", dict(beta=0.0)),
        "events": ("boundary", "events", dict(beta=0.0)),
    }
    for name, (merge, compare, options) in ways.items():
        batch = random_batch((student, teacher), rows, prompt, answer, merge, compare == "events")
        for chunk in (64,) if bench.small else (256, 1024) if name in ("gold", "projected") else (256,):
            if bench.left() < 20:
                return
            call, _ = _loss_call(student, teacher, batch, compare, merge, options, matched, chunk, dtype)
            seconds, spread = timed(call, 4, 1)
            flops = 2 * rows * answer * (3 * student.vocab_size * student.width + teacher.vocab_size * teacher.width)
            more = {"of the peak": f"{100 * flops / seconds / bench.peak:.1f} %"} if bench.peak else {}
            bench.add("5 loss", f"{name}, chunk {chunk}", seconds * 1e3, "ms", spread=spread * 1e3, **more)


@functools.lru_cache(maxsize=8)  # the same for every loss
def drawn(seed: int, shape: tuple[int, ...], scale: float, dtype, device) -> jax.Array:
    """Values from a normal distribution, the same on every device."""
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * scale
    return jax.device_put(jnp.asarray(values, dtype), device)


def _loss_call(student, teacher, batch, compare, merge, options, matched, chunk, dtype, device=None):
    """A jitted loss with its gradient on a device, and its arguments' maker."""
    from gold_jax.losses.compare import COMPARISONS, Overlap
    from gold_jax.losses.distill import Head, distill_loss

    bound = COMPARISONS[compare].bind(**options)

    sizes = batch.student.packed.tokens.size, batch.teacher.packed.tokens.size
    device, arrays = device or jax.devices()[0], []
    for number, (config, n) in enumerate(zip((student, teacher), sizes)):
        arrays += [
            drawn(number, (n, config.width), 1.0, dtype, device),
            drawn(2 + number, (config.vocab_size, config.width), config.width**-0.5, dtype, device),
        ]
    rng = np.random.default_rng(5)
    maps = [
        Head(
            None,
            np.arange(c.vocab_size, dtype=np.int32),
            prefix_of_unmatched=np.sort(rng.integers(0, matched + 1, c.vocab_size - matched)).astype(np.int32),
        )
        for c in (student, teacher)
    ]
    flat = batch._replace(
        student=batch.student._replace(packed=None), teacher=batch.teacher._replace(packed=None), labels=None
    )
    flat, maps = jax.device_put((flat, [m._replace(softcap=None, temperature=None) for m in maps]), device)

    def loss(student_state, student_weight, teacher_state, teacher_weight, batch, maps):
        own = [m._replace(softcap=None, temperature=1.0) for m in maps]
        return distill_loss(
            student_state, own[0]._replace(weight=student_weight), batch.student,
            teacher_state, own[1]._replace(weight=teacher_weight), batch.teacher,
            batch.weight, compare=bound, overlap=Overlap(matched), merge=merge, chunk=chunk,
        )[0]  # fmt: skip

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    return (lambda: step(*arrays, flat, maps)), arrays


def attention(bench: Bench) -> None:
    """Every implementation that runs here beside the plain one: values, gradients, time."""
    from gold_jax.models.attention import attention as attend
    from gold_jax.models.attention import check, current_platform

    platform = current_platform()
    rows, length, heads, kv, size = (2, 64, 4, 2, 16) if bench.small else (4, 1024, 32, 8, 64)
    drawn = [
        jax.random.normal(jax.random.key(i), (rows, length, h, size), jnp.bfloat16)
        for i, h in enumerate((heads, kv, kv))
    ]
    cotangent = jax.random.normal(jax.random.key(7), drawn[0].shape, jnp.float32)
    order = jnp.arange(length)
    cases = {
        "all tokens": (jnp.ones((rows, length), bool), None),
        "padding on the right": (order < jnp.array([length, length // 2, 1, length - 3])[:rows, None], None),
        "padding on the left": (order >= jnp.array([0, length // 2, length - 1, 3])[:rows, None], None),
        "window": (jnp.ones((rows, length), bool), length // 4),
    }
    for name, (mask, window) in cases.items():
        exact = None
        for kind in ("plain", "blockwise", "cudnn", "splash"):
            try:
                check(kind, platform, drawn[0].dtype, size, None)
            except ValueError:
                continue
            where = mask[..., None, None]

            def value(q, k, v, kind=kind, mask=mask, window=window, where=where):
                out = attend(q, k, v, mask=mask, window=window, implementation=kind)
                return jnp.sum(jnp.where(where, out, 0).astype(jnp.float32) * cotangent), jnp.where(where, out, 0)

            run = jax.jit(jax.grad(value, (0, 1, 2), has_aux=True))
            seconds, _ = timed(lambda run=run: run(*drawn), 5, 1)
            grads, out = run(*drawn)
            found = [np.asarray(x, np.float32) for x in (out, *grads)]
            if exact is None:  # plain, in float32, is what the others are compared with
                lifted = [x.astype(jnp.float32) for x in drawn]
                with jax.default_matmul_precision("highest"):
                    g, o = jax.jit(jax.grad(value, (0, 1, 2), has_aux=True))(*lifted)
                exact = [np.asarray(x, np.float32) for x in (o, *g)]
            error = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, exact))
            bench.add("1 attention", f"{kind}, {name}", seconds * 1e3, "ms", passed=error < 1e-2, error=error)


def losses_by_value(bench: Bench) -> None:
    """The loss and its gradient in float32 against a CPU of the same process."""
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        bench.add("2 losses", "no CPU in this process (JAX_PLATFORMS)", "left out")
        return
    import dataclasses

    student, teacher = (
        dataclasses.replace(c, vocab_size=v, width=w) for c, v, w in zip(decoder_configs(bench), (5000, 6000), (64, 96))
    )
    gold = dict(beta=0.0, matched_weight=1.0, unmatched_weight=1.0)
    ways = {
        "gold": ("chain", "hybrid", gold), "gold, top-k": ("chain", "hybrid", gold | dict(top_k=64)),
        "uld": ("chain", "sorted", {}), "strict": ("chain", "shared", dict(beta=0.5)),
        "projected": ("boundary", "projected", dict(beta=0.0)), "events": ("boundary", "events", dict(beta=0.5)),
    }  # fmt: skip
    for name, (merge, compare, options) in ways.items():
        batch = random_batch((student, teacher), 2, 8, 24, merge, compare == "events")
        found = []
        for device in (cpu, bench.device):
            with jax.default_matmul_precision("highest"), jax.default_device(device):
                call, _ = _loss_call(student, teacher, batch, compare, merge, options, 3500, 64, jnp.float32, device)
                found.append(jax.tree.map(np.asarray, jax.device_get(call())))
        (value, grads), (other, others) = found
        error = abs(float(value) - float(other)) / abs(float(value))
        gradient = max(float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in zip(grads, others))
        bench.add(
            "2 losses",
            name,
            float(other),
            "nats",
            passed=error < 1e-5 and gradient < 1e-4,
            error=error,
            gradient=gradient,
        )


# the state


def state_checks(bench: Bench) -> None:
    """An update that is not finite changes nothing; 20 further ones take no more memory."""
    under = getattr(bench, "under", None) or StepUnderTest(bench)
    probe = jax.jit(lambda tree: sum(jnp.sum(jnp.abs(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))
    before = float(probe(under.state.params))
    good = under.batch
    under.batch = good._replace(weight=np.where(good.weight > 0, np.inf, 0).astype(np.float32))
    metrics = under.train()
    under.batch = good
    after = float(probe(under.state.params))
    bench.add(
        "8 state",
        "an update that is not finite is left out",
        int(metrics["skipped"]),
        "",
        passed=int(metrics["skipped"]) == 1 and before == after,
    )
    stats = bench.device.memory_stats() or {}
    jax.block_until_ready(under.train())
    used = (bench.device.memory_stats() or {}).get("bytes_in_use")
    metrics = None
    for _ in range(20):
        metrics = under.train()
    jax.block_until_ready(metrics)
    del metrics
    grown = None if not stats else (bench.device.memory_stats()["bytes_in_use"] - used) / 2**20
    bench.add("8 state", "memory after 20 further updates", "not reported" if grown is None else grown, "MiB more",
              passed=None if grown is None else grown < 1)  # fmt: skip


def profile(bench: Bench) -> None:
    """Where a step's time goes, by kind of kernel."""
    under = getattr(bench, "under", None) or StepUnderTest(bench)
    jax.block_until_ready(under.train())
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        with jax.profiler.trace(folder):
            for _ in range(3):
                metrics = under.train()
            jax.block_until_ready(metrics)
        wall = time.perf_counter() - begin
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        if bench.args.trace:
            pathlib.Path(bench.args.trace).write_bytes(path.read_bytes())
        kinds, names, scopes = collections.Counter(), collections.Counter(), collections.Counter()
        for plane in data.planes:
            if "GPU" not in plane.name and "TPU" not in plane.name:
                continue
            for line in plane.lines:
                if "Stream" not in line.name and "XLA Ops" not in line.name:
                    continue
                for event in line.events:
                    names[event.name] += event.duration_ns
                    kinds[_kind(event.name)] += event.duration_ns
                    scopes[_scope(dict(event.stats))] += event.duration_ns
    total = sum(names.values())
    bench.add("7 profile", "device busy", 100 * total / 1e9 / wall if wall else 0.0, "% of the trace", wall=wall)
    for title, counter, most in (("kind", kinds, 10), ("scope", scopes, 12), ("kernel", names, 20)):
        for name, duration in counter.most_common(most):
            bench.add("7 profile", f"{title}: {name[:90]}", 100 * duration / total, "%", ms=duration / 3e6)


def _kind(kernel: str) -> str:
    lowered = kernel.lower()
    for kind, marks in {
        "attention": ("fmha", "flash", "cudnn"), "product": ("gemm", "nvjet", "cutlass", "cublas", "dot"), "sort": ("sort", "radix"),
        "copy": ("memcpy", "copy", "transpose"), "gather, scatter": ("gather", "scatter"), "reduce": ("reduce",), "fill": ("memset",),
    }.items():  # fmt: skip
        if any(mark in lowered for mark in marks):
            return kind
    return "other fusions"


def _scope(stats: dict[str, Any]) -> str:
    """The named scope of a kernel; of those replayed from a CUDA graph, which have no name, the program."""
    path = str(stats.get("name") or "")
    for scope in ("optimizer", "teacher", "student", "loss", "prefill", "draw"):
        if scope in path:
            return scope + (" backward" if "transpose(" in path else "")
    return str(stats.get("hlo_module") or "unnamed")


# whole runs


def quickstart_trainer(folder: str, steps: int = 12, **settings) -> Any:
    """The quickstart's first updates in float32, its settings otherwise."""
    import yaml
    from rich.console import Console

    from gold_jax import GOLDConfig, GOLDTrainer
    from gold_jax.quickstart import resolve

    text = (pathlib.Path(__file__).parents[1] / "configs" / "quickstart.yaml").read_text()
    fields = yaml.safe_load(text)
    names = [fields.pop(key) for key in ("model_name_or_path", "teacher_model_name_or_path", "dataset_name")]
    fields = {
        k: v
        for k, v in fields.items()
        if not k.startswith(("dataset_", "eval_", "predict_", "log_", "num_completions"))
    }
    fields |= dict(output_dir=folder, max_steps=steps, logging_steps=1, bf16=False, logging_first_step=True) | settings
    fields.pop("num_train_epochs")
    rows = str(resolve(names[2]) / "train.jsonl")
    return GOLDTrainer(*names[:2], GOLDConfig(**fields), rows, console=Console(quiet=True))


def quickstart(bench: Bench) -> None:
    """The quickstart's first updates beside those of a CPU, and a run that is stopped and goes on."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = quickstart_trainer(folder + "/a")
        trainer.train()
        losses = [row["loss"] for row in trainer.log_history if "loss" in row]
        tokens = greedy_tokens(trainer)
        if bench.args.write_reference:
            REFERENCE.parent.mkdir(exist_ok=True)
            REFERENCE.write_text(json.dumps(dict(losses=losses, tokens=tokens), indent=1) + "\n")
            return
        expected = json.loads(REFERENCE.read_text())
        worst = max(abs(a - b) / abs(b) for a, b in zip(losses, expected["losses"], strict=True))
        bench.add(
            "3 quickstart",
            "12 updates, largest difference of a loss",
            worst,
            "of it",
            passed=worst < 2e-3,
            last=losses[-1],
        )
        same = sum(a == b for a, b in zip(tokens, expected["tokens"], strict=True))
        bench.add("3 quickstart", "greedy completions equal", f"{same} of {len(tokens)}", passed=same == len(tokens))
        if bench.left() < 60:
            return
        first = quickstart_trainer(folder + "/b", save_strategy="steps", save_steps=6)
        first.train()
        again = quickstart_trainer(folder + "/b", save_strategy="steps", save_steps=6)
        again.train(resume_from_checkpoint=str(pathlib.Path(folder) / "b" / "checkpoint-6"))
        ours = [row["loss"] for row in again.log_history if "loss" in row][-6:]
        theirs = [row["loss"] for row in first.log_history if "loss" in row][-6:]
        bench.add(
            "9 resume",
            "updates 7 to 12 after a resume",
            str(ours == theirs),
            passed=np.allclose(ours, theirs, rtol=1e-5),
        )


def greedy_tokens(trainer) -> list[list[int]]:
    """What the trained student writes greedily for eight prompts."""
    from gold_jax.models.functional import split
    from gold_jax.rollout.sampler import SamplingEngine

    chat_tokenizer, model = trainer.student.chat_tokenizer, split(trainer.model)
    prompts = [chat_tokenizer.encode_prompt(example.prompt) for example in list(trainer.train_examples)[:8]]
    drawn = SamplingEngine(8).generate(
        model, prompts, max_new_tokens=16, key=jax.random.key(0), temperature=0.0, stop_ids=chat_tokenizer.stop_ids
    )
    return [[int(t) for t in d.ids] for d in drawn]


SECTIONS = {
    "ceilings": ceilings,
    "step": full_step,
    "decoding": decoding,
    "profile": profile,
    "loss_times": losses_by_time,
    "state": state_checks,
    "attention": attention,
    "loss_values": losses_by_value,
    "quickstart": quickstart,
}


def main() -> int:
    """Runs the sections; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--json")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--trace", help="keep the profile of the step in this file")
    parser.add_argument("--write_reference", action="store_true")
    args = parser.parse_args()
    if args.write_reference:
        args.only = ["quickstart"]
    bench = Bench(args)
    print(f"{bench.device.device_kind} ({jax.default_backend()}), jax {jax.__version__}\n")
    print("| section | what | value | beside it | mark |\n| --- | --- | --- | --- | --- |", flush=True)
    for name in args.only or SECTIONS:
        if bench.left() < 15:
            bench.add(name, "no time left", "left out")
            continue
        if name in ("loss_times", "attention") and hasattr(bench, "under") and "state" not in (args.only or SECTIONS):
            del bench.under
        begin = time.perf_counter()
        try:
            SECTIONS[name](bench)
        except Exception as error:
            traceback.print_exc()
            bench.add(name, f"{type(error).__name__}: {str(error)[:200]}", "error", passed=False)
        bench.add(name, "section's time", time.perf_counter() - begin, "s")
        bench.write()
    failed = any(row["mark"] == "FAIL" for row in bench.rows)
    print(f"\n{time.perf_counter() - bench.start:.0f} s", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
