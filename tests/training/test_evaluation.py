"""Which update was the best, and the measures of several sets."""

import math
import pathlib

import pytest

from gold_jax.training.evaluation import BestModel, Measured, compared, over_sets


def test_the_best_evaluation_and_the_best_that_is_saved_are_told_apart():
    best = BestModel("eval_loss", False)
    assert best.state() is None and not best.take_saved(1, "checkpoint-1")  # nothing is measured
    for step, loss in enumerate([math.nan, 2.0, 3.0, math.inf], start=1):
        best.take({"eval_loss": loss}, step)
        if step != 2:
            assert best.take_saved(step, f"checkpoint-{step}") == (step == 3)
    assert (best.best, best.saved, best.checkpoint) == (Measured(2.0, 2), Measured(3.0, 3), "checkpoint-3")
    assert best.saved_is_better(4) and not best.saved_is_better(3)
    again = BestModel("eval_loss", False)
    again.restore(best.state(), pathlib.Path("run"))
    assert (again.best, again.saved, again.checkpoint) == (best.best, best.saved, "run/checkpoint-3")
    assert not again.saved_is_better(4)  # nothing is measured since
    with pytest.raises(ValueError, match="'eval_loss', which no evaluation measures; there are eval_other"):
        best.take({"eval_other": 1.0}, 5)


def test_the_higher_is_the_better_where_that_is_so_and_without_a_metric_nothing_is():
    best, none = BestModel("exact_match", True), BestModel(None, None)
    for step, value in enumerate([0.5, 0.25, 0.75], start=1):
        best.take({"eval_exact_match": value}, step)
        none.take({"eval_exact_match": value}, step)
    assert best.best == Measured(0.75, 3) and none.best is None


def test_several_sets_are_measured_one_by_one_under_their_names():
    def measure(rows):
        return {"eval_loss": float(len(rows))}

    found = over_sets(measure, {"a": [1], "b": [1, 2]})
    assert found == {"eval_a_loss": 1.0, "eval_b_loss": 2.0} and over_sets(measure, [1]) == {"eval_loss": 1.0}
    rows = compared({"eval_a_loss": 3.0}, found, {"eval_b_loss": 0.5}, {"a": [1], "b": [1, 2]})
    assert rows == [("a loss", 3.0, 1.0, None), ("b loss", None, 2.0, 0.5)]
