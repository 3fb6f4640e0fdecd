"""Whatever was called before, a trainer answers as a new one on the same weights, and a caller's things stay as they are."""

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from stateful.story import Story, World

CALLS = 10
SFT, _, BY_TEACHER, STRICT = range(4)  # numbers of story.SETTINGS


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What new objects say is found out once for all stories."""
    return World(tmp_path_factory.mktemp("world"))


def make(number, kind="names", **given):
    return f"make_from_{kind}", {"number": number, **given}


CUT_SHORT = "train_and_be_cut_short", {"which": 0, "how": "error", "updates": 1}
INTERRUPTED = "train_and_be_cut_short", {"which": 0, "how": "interrupt", "updates": 1}
TRAIN, TRAIN_SECOND = ("train", {"which": 0}), ("train", {"which": 1})
SAVE, SAVE_BESIDE = ("save_model", {"which": 0, "beside": False}), ("save_model", {"which": 1, "beside": True})
RESUME, RESUME_ANEW = ("resume", {"which": 0, "fresh": False}), ("resume", {"which": 0, "fresh": True})
GONE_FURTHER = "resume_a_run_that_has_gone_further", {"which": 0}
FROM_NOTHING = "resume_from_nothing", {"which": 0}
GAPS = "measure_gaps", {"which": 0}
TOLD = {
    "a trainer whose teacher writes completions is evaluated": [make(BY_TEACHER)],
    "a trainer is evaluated after it has trained": [make(STRICT), TRAIN, GAPS],
    "a trainer trains again": [make(STRICT), TRAIN, TRAIN],
    "a trainer trains again with supervision": [make(SFT), TRAIN, TRAIN, SAVE],
    "a run is resumed by the trainer that made it and by another": [make(STRICT), TRAIN, RESUME, RESUME_ANEW],
    "a run that was interrupted is resumed": [make(SFT), INTERRUPTED, RESUME],
    "a trainer trains again after an error": [make(SFT), CUT_SHORT, TRAIN],
    "a trainer that refuses to resume still has its student": [make(SFT), TRAIN, FROM_NOTHING, GONE_FURTHER],
    "two trainers on the same models take turns": [
        make(STRICT, "models_in_memory", split=False),
        make(BY_TEACHER, "models_in_memory", split=True),
        TRAIN,
        TRAIN_SECOND,
        GAPS,
    ],
    "a trainer is made on the model of another that trains on": [
        make(SFT),
        make(SFT, "the_model_of_a_trainer", which=0),
        TRAIN,
        TRAIN_SECOND,
    ],
    "a trainer saves into the folder that it was made from": [
        make(SFT),
        SAVE,
        make(SFT, "a_saved_folder", which=0),
        TRAIN_SECOND,
        SAVE_BESIDE,
        make(SFT, "a_saved_folder", which=0),
    ],
}


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("order", TOLD)
def test_every_trainer_answers_as_a_new_one_when(order, world):
    story = type("Story", (Story,), {"world": world})()
    try:
        for name, given in TOLD[order]:
            getattr(story, name)(**given)
            story.look()
    finally:
        story.forget()


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("stories", [2, pytest.param(5, marks=pytest.mark.long)])
def test_every_trainer_answers_as_a_new_one_in_orders_drawn_at_random(world, stories):
    how = settings(
        max_examples=stories,
        stateful_step_count=CALLS,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # to shrink takes minutes; run_long.py --shrink does it by hand
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    run_state_machine_as_test(type("Story", (Story,), {"world": world}), settings=how)
