"""Whole training steps beside TRL's: the real pair, batch 4, at most 64 new tokens in a window of 128, float32, GOLD's loss.

    python benchmarks/step.py ASSETS --peer_python PYTHON [--rounds 5] [--modes off on] [--losses gold events]

ASSETS is what `tests/fetch_assets.py` makes, PYTHON one with torch and TRL. `off` learns from the data set's answers, in
`on` the student writes every completion. Each side runs in a process of its own; its time is the median of its steps after
the second, those left out in which a new program of the update was compiled (how many there were is in the JSON line).
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time

QUESTIONS = [
    "What is the capital of France?",
    "Explain photosynthesis in two sentences.",
    "Write a haiku about the sea.",
    "List three prime numbers greater than 10.",
    "Who wrote Hamlet?",
    "What is 17 + 25?",
    "Name two gases in the air.",
    "Give a synonym for happy.",
]
ANSWER = "The answer depends on the question, but here is a short and clear reply that stays on the topic at hand and then stops."
SETTINGS = dict(
    per_device_train_batch_size=4, gradient_accumulation_steps=1, learning_rate=1e-5, beta=0.0, temperature=1.0, top_p=0.95,
    max_completion_length=64, max_length=128, logging_steps=1, save_strategy="no", seed=42, gradient_checkpointing=False,
    uld_hybrid_matched_weight=1.0, uld_hybrid_unmatched_weight=1.0,
)  # fmt: skip


def rows() -> list[dict]:
    """128 conversations of one question and one answer."""
    return [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": ANSWER}]} for q in QUESTIONS * 16
    ]


def report(seconds: list[float], **more) -> None:
    """The line that `side_by_side` reads."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(dict(seconds=statistics.median(seconds), peak_gb=peak, **more)))


def ours(assets: str, mode: str, steps: int, loss: str) -> None:
    """This project's step, from the start of one update to the start of the next."""
    from rich.console import Console

    from gold_jax import GOLDConfig, GOLDTrainer
    from gold_jax.training.step import Step

    student, teacher = f"{assets}/smollm2-135m-gpt2tok", f"{assets}/smollm2-135m-instruct"
    with tempfile.TemporaryDirectory() as folder:
        args = GOLDConfig(**SETTINGS, output_dir=folder, max_steps=steps + 1, lmbda=float(mode == "on"), loss=loss)
        trainer = GOLDTrainer(student, teacher, args, rows(), console=Console(quiet=True))
        starts, compiled, update = [], [], Step.__call__

        def timed(step, *arguments):
            starts.append(time.perf_counter())
            found = update(step, *arguments)
            compiled.append(step.compiled)
            return found

        Step.__call__ = timed
        trainer.train()
    seconds = [b - a for a, b in zip(starts, starts[1:])]
    usual = [s for k, s in enumerate(seconds) if k >= 2 and compiled[k] == compiled[k - 1]]
    losses = [line["loss"] for line in trainer.log_history if "loss" in line]
    report(usual, steps=seconds, losses=losses, compiled=compiled[-1])


def peer(assets: str, mode: str, steps: int) -> None:
    """TRL's step."""
    import os

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    student, teacher = f"{assets}/smollm2-135m-gpt2tok", f"{assets}/smollm2-135m-instruct"
    seconds = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.start)

    float32 = {"dtype": "float32"}
    with tempfile.TemporaryDirectory() as folder:
        args = GOLDConfig(
            **SETTINGS, output_dir=folder, max_steps=steps, lmbda=float(mode == "on"), use_uld_loss=True,
            uld_use_hybrid_loss=True, uld_token_merge_strategy="bayesian", teacher_tokenizer_name_or_path=teacher,
            teacher_model_name_or_path=teacher, report_to=[], use_cpu=True, bf16=False, fp16=False,
            model_init_kwargs=float32, teacher_model_init_kwargs=float32, disable_tqdm=True,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(student)
        data = Dataset.from_list(rows())
        trainer = GOLDTrainer(
            model=student, teacher_model=teacher, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()]
        )  # fmt: skip
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    report(seconds[2:], steps=seconds, losses=losses)


def main() -> None:
    """Alternates, or is one of the sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets")
    parser.add_argument("--peer_python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--modes", nargs="+", default=["off", "on"], choices=["off", "on"])
    parser.add_argument("--losses", nargs="+", default=["gold"])
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side == "peer":
        return peer(args.assets, args.modes[0], args.steps)
    if args.side:
        return ours(args.assets, args.modes[0], args.steps, args.side)
    from side_by_side import alternate, table

    for mode in args.modes:
        tail = [__file__, args.assets, "--modes", mode, "--steps", str(args.steps), "--side"]
        commands = {"TRL": [args.peer_python, *tail, "peer"]}
        commands |= {loss: [sys.executable, *tail, loss] for loss in args.losses}
        print(f"\nA step, {mode}-policy:\n\n{table(alternate(commands, args.rounds), 'TRL')}", flush=True)


if __name__ == "__main__":
    main()
