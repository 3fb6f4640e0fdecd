"""Supervised fine-tuning: what is learned in each mode, cut where it is too long, and what updates make of it."""

import numpy as np
import pytest
from rich.console import Console
from run_files import metrics

from oracle import cases
from oracle import oracle as o

MODES = {"completion": {}, "assistant": {"assistant_only_loss": True}, "all": {"completion_only_loss": False}}
ROWS = [cases.ROWS[0], cases.ROWS[1], cases.ROWS[2], cases.ROWS[3], cases.ROWS[4]]


@pytest.mark.parametrize("max_length", [pytest.param(None, marks=pytest.mark.long), 24])
@pytest.mark.parametrize("learned", MODES)
def test_each_mode_learns_what_it_says_up_to_the_longest_length(learned, max_length, tmp_path):
    from gold_jax import SFTConfig, SFTTrainer

    args = SFTConfig(output_dir=str(tmp_path), max_length=max_length, per_device_eval_batch_size=3, **MODES[learned])
    trainer = SFTTrainer(str(cases.STUDENT), args, ROWS, ROWS, console=Console(quiet=True))
    side, rows = cases.student(), cases.examples(ROWS)
    made = [o.sft_row(side, e, learned, max_length) for e in rows]
    value, accuracy = o.sft_loss(np, side.weights, side.config, made)
    wanted = {"eval_loss": value, "eval_token_accuracy": accuracy, "eval_bits_per_byte": o.bits_per_byte(side, rows)}
    found = trainer.evaluate()
    assert set(found) == set(wanted)
    assert cases.differences(found, wanted) == []


@pytest.mark.long
@pytest.mark.parametrize("learned", MODES)
def test_updates_of_fine_tuning_are_adamw_s(learned, tmp_path):
    from gold_jax import sft

    rows = [
        cases.ROWS[1],
        cases.ROWS[2] | {"teacher_context": None},
        {"messages": [cases.user("So?"), cases.assistant("No.")]},
    ]
    rows = [{"messages": row["messages"]} for row in rows]
    data = cases.write_rows(tmp_path / "rows.jsonl", rows)
    command = ["--model_name_or_path", "embedded:student", "--dataset_name", data, "--output_dir", tmp_path / "run"]
    command += [
        "--per_device_train_batch_size",
        1,
        "--gradient_accumulation_steps",
        2,
        "--max_steps",
        2,
        "--report_to",
        "none",
    ]
    command += [
        "--learning_rate",
        1e-3,
        "--weight_decay",
        0.1,
        "--logging_steps",
        1,
        "--save_strategy",
        "no",
        "--seed",
        3,
    ]
    command += [word for name, value in MODES[learned].items() for word in (f"--{name}", str(value).lower())]
    sft.main([str(word) for word in command])
    side, weights, optimizer = cases.student(), dict(cases.student().weights), o.AdamW(decay=0.1)
    made = [o.sft_row(side, e, learned, 1024) for e in cases.examples(rows)]
    for step, line in enumerate(metrics(tmp_path / "run")):
        chosen = [made[i] for i in o.row_order(3, 2, 3, step)]
        value, accuracy = o.sft_loss(np, weights, side.config, chosen)
        rate = o.learning_rate(step, 2, peak=1e-3)
        gradient = o.gradient_of(lambda xp, w, c=chosen: o.sft_loss(xp, w, side.config, c)[0], weights)
        weights, norm = optimizer.update(weights, gradient, rate)
        wanted = {"loss": value, "token_accuracy": accuracy, "grad_norm": norm, "learning_rate": rate}
        assert cases.differences(line, wanted) == []
    assert step == 1
