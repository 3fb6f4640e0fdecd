"""Memory and MFU, where a device tells of them."""

import types

import jax
import pytest
from training.small import V, W, decoder

from gold_jax import SFTConfig, SFTTrainer
from gold_jax.accelerators import GPUS, TPUS
from gold_jax.models.functional import count, split
from gold_jax.training import utilization

ROWS = [{"prompt": f"{n}", "completion": f" {n + 1}"} for n in range(4)]


def test_a_token_costs_six_for_a_parameter_of_the_student_and_two_for_one_of_the_teacher():
    student, teacher = decoder(V, 1), decoder(W, 2, tied=False)
    sizes = [count(split(model)[1]) for model in (student, teacher)]
    assert utilization.training_flops(student, None) == 6 * sizes[0]
    assert utilization.training_flops(student, teacher) == 6 * sizes[0] + 2 * (sizes[1] - W * 16)


@pytest.mark.parametrize(
    "kind, chip",
    [
        ("TPU v5 lite", TPUS["v5e"]),
        ("TPU v5", TPUS["v5p"]),
        ("TPU v6 lite", TPUS["v6e"]),
        ("NVIDIA H100 80GB HBM3", GPUS["h100-80gb"]),
        ("NVIDIA L4", GPUS["l4-24gb"]),
        ("NVIDIA H100 PCIe", None),  # another card than that of plans
        ("cpu", None),
    ],
)
def test_peaks_are_those_that_plans_have(kind, chip, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert utilization.peak_flops() == (None if chip is None else pytest.approx(4 * chip.flops, rel=2e-3))


def test_a_line_has_mfu_and_memory_where_they_are_known(world, tmp_path, monkeypatch):
    def logged():
        trainer = SFTTrainer(str(world / "student"), SFTConfig(output_dir=tmp_path, max_steps=1), ROWS)
        trainer.train()
        return trainer.log_history[-1], trainer.loop.run.flops

    row, _ = logged()
    assert "mfu" not in row and "memory_gib" not in row  # a CPU
    monkeypatch.setattr("gold_jax.training.utilization.peak_flops", lambda: 1e12)
    monkeypatch.setattr("gold_jax.training.utilization.peak_memory", lambda: 3 * 2**29)
    row, flops = logged()
    assert row["mfu"] == pytest.approx(flops * row["tokens_per_second"] / 1e12) and row["memory_gib"] == 1.5
