import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
import tiny_models as tiny

SCRIPT = pathlib.Path(__file__).with_name("sharded_weights.py")


def started(devices, *arguments):
    environment = os.environ | tiny.cpu_devices(devices)
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process):
    try:
        out, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-2000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What happened on eight devices, by family, layout and dtype."""
    return finished(started(8, tmp_path_factory.mktemp("sharded")))


def test_a_model_read_into_shards_has_the_bits_of_one_read_whole(found):
    assert len(found) == 12
    for case, seen in found.items():
        assert seen["where asked"] and seen["same bits"], case


def test_every_slice_is_read_once_however_many_devices_hold_it(found):
    for case, seen in found.items():
        assert seen["reads of a slice"] == 1 and seen["bytes read"] == seen["bytes of the file"], case


def test_the_host_holds_one_shard_of_one_parameter_while_it_reads(found):
    for case, seen in found.items():
        assert seen["held while reading"] == seen["largest read"] == seen["largest shard"], case
    for layout, parts in (("fsdp", 8), ("tensor", 8), ("both", 8), ("layers", 6)):
        seen = found[f"qwen3_biases, {layout}, float32"]
        assert seen["largest read"] * parts == seen["largest parameter"], layout


def test_a_model_in_shards_is_written_as_one_that_is_whole(found):
    for case, seen in found.items():
        assert seen["same files"], case


def test_the_host_fetches_one_layer_at_a_time_and_keeps_none(found):
    for case, seen in found.items():
        on_one = "one device" in case  # looked at where it lies
        assert seen["largest written"] == (0 if on_one else seen["largest layer"]), case
        assert seen["largest layer"] < seen["largest parameter"] and seen["kept on the host"] == 0, case


@pytest.mark.slow
def test_processes_read_their_own_shards_and_the_first_writes_for_all(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    both = [started(4, tmp_path, number, port) for number in range(2)]
    try:
        first, second = map(finished, both)
    finally:
        for process in both:
            process.kill()
    for name in first:
        for seen in (first[name], second[name]):
            assert seen["same bits"] and seen["same files"] and seen["waited"]
            assert seen["bytes read"] < 0.6 * seen["bytes of the file"]
            assert seen["largest written"] == seen["largest parameter"] / 3  # of three layers
        assert first[name]["folders"] == ["copy 0", "plain 0", "source 0"] and second[name]["folders"] == ["source 1"]
        assert first[name]["failed"] == "FileExistsError" and second[name]["failed"] is None  # and nobody waits for it
