"""Runs of the train command on the embedded pair, and how far the weights of two of them lie apart.

python runs.py FOLDER JSON makes the runs that a JSON object of names and flags asks for, in a process of its own.
"""

import json
import pathlib
import sys

import numpy as np
from safetensors.numpy import load_file

from gold_jax import train

BASE = {
    "model_name_or_path": "embedded:student",
    "teacher_model_name_or_path": "embedded:teacher",
    "dataset_name": "embedded:task",
    "max_eval_samples": 6,
    "dtype": "float32",
    "loss": "gold",
    "uld_sort": "xla",
    "lmbda": 0.5,
    "temperature": 1.0,
    "top_p": 1.0,
    "max_completion_length": 12,
    "max_length": 48,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 6,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "seed": 7,
}


def run(output: pathlib.Path, **flags) -> dict[str, np.ndarray]:
    """Trains with `BASE` and these flags; returns the weights that it saved."""
    given = BASE | flags | {"output_dir": output}
    train.main([part for name, value in given.items() for part in (f"--{name}", str(value))])
    return load_file(output / "model.safetensors")


def apart(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest difference of two weights, in terms of the largest weight."""
    assert one.keys() == other.keys()
    largest = max(float(np.abs(x).max()) for x in one.values())
    return max(float(np.abs(one[k].astype(np.float64) - other[k]).max()) for k in one) / largest


if __name__ == "__main__":
    folder, cases = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
    for name, flags in cases.items():
        run(folder / name, **flags)
