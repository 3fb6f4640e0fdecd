"""The quickstart with several seeds and losses: the metrics of every 20th update, and their chart.

    python benchmarks/quickstart.py [--losses gold events] [--seeds 42 1 2]     # measures, then draws
    python benchmarks/quickstart.py --draw                                       # only draws

Writes results/quickstart.json and ../docs/quickstart.svg. Drawing needs matplotlib.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
RESULTS, CHART = HERE / "results" / "quickstart.json", HERE.parent / "docs" / "quickstart.svg"
COLORS = {"gold": "#c98500", "events": "#2a78b5"}  # distinguishable with colour blindness, on white and on black


def measure(loss: str, seed: int) -> dict:
    """Updates, exact match and bits per byte of one run, and the results in its summary."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gold_jax.train", "--config", str(HERE.parent / "configs/quickstart.yaml")]
        command += ["--output_dir", folder, "--loss", loss, "--seed", str(seed), "--log_completions", "false"]
        command += ["--eval_strategy", "steps", "--eval_steps", "20"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in pathlib.Path(folder, "metrics.jsonl").read_text().splitlines()]
        results = json.loads(pathlib.Path(folder, "summary.json").read_text())["results"]
    found = {line["step"]: line for line in lines if "eval_exact_match" in line}
    names = {"exact_match": "eval_exact_match", "bits_per_byte": "eval_bits_per_byte"}
    curves = {name: [line[key] for line in found.values()] for name, key in names.items()}
    return {"loss": loss, "seed": seed, "step": [*found], **curves, "results": results}


def draw(runs: list[dict]) -> None:
    """Exact match over updates: a line for each seed, thin, and their mean."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    # Text as text, and no date or random ids: the same figures give the same file.
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "quickstart", "font.family": "sans-serif"})
    gray = "#808080"
    figure, axes = plt.subplots(figsize=(7.2, 2.7), layout="constrained")
    for loss in dict.fromkeys(run["loss"] for run in runs):
        of_loss = [run for run in runs if run["loss"] == loss]
        for run in of_loss:
            axes.plot(run["step"], run["exact_match"], color=COLORS.get(loss), linewidth=0.8, alpha=0.45)
        mean = [sum(values) / len(of_loss) for values in zip(*(run["exact_match"] for run in of_loss))]
        axes.plot(of_loss[0]["step"], mean, color=COLORS.get(loss), linewidth=2.2)
        text = f"--loss {loss}, mean of {len(of_loss)} seeds"
        axes.annotate(text, (200, mean[-1]), (204, mean[-1]), va="center", color=COLORS.get(loss), fontsize=9)
    axes.axhline(1.0, color=gray, linestyle="--", linewidth=1)
    axes.annotate("teacher", (200, 1.0), (204, 1.0), va="center", color=gray, fontsize=9)
    axes.set(xlim=(0, 200), ylim=(-0.03, 1.05), xlabel="updates of 16 rows", ylabel="right answers of 200")
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    for part in [axes.xaxis, axes.yaxis]:
        part.label.set_color(gray)
    axes.tick_params(colors=gray)
    for spine in axes.spines.values():
        spine.set_color(gray)
    figure.savefig(CHART, transparent=True, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", default=["gold", "events"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 1, 2])
    parser.add_argument("--draw", action="store_true")
    args = parser.parse_args()
    if not args.draw:
        runs = []
        for loss in args.losses:
            for seed in args.seeds:
                runs.append(measure(loss, seed))
                print(loss, seed, runs[-1]["exact_match"], flush=True)
                RESULTS.write_text(json.dumps(runs, indent=1) + "\n")
    draw(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
