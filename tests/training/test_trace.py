import jax
import jax.numpy as jnp
import pytest
from training.traces import event, plane, program, step, write

from gold_jax.training.trace import COMPILING, PREFIX, Span, part_of, read_trace


@pytest.mark.parametrize(
    "scope, part",
    [
        ("jit(fused)/jvp(student)/while/body/closed_call/dot_general", "student forward"),
        ("jit(fused)/transpose(jvp(student))/while/body/checkpoint/mul", "student backward"),
        ("jit(fused)/jvp(teacher)/while", "teacher forward"),
        ("jit(fused)/jvp(loss)/while/body/transpose(jvp())/mul", "loss, both ways"),
        ("jit(fused)/transpose(jvp(loss))/mul", "loss, both ways"),
        ("jit(fused)/optimizer/add", "optimizer"),
        ("jit(_generate)/prefill/while/body/dot_general", "sampling: prefill"),
        ("jit(_generate)/while/body/decode/dot_general", "sampling: decoding"),
        ("jit(loss)/student/add", "student forward"),  # a function's name is no scope
        ("jit(loss)/add", None),
        ("jit(fused)/studentship/add", None),
        ("", None),
    ],
)
def test_a_scope_tells_the_part_of_a_step(scope, part):
    assert part_of(scope) == part


def cpu(tmp_path, *operations, **computations):
    """A trace of program 7 with these operations on one thread; returns it with the parts by name."""
    events = [
        event(name, start, end, hlo_op=name, hlo_module="jit_f", program_id=7, run_id=1)
        for name, start, end in operations
    ]
    lines = {"python": [event("train", 0, 10, step_num=1)], "worker": events}
    metadata = plane("/host:metadata", programs={"jit_f(7)": program(**computations)})
    trace = read_trace(write(tmp_path / "a.xplane.pb", metadata, plane("/host:CPU", lines)))
    return trace, {span.what.name: trace.source(span.what).part for thread in trace.threads for span in thread}


def test_an_operation_belongs_to_the_scope_that_its_program_names(tmp_path):
    scope = "jit(f)/transpose(jvp(student))/dot_general"
    trace, parts = cpu(tmp_path, ("dot.1", 1, 2), main=[("dot.1", "dot", scope, [], [])])
    assert parts == {"dot.1": "student backward"} and trace.device == "CPU"
    assert trace.steps == [Span(0, 10, 1)]
    source = trace.source(trace.threads[0][0].what)
    assert source.scope == scope and source.opcode == "dot"


def test_what_the_compiler_adds_belongs_to_what_it_calls_reads_or_is_called_by(tmp_path):
    _, parts = cpu(
        tmp_path,
        *((name, i, i + 1) for i, name in enumerate(("fused", "zeros", "kept", "nested", "alone"))),
        inner=[
            ("a", "add", "jit(f)/optimizer/add", [], []),
            ("b", "add", "jit(f)/optimizer/mul", [], []),
            ("c", "add", "jit(f)/student/mul", [], []),
        ],
        body=[("nested", "copy", "", [], [])],
        main=[
            ("fused", "fusion", "", [], ["inner"]),
            ("zeros", "broadcast", "", [], []),
            ("tuple", "tuple", "", ["zeros"], []),
            ("loop", "while", "jit(f)/loss/while", ["tuple"], ["body"]),
            ("kept", "copy", "", ["loop"], []),
            ("alone", "copy", "", [], []),
        ],
    )
    loss = "loss, both ways"
    assert parts == {"fused": "optimizer", "zeros": loss, "kept": loss, "nested": loss, "alone": None}


def test_a_program_from_the_cache_is_known_by_its_name_and_instructions_whatever_its_number(tmp_path):
    def scoped(scope, *names):
        return program(main=[(name, "dot", f"jit(f)/{scope}/dot", [], []) for name in names])

    programs = {
        "jit_f(7)": scoped("student", "dot.1", "dot.2"),
        "jit_f(8)": scoped("teacher", "dot.1", "dot.3"),
        "jit_g(9)": scoped("optimizer", "dot.1", "dot.3"),
    }
    events = [
        event(name, i, i + 1, hlo_op=name, hlo_module="jit_f", program_id=number, run_id=i)
        for i, (number, name) in enumerate([(7, "dot.1"), (7, "dot.3"), (3, "dot.1"), (3, "dot.2"), (9, "dot.3")])
    ]
    lines = {"python": [event("train", 0, 10, step_num=1)], "worker": events}
    trace = read_trace(
        write(tmp_path / "a.xplane.pb", plane("/host:metadata", programs=programs), plane("/host:CPU", lines))
    )
    parts = [trace.source(span.what).part for span in trace.threads[0]]
    assert parts == [f"{who} forward" for who in ("teacher", "teacher", "student", "student", "teacher")]


@pytest.mark.parametrize(
    "scopes, part",
    [
        (["prefill", "decode"], "sampling: decoding"),
        (["prefill"], "sampling: prefill"),
        (["teacher"], "teacher forward"),
        (["teacher", "loss"], None),
    ],
)
def test_what_nothing_tells_of_is_the_programs_one_part_or_decoding_where_it_samples(tmp_path, scopes, part):
    told = [(scope, "dot", f"jit(f)/{scope}/dot", [], []) for scope in scopes]
    _, parts = cpu(tmp_path, ("draw", 1, 2), main=[("draw", "sort", "jit(f)/sort", [], []), *told])
    assert parts == {"draw": part}


def test_parts_of_the_hosts_work_are_those_of_the_thread_that_trains(tmp_path):
    lines = {
        "python": [
            event("train", 0, 10, step_num=4),
            event(PREFIX + "alignment", 1, 2),
            event("backend_compile_and_load", 3, 5),
            event("something else", 6, 7),
        ],
        "other": [event(PREFIX + "saving", 1, 9)],
    }
    trace = read_trace(write(tmp_path / "a.xplane.pb", plane("/host:CPU", lines)))
    assert trace.host == [Span(1, 2, "alignment"), Span(3, 5, COMPILING)]


def test_a_program_on_the_cpu_runs_from_its_first_operation_to_its_end(tmp_path):
    stats = {"hlo_module": "jit_f", "program_id": 7}
    events = [
        event("ThunkExecutor::Execute (wait for completion)", 1, 8, run_id=5),
        event("dot", 2, 3, hlo_op="dot", run_id=5, **stats),
        event("end: dot", 3, 9, run_id=5),
    ]
    host = plane("/host:CPU", {"python": [event("train", 0, 10, step_num=1)], "worker": events})
    assert [span[:2] for span in read_trace(write(tmp_path / "a.xplane.pb", host)).running] == [(2, 8)]


def test_kernels_of_a_gpu_are_taken_from_its_streams_alone(tmp_path):
    stats = {"hlo_op": "fusion.3", "hlo_module": "jit_f", "program_id": 7}
    kernel = event("loop_fusion_kernel", 1, 2, **stats)
    lines = {"Stream #1(Compute)": [kernel], "Stream #2(Memcpy)": [event("copy", 1, 3)], "XLA Ops": [kernel]}
    metadata = plane(
        "/host:metadata", programs={"jit_f(7)": program(main=[("fusion.3", "fusion", "a/teacher/b", [], [])])}
    )
    trace = read_trace(
        write(tmp_path / "a.xplane.pb", metadata, step(1, 0, 5), plane("/device:GPU:0", lines), plane("/device:GPU:1"))
    )
    (one,), (other,) = trace.threads
    assert trace.device == "GPU:0" and trace.running == []
    assert one[:2] == (1, 2) and trace.source(one.what).part == "teacher forward"
    assert other[:2] == (1, 3) and trace.source(other.what).part is None


def test_operations_of_a_tpu_say_their_scope_themselves(tmp_path):
    name = "%fusion.3 = f32[8]{0} fusion(f32[8]{0} %p)"
    lines = {
        "XLA Ops": [event(name, 1, 2, tf_op="jit(f)/optimizer/add:")],
        "XLA Modules": [event("jit_f(7)", 0, 5)],
    }
    trace = read_trace(write(tmp_path / "a.xplane.pb", step(1, 0, 5), plane("/device:TPU:0", lines)))
    ((operation,),) = trace.threads
    assert operation.what.name == "fusion.3"
    assert trace.source(operation.what)[:2] == ("optimizer", "jit(f)/optimizer/add")


def test_a_trace_without_a_step_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=r"a\.xplane\.pb holds no step"):
        read_trace(write(tmp_path / "a.xplane.pb", plane("/host:CPU", {"python": [event("nothing", 0, 1)]})))


def test_scopes_are_found_in_a_trace_that_jax_wrote(tmp_path):
    def model(x):
        with jax.named_scope("student"):
            return jax.lax.scan(lambda c, _: (jnp.tanh(c @ c), None), x, length=3)[0].sum()

    gradient = jax.jit(jax.grad(model))
    x = jnp.full((64, 64), 0.1)
    jax.block_until_ready(gradient(x))
    with jax.profiler.trace(tmp_path), jax.profiler.StepTraceAnnotation("train", step_num=6):
        jax.block_until_ready(gradient(x))
    (path,) = tmp_path.rglob("*.xplane.pb")
    trace = read_trace(path)
    assert [span.what for span in trace.steps] == [6]
    parts = {trace.source(span.what).part for thread in trace.threads for span in thread}
    assert {"student forward", "student backward"} <= parts <= {"student forward", "student backward", None}
