"""What is drawn on meshes of eight devices against one device: prints how many completions of each mesh differ, and scores.

XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu python tests/sharding/sampling_on_eight_devices.py
"""

import json
import pathlib
import re
import sys
import tempfile

import jax
import numpy as np
from flax import nnx

sys.path[:0] = [str(pathlib.Path(__file__).parents[1]), str(pathlib.Path(__file__).parents[2])]

from models import tiny  # noqa: E402
from training.small import V, decoder  # noqa: E402

from gold_jax.models.functional import split  # noqa: E402
from gold_jax.models.hf_checkpoint import load_model  # noqa: E402
from gold_jax.rollout import decode_state as device  # noqa: E402
from gold_jax.rollout import sampler  # noqa: E402
from gold_jax.rollout.agreement import own_logprobs  # noqa: E402
from gold_jax.rollout.sampler import SamplingEngine  # noqa: E402
from gold_jax.sharding.axes import mesh_sizes  # noqa: E402
from gold_jax.sharding.placement import Placement, make_mesh  # noqa: E402
from gold_jax.values import QUANTIZATIONS  # noqa: E402

MESHES = ("data=8", "fsdp"), ("fsdp=8", "full"), ("fsdp=4,tensor=2", "fsdp"), ("data=2,fsdp=2,tensor=2", "full")


def main():
    jax.config.update("jax_disable_most_optimizations", True)
    sampler.SMALL_MODEL = 0  # rows join and leave as those of large models do
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, V, int(rng.integers(1, 40))).astype(np.int32) for _ in range(37)]
    options = dict(max_new_tokens=40, key=jax.random.key(3), temperature=0.8, top_k=30, top_p=0.95, stop_ids=[7, 11])
    model = decoder(V, 1)

    def drawn(model, rows, quantization="none"):
        return SamplingEngine(rows, quantization).generate(nnx.split(model), prompts, **options)

    expected, rounded = drawn(model, 16), {how: drawn(model, 16, how) for how in QUANTIZATIONS[1:]}
    texts = [prompt for prompt in prompts if len(prompt) > 1][:3]
    scored = own_logprobs(model, texts, 48)
    found = {}
    for text, layout in MESHES:
        placed = model.shard(Placement(make_mesh(mesh_sizes(text, 8)), layout))
        ours = drawn(placed, 15)  # not a multiple of the shards: a few more are written at once
        same = [np.array_equal(a.ids, b.ids) for a, b in zip(expected, ours)]
        gaps = [
            np.abs(a.logprobs - b.logprobs).max() for a, b, equal in zip(expected, ours, same) if equal and len(a.ids)
        ]
        if layout == "full":
            for how, alone in rounded.items():
                same += [np.array_equal(a.ids, b.ids) for a, b in zip(alone, drawn(placed, 15, how))]
        gaps.append(np.abs(own_logprobs(placed, texts, 48) - scored).max())
        found[f"{text} {layout}"] = {"differ": len(same) - sum(same), "logprobs": float(max(gaps))}
    found |= families(options | {"max_new_tokens": 16})
    lengths = [len(d.ids) for d in expected]
    with jax.transfer_guard("disallow"):  # no weight goes through the host
        weights = model.shard(Placement(make_mesh(mesh_sizes("fsdp=8", 8)), "full")).decoding_weights("int8")
    devices = min(len(x.sharding.device_set) for x in jax.tree.leaves(weights))
    print(
        json.dumps(
            {
                "devices": devices,
                "gathered": gathered_while_decoding(model),
                "meshes": found,
                "lengths": [min(lengths), max(lengths)],
                "distinct": len(set(lengths)),
            }
        )
    )


def families(options) -> dict[str, dict]:
    """The same of models that norm all heads together, rotate some channels or layers alone, or scale what layers add."""
    rng, found = np.random.default_rng(0), {}
    prompts = [rng.integers(0, 40, int(rng.integers(2, 16))).astype(np.int32) for _ in range(12)]
    placement = Placement(make_mesh(mesh_sizes("data=2,fsdp=2,tensor=2", 8)), "full")
    for name in ("olmo2", "phi3_longrope", "smollm3_window", "granite_biases"):
        with tempfile.TemporaryDirectory() as folder:
            model = load_model(tiny.write_folder(name, pathlib.Path(folder)))
        placed = model.shard(placement)
        drawn = [SamplingEngine(8).generate(nnx.split(x), prompts, **options) for x in (model, placed)]
        differ = sum(not np.array_equal(a.ids, b.ids) for a, b in zip(*drawn))
        alone, together = (own_logprobs(x, prompts[:3], 32) for x in (model, placed))
        found[name] = {"differ": differ, "logprobs": float(np.abs(alone - together).max())}
    return found


def gathered_while_decoding(model) -> list[str]:
    """The all-gathers that eight devices make for every token, each with its own rows."""
    model = model.shard(Placement(make_mesh(mesh_sizes("data=8", 8)), "fsdp"))
    sizes = {"rows": 32, "slots": 64, "new": 40}
    slots = device.empty_slots(
        jax.random.key(0), config=model.config, dtype=model.dtype, placement=model.placement, **sizes
    )
    options = device.SamplingOptions(*device.sampling_filters(0.8, 0, 0.9), np.full(8, -1, np.int32), np.int32(40))
    limits = np.int32(8), np.int32(0), np.int32(0)
    lowered = device.decode_until.lower(*split(model), model.decoding_weights(), *slots, options, *limits)
    loops = lowered.compile().as_text().split("ENTRY")[0]
    return re.findall(r"= (.*) all-gather(?:-start)?\(", loops)


if __name__ == "__main__":
    main()
