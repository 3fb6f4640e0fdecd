"""Random orders of calls of the Python surface. After each, every trainer answers as a new one with the same weights does.

`run_long.py` tells longer stories by hand; `test_stories.py` a few fixed ones.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import signal
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

import datasets
import jax
import numpy as np
import tiny_models as tiny
from flax import nnx
from hypothesis import currently_in_test_context, note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from rich.console import Console
from run_files import metrics
from stateful.owned import Owned, weights

from gold_jax import (
    GOLDConfig,
    GOLDTrainer,
    SFTConfig,
    SFTTrainer,
    load_model,
    load_model_and_tokenizer,
    measure_gaps,
    sample_completions,
    score_completions,
)
from gold_jax.loading import load_tokenizer
from gold_jax.quickstart import resolve
from gold_jax.text.data import load_examples
from gold_jax.training.checkpointing import current_run, run_of

STEPS, SAVED_AT = 3, 2  # one checkpoint lies on the way of a run
LIVE = 3  # trainers that live at once
BASE = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": SAVED_AT,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 3,
    "max_length": 64,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "seed": 5,
}
DISTILL = BASE | {"max_completion_length": 6, "uld_sort": "xla"}  # what the host sorts for cannot be kept compiled
SETTINGS = {
    "sft": BASE,
    "gold": DISTILL | {"loss": "gold", "lmbda": 0.5, "eval_strategy": "steps", "eval_steps": 2},
    "projected by the teacher": DISTILL | {"loss": "projected", "lmbda": 0.5, "seq_kd": True},
    "strict": DISTILL | {"loss": "strict", "lmbda": 1.0},
}
MORE = {
    "gold by the teacher": DISTILL | {"loss": "gold", "lmbda": 0.0, "seq_kd": True},
    "events": DISTILL | {"loss": "events", "lmbda": 0.0, "log_completions": True, "num_completions_to_print": 0},
    "alm": DISTILL | {"loss": "alm", "lmbda": 0.5, "eval_on_start": True, "predict_with_generate": True},
    "accumulated": DISTILL | {"loss": "gold", "lmbda": 0.5, "gradient_accumulation_steps": 2, "num_generations": 2},
    "sft of whole sequences": BASE | {"completion_only_loss": False, "save_strategy": "no"},
}
# All of a length, so that few shapes are compiled.
SHORT = [(f"{x} dogs?", f"The fox {y}.") for x in ("24", "48") for y in ("jumps", "is there", "x + 1", "größer")]
CHECKS = ("answers", "weights", "logs", "owned")
PAIRS = {"tiny": ("student", "teacher"), "embedded": ("embedded:student", "embedded:teacher")}


class Rows(Sequence):
    """Rows that can be told to fail, or to be interrupted, when they are read. (Of a list the trainer reads a copy.)"""

    def __init__(self, rows):
        self.rows = list(rows)
        self.left: int | None = None
        self.how = "error"

    def __len__(self):
        return len(self.rows)

    def arm(self, how: str, reads: int) -> None:
        """Fails at a later read; `how`: "error" or "interrupt"."""
        self.how, self.left = how, reads

    def __getitem__(self, index):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = None
                if self.how == "error":
                    raise OSError("the disk with the rows is gone")
                signal.raise_signal(signal.SIGINT)
        return self.rows[index]


@contextlib.contextmanager
def usual_interrupts():
    """Ctrl-C does what Python has it do, whatever the process that runs the tests made of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@dataclasses.dataclass
class Run:
    """What a run comes to: the weights, the closing measures, the log."""

    weights: str
    result: dict[str, float]
    log: list[dict]


class World:
    """The pair on disk, and what a new object says of some weights, looked up by their digest."""

    def __init__(self, folder: pathlib.Path, pair: str = "tiny", settings: dict | None = None, checks=CHECKS):
        self.folder, self.checks = folder, set(checks)
        self.settings = SETTINGS if settings is None else settings
        # The teacher's embedding is its head, whose rows are reordered while it teaches: what disturbs them shows.
        tiny.write_model(folder / "student", "qwen3", tiny.student_tokenizer())
        tiny.write_model(folder / "teacher", "llama", tiny.teacher_tokenizer(), seed=1)
        self.student, self.teacher = (n if ":" in n else str(folder / n) for n in PAIRS[pair])
        self.paths = [resolve(n) if ":" in n else n for n in (self.student, self.teacher)]
        rows = [{"prompt": q, "completion": a} for q, a in SHORT[:6]]
        rows += [tiny.conversation(*row) for row in SHORT[6:]]
        if pair == "embedded":
            rows = [
                {"prompt": f"How do you say {n}?", "completion": f"{n} is one two three."} for n in range(5160, 5168)
            ]
        self.rows, self.eval_rows = rows, [{k: r[k] for k in ("prompt", "completion")} for r in rows[:3]]
        self.prompts = [row["prompt"] for row in self.eval_rows]
        self.known: dict[tuple, Any] = {}
        self.compared = self.made = 0

    def trainer(self, setting: str, output: pathlib.Path, student: Any, teacher: Any = None, **given):
        """A trainer and the settings it was given."""
        changes = given.pop("changes", {})
        settings = self.settings[setting] | {"output_dir": str(output)} | changes
        given = {"train_dataset": self.rows, "eval_dataset": self.eval_rows, **given}
        console = Console(quiet=True)
        self.made += 1
        if "loss" not in settings:
            args = SFTConfig(**settings)
            given.pop("teacher_processing_class", None)
            return SFTTrainer(student, args, console=console, **given), args
        args = GOLDConfig(**settings)
        return GOLDTrainer(student, teacher or self.teacher, args, console=console, **given), args

    def keep(self, trainer) -> str:
        """Saves a trainer's student where it is not known yet; returns its digest."""
        name = weights(trainer.model)
        folder = self.folder / "weights" / name
        if not folder.exists():
            trainer.save_model(folder)
            assert weights(load_model(folder)) == name, "what save_model wrote is not the trainer's model"
        return name

    def _new(self, setting: str, name: str, changes: dict | None = None):
        student = str(self.folder / "weights" / name)
        with tempfile.TemporaryDirectory() as output:
            yield self.trainer(setting, pathlib.Path(output), student, changes=changes or {})[0]

    def measures(self, setting: str, name: str) -> dict[str, float]:
        """What a new trainer on these weights measures, one with no other settings than those that a measure asks for."""
        about = ("loss", "predict_with_generate", "completion_only_loss")
        key = "measures", *(self.settings[setting].get(name) for name in about), name
        if key not in self.known:
            plain = {"seq_kd": False, "lmbda": 0.0} if "loss" in self.settings[setting] else {}
            for trainer in self._new(setting, name, plain):
                self.known[key] = trainer.evaluate()
        return self.known[key]

    def run(self, setting: str, name: str) -> Run:
        """What a new trainer on these weights comes to."""
        key = "run", setting, name
        if key not in self.known:
            for trainer in self._new(setting, name):
                result = trainer.train().metrics
                output = pathlib.Path(trainer.args.output_dir)
                self.known[key] = Run(weights(load_model(output)), result, read_log(output))
        return self.known[key]

    def answers(self, model, chat_tokenizer) -> dict:
        """What a model draws and how it reads, for a fixed key."""
        options = {"max_new_tokens": 6, "key": jax.random.key(3), "batch_size": 3}
        drawn = sample_completions(model, chat_tokenizer, self.prompts, **options)
        score = score_completions(model, chat_tokenizer, list(load_examples(self.eval_rows)), batch_size=3)
        found = {"drawn": [(d.text, tuple(np.asarray(d.ids).tolist()), d.stopped) for d in drawn]}
        return found | {"bits": score.bits.tolist(), "bytes": score.bytes.tolist()}

    def gaps(self, model, chat_tokenizer) -> tuple:
        """The gaps of a model to the teacher, for a fixed key."""
        teacher = self.loaded_model(self.paths[1])
        options = {"max_new_tokens": 6, "key": jax.random.key(4), "batch_size": 3}
        try:
            return dataclasses.astuple(measure_gaps((model, chat_tokenizer), teacher[:2], self.prompts, **options))
        except ValueError as error:
            return (str(error),)

    def loaded_model(self, folder):
        """A model and its chat tokenizer, loaded once."""
        key = "loaded_model", str(folder)
        if key not in self.known:
            self.known[key] = load_model_and_tokenizer(str(folder), dtype="float32")
        return self.known[key]

    def new_answers(self, kind: str, name: str):
        """`answers` or `gaps` of a model loaded anew."""
        key = kind, name
        if key not in self.known:
            who = load_model_and_tokenizer(str(self.folder / "weights" / name), dtype="float32")
            self.known[key] = getattr(self, kind)(who.model, who.chat_tokenizer)
        return self.known[key]


def read_log(output: pathlib.Path) -> list[dict]:
    """metrics.jsonl without what a clock says."""
    timed = (*tiny.TIMED, "seconds")
    return [{k: v for k, v in row.items() if k not in timed} for row in metrics(output)]


def _say(line: str) -> None:
    if currently_in_test_context():
        note(line)


@dataclasses.dataclass
class Live:
    """A trainer that lives in a story."""

    trainer: Any
    setting: str
    output: pathlib.Path
    rows: Rows
    source: Any
    begun: str | None = None  # the weights that the run in `output` began with


class Story(RuleBasedStateMachine):
    """One order of calls; `world` is set by who runs it."""

    world: World

    def __init__(self):
        super().__init__()
        self.folder = pathlib.Path(tempfile.mkdtemp(dir=self.world.folder))
        self.live: list[Live] = []
        self.saved: list[pathlib.Path] = []
        self.number = 0
        self.runs: dict[pathlib.Path, int] = {}
        self.student, self.teacher = (load_model(path) for path in self.world.paths)
        self.split = nnx.split(self.student), nnx.split(self.teacher)
        self.tokenizers = [load_tokenizer(path) for path in self.world.paths]
        self.eval_data = datasets.Dataset.from_list(self.world.eval_rows)
        self.owned = Owned(
            student=self.student,
            teacher=self.teacher,
            split=self.split,
            student_tokenizer=self.tokenizers[0],
            teacher_tokenizer=self.tokenizers[1],
            rows=self.world.rows,
            eval_rows=self.world.eval_rows,
            eval_data=self.eval_data,
        )

    def teardown(self):
        try:
            self.look()
        finally:
            self.forget()

    def forget(self):
        """Removes what the story wrote."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @initialize(watched=st.booleans(), number=st.integers(0, 99))
    def begin(self, watched, number):
        """Half of the stories look at their trainers after every call, so that looking disturbs nothing unseen."""
        self.watched = watched
        self._make(self._setting(number), self.world.student)

    # what there is to choose from

    def _pick(self, number: int) -> Live:
        return self.live[number % len(self.live)]

    def _make(self, setting: str, student: Any, teacher: Any = None, output: pathlib.Path | None = None, **given):
        self.number += 1
        output = output or self.folder / f"run-{self.number}"
        rows = Rows(json.loads(json.dumps(self.world.rows)))
        given = {"train_dataset": rows, **given}
        trainer, args = self.world.trainer(setting, output, student, teacher, **given)
        self.owned.add(**{f"rows of {self.number}": rows, f"settings of {self.number}": args})
        self.live = [*self.live[1 - LIVE :], Live(trainer, setting, output, rows, student)]
        return self.live[-1]

    settings = st.integers(0, 99)
    which = st.integers(0, LIVE - 1)

    def _setting(self, number: int) -> str:
        return list(self.world.settings)[number % len(self.world.settings)]

    # making trainers

    @rule(number=settings)
    def make_from_names(self, number):
        self._make(self._setting(number), self.world.student)

    @rule(number=settings, split=st.booleans())
    def make_from_models_in_memory(self, number, split):
        student, teacher = self.split if split else (self.student, self.teacher)
        self._make(
            self._setting(number),
            student,
            teacher,
            eval_dataset=self.eval_data,
            processing_class=self.tokenizers[0],
            teacher_processing_class=self.tokenizers[1],
        )

    @precondition(lambda self: self.saved)
    @rule(number=settings, which=which)
    def make_from_a_saved_folder(self, number, which):
        self._make(self._setting(number), str(self.saved[which % len(self.saved)]))

    @precondition(lambda self: self.live)
    @rule(number=settings, which=which)
    def make_from_the_model_of_a_trainer(self, number, which):
        one = self._pick(which)
        before = weights(one.trainer.model)
        other = self._make(self._setting(number), one.trainer.model, processing_class=self.tokenizers[0])
        assert weights(other.trainer.model) == before

    # using them

    @precondition(lambda self: self.live)
    @rule(which=which)
    def evaluate(self, which):
        one = self._pick(which)
        assert one.trainer.evaluate() == one.trainer.evaluate(), "evaluate() twice says two things"

    @precondition(lambda self: self.live)
    @rule(which=which)
    def train(self, which):
        self._train(self._pick(which))

    @rule(which=which)
    def train_and_look(self, which):
        if self.live:
            self._train(self._pick(which))
            self.look()

    def _train(self, one: Live) -> None:
        before = self.world.keep(one.trainer)
        self.runs[one.output] = self.runs.get(one.output, 0) + 1
        one.begun = before
        result = one.trainer.train().metrics
        self._ended(one, before, result)

    def _ended(self, one: Live, begun: str, result: dict) -> None:
        wanted = self.world.run(one.setting, begun)
        now = weights(one.trainer.model)
        if "weights" in self.world.checks:
            assert now == wanted.weights, f"{one.setting}: train() ends in other weights than a new trainer's"
            assert weights(load_model(one.output)) == now, "the student in output_dir is not the trainer's"
        if "answers" in self.world.checks:
            found, new = ({k: v for k, v in x.items() if k.startswith("eval_")} for x in (result, wanted.result))
            assert found == new, f"{one.setting}: train() measures {found}, a new trainer {new}"
        if "logs" in self.world.checks:
            assert read_log(one.output) == wanted.log
            logs = sorted(path.name for path in one.output.glob("metrics*.jsonl"))
            earlier = [f"metrics.{i}.jsonl" for i in range(1, self.runs[one.output])]
            assert logs == sorted([*earlier, "metrics.jsonl"]), f"{self.runs[one.output]} runs left {logs}"

    def _has_a_checkpoint(self, one: Live) -> bool:
        return one.begun is not None and self._saved(one) > 0

    def _saved(self, one: Live) -> int:
        """The last update that the run that was started last has saved; those of earlier runs are passed over."""
        run = current_run(one.output)
        mine = [path for path in one.output.glob("checkpoint-*") if run_of(path) == run]
        return max((int(path.name.removeprefix("checkpoint-")) for path in mine), default=0)

    def _has_gone_further(self, one: Live) -> bool:
        return self._saved(one) > 1

    @precondition(lambda self: any(map(self._has_a_checkpoint, self.live)))
    @rule(which=which, fresh=st.booleans())
    def resume(self, which, fresh):
        able = [one for one in self.live if self._has_a_checkpoint(one)]
        one = able[which % len(able)]
        if fresh:
            begun = one.begun
            one = self._make(one.setting, self.world.student, output=one.output)
            one.begun = begun
        result = one.trainer.train(resume_from_checkpoint=True).metrics
        self._ended(one, one.begun, result)

    @precondition(lambda self: self.live)
    @rule(which=which)
    def sample_and_score(self, which):
        one = self._pick(which)
        name = self.world.keep(one.trainer)
        found = self.world.answers(one.trainer.model, one.trainer.student.chat_tokenizer)
        assert found == self.world.new_answers("answers", name)

    @precondition(lambda self: self.live)
    @rule(which=which)
    def measure_gaps(self, which):
        one = self._pick(which)
        name = self.world.keep(one.trainer)
        found = self.world.gaps(one.trainer.model, one.trainer.student.chat_tokenizer)
        np.testing.assert_equal(found, self.world.new_answers("gaps", name))

    @precondition(lambda self: self.live)
    @rule(which=which, beside=st.booleans())
    def save_model(self, which, beside):
        """Elsewhere, or into the folder that the trainer was made from."""
        one = self._pick(which)
        here = beside and isinstance(one.source, str) and one.source.startswith(str(self.folder))
        folder = pathlib.Path(one.source) if here else self.folder / f"saved-{len(self.saved)}"
        one.trainer.save_model(folder)
        assert weights(load_model(folder)) == weights(one.trainer.model)
        if folder not in self.saved:
            self.saved.append(folder)

    # errors

    @precondition(lambda self: self.live)
    @rule(which=which, how=st.sampled_from(["error", "interrupt"]), updates=st.integers(0, STEPS - 1))
    def train_and_be_cut_short(self, which, how, updates):
        one = self._pick(which)
        before = self.world.keep(one.trainer)
        self.runs[one.output] = self.runs.get(one.output, 0) + 1
        one.rows.arm(how, 2 * updates + 1)
        one.begun = before
        try:
            with usual_interrupts():
                one.trainer.train()
        except (OSError, KeyboardInterrupt) as error:
            _say(f"train() ended by {error!r}")
        else:
            raise AssertionError("it was not cut short")
        finally:
            one.rows.left = None

    @precondition(lambda self: self.live)
    @rule(which=which)
    def resume_from_nothing(self, which):
        one = self._pick(which)
        before = weights(one.trainer.model)
        self._refused(lambda: one.trainer.train(resume_from_checkpoint=str(self.folder / "nothing")))
        assert weights(one.trainer.model) == before, "a run that did not begin changed the model"

    @precondition(lambda self: any(map(self._has_gone_further, self.live)))
    @rule(which=which)
    def resume_a_run_that_has_gone_further(self, which):
        able = [one for one in self.live if self._has_gone_further(one)]
        one = able[which % len(able)]
        changes = {"max_steps": 1, "save_steps": 1}
        other, _ = self.world.trainer(one.setting, one.output, self.world.student, changes=changes)
        before = other.evaluate()
        self._refused(lambda: other.train(resume_from_checkpoint=True))
        assert other.evaluate() == before, "a run that did not begin changed the model"

    @rule(kind=st.sampled_from(["row", "setting", "model"]), number=settings)
    def be_refused(self, kind, number):
        setting = self._setting(number)
        output = self.folder / "refused"
        given = {
            "row": {"train_dataset": [*self.world.rows, {"prompt": 3, "completion": "x"}]},
            "setting": {"changes": {"learning_rate": -1}},
            "model": {},
        }[kind]
        student = self.student if kind == "model" else self.world.student  # no tokenizer beside a model in memory
        self._refused(lambda: self.world.trainer(setting, output, student, **given))

    def _refused(self, call) -> None:
        try:
            call()
        except (ValueError, TypeError, OSError) as error:
            _say(f"refused: {error}")
        else:
            raise AssertionError("it was not refused")

    # what always holds

    @invariant()
    def look_on(self):
        if getattr(self, "watched", False):
            self.look()

    def look(self):
        """Every trainer measures and draws as a new object with its weights does, and nothing handed over has changed."""
        if "owned" in self.world.checks:
            self.owned.check()
        if "answers" not in self.world.checks:
            return
        for one in self.live:
            found = one.trainer.evaluate()
            name = self.world.keep(one.trainer)
            wanted = self.world.measures(one.setting, name)
            assert found == wanted, f"{one.setting}: evaluate() says {found}, a new trainer on its weights {wanted}"
            drawn = self.world.answers(one.trainer.model, one.trainer.student.chat_tokenizer)
            assert drawn == self.world.new_answers("answers", name), f"{one.setting}: it draws or reads otherwise"
            self.world.compared += 1
