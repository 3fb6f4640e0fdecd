"""The host's work for an off-policy batch beside TRL's: encode both sides, align, pad.

    python benchmarks/host.py ASSETS TEXT_FILE... --peer_python PYTHON [--rounds 5]

Student tokens are Llama 3.2's, teacher tokens Qwen 3's; texts are cut into pieces of 2,000 characters. Figures are student
tokens a second: `whole` is all of it (TRL: encoding with byte offsets and groups, without padding), `groups` the alignment
alone with spans given, `bare` the tokenizers' `encode_batch` with nothing around it.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

FIGURES = "whole", "groups", "bare"


def texts(files: list[str]) -> list[str]:
    """All files, cut."""
    text = "\n".join(pathlib.Path(file).read_text(encoding="utf-8") for file in files)
    return [text[i : i + 2000] for i in range(0, len(text), 2000)]


def tokenizers(assets: str) -> list:
    """The student's and the teacher's."""
    from transformers import AutoTokenizer

    return [AutoTokenizer.from_pretrained(f"{assets}/tokenizers/{name}") for name in ("llama3_2", "qwen3")]


def seconds(work) -> tuple[float, object]:
    """The median of three calls after the first, and what it returned."""
    work()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        found = work()
        times.append(time.perf_counter() - start)
    return statistics.median(times), found


def report(tokens: int, whole: float, groups: float, bare: float) -> None:
    """The line that is read."""
    print(json.dumps({"whole": tokens / whole, "groups": tokens / groups, "bare": tokens / bare}))


def ours(assets: str, pieces: list[str]) -> None:
    """This project's."""
    import numpy as np

    from gold_jax.text.align import groups_of
    from gold_jax.text.batch import Row, SideTokens, build_batches
    from gold_jax.text.encode import PlainEncoder

    backends = tokenizers(assets)
    encoders = [PlainEncoder(tokenizer) for tokenizer in backends]
    prompt = np.zeros(1, np.int32)

    def encode():
        return [encoder.encode(pieces) for encoder in encoders]

    def align(sides):
        return groups_of(*([x.spans[:, 1] for x in side] for side in sides))

    def all_of_it():
        sides = encode()
        rows = [
            Row(SideTokens(prompt, a.ids, s), SideTokens(prompt, b.ids, t), count, "", True)
            for a, b, (s, t, count) in zip(*sides, align(sides))
        ]
        build_batches(rows, 32, merge="chain", groups="all")
        return sides

    whole, sides = seconds(all_of_it)
    groups, _ = seconds(lambda: align(sides))
    bare, _ = seconds(lambda: [t.backend_tokenizer.encode_batch(pieces, add_special_tokens=False) for t in backends])
    report(sum(len(x.ids) for x in sides[0]), whole, groups, bare)


def peer(assets: str, pieces: list[str]) -> None:
    """TRL's."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gold.gold_trainer import ULDLoss
    from trl.experimental.utils import encode_with_byte_offsets

    backends = [tokenizer.backend_tokenizer for tokenizer in tokenizers(assets)]

    def encode():
        return [encode_with_byte_offsets(backend, pieces) for backend in backends]

    def align(sides):
        return [ULDLoss._align_by_byte_offsets(a[1], b[1]) for a, b in zip(*sides)]

    whole, _ = seconds(lambda: align(encode()))
    sides = encode()
    groups, _ = seconds(lambda: align(sides))
    bare, _ = seconds(lambda: [backend.encode_batch(pieces, add_special_tokens=False) for backend in backends])
    report(sum(len(ids) for ids, _ in sides[0]), whole, groups, bare)


def main() -> None:
    """Alternates, or is one of the sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--peer_python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=["ours", "peer"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return {"ours": ours, "peer": peer}[args.side](args.assets, texts(args.files))
    from side_by_side import alternate

    tail = [__file__, args.assets, *args.files, "--side"]
    found = alternate({"TRL": [args.peer_python, *tail, "peer"], "ours": [sys.executable, *tail, "ours"]}, args.rounds)
    print(
        "| million student tokens a second: median (least to most) | "
        + " | ".join(FIGURES)
        + " |\n| --- | --- | --- | --- |"
    )
    for name, runs in found.items():
        cells = []
        for figure in FIGURES:
            values = sorted(run[figure] / 1e6 for run in runs)
            cells.append(f"{statistics.median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})")
        print(f"| {name} | " + " | ".join(cells) + " |")
    ratios = [
        statistics.median(r[f] for r in found["ours"]) / statistics.median(r[f] for r in found["TRL"]) for f in FIGURES
    ]
    print("| times as fast | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


if __name__ == "__main__":
    main()
