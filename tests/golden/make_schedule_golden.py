"""Writes schedules.json: learning rates of transformers' schedules, step by step (needs torch and transformers)."""

import json
import math
import pathlib

import torch
from transformers import get_scheduler

CASES = [
    {"kind": "linear", "peak": 2e-5, "steps": 20, "warmup_ratio": 0.0, "options": {}},
    {"kind": "linear", "peak": 2e-5, "steps": 23, "warmup_ratio": 0.07, "options": {}},
    {"kind": "cosine", "peak": 1e-3, "steps": 17, "warmup_ratio": 0.1, "options": {}},
    {"kind": "cosine", "peak": 1e-3, "steps": 30, "warmup_ratio": 0.0, "options": {"num_cycles": 1.5}},
    {"kind": "cosine_with_min_lr", "peak": 1e-7, "steps": 100, "warmup_ratio": 0.05, "options": {"min_lr_rate": 0.1}},
    {"kind": "cosine_with_min_lr", "peak": 1e-4, "steps": 40, "warmup_ratio": 0.2, "options": {"min_lr": 3e-5}},
    {"kind": "constant", "peak": 5e-5, "steps": 10, "warmup_ratio": 0.3, "options": {}},
    {"kind": "constant_with_warmup", "peak": 5e-5, "steps": 10, "warmup_ratio": 0.25, "options": {}},
    {"kind": "cosine_with_restarts", "peak": 1e-3, "steps": 21, "warmup_ratio": 0.0, "options": {"num_cycles": 3}},
    {"kind": "cosine_with_restarts", "peak": 1e-3, "steps": 20, "warmup_ratio": 0.2, "options": {}},
    {"kind": "polynomial", "peak": 1e-4, "steps": 20, "warmup_ratio": 0.1, "options": {}},
    {"kind": "polynomial", "peak": 1e-4, "steps": 20, "warmup_ratio": 0.0, "options": {"lr_end": 1e-5, "power": 2.5}},
    {"kind": "inverse_sqrt", "peak": 1e-4, "steps": 20, "warmup_ratio": 0.2, "options": {}},
    {"kind": "inverse_sqrt", "peak": 1e-4, "steps": 20, "warmup_ratio": 0.2, "options": {"timescale": 9}},
    {"kind": "inverse_sqrt", "peak": 1e-4, "steps": 20, "warmup_ratio": 0.0, "options": {}},
    {
        "kind": "cosine_warmup_with_min_lr",
        "peak": 1e-4,
        "steps": 20,
        "warmup_ratio": 0.2,
        "options": {"min_lr_rate": 0.2},
    },
    {
        "kind": "cosine_warmup_with_min_lr",
        "peak": 1e-4,
        "steps": 20,
        "warmup_ratio": 0.25,
        "options": {"min_lr": 2e-5, "warmup_lr_rate": 0.1, "num_cycles": 1.5},
    },
    {"kind": "warmup_stable_decay", "peak": 1e-4, "steps": 20, "warmup_ratio": 0.2, "options": {"num_decay_steps": 6}},
    {
        "kind": "warmup_stable_decay",
        "peak": 1e-4,
        "steps": 20,
        "warmup_ratio": 0.25,
        "options": {
            "num_decay_steps": 6,
            "num_stable_steps": 5,
            "warmup_type": "cosine",
            "decay_type": "1-sqrt",
            "min_lr_ratio": 0.1,
        },
    },
    {
        "kind": "warmup_stable_decay",
        "peak": 1e-4,
        "steps": 20,
        "warmup_ratio": 0.25,
        "options": {"num_decay_steps": 7, "warmup_type": "1-sqrt", "decay_type": "linear", "min_lr_ratio": 0.2},
    },
]


def rates(case: dict) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=case["peak"])
    schedule = get_scheduler(
        case["kind"],
        optimizer,
        num_warmup_steps=math.ceil(case["steps"] * case["warmup_ratio"]),
        num_training_steps=case["steps"],
        scheduler_specific_kwargs=case["options"],
    )
    found = []
    for _ in range(case["steps"] + 1):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


if __name__ == "__main__":
    path = pathlib.Path(__file__).with_name("schedules.json")
    lines = [json.dumps({**case, "rates": rates(case)}) for case in CASES]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")
