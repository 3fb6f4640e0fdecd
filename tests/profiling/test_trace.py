import jax
import jax.numpy as jnp
import pytest
from traces import event, operation, plane, step, write

from gold_jax.profiling.scopes import best_match, load_scopes, part_of, save_scopes, scopes_of
from gold_jax.profiling.trace import COMPILING, Span, read_trace
from gold_jax.training.annotations import PREFIX


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
        ("jit(_generate)/while/body/draw/sort", "sampling: decoding"),
        ("jit(loss)/student/add", "student forward"),  # a function's name is no scope
        ("jit(loss)/add", ""),
        ("jit(fused)/studentship/add", ""),
        ("", ""),
    ],
)
def test_a_scope_tells_the_part_of_a_step(scope, part):
    assert part_of(scope) == part


def hlo(*computations):
    """A program's text, from lists of (instruction, scope, what it reads)."""
    lines = ["HloModule jit_f, is_scheduled=true", ""]
    for k, instructions in enumerate(computations):
        lines += [f"%computation.{k} (p: (f32[8], s32[])) -> f32[8] {{"]
        for i, (name, scope, *read) in enumerate(instructions):
            metadata = f', metadata={{op_name="{scope}" stack_frame_id=3}}' if scope else ""
            operands = ", ".join(f"%{operand}" for operand in ("p", *read))
            root = "ROOT " if i == len(instructions) - 1 else ""
            lines.append(
                f"  {root}%{name} = (f32[8]{{0}}, s32[]) fusion({operands}), calls=%computation{metadata}, x={{}}"
            )
        lines += ["}", ""]
    return "\n".join(lines)


def test_what_the_compiler_adds_belongs_to_what_reads_it_or_came_before():
    loss, optimizer = "jit(f)/loss/add", "jit(f)/optimizer/mul"
    found = scopes_of(
        hlo(
            [
                ("zeros", "jit(f)/broadcast"),
                ("copy", "", "zeros"),
                ("a.1", loss),
                ("stray", ""),
                ("b", optimizer, "copy", "a.1"),
                ("last", "", "b"),
            ],
            [("alone", "")],
        )
    )
    assert found == {
        "zeros": ("optimizer", "jit(f)/broadcast"),
        "copy": ("optimizer", ""),
        "a.1": ("loss, both ways", loss),
        "stray": ("loss, both ways", ""),
        "b": ("optimizer", optimizer),
        "last": ("optimizer", ""),
        "alone": ("", ""),
    }


def test_what_nothing_tells_of_is_the_programs_only_part():
    found = scopes_of(hlo([("a", "jit(f)/teacher/dot")], [("alone", "jit(f)/sort")]))
    assert found["alone"] == ("teacher forward", "jit(f)/sort")


def test_of_programs_with_one_name_that_is_taken_which_has_the_instructions_that_ran():
    one, other = {"dot.1": ("a", ""), "dot.2": ("a", "")}, {"dot.1": ("b", ""), "dot.3": ("b", "")}
    assert best_match([one, other], {"dot.1", "dot.3"}) is other
    assert best_match([one, other], {"dot.1", "dot.2"}) is one
    assert best_match([], {"dot.1"}) == {}


def cpu(tmp_path, programs, *operations):
    """A trace of these operations on one thread."""
    lines = {"python": [event("train", 0, 10, step_num=1)], "worker": list(operations)}
    return read_trace(write(tmp_path / "a.xplane.pb", plane("/host:CPU", lines)), programs)


def test_an_operation_belongs_to_the_scope_that_its_program_names(tmp_path):
    scope = "jit(f)/transpose(jvp(student))/dot_general"
    trace = cpu(tmp_path, {"jit_f": [{"dot.1": (part_of(scope), scope)}]}, operation("dot.1", 1, 2))
    ((span,),) = trace.threads
    assert (span.start, span.end) == (1, 2)
    assert (span.what.name, span.what.part, span.what.scope) == ("dot.1", "student backward", scope)
    assert trace.device == "CPU" and trace.steps == [Span(0, 10, 1)]


def test_each_program_that_ran_is_looked_up_by_its_own_instructions(tmp_path):
    programs = {"jit_f": [{"a": ("one", ""), "b": ("one", "")}, {"a": ("two", ""), "c": ("two", "")}]}
    ran = [operation("a", 0, 1, 7), operation("c", 1, 2, 7), operation("a", 2, 3, 8), operation("b", 3, 4, 8)]
    (spans,) = cpu(tmp_path, programs, *ran).threads
    assert [span.what.part for span in spans] == ["two", "two", "one", "one"]


def test_without_the_programs_an_operation_has_no_part(tmp_path):
    ((span,),) = cpu(tmp_path, None, operation("dot.1", 1, 2)).threads
    assert span.what[1:] == ("dot.1", "", "")


@pytest.mark.parametrize("name, runs", [("while", True), ("while.3", True), ("call.1", True), ("dot.1", False)])
def test_loops_and_calls_run_others(tmp_path, name, runs):
    ((span,),) = cpu(tmp_path, {}, operation(name, 1, 2)).threads
    assert span.what.runs_others == runs


def test_annotated_work_is_that_of_the_thread_that_trains(tmp_path):
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
    planes = step(1, 0, 5), plane("/device:GPU:0", lines), plane("/device:GPU:1")
    programs = {"jit_f": [{"fusion.3": ("teacher forward", "a/teacher/b")}]}
    trace = read_trace(write(tmp_path / "a.xplane.pb", *planes), programs)
    (one,), (other,) = trace.threads
    assert trace.device == "GPU:0" and trace.running == []
    assert one[:2] == (1, 2) and one.what.part == "teacher forward"
    assert other[:2] == (1, 3) and other.what.part == ""


def test_operations_of_a_tpu_say_their_scope_themselves(tmp_path):
    name = "%fusion.3 = f32[8]{0} fusion(f32[8]{0} %p)"
    lines = {
        "XLA Ops": [event(name, 1, 2, tf_op="jit(f)/optimizer/add:")],
        "XLA Modules": [event("jit_f(7)", 0, 5)],
    }
    trace = read_trace(write(tmp_path / "a.xplane.pb", step(1, 0, 5), plane("/device:TPU:0", lines)))
    (((_, _, found),),) = trace.threads
    assert found[1:] == ("fusion.3", "optimizer", "jit(f)/optimizer/add")


def test_a_trace_without_a_step_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=r"a\.xplane\.pb holds no step"):
        read_trace(write(tmp_path / "a.xplane.pb", plane("/host:CPU", {"python": [event("nothing", 0, 1)]})))


@pytest.mark.parametrize("cached", [False, True])
def test_scopes_are_found_in_a_trace_that_jax_wrote(tmp_path, cached):
    def model(x):
        with jax.named_scope("student"):
            return jax.lax.scan(lambda c, _: (jnp.tanh(c @ c), None), x, length=3)[0].sum()

    gradient = jax.jit(jax.grad(model))
    x = jnp.full((64, 64), 0.1)
    jax.block_until_ready(gradient(x))
    if cached:  # the program then comes from JAX's cache, with another number than it was compiled under
        jax.clear_caches()
        jax.block_until_ready(gradient(x))
    with jax.profiler.trace(tmp_path), jax.profiler.StepTraceAnnotation("train", step_num=6):
        jax.block_until_ready(gradient(x))
    save_scopes(tmp_path / "scopes.json")
    (path,) = tmp_path.rglob("*.xplane.pb")
    trace = read_trace(path, load_scopes(tmp_path / "scopes.json"))
    assert [span.what for span in trace.steps] == [6]
    parts = {span.what.part for thread in trace.threads for span in thread}
    assert {"student forward", "student backward"} <= parts <= {"student forward", "student backward", ""}
