"""The meshes that a pair of models can be spread over."""

from collections.abc import Iterator, Mapping

from gold_jax.planning.sizes import Pair

LARGEST_TENSOR = 8  # beyond a host's devices, hidden states would be summed over slow links


def meshes(devices: int, pair: Pair) -> Iterator[dict[str, int]]:
    """Every way to cut so many devices into `data`, `fsdp` and `tensor`, where `tensor` divides heads and inner width of both."""
    tensor = 1
    while tensor <= LARGEST_TENSOR and devices % tensor == 0:
        if all(c.heads % tensor == 0 and c.mlp_width % tensor == 0 for c in filter(None, pair[:2])):
            shards = devices // tensor
            for data in range(1, shards + 1):
                if shards % data == 0:
                    yield {"data": data, "fsdp": shards // data, "tensor": tensor}
        tensor *= 2


def mesh_flag(mesh: Mapping[str, int]) -> str:
    """A mesh as `--mesh` takes it, such as `fsdp=4,tensor=2`."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "auto"
