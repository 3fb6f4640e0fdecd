"""Runs `one_of_several.py` in several processes of this machine."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import tiny_models as tiny

HERE = pathlib.Path(__file__).parent


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def begin(part, address, number, index, *arguments) -> subprocess.Popen:
    ours = [
        name
        for name in os.environ
        if name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR", "JAX_NUM_P", "JAX_PROCESS"))
    ]
    environment = {name: value for name, value in os.environ.items() if name not in ours} | {
        **tiny.cpu_devices(2),
        "PYTHONPATH": str(HERE.parents[1]),
    }
    return subprocess.Popen(
        [sys.executable, str(HERE / "one_of_several.py"), part, address, str(number), str(index), *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process, timeout=90) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; a process that hangs is killed, and its code is None."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        return None, out, err
    return process.returncode, out, err


def told(out) -> list[tuple[str, object]]:
    """The names and values that a process told."""
    lines = [line[1:].partition(" ") for line in out.splitlines() if line.startswith("@")]
    return [(name, json.loads(value)) for name, _, value in lines]
