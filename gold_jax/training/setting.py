"""Where a run is computed: its mesh, the rows of each process, and the server that writes its completions."""

import os
import pathlib

import jax

from gold_jax.config import GOLDConfig
from gold_jax.distributed import consensus
from gold_jax.rollout.server import ServerEngine
from gold_jax.sharding.mesh import make_mesh, mesh_sizes
from gold_jax.sharding.placement import Placement
from gold_jax.text.process_shard import ProcessShard


def place_run(mesh: str | None, layout: str = "fsdp") -> Placement | None:
    """The mesh over all devices that a run is spread over; None where there is one device.

    Raises:
        ValueError: as `mesh_sizes`.
    """
    sizes = mesh_sizes(mesh, jax.device_count())
    return None if jax.device_count() == 1 else Placement(make_mesh(sizes), layout)


def process_shard_of(placement: Placement | None) -> ProcessShard:
    """Which rows this process makes."""
    if placement is None:
        return ProcessShard()
    if jax.process_count() == 1:
        return ProcessShard.single_process(placement.row_shards)
    owner, local_shards = placement.row_owners()
    exchange = consensus.all_reduce_sum, consensus.all_reduce_max, consensus.all_gather_ragged
    return ProcessShard(owner, local_shards, jax.process_index(), *exchange)


def completion_server(args: GOLDConfig, vocab_size: int, dtype: str) -> tuple[ServerEngine | None, list[str]]:
    """The server that writes for the student, found to be there, or None for the built-in sampler; and notices.

    Raises:
        ServerError: it is not there, or its window is too short.
        ValueError: the run has several processes.
    """
    if args.server_url is None:
        return None, []
    if args.lmbda == 0:
        return None, ["--use_vllm: no effect with --lmbda 0, where the student writes nothing"]
    if jax.process_count() > 1:
        raise ValueError(
            "--use_vllm --vllm_mode server takes a run of one process, and this one has several; leave it out, and the built-in "
            "sampler writes the completions on all devices."
        )
    engine = ServerEngine(
        args.server_url,
        args.rollout_weights_dir or pathlib.Path(args.output_dir) / ".rollout_weights",
        kind=args.rollout_server,
        vocab_size=vocab_size,
        timeout=args.vllm_server_timeout,
        sync_every=args.vllm_sync_frequency,
        sync_first=args.rollout_sync_first,
        dtype=dtype,
        api_key=os.environ.get("VLLM_API_KEY"),
    )
    engine.check(args.prompt_budget + args.max_completion_length)
    return engine, []
