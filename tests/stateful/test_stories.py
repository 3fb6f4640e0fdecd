"""Whatever was called before, a trainer answers as a new one on the same weights, and a caller's things stay as they are."""

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from stateful.story import Story, World

pytestmark = pytest.mark.usefixtures("quick_compiles", "own_cache")
STORIES, CALLS = 12, 12


@pytest.mark.slow
def test_in_any_order_of_calls_trainers_answer_as_new_ones_do(tmp_path):
    machine = type("Story", (Story,), {"world": World(tmp_path)})
    how = settings(
        max_examples=STORIES,
        stateful_step_count=CALLS,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # to shrink takes minutes; run_long.py --shrink does it by hand
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    run_state_machine_as_test(machine, settings=how)
