"""Models read into shards and written again, and what the host held meanwhile: prints what it found.

Arguments: a folder to work in; and, for one of two processes that share a model, its number and the port of the first.
"""

import collections
import contextlib
import json
import math
import pathlib
import sys
import weakref

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors.numpy import load_file as tensors_in

sys.path[:0] = [str(pathlib.Path(__file__).parents[1]), str(pathlib.Path(__file__).parents[2])]

from gold_jax.models import hf_checkpoint  # noqa: E402
from gold_jax.models.decoder import parameters  # noqa: E402
from gold_jax.models.hf_checkpoint import load_model, save_model  # noqa: E402
from gold_jax.models.safetensors_io import TensorFolder  # noqa: E402
from models import tiny  # noqa: E402

INNER = ("heads", "kv_heads", "mlp", "vocab")
LAYOUTS = {  # shape of the mesh, and the axes that each of its two cuts
    "fsdp": ((8, 1), ("embed",), ()),
    "tensor": ((1, 8), (), INNER),
    "both": ((2, 4), ("embed",), INNER),
    "replicated": ((2, 4), (), ()),
    "layers": ((3, 2), ("layers",), ("embed",)),
}
CASES = [("qwen3_biases", layout, "float32") for layout in (*LAYOUTS, "one device")]
CASES += [(name, "both", "float32") for name in ("llama", "qwen2", "gemma3_old", "phi3", "olmo2")]
CASES += [("llama", "both", "bfloat16")]


def sharding_of(layout):
    if layout == "one device":
        return lambda shape, spec: SingleDeviceSharding(jax.devices()[3])
    shape, *cut = LAYOUTS[layout]
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    mesh = Mesh(devices, ("one", "other"), axis_types=(AxisType.Auto,) * 2)
    names = {axis: mesh_axis for mesh_axis, axes in zip(mesh.axis_names, cut) for axis in axes}
    return lambda shape, spec: NamedSharding(mesh, PartitionSpec(*map(names.get, spec)))


class Host:
    """What the host reads from files, fetches from devices, and makes room for."""

    def __init__(self):
        self.reads, self.read, self.largest, self.held = collections.Counter(), 0, 0, 0
        self._made = []

    def _noted(self, array):
        self.largest = max(self.largest, array.nbytes)
        return array

    def _read(self, function, folder, name, index):
        array = function(folder, name, index)
        self.reads[name, *((part.start, part.stop) for part in index)] += 1
        self.read += array.nbytes
        return self._noted(array)

    def empty(self, shape, dtype):
        size = math.prod(shape) * dtype.itemsize
        raw = np.empty(size + 96, np.uint8)
        start = -raw.ctypes.data % 64 + 32  # where a CPU device does not take it for its own
        array = np.ndarray(shape, dtype, raw[start : start + size])
        self._made = [made for made in self._made if made() is not None] + [weakref.ref(array)]
        self.held = max(self.held, sum(made().nbytes for made in self._made))
        return self._noted(array)

    def __getattr__(self, name):  # in numpy's place
        return getattr(np, name)

    @contextlib.contextmanager
    def watched(self):
        read, gathered = TensorFolder.read, hf_checkpoint._unshard
        TensorFolder.read = lambda *args: self._read(read, *args)
        hf_checkpoint._unshard = lambda array: self._noted(gathered(array))
        hf_checkpoint.np = self
        try:
            yield self
        finally:
            TensorFolder.read, hf_checkpoint._unshard, hf_checkpoint.np = read, gathered, np


def parameters_of(model):
    """Each parameter with its `ParamInfo` and its path."""
    for path, info in parameters(model.config).items():
        yield getattr(model.layers if len(path) == 2 else model, path[-1])[...], info, path


def bits_of(model):
    return [np.asarray(array).tobytes() for array, _, _ in parameters_of(model)]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def bytes_of(source):
    return sum(value.nbytes for value in tensors_in(source / "model.safetensors").values())


def compared(source, folder, layout, param_dtype):
    """What reading and writing with a layout did, against the same without one."""
    plain, sharding = load_model(source, param_dtype=param_dtype), sharding_of(layout)
    save_model(plain, folder / "plain")
    with Host().watched() as reading:
        model = load_model(source, param_dtype=param_dtype, sharding=sharding)
    with Host().watched() as writing:
        save_model(model, folder / "copy")
    arrays = [array for array, _, _ in parameters_of(model)]
    return {
        "kept on the host": sum(getattr(array, "_npy_value", None) is not None for array in arrays),
        "where asked": all(a.sharding == sharding(info.shape, info.spec) for a, info, _ in parameters_of(model)),
        "same bits": bits_of(model) == bits_of(plain),
        "same files": files_of(folder / "copy") == files_of(folder / "plain"),
        "reads of a slice": max(reading.reads.values()),
        "bytes read": reading.read,
        "bytes of the file": bytes_of(source),
        "held while reading": reading.held,
        "largest read": reading.largest,
        "largest written": writing.largest,
        "largest shard": max(shard.data.nbytes for array in arrays for shard in array.addressable_shards),
        "largest layer": max(a.nbytes // (len(a) if len(path) == 2 else 1) for a, _, path in parameters_of(model)),
        "largest parameter": max(array.nbytes for array in arrays),
    }


def on_eight_devices(folder):
    assert jax.device_count() == 8
    found = {}
    for name, layout, param_dtype in CASES:
        source = tiny.write_folder(name, folder / name)
        found[f"{name}, {layout}, {param_dtype}"] = compared(
            source, folder / f"{name} {layout} {param_dtype}", layout, param_dtype
        )
    return found


def in_two_processes(folder, process, name):
    assert (jax.device_count(), jax.local_device_count(), jax.process_count()) == (8, 4, 2)
    folder = folder / name
    source = tiny.write_folder(name, folder / f"source {process}")
    plain = load_model(source)
    with Host().watched() as reading:
        model = load_model(source, sharding=sharding_of("both"))
    same = [
        np.array_equal(shard.data, np.asarray(whole)[shard.index])
        for (array, _, _), (whole, _, _) in zip(parameters_of(model), parameters_of(plain), strict=True)
        for shard in array.addressable_shards
    ]
    with Host().watched() as writing:
        save_model(model, folder / f"copy {process}")
    save_model(plain, folder / f"plain {process}")
    waited = (folder / "plain 0" / "config.json").exists()
    try:
        save_model(model, source / "config.json")
        failed = None
    except OSError as error:
        failed = type(error).__name__
    return {
        "same bits": all(same),
        "same files": process > 0 or files_of(folder / "copy 0") == files_of(folder / "plain 0"),
        "waited": waited,
        "bytes read": reading.read,
        "bytes of the file": bytes_of(source),
        "largest written": writing.largest,
        "largest parameter": max(array.nbytes for array, _, _ in parameters_of(model)),
        "folders": sorted(path.name for path in folder.iterdir() if path.name.endswith(str(process))),
        "failed": failed,
    }


def main(folder, process=None, port=None):
    jax.config.update("jax_disable_most_optimizations", True)  # most of the time goes into compiling
    if process is None:
        found = on_eight_devices(pathlib.Path(folder))
    else:
        jax.distributed.initialize(f"localhost:{port}", 2, int(process))
        found = {name: in_two_processes(pathlib.Path(folder), int(process), name) for name in ("qwen3_biases", "phi3")}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
