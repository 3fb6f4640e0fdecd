import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from gold_jax.planning import hlo
from gold_jax.planning.collectives import read_collectives
from gold_jax.planning.hardware import has_gpu_compiler

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
KIB, MIB = 2**10, 2**20
ADD = """
add {
  x = f32[] parameter(0)
  y = f32[] parameter(1)
  ROOT sum = f32[] add(x, y)
}
"""


def by_axes(found: dict[tuple[str, str], float]) -> dict[str, dict[str, float]]:
    return {axes: {op: sent for (one, op), sent in found.items() if one == axes} for axes, _ in found}


def read(body: str, *, before: str = "", trips=1) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Bytes by axes and operation, and the loops that do not say how often they run."""
    program = hlo.read(f"HloModule m\n{ADD}{before}\nENTRY main {{\n{body}\n}}\n")
    loops = []
    executions = hlo.executed(program, lambda loop: loops.append(loop) or trips)
    return by_axes(read_collectives(executions, MESH)), loops


def one(line: str) -> tuple[str, str, float]:
    """Axes, operation and bytes of a program of one collective."""
    ((axes, ops),) = read(f"  p = f32[1024]{{0}} parameter(0)\n  ROOT r = {line}")[0].items()
    ((op, sent),) = ops.items()
    return axes, op, sent


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", "tensor"),
        ("{{0,2},{1,3},{4,6},{5,7}}", "fsdp"),
        ("{{0,4},{1,5},{2,6},{3,7}}", "data"),
        ("[4,2]<=[8]", "tensor"),
        ("[4,2]<=[4,2]T(0,1)", "tensor"),
        ("[4,2]<=[2,4]T(1,0)", "data"),
        ("[4,2]<=[2,2,2]T(0,2,1)", "fsdp"),
        ("mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_1'}", "fsdp"),
        ("mesh['x'=8] {'x':(4)2}", "tensor"),
        ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", "data"),
        ("mesh['x'=2,'y'=4], device_ids=(0,2,4,6,1,3,5,7) {'x'}", "tensor"),
    ],
)
def test_groups_of_two_are_named_by_the_axis_they_span(groups, axes):
    line = (
        f"f32[1024]{{0}} all-reduce(p), channel_id=1, replica_groups={groups}, use_global_device_ids=true, to_apply=add"
    )
    assert one(line) == (axes, "all-reduce", 4 * KIB)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", "fsdp+tensor"),
        ("[2,4]<=[2,2,2]T(1,0,2)", "data+tensor"),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','b'}", "data+fsdp"),
    ],
)
def test_groups_of_four_span_two_axes_in_the_meshs_order(groups, axes):
    line = (
        f"f32[1024]{{0}} all-reduce(p), channel_id=1, replica_groups={groups}, use_global_device_ids=true, to_apply=add"
    )
    assert one(line) == (axes, "all-reduce", 2 * 4 * KIB * 3 / 4)


@pytest.mark.parametrize("groups", ["replica_groups={}", "replica_groups={{0}}", "replica_groups=[1,8]<=[8]"])
def test_no_groups_and_groups_of_the_one_replica_are_everyone(groups):
    flag = ", use_global_device_ids=true" if "<=" in groups else ""
    assert one(f"f32[1024]{{0}} all-reduce(p), channel_id=1, {groups}{flag}, to_apply=add") == (
        "data+fsdp+tensor",
        "all-reduce",
        2 * 4 * KIB * 7 / 8,
    )


FSDP = "channel_id=1, replica_groups={{0,2},{1,3},{4,6},{5,7}}, use_global_device_ids=true"


@pytest.mark.parametrize(
    ("line", "op", "sent"),
    [
        (f"f32[2048]{{0}} all-gather(p), {FSDP}, dimensions={{0}}", "all-gather", 4 * KIB),
        (f"(f32[1024]{{0}}, f32[2048]{{0}}) all-gather-start(p), {FSDP}, dimensions={{0}}", "all-gather", 4 * KIB),
        (
            f"((f32[8]{{0}}, bf16[4]{{0}}), (f32[16]{{0}}, bf16[8]{{0}})) all-gather-start(p, p), {FSDP}",
            "all-gather",
            (64 + 16) / 2,
        ),
        (f"f32[512]{{0}} reduce-scatter(p), {FSDP}, dimensions={{0}}, to_apply=add", "reduce-scatter", 2 * KIB),
        (
            f"((f32[1024]{{0}}), f32[512]{{0}}, u32[]{{:S(2)}}) reduce-scatter-start(p), {FSDP}, to_apply=add",
            "reduce-scatter",
            2 * KIB,
        ),
        (f"f32[1024]{{0}} all-reduce-start(p), {FSDP}, to_apply=add", "all-reduce", 4 * KIB),
        (
            f"(f32[1024]{{0}}, bf16[2,4]{{1,0:T(8,128)(2,1)}}) all-reduce(p, p), {FSDP}, to_apply=add",
            "all-reduce",
            4112,
        ),
        (f"f32[2,512]{{1,0}} all-to-all(p), {FSDP}, dimensions={{0}}", "all-to-all", 2 * KIB),
        (f"(f32[512]{{0}}, /*index=1*/f32[512]{{0}}) all-to-all(p, p), {FSDP}", "all-to-all", 2 * KIB),
        ("f32[1024]{0} collective-permute(p), source_target_pairs={{0,2},{4,6}}", "collective-permute", 4 * KIB),
        (
            "(f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(p), source_target_pairs={{0,2},{2,0}}",
            "collective-permute",
            32,
        ),
        (f"s4[1024]{{0:E(4)}} all-reduce(p), {FSDP}, to_apply=add", "all-reduce", 512),
        (f"pred[1024]{{0}} all-reduce(p), {FSDP}, to_apply=add", "all-reduce", 1024),
        (f"f8e4m3fn[1024]{{0}} all-reduce(p), {FSDP}, to_apply=add", "all-reduce", 1024),
    ],
)
def test_bytes_follow_the_ring_formulas(line, op, sent):
    assert one(line) == ("fsdp", op, sent)


def test_a_permutation_that_turns_two_axes_at_once_is_named_by_both():
    line = "f32[1024]{0} collective-permute(p), channel_id=3, source_target_pairs={{0,3},{1,2},{3,0},{2,1}}"
    assert one(line) == ("fsdp+tensor", "collective-permute", 4 * KIB)


def test_groups_of_one_device_send_nothing():
    line = "f32[8]{0} all-reduce(p), channel_id=1, replica_groups=[8,1]<=[8], use_global_device_ids=true, to_apply=add"
    assert read(f"  p = f32[8]{{0}} parameter(0)\n  ROOT r = {line}")[0] == {}


def test_async_wrappers_count_at_their_start_alone():
    wrapped = f"""
wrapped {{
  p = f32[1024]{{0}} parameter(0)
  ROOT r = f32[512]{{0}} reduce-scatter(p), {FSDP}, dimensions={{0}}, to_apply=add
}}, execution_thread="sparsecore"
"""
    body = """  p = f32[1024]{0} parameter(0)
  s = ((f32[1024]{0}), f32[512]{0}, u32[]) async-start(p), async_execution_thread="sparsecore", calls=wrapped
  u = ((f32[1024]{0}), f32[512]{0}, u32[]) async-update(s), calls=wrapped
  ROOT d = f32[512]{0} async-done(u), calls=wrapped"""
    assert read(body, before=wrapped)[0] == {"fsdp": {"reduce-scatter": 2 * KIB}}


PIECE = 'backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}'
TPU_PIECES = f"""
%start (p.1: f32[1024]) -> (f32[1024], f32[2048], u32[]) {{
  %p.1 = f32[1024]{{0:T(1024)S(1)}} parameter(0)
  %all-gather.1 = f32[2048]{{0:T(1024)}} all-gather(%p.1), {FSDP}, dimensions={{0}}, {PIECE}
  ROOT %c.1 = (f32[1024]{{0}}, f32[2048]{{0}}, u32[]{{:S(2)}}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}}

%meanwhile (p.2: f32[1024]) -> (f32[1024], f32[2048]) {{
  %p.2 = f32[1024]{{0:T(1024)S(1)}} parameter(0)
  %all-gather.2 = f32[2048]{{0:T(1024)S(1)}} all-gather(%p.2), {FSDP}, dimensions={{0}}, {PIECE}
  ROOT %t.2 = (f32[1024]{{0}}, f32[2048]{{0}}) tuple(%p.2, %all-gather.2)
}}

%done (p.3: f32[1024]) -> f32[2048] {{
  %p.3 = f32[1024]{{0:T(1024)S(1)}} parameter(0)
  %all-gather.3 = f32[2048]{{0:T(1024)}} all-gather(%p.3), {FSDP}, dimensions={{0}}, {PIECE}
  ROOT %c.3 = f32[2048]{{0:T(1024)S(1)}} custom-call(%p.3, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}}

%all-reduce-scatter (p.4: f32[2048]) -> f32[1024] {{
  %p.4 = f32[2048]{{0:T(1024)S(1)}} parameter(0)
  %all-reduce.4 = f32[2048]{{0:T(1024)}} all-reduce(%p.4), {FSDP}, to_apply=%add
  %partition-id.4 = u32[] partition-id()
  ROOT %dynamic-slice.4 = f32[1024]{{0:T(1024)S(1)}} dynamic-slice(%all-reduce.4, %partition-id.4), dynamic_slice_sizes={{1024}}
}}
"""


def test_the_pieces_of_a_tpus_asynchronous_gather_are_one_and_its_fused_scatter_is_a_scatter():
    body = """  %p = f32[1024]{0:T(1024)} parameter(0)
  %s = (f32[1024]{0}, f32[2048]{0}, u32[]{:S(2)}) fusion(%p), kind=kCustom, calls=%start
  %g = f32[1024]{0} get-tuple-element(%s), index=0
  %m = (f32[1024]{0}, f32[2048]{0}) fusion(%g), kind=kOutput, calls=%meanwhile
  %d = f32[2048]{0:T(1024)S(1)} fusion(%g), kind=kCustom, calls=%done
  ROOT %r = f32[1024]{0:T(1024)S(1)} fusion(%d), kind=kCustom, calls=%all-reduce-scatter"""
    assert read(body, before=TPU_PIECES)[0] == {"fsdp": {"all-gather": 4 * KIB, "reduce-scatter": 4 * KIB}}


GPU = """channel_id=13, replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_1'}, use_global_device_ids=true"""
CONFIG = 'backend_config={"operation_queue_id":"0","collective_backend_config":{"is_sync":false},"reification_cost":[]}'
GPU_LAYERS = f"""
%wrapped (p.1: f32[1024]) -> f32[512] {{
  %p.1 = f32[1024]{{0}} parameter(0)
  ROOT %reduce-scatter.1 = f32[512]{{0}} reduce-scatter(%p.1), {GPU}, dimensions={{0}}, to_apply=%add
}}

%command_buffer (p.2: f32[1024]) -> f32[1024] {{
  %p.2 = f32[1024]{{0}} parameter(0)
  %all-reduce-start.2 = f32[1024]{{0}} all-reduce-start(%p.2), {GPU}, to_apply=%add, {CONFIG}
  ROOT %all-reduce-done.2 = f32[1024]{{0}} all-reduce-done(%all-reduce-start.2), {CONFIG}
}}

%condition (t.3: (s32[], f32[1024])) -> pred[] {{
  %t.3 = (s32[], f32[1024]{{0}}) parameter(0)
  %i.3 = s32[] get-tuple-element(%t.3), index=0
  %n.3 = s32[] constant(16)
  ROOT %wrapped_compare.3 = pred[] compare(%i.3, %n.3), direction=LT
}}

%body (t.4: (s32[], f32[1024])) -> (s32[], f32[1024]) {{
  %t.4 = (s32[], f32[1024]{{0}}) parameter(0)
  %i.4 = s32[] get-tuple-element(%t.4), index=0
  %x.4 = f32[1024]{{0}} get-tuple-element(%t.4), index=1
  %all-gather-start.4 = ((f32[1024]{{0}}, bf16[1024]{{0}}), (f32[2048]{{0}}, bf16[2048]{{0}})) all-gather-start(%x.4, %x.4), {GPU}, dimensions={{0}}, frontend_attributes={{trivially_pipelineable=""}}, {CONFIG}
  %all-gather-done.4 = (f32[2048]{{0}}, bf16[2048]{{0}}) all-gather-done(%all-gather-start.4), {CONFIG}
  %reduce-scatter-start.4 = ((f32[1024]{{0}}, bf16[1024]{{0}}), (f32[512]{{0}}, bf16[512]{{0}})) reduce-scatter-start(%x.4, %x.4), {GPU}, dimensions={{0}}, to_apply=%add, {CONFIG}
  %reduce-scatter-done.4 = (f32[512]{{0}}, bf16[512]{{0}}) reduce-scatter-done(%reduce-scatter-start.4), {CONFIG}
  %call.4 = f32[1024]{{0}} call(%x.4), to_apply=%command_buffer
  ROOT %tuple.4 = (s32[], f32[1024]{{0}}) tuple(%i.4, %call.4)
}}
"""


def test_gpus_collectives_are_read_combined_wrapped_in_loops_and_in_command_buffers():
    body = f"""  %p = f32[1024]{{0}} parameter(0)
  %start = ((f32[1024]{{0}}), f32[512]{{0}}) async-start(%p), calls=%wrapped, {CONFIG}
  %done = f32[512]{{0}} async-done(%start)
  %z = s32[] constant(0)
  %t = (s32[], f32[1024]{{0}}) tuple(%z, %p)
  ROOT %w = (s32[], f32[1024]{{0}}) while(%t), condition=%condition, body=%body, backend_config={{"known_trip_count":{{"n":"16"}},"known_init_step":{{"init":"0","step":"1"}},"dynamic_variables":[]}}"""
    layers, both = 16, 2048 + 1024  # bytes that a device gives of float32 and of bfloat16
    assert read(body, before=GPU_LAYERS) == (
        {
            "fsdp": {
                "all-gather": layers * 2 * both,
                "all-reduce": layers * 4 * KIB,
                "reduce-scatter": layers * both + 2 * KIB,
            }
        },
        [],
    )


def loop(condition: str, *, start="constant(0)", step="constant(1)", attributes="", **options):
    """A program with an all-reduce of 4 KiB over "tensor" in a while loop."""
    before = f"""
condition {{
  t = (s32[], f32[1024]{{0}}, s32[]) parameter(0)
  i = s32[]{{:T(128)}} get-tuple-element(t), index=0
  n = s32[]{{:T(128)}} get-tuple-element(t), index=2
  c = s32[]{{:T(128)}} constant(12)
  ROOT less = pred[]{{:T(512)}} {condition}
}}

body {{
  t = (s32[], f32[1024]{{0}}, s32[]) parameter(0)
  i = s32[]{{:T(128)}} get-tuple-element(t), index=0
  x = f32[1024]{{0}} get-tuple-element(t), index=1
  n = s32[]{{:T(128)}} get-tuple-element(t), index=2
  k = s32[]{{:T(128)}} {step}
  copied = s32[]{{:T(128)S(6)}} copy(i)
  next = s32[]{{:T(128)}} add(copied, k)
  r = f32[1024]{{0}} all-reduce(x), channel_id=1, replica_groups=[4,2]<=[8], use_global_device_ids=true, to_apply=add
  ROOT out = (s32[], f32[1024]{{0}}, s32[]) tuple(next, r, /*index=2*/n)
}}
"""
    body = f"""  p = f32[1024]{{0}} parameter(0)
  z = s32[]{{:T(128)}} {start}
  zc = s32[]{{:T(128)}} copy(z)
  n = s32[]{{:T(128)}} constant(9)
  t = (s32[], f32[1024]{{0}}, s32[]) tuple(zc, p, n)
  ROOT w = (s32[], f32[1024]{{0}}, s32[]) while(t), condition=condition, body=body, metadata={{op_name="jit(f)/while"}}{attributes}"""
    return read(body, before=before, **options)


COUNTED = "compare(i, c), direction=LT"


@pytest.mark.parametrize(
    ("options", "trips"),
    [
        ({"condition": COUNTED}, 12),
        ({"condition": "compare(i, n), direction=LT"}, 9),
        ({"condition": "compare(i, c), direction=LE"}, 13),
        ({"condition": COUNTED, "start": "constant(2)"}, 10),
        ({"condition": COUNTED, "step": "constant(5)"}, 3),
        ({"condition": "compare(i, n), direction=GT", "start": "constant(20)", "step": "constant(-1)"}, 11),
        ({"condition": COUNTED, "attributes": ', backend_config={"known_trip_count":{"n":"4"}}'}, 4),
    ],
)
def test_what_is_in_a_loop_counts_as_often_as_the_loop_runs(options, trips):
    assert loop(**options) == ({"tensor": {"all-reduce": 4 * KIB * trips}}, [])


@pytest.mark.parametrize("options", [{"condition": "custom-call(i)"}, {"condition": COUNTED, "start": "parameter(1)"}])
def test_a_loop_that_does_not_say_how_often_it_runs_counts_once_and_is_named(options):
    assert loop(**options) == ({"tensor": {"all-reduce": 4 * KIB}}, ["jit(f)/while"])
    assert loop(**options, trips=6)[0] == {"tensor": {"all-reduce": 24 * KIB}}


def test_of_a_conditional_the_dearer_branch_counts():
    branches = "".join(
        f"""
branch.{size} {{
  p = f32[{size}]{{0}} parameter(0)
  ROOT r = f32[{size}]{{0}} all-reduce(p), {FSDP}, to_apply=add
}}
"""
        for size in (8, 64, 16)
    )
    body = """  p = s32[] parameter(0)
  x = f32[64]{0} parameter(1)
  ROOT r = f32[64]{0} conditional(p, x, x, x), branch_computations={branch.8, branch.64, branch.16}"""
    assert read(body, before=branches)[0] == {"fsdp": {"all-reduce": 256}}
    two = "  ROOT r = f32[64]{0} conditional(p, x, x), true_computation=branch.16, false_computation=branch.8"
    assert read(body.rsplit("\n", 1)[0] + "\n" + two, before=branches)[0] == {"fsdp": {"all-reduce": 64}}


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="not the text of a compiled program"):
        hlo.read("module @jit_f {\n}\n")


def compiled(where: str) -> dict:
    script = pathlib.Path(__file__).with_name("compiled_programs.py")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",  # these are about what the compiler makes of them
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8" if where == "cpu" else "",
        "PYTHONPATH": os.pathsep.join([str(script.parents[2]), *sys.path]),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    done = subprocess.run(
        [sys.executable, script, where], env=environment, check=True, timeout=300, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


NEEDS_TPU_COMPILER = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed"
)
NEEDS_GPU_COMPILER = pytest.mark.skipif(
    not has_gpu_compiler(), reason="the GPU compiler is not installed: pip install 'gold_jax[plan-cuda]'"
)


@pytest.mark.parametrize(
    "where",
    [
        "cpu",
        pytest.param("v5e:2x4", marks=[pytest.mark.slow, NEEDS_TPU_COMPILER]),
        pytest.param("gpu:8xh100", marks=[pytest.mark.slow, NEEDS_GPU_COMPILER]),
    ],
)
def test_compiled_programs_send_what_they_say(where):
    found = compiled(where)
    layers, gathered = 5, 512 * 512 * 4 * 7 / 8
    assert found["chain"] == {
        "by_axes": {
            "fsdp": {
                "all-gather": 2 * layers * gathered,
                "reduce-scatter": layers * gathered,
            }
        },
        "unknown_loops": [],
    }
    assert found["every_kind"]["by_axes"] == {
        "data": {
            "all-reduce": 2 * MIB,
            "collective-permute": 2 * MIB,
        },
        "data+fsdp": {"all-gather": 6 * MIB},
        "data+tensor": {"all-reduce": 7 * 3 * 3 * MIB},
        "fsdp": {"reduce-scatter": 2 * MIB},
        "tensor": {
            "all-reduce": 2 * MIB,
            "all-to-all": 2 * MIB,
            "collective-permute": 20 * MIB,
        },
    }
    assert len(found["every_kind"]["unknown_loops"]) == 1
    assert found["partitioned"]["by_axes"] == {"tensor": {"all-reduce": 128 * 128 * 4}}
