"""What a run takes of each chip as slices grow: `gold_jax.plan` on one slice after the other, rows per chip unchanged.

    python benchmarks/scaling.py [--slices v5e:2x4 v5e:4x4 …] [--meshes fsdp=8 fsdp=16 …] [-- FLAGS OF gold_jax.plan]

Nothing runs on an accelerator: programs are compiled by the TPU compiler, times are rooflines.
"""

import argparse
import json
import subprocess
import sys

SLICES = {
    "v5e:2x4": "fsdp=8",
    "v5e:4x4": "fsdp=16",
    "v5e:4x8": "data=2,fsdp=16",
    "v5e:8x8": "data=4,fsdp=16",
    "v5e:8x16": "data=8,fsdp=16",
    "v5e:16x16": "data=16,fsdp=16",
}
CONFIG = "configs/plan_llama1b_from_qwen4b.yaml"
GIB = 2**30


def planned(topology: str, mesh: str, flags: list[str]) -> dict:
    """What the plan of one slice says."""
    command = [sys.executable, "-m", "gold_jax.plan", "--topology", topology, "--mesh", mesh, "--json", *flags]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def row(topology: str, mesh: str, plan: dict) -> str:
    """One line of the table."""
    memory, time = plan["memory"], plan["time"]
    phases = {phase["name"]: phase for phase in time["phases"]}
    learning = [phases[name] for name in ("teacher", "student") if name in phases]
    sent = sum(sum(phase["sent"].values()) for phase in learning)
    links, least = sum(phase["seconds"]["interconnect"] for phase in learning), sum(p["least"] for p in learning)
    return (
        f"| {topology} | {mesh} | {memory['peak_bytes'] / GIB:.2f} of {memory['limit_bytes'] / GIB:.2f} | {sent / GIB:.2f} "
        f"| {links / least:.0%} | {time['tokens_per_second_per_chip']:,.0f} | {plan['compile_seconds']:.0f} s |"
    )


def main() -> None:
    """Plans and prints."""
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", nargs="+", default=list(SLICES))
    parser.add_argument("--meshes", nargs="+")
    args = parser.parse_args(argv[:cut])
    meshes = args.meshes or [SLICES.get(name, "auto") for name in args.slices]
    print(
        "| slice | mesh | GiB of a chip at the fullest | GiB sent by a chip in teacher's and student's step | links' time, share of "
        "those steps' least | tokens/s and chip, at most, sampling included | compiling |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for topology, mesh in zip(args.slices, meshes, strict=True):
        plan = planned(topology, mesh, argv[cut + 1 :] or ["--config", CONFIG])
        print(row(topology, mesh, plan), flush=True)


if __name__ == "__main__":
    main()
