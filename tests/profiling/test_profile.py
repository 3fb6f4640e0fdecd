import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from flax import nnx
from rich.console import Console
from traces import event, operation, plane, step, write

from gold_jax import GOLDConfig, GOLDTrainer, SFTConfig, SFTTrainer
from gold_jax.profiling import capture, print_summary, summarize, trace_steps
from gold_jax.profiling.summary import DEVICE, HEAVIEST, HOST
from gold_jax.step_ranges import read_steps
from gold_jax.training.annotations import PREFIX, annotate


@pytest.mark.parametrize(
    "given, steps",
    [
        (["3"], [3]),
        (["7", "3"], [3, 7]),
        (["3-5", "9", "4-6"], [3, 4, 5, 6, 9]),
        ([3, 7], [3, 7]),
        (["none"], []),
        (None, []),
    ],
)
def test_steps_are_numbers_and_ranges(given, steps):
    assert read_steps("flag", given) == steps
    assert read_steps("flag", steps) == steps


@pytest.mark.parametrize("given", ["0", "0-2", "5-3", "3-", "-3", "3-5-7", "x", "1.5", "none"])
def test_what_is_no_step_is_an_error_that_says_what_is(given):
    with pytest.raises(ValueError, match=rf"--flag has '{given}'; .* such as 3-5,9"):
        read_steps("flag", ["1", given])


def test_steps_beyond_the_runs_end_are_an_error_that_names_it():
    assert GOLDConfig(profile_steps="2-4,4", max_steps=4).profile_steps == [2, 3, 4]
    assert GOLDConfig(profile_steps=3, max_steps=4).profile_steps == [3]
    with pytest.raises(ValueError, match=r"--profile_steps has '3-5', but the run ends with step 4"):
        GOLDConfig(profile_steps="3-5", max_steps=4)


def write_two(folder):
    """Two traces, of steps 1 and 4, with known times."""
    scopes = {
        "dot": ("student forward", "jit(f)/jvp(student)/while/body/closed_call/dot_general"),
        "add": ("optimizer", "jit(f)/optimizer/add"),
    }
    (folder / "scopes.json").write_text(json.dumps({"jit_f": [scopes]}))
    for number, operations in {1: [("dot", 1, 4), ("add", 4, 6)], 4: [("dot", 1, 2), ("dot", 2, 4)]}.items():
        (folder / f"step_{number}").mkdir(parents=True)
        work = [event(PREFIX + name, s, e) for name, s, e in (("alignment", 0, 2), ("padding and batches", 3, 4))]
        line = plane(
            "/host:CPU",
            {
                "python": [event("train", 0, 8, step_num=number), *work],
                "worker": [operation(*o) for o in operations],
            },
        )
        write(folder / f"step_{number}" / "host.xplane.pb", line)


def test_a_summary_holds_each_step_their_mean_and_the_heaviest_operations(tmp_path):
    write_two(tmp_path)
    found = summarize(tmp_path)
    assert [s["step"] for s in found["steps"]] == [1, 4] and found["device"] == "CPU"
    one, four = found["steps"]
    assert {k: v for k, v in one["device"].items() if v} == {"student forward": 3, "optimizer": 2, "idle": 3}
    assert {k: v for k, v in four["device"].items() if v} == {"student forward": 3, "idle": 5}
    assert {k: v for k, v in one["host"].items() if v} == {"alignment": 2, "padding and batches": 1, "other": 5}
    assert one["ahead"] == {"seconds": 3, "hidden": 2}
    assert found["mean"]["wall"] == 8 and found["mean"]["device"]["optimizer"] == 1
    scope = "jit(f)/jvp(student)/while/body/closed_call/dot_general"
    assert found["operations"] == [
        {"name": "dot", "part": "student forward", "scope": scope, "seconds": 3, "count": 1.5},
        {"name": "add", "part": "optimizer", "scope": "jit(f)/optimizer/add", "seconds": 1, "count": 0.5},
    ]


def printed(summary, width=100):
    console = Console(file=io.StringIO(), width=width)
    print_summary(console, summary, "here")
    return console.file.getvalue()


def test_the_table_shows_parts_in_seconds_and_per_cent_what_overlapped_and_operations(tmp_path):
    write_two(tmp_path)
    lines = [line.split() for line in printed(summarize(tmp_path)).splitlines()]
    assert "step 8.000 100.0 8.000 8.000".split() in lines
    assert "student forward 3.000 37.5 3.000 3.000".split() in lines
    assert "optimizer 1.000 12.5 2.000 0.000".split() in lines
    assert "idle 4.000 50.0 3.000 5.000".split() in lines
    assert "while the device is busy 2.000 25.0 2.000 2.000".split() in lines
    assert not any(line[:2] == ["teacher", "forward"] for line in lines)
    text = " ".join(word for line in lines for word in line)
    assert "took the host 3.000 s, of which 2.000 s (67 %) while the device was busy" in text
    assert "3.000 s 37.5 % 1.5 × dot student forward: while/body/dot_general" in text
    assert "compiled" not in text


def test_what_an_evaluation_encodes_is_not_for_the_next_update(tmp_path):
    work = [("rendering and encoding", 0, 1), ("evaluation", 2, 6), ("rendering and encoding", 3, 4)]
    compiling = event("backend_compile_and_load", 4, 5)
    write(tmp_path / "a.xplane.pb", step(1, 0, 8, compiling, *(event(PREFIX + name, s, e) for name, s, e in work)))
    (one,) = summarize(tmp_path)["steps"]
    assert {name: spent for name, spent in one["host"].items() if spent} == {
        "rendering and encoding": 1,
        "evaluation": 3,
        "compiling programs": 1,
        "other": 3,
    }
    assert one["ahead"]["seconds"] == 1


def test_steps_that_compiled_are_named(tmp_path):
    host = step(3, 0, 8, event("backend_compile_and_load", 1, 3))
    write(tmp_path / "a.xplane.pb", host)
    assert "New programs were compiled in step 3," in " ".join(printed(summarize(tmp_path)).split())


def test_a_folder_without_a_trace_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no trace"):
        summarize(tmp_path)


def turn(numbers, folder, total=5, work=lambda step: None):
    """A loop over profiled steps; returns what was shown."""
    shown = []
    x = jnp.ones(8)
    double = jax.jit(lambda x: 2 * x)
    for at in trace_steps(range(total), numbers, folder, block=x.block_until_ready, report=shown.append):
        work(at)
        with annotate("alignment"):
            x = double(x)
    return shown


def test_neighbouring_steps_share_a_trace_and_the_summary_comes_once_at_the_end(tmp_path):
    seen = []
    (shown,) = turn([1, 2, 4], tmp_path / "profile", work=seen.append)
    assert seen == [0, 1, 2, 3, 4]
    assert sorted(p.name for p in (tmp_path / "profile/plugins/profile").iterdir()) == ["step_4", "steps_1-2"]
    assert [s["step"] for s in shown["steps"]] == [1, 2, 4]
    assert shown == json.loads((tmp_path / "profile/summary.json").read_text()) == summarize(tmp_path / "profile")


def test_an_earlier_runs_traces_are_not_this_ones(tmp_path):
    turn([1], tmp_path)
    (shown,) = turn([3], tmp_path)
    assert [s["step"] for s in shown["steps"]] == [3]


def test_without_steps_nothing_is_traced_or_written(tmp_path):
    assert turn([], tmp_path / "profile") == [] and not (tmp_path / "profile").exists()


def test_an_error_in_a_step_ends_its_trace(tmp_path):
    def fail(step):
        raise KeyError("broken")

    with pytest.raises(KeyError):
        turn([1], tmp_path / "one", work=fail)
    assert turn([1], tmp_path / "other")[0]["steps"]


def test_a_trace_that_cannot_be_read_is_told_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(capture, "summarize", lambda path: (_ for _ in ()).throw(ValueError("torn")))
    (shown,) = turn([2], tmp_path)
    assert shown == {"failed": "ValueError: torn"}
    assert "could not be summarised: ValueError: torn" in printed(shown)


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """The same small run with and without a profile: `(trainer, output folder, what was printed)` of either."""
    found = {}
    for steps in ("2-3", None):
        out = tmp_path_factory.mktemp("run")
        console = Console(file=io.StringIO(), width=120)
        args = GOLDConfig(
            output_dir=str(out), profile_steps=steps, max_steps=3, lmbda=0.6, loss="projected", max_completion_length=8, learning_rate=1e-3,
            per_device_train_batch_size=1, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=2,
            save_strategy="steps", save_steps=2, logging_steps=1,
        )  # fmt: skip
        trainer = GOLDTrainer(
            str(world / "student"), str(world / "teacher"), args, str(world / "data" / "train.jsonl"),
            eval_dataset=str(world / "data" / "test.jsonl"), console=console,
        )  # fmt: skip
        trainer.train()
        found[steps] = trainer, out, console.file.getvalue()
    return found


def test_a_profiled_run_learns_what_any_other_does(runs):
    (one, _, _), (other, _, _) = runs.values()
    same = jax.tree.map(np.array_equal, *(nnx.state(t.model) for t in (one, other)))
    assert all(jax.tree.leaves(same))
    logs = [[{k: v for k, v in row.items() if k not in tiny.TIMED} for row in t.log_history] for t in (one, other)]
    assert logs[0] == logs[1]


def test_a_run_without_the_flag_has_nothing_to_do_with_profiles(runs):
    _, out, text = runs[None]
    assert not (out / "profile").exists() and "Where the time goes" not in text


def test_the_parts_of_every_step_add_up_to_its_time(runs):
    _, out, text = runs["2-3"]
    found = json.loads((out / "profile" / "summary.json").read_text())
    assert [s["step"] for s in found["steps"]] == [2, 3] and "Where the time goes" in text
    for one in (*found["steps"], found["mean"]):
        for side in ("device", "host"):
            assert sum(one[side].values()) == pytest.approx(one["wall"])
            assert all(spent >= -1e-9 for spent in one[side].values())
        assert 0 <= one["ahead"]["hidden"] <= one["ahead"]["seconds"] <= one["wall"]


def test_a_run_on_and_off_policy_shows_every_part(runs):
    found = summarize(runs["2-3"][1] / "profile")
    mean = found["mean"]
    assert {name for name, spent in mean["device"].items() if spent > 0} >= set(DEVICE)
    assert {name for name, spent in mean["host"].items() if spent > 0} >= set(HOST) - {"compiling programs"}
    named = sum(spent for name, spent in mean["device"].items() if name not in ("idle", "other"))
    assert mean["device"]["other"] < 0.05 * named
    assert len(found["operations"]) == HEAVIEST
    evaluated = [s["device"]["evaluation"] > 0 for s in found["steps"]]
    assert evaluated == [True, False]


def test_fine_tuning_is_profiled_too(world, tmp_path):
    args = SFTConfig(
        output_dir=str(tmp_path), profile_steps="1", max_steps=2, per_device_train_batch_size=2, save_strategy="no"
    )
    SFTTrainer(
        str(world / "student"), args, str(world / "data" / "train.jsonl"), console=Console(file=io.StringIO())
    ).train()
    mean = summarize(tmp_path / "profile")["mean"]
    for name in ("student forward", "student backward", "loss, both ways", "optimizer"):
        assert mean["device"][name] > 0
    assert mean["host"]["rendering and encoding"] > 0 and mean["host"]["alignment"] == 0


def test_a_step_beyond_the_epochs_is_an_error_before_the_first_update(world, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), profile_steps="3", num_train_epochs=1, per_device_train_batch_size=2)
    with pytest.raises(ValueError, match=r"--profile_steps has '3', but the run ends with step 2"):
        SFTTrainer(str(world / "student"), args, str(world / "data" / "train.jsonl"))
