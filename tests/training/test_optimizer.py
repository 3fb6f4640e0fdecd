import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gold_jax.config import SFTConfig
from gold_jax.training.optimizer import decay_mask, make_optimizer, make_schedule

CASES = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "schedules.json").read_text())


def settings_of(case):
    return SFTConfig(
        lr_scheduler_type=case["kind"],
        learning_rate=case["peak"],
        warmup_ratio=case["warmup_ratio"],
        lr_scheduler_kwargs=case["options"],
    )


@pytest.mark.parametrize("case", CASES, ids=[f"{case['kind']}-{i}" for i, case in enumerate(CASES)])
def test_a_schedule_is_transformers_s_at_every_step(case):
    schedule = jax.jit(make_schedule(settings_of(case), case["steps"]))
    rates = [float(schedule(step)) for step in range(case["steps"] + 1)]
    np.testing.assert_allclose(rates, case["rates"], rtol=1e-5, atol=2e-7 * case["peak"])


def test_the_floor_is_a_tenth_of_the_peak_where_none_is_given():
    schedule = make_schedule(SFTConfig(lr_scheduler_type="cosine_with_min_lr", learning_rate=1e-3), 10)
    assert float(schedule(10)) == pytest.approx(1e-4)


@pytest.mark.parametrize(
    "kind, options, says",
    [
        ("polynomial", {"lr_end": 1e-3}, "ends at lr_end 0.001 .* must be below --learning_rate 0.001"),
        ("warmup_stable_decay", {}, "needs num_decay_steps"),
        ("warmup_stable_decay", {"num_decay_steps": 1, "decay_type": "x"}, "decay_type='x'; it must be one of linear"),
        ("inverse_sqrt", {"timescale": 0}, "timescale=0; it must be greater than 0"),
    ],
)
def test_a_schedule_without_what_it_needs_is_refused(kind, options, says):
    with pytest.raises(ValueError, match=says):
        SFTConfig(learning_rate=1e-3, lr_scheduler_type=kind, lr_scheduler_kwargs=options)


def adamw_reference(params, gradients, rates, *, b1, b2, eps, decay, clip, undecayed):
    """AdamW written from its formula, in float64; the gradients are clipped by their global norm first."""
    params = {name: np.asarray(p, np.float64) for name, p in params.items()}
    m = {name: np.zeros_like(p) for name, p in params.items()}
    v = {name: np.zeros_like(p) for name, p in params.items()}
    for t, (gradient, rate) in enumerate(zip(gradients, rates), start=1):
        norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in gradient.values()))
        scale = min(1.0, clip / norm) if clip else 1.0
        for name in params:
            g = np.asarray(gradient[name], np.float64) * scale
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g * g
            step = (m[name] / (1 - b1**t)) / (np.sqrt(v[name] / (1 - b2**t)) + eps)
            params[name] = params[name] - rate * (step + (0.0 if name in undecayed else decay) * params[name])
    return params


def run(settings, params, gradients):
    optimizer = make_optimizer(settings, len(gradients))
    params = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def problem(steps=12):
    rng = np.random.default_rng(0)
    shapes = {"embedding": (5, 3), "query": (3, 4), "query_bias": (4,), "final_norm": (3,)}
    draw = lambda scale: {n: (scale * rng.normal(size=s)).astype(np.float32) for n, s in shapes.items()}  # noqa: E731
    return draw(1.0), [draw(10.0 ** rng.integers(-6, 2)) for _ in range(steps)]


@pytest.mark.parametrize("clip", [0.5, 0.0, None])
def test_adamw_is_its_formula_with_clipping_and_without_decay_of_norms_and_biases(clip):
    params, gradients = problem()
    settings = SFTConfig(
        **dict(learning_rate=1e-2, weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-4),
        **dict(max_grad_norm=clip, warmup_steps=3, lr_scheduler_type="cosine"),
    )
    schedule = make_schedule(settings, len(gradients))
    expected = adamw_reference(
        *(params, gradients, [float(schedule(step)) for step in range(len(gradients))]),
        **dict(b1=0.8, b2=0.95, eps=1e-4, decay=0.3, clip=clip, undecayed={"query_bias", "final_norm"}),
    )
    found = run(settings, params, gradients)
    for name in params:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, atol=2e-6, err_msg=name)


TORCH_SCRIPT = """
import json, sys, torch
spec = json.load(sys.stdin)
params = {n: torch.nn.Parameter(torch.tensor(p)) for n, p in spec["params"].items()}
plain = [p for n, p in params.items() if n in ("query_bias", "final_norm")]
decayed = [p for n, p in params.items() if n not in ("query_bias", "final_norm")]
groups = [{"params": decayed, "weight_decay": 0.3}, {"params": plain, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), eps=1e-4)
for gradient in spec["gradients"]:
    for name, p in params.items():
        p.grad = torch.tensor(gradient[name])
    torch.nn.utils.clip_grad_norm_(params.values(), 0.5)
    optimizer.step()
print(json.dumps({n: p.tolist() for n, p in params.items()}))
"""


@pytest.mark.live
def test_adamw_is_torch_s():
    python = os.environ.get("GOLD_JAX_TRL_PYTHON", sys.executable if importlib.util.find_spec("torch") else None)
    if not python:
        pytest.skip("torch is not installed and GOLD_JAX_TRL_PYTHON does not name a Python that has it")
    params, gradients = problem()
    lists = lambda tree: {name: value.tolist() for name, value in tree.items()}  # noqa: E731
    spec = json.dumps({"params": lists(params), "gradients": [lists(gradient) for gradient in gradients]})
    output = subprocess.run([python, "-c", TORCH_SCRIPT], input=spec, capture_output=True, text=True, check=True).stdout
    settings = SFTConfig(
        **dict(learning_rate=1e-2, weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-4),
        **dict(max_grad_norm=0.5, lr_scheduler_type="constant"),
    )
    found = run(settings, params, gradients)
    for name, expected in json.loads(output.strip().splitlines()[-1]).items():
        np.testing.assert_allclose(found[name], expected, rtol=2e-5, atol=2e-6, err_msg=name)


class Layers(nnx.Module):
    def __init__(self):
        self.query = nnx.Param(jnp.ones((2, 3, 3)))
        self.query_bias = nnx.Param(jnp.ones((2, 3)))
        self.attention_norm = nnx.Param(jnp.ones((2, 3)))


class Model(nnx.Module):
    def __init__(self):
        self.embedding = nnx.Param(jnp.ones((4, 3)), spec=("vocab", "embed"))
        self.layers = Layers()
        self.final_norm = nnx.Param(jnp.ones((3,)))


def test_an_nnx_state_is_updated_and_its_norms_and_biases_do_not_decay():
    params = nnx.state(Model(), nnx.Param)
    mask = nnx.to_flat_state(decay_mask(params))
    decays = {"/".join(path): jax.tree.leaves(leaf)[0] for path, leaf in mask}
    assert decays == {
        **{"embedding": True, "final_norm": False, "layers/query": True},
        **{"layers/query_bias": False, "layers/attention_norm": False},
    }
    # without gradients only the decay moves parameters
    settings = SFTConfig(learning_rate=0.1, weight_decay=0.5, lr_scheduler_type="constant")
    optimizer = make_optimizer(settings, 10)
    gradients = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_allclose(moved["embedding"][...], 0.95)
    np.testing.assert_allclose(moved["layers"]["query"][...], 0.95)
    np.testing.assert_allclose(moved["layers"]["query_bias"][...], 1.0)
    np.testing.assert_allclose(moved["final_norm"][...], 1.0)
