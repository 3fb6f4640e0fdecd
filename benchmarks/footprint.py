"""How near the plan's formula for temporaries comes to what the compiler lays out: student's steps of several runs.

    python benchmarks/footprint.py [--cases NAME …] [--gpus h100-80gb]

Nothing runs on an accelerator. Compiling all of them takes about a quarter of an hour on two cores; with `--gpus` it is for
as many such cards as the case has TPU devices. Printed for each: GiB that the
student's step needs beside its arguments, by the compiler and by the formula, and how far the second is from the first.
"""

import argparse

from gold_jax.planning.hardware import prepare

LONG = dict(lmbda=1.0, beta=0.0, max_prompt_length=512, max_completion_length=2048)
SHORT = dict(lmbda=1.0, max_completion_length=512, max_length=1024)
# name: (topology, mesh, student, teacher, matched entries, settings)
CASES = {
    "1b4b": ("v5e:2x4", "fsdp=8", "meta-llama/Llama-3.2-1B", "Qwen/Qwen3-4B", 109566, LONG | dict(per_device_train_batch_size=4)),
    "1b4b-tensor": ("v5e:2x4", "fsdp=4,tensor=2", "meta-llama/Llama-3.2-1B", "Qwen/Qwen3-4B", 109566, LONG | dict(per_device_train_batch_size=4)),
    "1b4b-micro": ("v5e:2x4", "fsdp=8", "meta-llama/Llama-3.2-1B", "Qwen/Qwen3-4B", 109566, LONG | dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)),
    "q06q17-plain": ("v5e:2x2", "data=2,fsdp=2", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", None, SHORT | dict(gradient_checkpointing=False, per_device_train_batch_size=2)),
    "q06q17-full": ("v5e:2x2", "data=2,fsdp=2", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", None, SHORT | dict(teacher_layout="full", layout="replicated", per_device_train_batch_size=2)),
    "smol": ("v5e:1x1", "auto", "HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-360M", None, SHORT | dict(per_device_train_batch_size=8)),
    "sft1b": ("v5e:2x2", "fsdp=4", "meta-llama/Llama-3.2-1B", None, None, dict(max_length=2048, per_device_train_batch_size=4)),
    "8b32b": ("v5p:2x2x4", "fsdp=16", "Qwen/Qwen3-8B", "Qwen/Qwen3-32B", None, LONG | dict(per_device_train_batch_size=2)),
}  # fmt: skip


def main() -> None:
    """Compiles and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--gpus")
    args = parser.parse_args()
    prepare()
    from gold_jax.accelerators import GIB
    from gold_jax.config import GOLDConfig, SFTConfig
    from gold_jax.planning.analytic import Analytic
    from gold_jax.planning.compiled import compile_plan
    from gold_jax.planning.hardware import read_topology
    from gold_jax.planning.models import known_config
    from gold_jax.planning.plan import STUDENT, Pair, PlanRequest
    from gold_jax.sharding.axes import mesh_sizes

    print("| run | program | compiler, GiB | formula, GiB | formula less compiler |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    for name in args.cases:
        topology, mesh, student, teacher, matched, settings = CASES[name]
        topology = read_topology(topology)
        if args.gpus:
            topology = read_topology(f"gpu:{topology.devices}x{args.gpus}")
        training = (GOLDConfig if teacher else SFTConfig)(output_dir="unused", **settings)
        pair = Pair(known_config(student), teacher and known_config(teacher), matched)
        request = PlanRequest(training, pair, topology, mesh_sizes(mesh, topology.devices), None)
        model = Analytic(request)
        for one in compile_plan(request, leave_out=set(request.programs) - set(STUDENT)).moments:
            found, formula = one["parts"]["temporaries"], sum(model.temporaries(one["program"]).values())
            print(
                f"| {name} | {one['program']} | {found / GIB:.2f} | {formula / GIB:.2f} | {formula / found - 1:+.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
