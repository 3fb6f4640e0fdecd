import collections

import hypothesis
import pytest
from hypothesis import strategies as st

from gold_jax.training.timesheet import innermost, shared, sheets, union, within
from gold_jax.training.trace import Span


def seconds(moments):
    """How long each has."""
    found = collections.Counter()
    for start, end, owners in moments:
        for owner in owners:
            found[owner] += (end - start) / len(owners)
    return dict(found)


def test_a_loop_has_only_what_its_operations_leave():
    loop = [Span(0, 10, "loop"), Span(1, 3, "a"), Span(3, 6, "b"), Span(4, 5, "inside b")]
    assert seconds(shared([loop])) == {"loop": 5, "a": 2, "b": 2, "inside b": 1}


def test_operations_on_several_threads_share_the_time_between():
    assert seconds(shared([[Span(0, 4, "a")], [Span(2, 6, "b")]])) == {"a": 3, "b": 3}


def test_an_operation_that_runs_others_has_nothing_while_one_of_them_runs_elsewhere():
    threads = [[Span(0, 6, "loop")], [Span(1, 5, "a")]]
    assert seconds(shared(threads, holds_others=lambda what: what == "loop")) == {"loop": 2, "a": 4}


def test_time_of_a_program_in_which_nothing_is_told_belongs_to_the_operation_before():
    thread = [Span(1, 2, "a"), Span(5, 6, "b"), Span(20, 21, "c")]
    assert seconds(shared([thread], running=[Span(1, 8, 1)])) == {"a": 4, "b": 3, "c": 1}
    assert seconds(shared([thread])) == {"a": 1, "b": 1, "c": 1}


spans = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 9)).map(lambda t: Span(t[0], t[0] + t[1], t)), max_size=12
)


@hypothesis.given(st.lists(spans, max_size=3), spans)
def test_moments_are_disjoint_and_cover_what_runs_and_no_more(threads, running):
    moments = list(shared(threads, running))
    assert all(one[1] <= other[0] for one, other in zip(moments, moments[1:]))
    told = [span for thread in threads for span in thread]
    covered = union(Span(start, end, None) for start, end, _ in moments)
    assert sum(s.end - s.start for s in union(told)) <= sum(s.end - s.start for s in covered)
    for span in covered:
        assert within(span, union(told + running)) == pytest.approx(span.end - span.start)


@hypothesis.given(spans)
def test_stretches_of_a_thread_cover_its_spans_once(given):
    stretches = list(innermost(given))
    assert all(one.end <= other.start for one, other in zip(stretches, stretches[1:]))
    assert [s[:2] for s in union(stretches)] == [s[:2] for s in union(given)]


def test_each_step_gets_its_share_of_both_sides_and_what_overlapped():
    one, other = sheets(
        [Span(0, 10, 1), Span(10, 20, 2)],
        host=[Span(1, 4, "alignment"), Span(2, 3, "encoding"), Span(8, 13, "waiting")],
        moments=[(0, 3, ["a"]), (9, 11, ["a", "b"])],
        part=str.upper,
        apart="evaluation",
    )
    assert (one.number, one.wall) == (1, 10) and (other.number, other.wall) == (2, 10)
    assert one.device == {"A": 3.5, "B": 0.5} and other.device == {"A": 0.5, "B": 0.5}
    assert one.host == {"alignment": 2, "encoding": 1, "waiting": 2} and other.host == {"waiting": 3}
    assert one.hidden == {"alignment": 1, "encoding": 1, "waiting": 1} and other.hidden == {"waiting": 1}
    assert one.operations == {"a": 3.5, "b": 0.5}


def test_what_the_device_does_for_an_evaluation_is_apart_whatever_it_is():
    (sheet,) = sheets(
        [Span(0, 10, 1)], [Span(4, 8, "evaluation")], [(1, 5, ["a"]), (6, 7, ["b"])], str.upper, apart="evaluation"
    )
    assert sheet.device == {"A": 3, "B": 0, "evaluation": 2}
