import collections

import hypothesis
import pytest
from hypothesis import strategies as st

from gold_jax.profiling.breakdown import step_times
from gold_jax.profiling.trace import Operation, Span, Trace

END = 100.0


def op(name, part=""):
    return Operation((7, "jit_f"), name, part)


def thread(*spans):
    return [Span(start, end, op(name, name.upper())) for start, end, name in spans]


def times(*threads, host=(), running=(), steps=((0, END, 1),)):
    trace = Trace(
        "CPU", [Span(*s) for s in steps], [Span(*s) for s in host], list(threads), [Span(*r) for r in running]
    )
    return step_times(trace)


def seconds(*threads, **options):
    """How long each operation has."""
    (one,) = times(*threads, **options)
    return {operation.name: spent for operation, spent in one.operations.items()}


def test_a_loop_has_only_what_its_operations_leave():
    assert seconds(thread((0, 10, "loop"), (1, 3, "a"), (3, 6, "b"), (4, 5, "inside"))) == {
        "loop": 5,
        "a": 2,
        "b": 2,
        "inside": 1,
    }


def test_operations_on_several_threads_share_the_time_between():
    assert seconds(thread((0, 4, "a")), thread((2, 6, "b"))) == {"a": 3, "b": 3}


def test_an_operation_that_runs_others_has_nothing_while_one_of_them_runs_elsewhere():
    assert seconds(thread((0, 6, "while.1")), thread((1, 5, "a"))) == {"while.1": 2, "a": 4}


def test_time_of_a_program_in_which_nothing_is_told_belongs_to_the_operation_before():
    told = thread((1, 2, "a"), (5, 6, "b"), (20, 21, "c"))
    assert seconds(told, running=[(1, 8, 1)]) == {"a": 4, "b": 3, "c": 1}
    assert seconds(told) == {"a": 1, "b": 1, "c": 1}


spans = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)).map(lambda t: (t[0], t[0] + t[1])), max_size=12)


def covered(spans):
    return {moment for start, end in spans for moment in range(start, end)}


@hypothesis.given(st.lists(spans, max_size=3), spans, spans)
def test_moments_are_given_once_and_cover_what_runs_and_no_more(threads, running, steps):
    steps = [(10 * k, 10 * k + end - start, k) for k, (start, end) in enumerate(steps) if end > start]
    found = times(
        *([Span(s, e, op(f"{i}-{s}-{e}", "part")) for s, e in spans] for i, spans in enumerate(threads)),
        running=[(*r, 1) for r in running],
        host=[(s, e, "work") for s, e in running],
        steps=steps,
    )
    told = covered(span for spans in threads for span in spans)
    for one, (start, end, number) in zip(found, steps, strict=True):
        inside = set(range(start, end))
        assert (one.number, one.wall) == (number, end - start)
        assert sum(one.device.values()) == pytest.approx(sum(one.operations.values()))
        least, most = len(told & inside), len((told | covered(running)) & inside)
        assert least - 1e-9 <= sum(one.device.values()) <= most + 1e-9
        assert one.host.get("work", 0) == len(covered(running) & inside)
        assert one.hidden.get("work", 0) <= one.host.get("work", 0)


def test_each_step_gets_its_share_of_both_sides_and_what_overlapped():
    one, other = times(
        thread((0, 3, "a"), (9, 11, "a")),
        thread((9, 11, "b")),
        host=[(1, 4, "alignment"), (2, 3, "encoding"), (8, 13, "waiting")],
        steps=[(0, 10, 1), (10, 20, 2)],
    )
    assert (one.number, one.wall) == (1, 10) and (other.number, other.wall) == (2, 10)
    assert one.device == {"A": 3.5, "B": 0.5} and other.device == {"A": 0.5, "B": 0.5}
    assert one.host == {"alignment": 2, "encoding": 1, "waiting": 2} and other.host == {"waiting": 3}
    assert +collections.Counter(one.hidden) == {"alignment": 1, "encoding": 1, "waiting": 1}
    assert other.hidden == {"waiting": 1}
    assert {o.name: s for o, s in one.operations.items()} == {"a": 3.5, "b": 0.5}


def test_what_the_device_does_for_an_evaluation_is_apart_whatever_it_is():
    (one,) = times(thread((1, 5, "a")), thread((6, 7, "b")), host=[(4, 8, "evaluation")], steps=[(0, 10, 1)])
    assert one.device == {"A": 3, "evaluation": 2}


def test_what_is_in_no_part_is_other():
    (one,) = times([Span(0, 1, op("a"))])
    assert one.device == {"other": 1}
