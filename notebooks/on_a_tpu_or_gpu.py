# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # On a TPU or a GPU
#
# What to set before JAX is imported, how to see what JAX runs on, how to plan a run before anything is rented, and the
# flags of a training call. On a machine without an accelerator all of it runs on the CPU.

# %%
import glob
import importlib.util
import os
import shutil
import subprocess
import sys

from IPython import get_ipython

extra = ""
if os.environ.get("JAX_PLATFORMS") != "cpu":
    tpu = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/*")
    extra = "cuda12" if shutil.which("nvidia-smi") else "tpu" if tpu else ""
plugin = {"cuda12": "jax_cuda12_plugin", "tpu": "libtpu", "": "jax"}[extra]
if importlib.util.find_spec("gold_jax") is None or importlib.util.find_spec(plugin) is None:
    wanted = ",".join(filter(None, ("notebooks", extra)))
    print("Installing gold_jax from this checkout, which takes a minute or two ...")
    get_ipython().run_line_magic("pip", f"install --quiet '..[{wanted}]'")
found = {"cuda12": "an NVIDIA GPU", "tpu": "a TPU", "": "no accelerator: JAX runs on the CPU"}
print("This machine has", found[extra])
if "jax" in sys.modules and extra and sys.modules["jax"].default_backend() == "cpu":
    print("JAX is imported and runs on the CPU: restart the kernel and run this cell first")

# %% [markdown]
# ## Before JAX is imported
#
# On a GPU JAX takes 75 % of the memory when it starts. For training let it take more; for sharing a card with another
# program let it take what it needs, when it needs it, which is slower and can fragment memory. TPUs ignore both.

# %%
os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.92"
# os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # a shared card

# %% [markdown]
# Compiling is most of a short run. With JAX's cache the second run of this notebook starts at once. The commands keep
# one by themselves; a notebook asks for it.

# %%
import importlib.metadata

import jax

import gold_jax

if not jax.config.jax_compilation_cache_dir:  # $JAX_COMPILATION_CACHE_DIR
    folder = os.path.expanduser("~/.cache/gold_jax/notebooks")
    jax.config.update("jax_compilation_cache_dir", folder)

# %% [markdown]
# ## What JAX runs on

# %%
print("backend ", jax.default_backend())
for device in jax.devices():
    memory = device.memory_stats() or {}  # a CPU tells nothing
    limit = f", {memory['bytes_limit'] / 2**30:.1f} GiB for JAX" if "bytes_limit" in memory else ""
    print(f"device   {device.id}: {device.device_kind}{limit}")
for name in ("jax", "jaxlib", "flax", "gold_jax"):
    print(f"{name:8} {importlib.metadata.version(name)}")

# %% [markdown]
# ## Does it fit?
#
# `gold_jax.plan` takes the flags of a run and says what it would take of devices that are not here: memory at its peak,
# a lower bound for the time of an update, and what to change. It compiles the run's own programs where the compiler for
# the device is installed (`gold_jax[tpu]`, `gold_jax[plan-cuda]`; some minutes), and counts by formula where it is not.

# %%
plan = """
  --model_name_or_path meta-llama/Llama-3.2-1B-Instruct
  --teacher_model_name_or_path Qwen/Qwen3-4B-Instruct-2507
  --matched 109566 --lmbda 0.5 --max_length 1024 --max_new_tokens 512 --per_device_train_batch_size 4
  --gradient_checkpointing --topology gpu:h100
"""
command = [sys.executable, "-m", "gold_jax.plan", *plan.split()]
done = subprocess.run(command, capture_output=True, text=True)
print(done.stdout if done.returncode == 0 else done.stderr)

# %% [markdown]
# ## Train
#
# On a CPU `bf16` is off by default, because it is no faster there, and programs take other routes (plain attention,
# vocabularies sorted on the host); the losses are the same up to rounding.

# %%
on_accelerator = jax.default_backend() != "cpu"
config = gold_jax.GOLDConfig(
    output_dir="runs/accelerator",
    loss="gold",
    beta=0.0,
    lmbda=0.5,
    bf16=on_accelerator,  # compute; parameters and optimizer stay float32
    gradient_checkpointing=on_accelerator,  # for memory: layers are computed again in the backward pass
    per_device_train_batch_size=64 if on_accelerator else 16,
    max_steps=200 if on_accelerator else 20,
    learning_rate=2e-3,
    warmup_steps=5,
    adam_beta2=0.99,
    max_length=64,
    max_completion_length=24,
    length_buckets=1,  # few padded shapes, few compilations
    logging_steps=5,
    save_strategy="no",
)
trainer = gold_jax.GOLDTrainer("embedded:student", "embedded:teacher", config, "embedded:task")
result = trainer.train()

# %%
for device in jax.devices():
    memory = device.memory_stats() or {}
    peak = f"{memory['peak_bytes_in_use'] / 2**30:.2f} GiB" if memory else "not known of a CPU"
    print(f"{device.device_kind}: memory at the peak {peak}")

# %% [markdown]
# Several devices: `mesh="fsdp:8"` and the like, see [many devices](../docs/distributed.md) and [TPU VMs](../docs/tpu.md).
# Where the time goes: [profiling](../docs/profiling.md).
