"""`gold_jax.plan`: what goes in, what comes out."""

import importlib.util
import json
import os
import pathlib
import shlex
import subprocess
import sys
from unittest import mock

import huggingface_hub
import pytest

from gold_jax import cli, inspect_pair, plan
from gold_jax.planning import compiled
from gold_jax.planning.advice import flags_of
from gold_jax.planning.hardware import has_gpu_compiler

ROOT = pathlib.Path(__file__).parents[1]
GPUS = "--topology gpu:8xh100-80gb"
NEEDS_COMPILER = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed"
)
NEEDS_GPU_COMPILER = pytest.mark.skipif(
    not has_gpu_compiler(), reason="the GPU compiler is not installed: pip install 'gold_jax[plan-cuda]'"
)
# One layer over a wide vocabulary: quickly compiled, and too much for a chip where each has all of it.
WIDE = {
    "model_type": "llama",
    "vocab_size": 131072,
    "hidden_size": 8192,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture(autouse=True)
def no_gpu_compiler(monkeypatch):
    """GPUs are planned by formula in this process, whether or not their compiler is installed."""
    monkeypatch.setattr(compiled, "has_gpu_compiler", lambda: False)


@pytest.fixture
def told(capsys, monkeypatch):
    """Runs the command in this process; gives what it prints."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # which the variable sets on import
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(plan, "prepare", lambda: None)  # this process's JAX has its platform

    def run(line: str) -> str:
        cli.run("gold_jax.plan", plan.main, shlex.split(line))
        return capsys.readouterr().out

    return run


@pytest.fixture
def planned(told, world):
    """Runs the command on the two models with --json; gives the object."""

    def run(line: str = GPUS) -> dict:
        return json.loads(told(f"{line} {pair(world)} --json"))

    return run


@pytest.fixture
def refused(told, capsys):
    """Runs the command, which must end in an error; gives the one paragraph that it says."""

    def run(line: str) -> str:
        with pytest.raises(SystemExit) as end:
            told(line)
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.startswith("gold_jax.plan: ") and said.count("\n") == 1
        return said

    return run


@pytest.fixture
def wide(tmp_path) -> pathlib.Path:
    """A folder with the wide model's config alone."""
    (tmp_path / "config.json").write_text(json.dumps(WIDE))
    return tmp_path


def pair(world: pathlib.Path) -> str:
    return f"--model_name_or_path {world}/student --teacher_model_name_or_path {world}/teacher"


def in_a_process(line: str) -> str:
    """What the command prints in a process of its own, in which it chooses JAX's platform."""
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(
        [sys.executable, "-m", "gold_jax.plan", *shlex.split(line)],
        cwd=ROOT,
        env=env | {"HF_HUB_OFFLINE": "1", "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_report_of_two_models_fits_eighty_columns(told, world):
    shown = told(f"{GPUS} {pair(world)} --max_length 256")
    for part in ("student", "teacher", "loss", "update", "sampling", "devices", "mesh          fsdp=8"):
        assert f"  {part} " in shown
    assert "64 rows of 256 tokens, 8 at a time on each device" in shown
    assert "It fits" in shown and "Nothing was compiled" in shown and "would help" not in shown
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown


def test_json_is_one_object_whose_parts_add_up(planned):
    found = planned()
    memory, time = found["memory"], found["time"]
    assert found["fits"] and not found["compiled"] and found["advice"] == [] and found["search"] is None
    assert [moment["program"] for moment in memory["moments"]] == ["teacher", "student", "prefill", "decoding"]
    for moment in memory["moments"]:
        assert moment["total"] == sum(moment["parts"].values()) and moment["error"] is None
    fullest = max(memory["moments"], key=lambda moment: moment["total"])
    assert memory["fullest"] == fullest["program"]
    assert memory["peak_bytes"] == sum(memory["always"].values()) + fullest["total"]
    assert memory["free_bytes"] == memory["limit_bytes"] - memory["peak_bytes"]
    assert time["seconds"] == pytest.approx(sum(phase["least"] for phase in time["phases"]))
    for phase in time["phases"]:
        assert phase["least"] == max(phase["seconds"].values()) == phase["seconds"][phase["slowest"]]
    assert time["tokens_per_second"] == pytest.approx(found["update"]["tokens"] / time["seconds"])
    assert 0 < time["model_flops_share"] < 1


def test_gpus_leave_a_quarter_of_their_memory(planned):
    found = planned()
    assert found["memory"]["limit_bytes"] == int(0.75 * found["topology"]["memory_bytes"])


def test_vocabularies_are_matched_by_the_tokenizers_that_are_here(planned, world):
    expected = inspect_pair(world / "student", world / "teacher", "a", models=False).vocabularies
    found = planned(f"{GPUS} --matched 10")["vocabularies"]
    assert found["how"] == "tokenizers" and not found["one"]
    # Stop tokens, of which each side may have one of another spelling, are matched besides.
    assert expected.surfaces.shared <= found["matched"] <= expected.surfaces.shared + 1


def test_one_tokenizer_makes_one_vocabulary(told, world):
    found = json.loads(
        told(f"{GPUS} --model_name_or_path {world}/student --teacher_model_name_or_path {world}/sibling --json")
    )
    assert found["vocabularies"] == {"matched": None, "how": "tokenizers", "one": True}
    assert found["loss"].startswith("gkd")


def test_without_tokenizers_the_share_is_given_or_assumed_and_said(told):
    line = f"{GPUS} --model_name_or_path meta-llama/Llama-3.2-1B --teacher_model_name_or_path Qwen/Qwen3-4B"
    assert "92,344 matched (assumed, 72%" in " ".join(told(line).split())
    assert "109,000 matched (by --matched)" in told(f"{line} --matched 109000")


def test_without_a_teacher_it_is_fine_tuning(told, world):
    line = f"{GPUS} --model_name_or_path {world}/student --json"
    found = json.loads(told(line))
    assert found["teacher"] is None and found["vocabularies"] is None and found["loss"] == "cross-entropy"
    assert [moment["program"] for moment in found["memory"]["moments"]] == ["student"]
    assert set(found["memory"]["always"]) == {"student", "optimizer"} and found["notes"] == []
    # A flag of distillation's alone, and still no teacher.
    (note,) = json.loads(told(f"{line} --lmbda 0.25"))["notes"]
    assert "There is no teacher" in note


def test_micro_batches_keep_gradients_and_have_programs_of_their_own(planned):
    one, four = planned(), planned(f"{GPUS} --gradient_accumulation_steps 4")
    moments = {moment["program"]: moment for moment in four["memory"]["moments"]}
    assert {"student", "student, further micro-batches", "optimizer"} < set(moments)
    assert moments["optimizer"]["parts"]["gradients"] == four["memory"]["always"]["student"]
    assert four["update"]["rows"] == 4 * one["update"]["rows"]


def test_nothing_is_sampled_where_nothing_is_on_policy(planned):
    found = planned(f"{GPUS} --lmbda 0")
    assert found["update"]["sampled_rows"] == 0
    assert [phase["name"] for phase in found["time"]["phases"]] == ["teacher", "student"]


def test_mesh_and_layouts_are_as_asked(planned, told, world):
    alone, cut = planned(f"{GPUS} --mesh data=8"), planned(f"{GPUS} --mesh data=8 --layout full")
    assert alone["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    # Each device of `data` has all of the student, or a share of it.
    assert alone["memory"]["always"]["student"] == 4 * alone["student"]["parameters"]
    assert cut["memory"]["always"]["student"] < alone["memory"]["always"]["student"] / 7
    assert cut["memory"]["always"]["teacher"] == alone["memory"]["always"]["teacher"]
    shared = planned(f"{GPUS} --mesh data=8 --teacher_layout full")
    assert shared["memory"]["always"]["teacher"] < alone["memory"]["always"]["teacher"]
    both = planned(f"{GPUS} --mesh fsdp=2,tensor=2,data=2")
    assert both["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2} and set(both["time"]["sent_bytes"]) >= {"tensor"}
    shown = told(f"{GPUS} {pair(world)} --mesh data=8 --teacher_layout full")
    assert "data=8; layout of the teacher full" in shown


def test_tensor_that_does_not_divide_the_heads_is_noted(planned):
    notes = planned(f"{GPUS} --mesh tensor=4")["notes"]
    assert [("student" in note, "teacher" in note) for note in notes] == [(True, False), (False, True)]
    assert all("tensor=4 does not divide" in note for note in notes)


def test_one_device_sends_nothing(planned, told, world):
    found = planned("--topology gpu:h100-80gb")
    assert not any(found["time"]["sent_bytes"].values()) and found["topology"]["devices"] == 1
    assert "  mesh          one device" in told(f"--topology gpu:h100-80gb {pair(world)}")


def test_what_does_not_fit_says_what_to_change(told):
    line = (
        "--topology gpu:8xl4-24gb --model_name_or_path Qwen/Qwen3-8B --max_length 4096 --per_device_train_batch_size 8"
    )
    found = json.loads(told(f"{line} --json"))
    memory, advice = found["memory"], found["advice"]
    assert not found["fits"] and memory["free_bytes"] < 0 and "It does not fit" in found["findings"][0]
    assert any("--per_device_train_batch_size" in one["flags"] for one in advice)
    assert any(one["fits"] for one in advice)
    for one in advice:
        assert one["peak"] == memory["peak_bytes"] - one["saves"]
        assert one["fits"] == (one["peak"] <= memory["limit_bytes"])
    shown = told(line)
    assert "what would help, by the analytic model" in shown and advice[0]["flags"].split()[0] in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_run_with_the_advised_flags_fits(told):
    line = (
        "--topology gpu:8xl4-24gb --model_name_or_path Qwen/Qwen3-8B --max_length 4096 --per_device_train_batch_size 8"
    )
    before = json.loads(told(f"{line} --json"))
    one = next(one for one in before["advice"] if one["fits"])
    after = json.loads(told(f"{line} {one['flags']} --json"))
    assert after["fits"] and after["memory"]["peak_bytes"] == one["peak"]


def test_the_search_ranks_several_meshes(planned, told, world):
    found = planned(f"{GPUS} --search --search_limit 5")["search"]
    assert len(found) == 5 and sum(one["asked"] for one in found) == 1
    assert len({tuple(one["mesh"].values()) for one in found}) >= 2
    speeds = [one["tokens_per_second_per_chip"] for one in found if one["fits"]]
    assert len(speeds) == 5 and speeds == sorted(speeds, reverse=True)
    shown = told(f"{GPUS} {pair(world)} --search")
    assert "ways to spread it, by the analytic model" in shown and "The first: --mesh" in shown
    # No number is cut off.
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown


def test_the_first_of_a_search_is_what_its_flags_make(planned):
    best = planned(f"{GPUS} --search")["search"][0]
    again = planned(f"{GPUS} {best['flags']}")
    assert again["memory"]["peak_bytes"] == best["peak_bytes"] and again["mesh"] == best["mesh"]
    assert again["time"]["seconds"] == pytest.approx(best["seconds"])


def test_what_is_asked_for_is_in_a_search_of_one(planned):
    (one,) = planned(f"{GPUS} --search --search_limit 1 --mesh data=2,fsdp=4")["search"]
    assert one["asked"] and one["flags"].startswith("--mesh data=2,fsdp=4 ")


def test_plan_run_gives_a_report_and_tells_what_it_does(world, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    heard = []
    model = plan.ModelArguments(model_name_or_path=str(world / "student"))
    training = plan.GOLDConfig(output_dir="x", teacher_model_name_or_path=str(world / "teacher"))
    report = plan.plan_run(model, training, plan.PlanArguments(topology="gpu:2xa100-80gb"), heard.append)
    assert (
        report.plan.fits and "reading tokenizers" in heard and flags_of(report.plan.request).startswith("--mesh fsdp=2")
    )


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("plan_*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_are_planned_without_the_hub(recipe, told):
    found = json.loads(told(f"--config {recipe} {GPUS} --json"))
    assert found["fits"] and found["update"]["length"] == 2560 and found["update"]["sampled_rows"] == 32


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "--topology is missing: TYPE:SHAPE for a TPU slice"),
        ("--topology v9:2x2", "'v9' in 'v9:2x2' is not a known TPU"),
        ("--topology gpu:8xa100", "It could be a100-40gb or a100-80gb"),
        ("--topology nonsense", "'nonsense' is not a topology"),
        (f"{GPUS} --mesh fsdp=3", "which takes 3 devices, and there are 8"),
        (f"{GPUS} --matched 420", "--matched is 420; it must be between 1 and 419"),
        (f"{GPUS} --matched 0", "--matched is 0; it must be at least 1"),
        (f"{GPUS} --search_limit 0", "--search_limit is 0; it must be at least 1"),
        (f"{GPUS} --serch", "there is no flag --serch; the nearest is --search"),
    ],
)
def test_what_is_wrong_with_a_flag_is_said_in_one_paragraph(line, says, refused, world):
    assert says in refused(f"{line} {pair(world)}")


def test_what_is_wrong_with_a_model_is_said_in_one_paragraph(refused, world):
    assert "--model_name_or_path is missing" in refused(GPUS)
    said = refused(f"{GPUS} --model_name_or_path Qwen/Qwen3-5B")
    assert "the student 'Qwen/Qwen3-5B' is neither a folder here" in said
    assert "Qwen/Qwen3-4B" in said.partition("Known without the hub are ")[2]
    said = refused(f"{GPUS} --model_name_or_path {world}/student --teacher_model_name_or_path ./no/where")
    assert "the teacher './no/where' is not a folder here, nor the name of a model on the hub" in said
    assert "has no config.json" in refused(f"{GPUS} --model_name_or_path {world}/student_tokenizer")


def test_a_missing_compiler_is_said_in_one_paragraph(refused, world, monkeypatch):
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else known(name, *rest)
    )
    said = refused(f"--topology v5e:2x4 {pair(world)}")
    assert "v5e:2x4" in said and "pip install 'gold_jax[tpu]'" in said and "gpu:8xh100-80gb" in said


def test_the_command_needs_no_device_and_no_terminal(world):
    found = json.loads(in_a_process(f"--topology gpu:8xl4-24gb {pair(world)} --json"))
    assert found["fits"] and found["topology"]["devices"] == 8


def test_why_nothing_is_compiled_for_gpus_is_said(told, world, monkeypatch):
    def why(line=GPUS):
        found = json.loads(told(f"{line} {pair(world)} --json"))
        assert not found["compiled"] and found["time"]["expected_seconds"] is None
        return found["findings"][-1]

    assert why().startswith("Nothing was compiled: with `pip install 'gold_jax[plan-cuda]'` the run's programs are")
    assert why("--topology gpu:l4").startswith("Nothing was compiled: gold_jax has no description of the l4-24gb to")
    monkeypatch.setattr(compiled, "has_gpu_compiler", lambda: True)
    options = {"side_effect": RuntimeError("no field named clock_rate_ghz\nand more")}
    monkeypatch.setattr(compiled, "describe", mock.Mock(**options))
    assert "does not know this card (no field named clock_rate_ghz). The resident memory is exact" in why()


@pytest.mark.slow
@NEEDS_COMPILER
def test_a_pair_is_compiled_for_a_slice_that_is_not_here(world):
    # Short, as to compile takes longer for more; a chunk is computed whole, and should not be much larger.
    lengths = "--max_length 64 --max_new_tokens 16 --loss_chunk 256"
    found = json.loads(in_a_process(f"--topology v5e:2x2 {pair(world)} --mesh fsdp=2,tensor=2 {lengths} --json"))
    memory = found["memory"]
    assert found["fits"] and found["compiled"] and found["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
    assert memory["limit_bytes"] == found["topology"]["memory_bytes"]
    assert [moment["program"] for moment in memory["moments"]] == ["teacher", "student", "prefill", "decoding"]
    for moment in memory["moments"]:
        assert moment["error"] is None and moment["seconds"] > 0
        assert moment["total"] == sum(moment["parts"].values()) and min(moment["parts"].values()) >= 0
    assert found["compile_seconds"] == pytest.approx(sum(moment["seconds"] for moment in memory["moments"]))
    most = max(moment["total"] for moment in memory["moments"])
    assert memory["peak_bytes"] == sum(memory["always"].values()) + most and memory["always"]["programs"] > 0
    assert {"fsdp", "tensor"} <= set(found["time"]["sent_bytes"])
    for phase in found["time"]["phases"]:
        assert 0.7 < phase["flops"] / phase["model_flops"] < 3 and phase["hbm_bytes"] > 0, phase["name"]


@pytest.mark.slow
@NEEDS_COMPILER
def test_what_the_compiler_refuses_does_not_fit_and_gets_advice(wide):
    line = f"--topology v5e:2x2 --model_name_or_path {wide} --max_length 128 --per_device_train_batch_size 2 --json"
    found = json.loads(in_a_process(f"{line} --mesh data=4"))
    (moment,) = found["memory"]["moments"]
    assert not found["fits"] and "RESOURCE_EXHAUSTED" in moment["error"]
    assert any("refused by the compiler" in sentence for sentence in found["findings"])
    assert found["memory"]["peak_bytes"] > found["memory"]["limit_bytes"]
    assert "--mesh fsdp=4" in [one["flags"] for one in found["advice"] if one["fits"]]


@pytest.mark.slow
@NEEDS_GPU_COMPILER
@pytest.mark.parametrize(("topology", "mesh"), [("gpu:1xh200", "auto"), ("gpu:2xa100-80gb", "fsdp=2")])
def test_a_pair_is_compiled_for_gpus_that_are_not_here(topology, mesh, world):
    lengths = "--max_length 64 --max_new_tokens 16 --attn_implementation cudnn"
    found = json.loads(in_a_process(f"--topology {topology} {pair(world)} --mesh {mesh} {lengths} --json"))
    memory, time = found["memory"], found["time"]
    assert found["fits"] and found["compiled"] and "are chosen on the card" in found["findings"][-1]
    assert [moment["program"] for moment in memory["moments"]] == ["teacher", "student", "prefill", "decoding"]
    for moment in memory["moments"]:
        assert moment["error"] is None and moment["seconds"] > 0 and min(moment["parts"].values()) >= 0
    assert set(time["sent_bytes"]) == ({"fsdp"} if "fsdp" in mesh else set())
    for phase in time["phases"]:
        assert 0.7 < phase["flops"] / phase["model_flops"] < 3 and phase["hbm_bytes"] > 0, phase["name"]
    assert (time["expected_seconds"] or 0) > time["seconds"] or "a100" in topology


@pytest.mark.slow
@NEEDS_GPU_COMPILER
def test_what_cudnn_cannot_do_on_a_card_is_said_in_one_sentence(wide):
    (wide / "config.json").write_text(json.dumps(WIDE | {"head_dim": 256}))
    line = f"--topology gpu:a100-80gb --model_name_or_path {wide} --max_length 128 --attn_implementation cudnn"
    with pytest.raises(AssertionError, match="gpu:1xa100-80gb cannot do what the run asks for: .*128"):
        in_a_process(line)
