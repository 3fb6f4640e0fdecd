"""Kills a short run with `kill -9` at random moments, resumes it every time, and checks that nothing was lost or doubled.

    python tests/training/kill_and_resume.py --kills 50

The run distils the embedded quickstart models, cut to a few short rows, with half of the micro-batches written by the student. It is
started again with `--resume_from_checkpoint latest` after each kill until it ends, and begun anew in an empty folder until there were
as many kills as asked for. After each start is checked that

    state    the checkpoint that it went on from is whole (every array has the checksum it was saved with), and no other
             folder that looks like one is not
    lost     it goes on from the newest checkpoint that was there when the run was killed, no update before it
    rows     every update read the rows that this update reads in a run that is not killed: none twice, none left out
    log      metrics.jsonl has each of its steps once

and at the end of each run that its parameters, optimizer state, log and completions are, bit for bit, those of the run that nothing
stopped. One line is printed for each kill; the exit code is 1 where anything was wrong.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
STEPS, SAVE_EVERY = 24, 3
# What log lines of two runs that are alike differ in.
TIMED = ("tokens_per_second", "time", "programs_compiled", "compiling_seconds")


def work(folder: pathlib.Path) -> None:
    """One start of the run: goes on from what is there."""
    import jax
    from rich.console import Console

    from gold_jax import GOLDConfig, GOLDTrainer
    from gold_jax.quickstart import resolve
    from gold_jax.training.step import Step

    jax.config.update("jax_compilation_cache_dir", str(folder.parent / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    rows = [json.loads(line) for line in (resolve("embedded:task") / "train.jsonl").read_text().splitlines()[:24]]
    args = GOLDConfig(
        output_dir=str(folder), loss="gold", beta=0.0, lmbda=0.5, temperature=1.0, max_completion_length=8, max_length=64,
        max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3,
        gradient_checkpointing=False, logging_steps=2, save_steps=SAVE_EVERY, save_total_limit=2, log_completions=True,
        log_completions_steps=1000, resume_from_checkpoint="latest", seed=3,
    )  # fmt: skip
    trainer = GOLDTrainer("embedded:student", "embedded:teacher", args, rows, console=Console(width=300))
    loop, train = trainer.loop, Step.__call__

    def told(self, state, *arguments):
        """Writes down each update with its rows as it is begun, in one write: a kill cannot cut it in two."""
        row = {"start": os.getpid(), "step": loop.done + 1, "rows": loop.data.order(loop.done)}
        with open(folder / "read.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        return train(self, state, *arguments)

    Step.__call__ = told
    trainer.train()
    held = {f"{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves((loop.state.params, loop.state.optimizer)))}
    np.savez(folder / "held.npz", **held)


def start(folder: pathlib.Path) -> subprocess.Popen:
    """Starts the run in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with open(folder / "said.txt", "a") as said:
        return subprocess.Popen(
            [sys.executable, __file__, "--work", str(folder)], env=environment, stdout=said, stderr=subprocess.STDOUT
        )


def lines(path: pathlib.Path) -> list[dict]:
    """The rows of a log; one that a kill cut off is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            pass
    return found


def steady(path: pathlib.Path) -> list[dict]:
    """A log without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in TIMED} for row in lines(path)]


def whole(folder: pathlib.Path) -> list[int]:
    """Steps of the committed checkpoints."""
    return sorted(
        int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*") if "." not in path.name
    )


def kill_somewhere(folder: pathlib.Path, rng: random.Random) -> tuple[str, bool]:
    """Starts the run and kills it at a random moment; says at which, and whether the run was killed at all."""
    process = start(folder)
    begun, seen = time.time(), len(lines(folder / "read.jsonl"))
    kind = rng.choice(("time", "update", "update", "saving", "saving"))
    after, pause = rng.randint(1, 8), rng.uniform(0, 0.4)
    while process.poll() is None:
        updates = len(lines(folder / "read.jsonl")) - seen
        saving = any(folder.glob("*.orbax-checkpoint-tmp*"))
        if (
            kind == "time" and time.time() - begun > after * 2
            or kind == "update" and updates >= after
            or kind == "saving" and saving and updates >= min(after, SAVE_EVERY)
        ):  # fmt: skip
            time.sleep(pause if kind != "saving" else pause / 20)
            break
        time.sleep(0.002)
    killed = process.poll() is None
    process.kill()
    code = process.wait()
    if not killed and code:
        raise SystemExit(f"the run ended by itself with {code}:\n{(folder / 'said.txt').read_text()[-3000:]}")
    return kind, killed


def check_start(folder: pathlib.Path, expected: int, first: int, plan: dict[int, list[int]]) -> list[str]:
    """What is wrong with the updates of one start, those in read.jsonl from line `first` on."""
    wrong, read = [], lines(folder / "read.jsonl")[first:]
    if read and read[0]["step"] != expected + 1:
        wrong.append(f"went on with update {read[0]['step']} and not {expected + 1}")
    for i, row in enumerate(read):
        if row["step"] != read[0]["step"] + i:
            wrong.append(f"update {row['step']} follows {read[i - 1]['step']}")
        if row["rows"] != plan[row["step"]]:
            wrong.append(f"update {row['step']} read other rows")
    return wrong


def check_log(folder: pathlib.Path) -> list[str]:
    """Steps that are in the log twice."""
    counted = collections.Counter(row["step"] for row in lines(folder / "metrics.jsonl"))
    return [f"metrics.jsonl has step {step} {n} times" for step, n in counted.items() if n > 1]


def check_checkpoints(folder: pathlib.Path) -> list[str]:
    """Checkpoints that are not what was saved."""
    import jax

    from gold_jax.training import checkpointing

    wrong = []
    for step in whole(folder):
        path = folder / f"checkpoint-{step}"
        try:
            metadata = checkpointing.read_metadata(path)
            arrays = {name: jax.ShapeDtypeStruct(*kind) for name, (*kind, _) in metadata["arrays"].items()}
            checkpointing.restore(path, metadata, arrays)
        except checkpointing.BadCheckpoint as error:
            wrong.append(f"{path.name}: {error}")
    return wrong


def check_end(folder: pathlib.Path, reference: pathlib.Path) -> list[str]:
    """Where a finished run differs from the one that nothing stopped."""
    wrong = []
    with np.load(folder / "held.npz") as ours, np.load(reference / "held.npz") as theirs:
        differ = [name for name in theirs.files if not np.array_equal(ours[name], theirs[name])]
    if differ:
        wrong.append(f"{len(differ)} arrays differ at the end")
    for name in ("metrics.jsonl", "completions.jsonl"):
        if steady(folder / name) != steady(reference / name):
            wrong.append(f"{name} differs at the end")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work)
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    base = pathlib.Path(tempfile.mkdtemp(prefix="kill_and_resume_"))
    reference, rng = base / "reference", random.Random(args.seed)
    if start(reference).wait():
        raise SystemExit(f"the run that nothing stops failed:\n{(reference / 'said.txt').read_text()[-3000:]}")
    plan = {row["step"]: row["rows"] for row in lines(reference / "read.jsonl")}
    print("kill  run  aimed at  updates begun  checkpoints then  went on from  wrong", flush=True)
    kills, runs, counted, faults = 0, 0, collections.Counter(), 0
    while kills < args.kills:
        runs += 1
        folder = base / f"run-{runs}"
        finished, expected = False, 0
        while not finished:
            first = len(lines(folder / "read.jsonl"))
            if kills < args.kills:
                kind, killed = kill_somewhere(folder, rng)
            else:
                kind, killed = "-", False
                if start(folder).wait():
                    raise SystemExit(f"a resumed run failed:\n{(folder / 'said.txt').read_text()[-3000:]}")
            finished = not killed
            wrong = check_start(folder, expected, first, plan) + check_log(folder) + check_checkpoints(folder)
            begun = len(lines(folder / "read.jsonl")) - first
            if killed:
                kills += 1
                counted[kind] += 1
                there = whole(folder)
                print(
                    f"{kills:4}  {runs:3}  {kind:>8}  {begun:13}  {' '.join(map(str, there)) or 'none':>16}  "
                    f"{expected:12}  {'; '.join(wrong) or 'nothing'}",
                    flush=True,
                )
                expected = max(there, default=0)
            else:
                wrong += check_end(folder, reference)
                print(f"      run {runs} ended: wrong {'; '.join(wrong) or 'nothing'}", flush=True)
            faults += len(wrong)
    print(f"{kills} kills ({', '.join(f'{n} by {k}' for k, n in counted.items())}) in {runs} runs, {faults} faults")
    shutil.rmtree(base)
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
