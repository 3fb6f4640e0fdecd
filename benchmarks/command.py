"""Whole commands beside TRL's, from the start of the process to its end: starting, loading, compiling, training, saving.

    python benchmarks/command.py ASSETS ROWS --peer_python PYTHON [--steps 40] [--rounds 1] [--modes off on]

ASSETS is what `tests/fetch_assets.py` makes, ROWS a JSONL file of `messages`, PYTHON one with torch and TRL. The real pair,
batch 4, windows of 256 tokens and at most 64 new ones, GOLD's loss, float32. `cold` has no program kept by an earlier run,
`warm` those of the cold one.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

SETTINGS = dict(
    per_device_train_batch_size=4, learning_rate=5e-5, lr_scheduler_type="constant_with_warmup", warmup_steps=5, beta=0.0,
    max_completion_length=64, max_length=256, logging_steps=10, use_uld_loss=True, uld_use_hybrid_loss=True,
    uld_hybrid_matched_weight=1.0, uld_hybrid_unmatched_weight=1.0, temperature=1.0, top_p=0.95, seed=42,
    gradient_checkpointing=False,
)  # fmt: skip


def timed(command: list[str], **environment: str) -> None:
    """Runs a command; prints its seconds, from start to end, and its peak."""
    begin = time.perf_counter()
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    seconds = time.perf_counter() - begin
    if ran.returncode:
        raise SystemExit(ran.stderr[-2000:])
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime
    print(json.dumps(dict(seconds=seconds, peak_gb=used.ru_maxrss / 2**20, cpu_seconds=cpu)))


def ours(assets: str, rows: str, mode: str, steps: int, cache: str) -> None:
    """This project's command."""
    student, teacher = f"{assets}/smollm2-135m-gpt2tok", f"{assets}/smollm2-135m-instruct"
    with tempfile.TemporaryDirectory() as folder:
        own = dict(model_name_or_path=student, teacher_model_name_or_path=teacher, dataset_name=rows, max_steps=steps)
        own |= dict(output_dir=f"{folder}/run", lmbda=float(mode == "on"), compilation_cache=cache, save_strategy="no")
        flags = [f"--{name}={value}" for name, value in (SETTINGS | own).items()]
        timed([sys.executable, "-m", "gold_jax.train", *flags])


def peer(assets: str, rows: str, mode: str, steps: int) -> None:
    """TRL's trainer in a script: what its own command does, with the teacher's tokenizer named."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    student, teacher = f"{assets}/smollm2-135m-gpt2tok", f"{assets}/smollm2-135m-instruct"
    float32 = {"dtype": "float32"}
    with tempfile.TemporaryDirectory() as folder:
        args = GOLDConfig(
            **SETTINGS, output_dir=folder, max_steps=steps, lmbda=float(mode == "on"), save_strategy="no",
            uld_token_merge_strategy="bayesian", teacher_tokenizer_name_or_path=teacher, teacher_model_name_or_path=teacher,
            report_to=[], use_cpu=True, bf16=False, fp16=False, model_init_kwargs=float32,
            teacher_model_init_kwargs=float32, disable_tqdm=True,
        )  # fmt: skip
        data, tokenizer = load_dataset("json", data_files=rows, split="train"), AutoTokenizer.from_pretrained(student)
        trainer = GOLDTrainer(
            model=student, teacher_model=teacher, args=args, train_dataset=data, processing_class=tokenizer
        )
        trainer.train()
        trainer.save_model(f"{folder}/student")


def main() -> None:
    """Alternates, or is one of the sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets")
    parser.add_argument("rows")
    parser.add_argument("--peer_python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--modes", nargs="+", default=["off", "on"], choices=["off", "on"])
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    args = parser.parse_args()
    given = args.assets, args.rows, args.modes[0], args.steps
    if args.side == "trains":
        return peer(*given)
    command = [__file__, args.assets, args.rows, "--steps", str(args.steps)]
    if args.side == "peer":
        return timed([args.peer_python, *command, "--modes", args.modes[0], "--side", "trains"])
    if args.side:
        return ours(*given, args.cache)
    from side_by_side import alternate, table

    for mode in args.modes:
        found: dict[str, list] = {}
        for _ in range(args.rounds):  # each with programs of its own
            with tempfile.TemporaryDirectory() as cache:
                tail = [*command, "--modes", mode, "--cache", cache, "--peer_python", args.peer_python, "--side"]
                sides = {name: [sys.executable, *tail, side] for name, side in (("cold", "ours"), ("warm", "ours"))}
                for name, rows in alternate({"TRL": [sys.executable, *tail, "peer"], **sides}, 1).items():
                    found.setdefault(name, []).extend(rows)
        print(f"\n{args.steps} steps, {mode}-policy, the whole command:\n\n{table(found, 'TRL')}", flush=True)
        cpu = {name: [round(row["cpu_seconds"]) for row in rows] for name, rows in found.items()}
        print(f"\nCPU seconds: {cpu}", flush=True)


if __name__ == "__main__":
    main()
