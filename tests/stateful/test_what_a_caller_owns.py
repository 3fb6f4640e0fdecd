"""Whatever is handed to the package is as it was afterwards, when a call returns and when it raises."""

import jax
import numpy as np
import pytest
import tiny_models as tiny
from datasets import Dataset
from flax import nnx
from rich.console import Console
from stateful.owned import Owned
from transformers import AutoTokenizer

import gold_jax
from gold_jax import evaluate, generate, inspect, sft, train
from gold_jax.loading import LoadedModel
from gold_jax.loss_spec import comparisons
from gold_jax.scoring import exact_match
from gold_jax.text.data import load_examples
from gold_jax.text.template import PLAIN_TEMPLATE

pytestmark = pytest.mark.usefixtures("own_cache")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"numbers": [24, {"of": 48}]}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
TOOL_ROW = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "24 + 48?"}], "name": None},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
    ],
    "tools": [TOOL],
    "chat_template_kwargs": {"enable_thinking": False, "more": {"nested": [1]}},
}
SMALL = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "save_strategy": "no",
    "template_kwargs": {"deep": {"list": [1, 2]}},
    "model_init_kwargs": {"dtype": "float32", "attn_implementation": "plain"},
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "learning_rate": 1e-2,
    "report_to": [],
}
GOLD = SMALL | {
    "max_completion_length": 6,
    "lmbda": 0.5,
    "loss": "projected",
    "projection_mask": ["numerals"],
    "teacher_template_kwargs": {"for": {"the": ["teacher"]}},
    "teacher_model_init_kwargs": {"attn_implementation": "plain"},
}


class Caller:
    """Things that a caller could hold, made anew for each test."""

    def __init__(self, world, folder):
        self.folder, self.world = folder, world
        self.student, self.teacher = (gold_jax.load_model(world / name) for name in ("student", "teacher"))
        self.split = nnx.split(self.student), nnx.split(self.teacher)
        self.tokenizers = [AutoTokenizer.from_pretrained(world / name) for name in ("student", "teacher")]
        self.tokenizers[0].backend_tokenizer.enable_truncation(max_length=5, stride=1)
        self.tokenizers[0].backend_tokenizer.enable_padding(length=40)
        self.tokenizers[1].backend_tokenizer.enable_truncation(max_length=7)
        self.tokenizers[1].padding_side = self.tokenizers[1].truncation_side = "left"
        self.chat_tokenizers = [
            gold_jax.ChatTokenizer(AutoTokenizer.from_pretrained(world / n)) for n in ("student", "teacher")
        ]
        self.loaded_models = [
            LoadedModel(model, chat_tokenizer, "mine")
            for model, chat_tokenizer in zip((self.student, self.teacher), self.chat_tokenizers)
        ]
        self.rows = [*(tiny.conversation(*row) for row in tiny.ROWS[:3]), TOOL_ROW]
        self.data = Dataset.from_list([{"prompt": q, "completion": a} for q, a in tiny.ROWS[:2]])
        self.prompts = ["What is 24 + 48?", [{"role": "user", "content": "Greet me."}]]
        self.examples = list(load_examples(self.data))
        self.texts = {"one": "The quick brown fox", "other": "größer"}
        self.key = jax.random.key(0)
        (folder / "calls.jinja").write_text(PLAIN_TEMPLATE)  # one that writes tool calls
        calls = {"assistant_only_loss": True, "chat_template_path": str(folder / "calls.jinja")}
        self.sft = gold_jax.SFTConfig(output_dir=str(folder / "sft"), **calls, **SMALL)
        self.gold = gold_jax.GOLDConfig(output_dir=str(folder / "gold"), **GOLD)
        self.settings = {"sft": dict(SMALL), "gold": dict(GOLD)}
        self.mask = ["whitespace"]
        self.options = {"temperature": 2.0}
        self.template = tiny.student_tokenizer().chat_template

    def drawing(self):
        return {"max_new_tokens": 4, "key": self.key, "batch_size": 2}

    def spec(self):
        return gold_jax.LossSpec("boundary", "all", "alm", self.options)

    def gradient(self, rows):
        loss = gold_jax.DistillationLoss(*self.loaded_models, self.spec())
        return jax.value_and_grad(loss, has_aux=True)(loss.params, loss.batch(rows))

    def registered(self, function):
        gold_jax.register_comparison("a caller's own", function)
        comparisons().pop("a caller's own")

    def trainer(self, kind="gold", split=False, **changes):
        student, teacher = self.split if split else (self.student, self.teacher)
        args = getattr(self, kind)
        given = {
            "train_dataset": self.rows,
            "eval_dataset": self.data,
            "processing_class": self.tokenizers[0],
            "console": Console(quiet=True),
        } | changes
        if kind == "sft":
            return gold_jax.SFTTrainer(student, args, **given)
        return gold_jax.GOLDTrainer(student, teacher, args, teacher_processing_class=self.tokenizers[1], **given)


@pytest.fixture
def caller(world, tmp_path):
    return Caller(world, tmp_path)


def surfaces(caller):
    return [chat_tokenizer.surfaces for chat_tokenizer in caller.chat_tokenizers]


RETURN = {
    "GOLDConfig": lambda c: gold_jax.GOLDConfig(**c.settings["gold"]),
    "SFTConfig": lambda c: gold_jax.SFTConfig(**c.settings["sft"]),
    "GOLDTrainer": lambda c: c.trainer().train(),
    "GOLDTrainer on split models": lambda c: c.trainer(split=True).train(),
    "GOLDTrainer.evaluate": lambda c: c.trainer().evaluate(),
    "SFTTrainer": lambda c: c.trainer("sft").train(),
    "SFTTrainer on a split model": lambda c: c.trainer("sft", split=True).train(),
    "SFTTrainer.save_model": lambda c: c.trainer("sft").save_model(c.folder / "saved"),
    "align": lambda c: gold_jax.align(*c.tokenizers, c.texts["one"]),
    "Alignment": lambda c: [str(x) for x in (gold_jax.align(*c.tokenizers, c.texts["one"]),)],
    "match_vocabularies": lambda c: gold_jax.match_vocabularies(*c.tokenizers, mask=c.mask),
    "LoadedModel": lambda c: gold_jax.score_completions(
        gold_jax.LoadedModel(c.student, c.chat_tokenizers[0], "student"), rows=c.rows[:1]
    ),
    "VocabularyMap": lambda c: gold_jax.VocabularyMap.build(
        *surfaces(c),
        student_size=500,
        teacher_size=600,
        stop=tuple(chat_tokenizer.stop_ids for chat_tokenizer in c.chat_tokenizers),
        mask=c.mask,
    ),
    "ChatTokenizer": lambda c: [
        (k.encode_prompts(c.prompts), k.encode_completions(["größer", "24"]), k.render(c.prompts[1]))
        for k in (gold_jax.ChatTokenizer(c.tokenizers[0], template_kwargs=c.settings["sft"]["template_kwargs"]),)
    ],
    "ChatTokenizer.encode_turns": lambda c: gold_jax.ChatTokenizer(c.tokenizers[0]).encode_turns(c.rows[0]["messages"]),
    "ChatTokenizer.with_context": lambda c: c.chat_tokenizers[0].with_context(c.prompts[1], "Be brief."),
    "Decoder": lambda c: c.student(np.ones((1, 4), np.int32), np.ones((1, 4), bool)),
    "load_model": lambda c: gold_jax.load_model(c.world / "student"),
    "save_model": lambda c: gold_jax.save_model(c.student, c.folder / "saved", dtype="bfloat16"),
    "load_model_and_tokenizer": lambda c: gold_jax.load_model_and_tokenizer(
        c.student,
        c.tokenizers[0],
        dtype="bfloat16",
        param_dtype="bfloat16",
        remat=True,
        attention="blockwise",
        eos_token="<|endoftext|>",
        chat_template=c.template,
        template_kwargs=c.settings["sft"]["template_kwargs"],
    ),
    "load_model_and_tokenizer of a split model": lambda c: gold_jax.load_model_and_tokenizer(
        c.split[1], c.tokenizers[1], dtype="float32", remat=True
    ),
    "inspect_pair": lambda c: gold_jax.inspect_pair(*c.tokenizers, c.texts),
    "inspect_pair of loaded models": lambda c: gold_jax.inspect_pair(*c.loaded_models, c.texts),
    "sample_completions": lambda c: gold_jax.sample_completions(
        c.student, c.chat_tokenizers[0], c.prompts, **c.drawing()
    ),
    "sample_completions of a split model": lambda c: gold_jax.sample_completions(
        c.split[0], c.chat_tokenizers[0], c.prompts, **c.drawing()
    ),
    "score_completions": lambda c: gold_jax.score_completions(c.student, c.chat_tokenizers[0], c.examples),
    "measure_gaps": lambda c: gold_jax.measure_gaps(*c.models_with_tokenizers(), c.prompts, **c.drawing()),
    "exact_match": lambda c: exact_match(c.student, c.chat_tokenizers[0], c.examples, max_new_tokens=4),
    "load_examples": lambda c: list(load_examples(c.rows)),
    "loss": lambda c: gold_jax.loss(*c.loaded_models, c.rows[:2], c.spec()),
    "DistillationLoss": lambda c: c.gradient(c.examples),
    "DistillationLoss of settings": lambda c: gold_jax.loss(*c.loaded_models, c.rows[:2], c.gold),
    "LossSpec": lambda c: (c.spec(), gold_jax.LossSpec(compare="projected", mask=c.mask).check()),
    "Overlap": lambda c: gold_jax.Overlap(3),
    "GroupDistribution": lambda c: gold_jax.GroupDistribution.single_token(jax.numpy.zeros(3)).logp,
    "register_comparison": lambda c: c.registered(lambda s, t, o: (s.logp.sum(), {})),
}
Caller.models_with_tokenizers = lambda self: [tuple(who[:2]) for who in self.loaded_models]

BAD_ROWS = [{"prompt": 3, "completion": "x"}]
RAISE = {
    "GOLDConfig": lambda c: gold_jax.GOLDConfig(**c.settings["gold"], learning_rates=1),
    "SFTConfig": lambda c: gold_jax.SFTConfig(**(c.settings["sft"] | {"max_steps": 0})),
    "GOLDTrainer with a bad row": lambda c: c.trainer(train_dataset=c.rows + BAD_ROWS),
    "GOLDTrainer with a row without completion": lambda c: c.trainer(train_dataset=[*c.rows, {"prompt": "x"}]),
    "GOLDTrainer with the wrong tokenizer": lambda c: c.trainer(processing_class=object()),
    "GOLDTrainer with an unknown end token": lambda c: c.trainer(),
    "GOLDTrainer.train from nothing": lambda c: c.trainer().train(resume_from_checkpoint=str(c.folder / "none")),
    "GOLDTrainer that is to evaluate without rows": lambda c: c.trainer(eval_dataset=None),
    "GOLDTrainer with a pair of answers": lambda c: c.trainer(
        train_dataset=[*c.rows, {"prompt": "x", "completion": "y", "chosen": "y", "rejected": "z"}]
    ),
    "GOLDTrainer with an answer that is called wrong": lambda c: c.trainer(
        train_dataset=[*c.rows, {"prompt": "x", "completion": "y", "label": False}]
    ),
    "GOLDConfig to which an unknown setting is assigned": lambda c: setattr(c.gold, "learning_rates", 1),
    "SFTTrainer without data": lambda c: c.trainer("sft", train_dataset=None),
    "SFTTrainer with the wrong tokenizer": lambda c: c.trainer("sft", processing_class=c.folder / "nothing"),
    "SFTTrainer.evaluate without rows": lambda c: c.trainer("sft", eval_dataset=None).evaluate(),
    "SFTTrainer.save_model under a file": lambda c: c.trainer("sft").save_model(c.world / "data/train.jsonl" / "x"),
    "ChatTokenizer whose template refuses": lambda c: gold_jax.ChatTokenizer(
        c.tokenizers[0], chat_template="{{ raise_exception('no') }}"
    ).encode_prompts(c.prompts),
    "ChatTokenizer.encode_turns": lambda c: gold_jax.ChatTokenizer(c.tokenizers[1]).encode_turns(
        [{"role": "x", "content": "y"}]
    ),
    "load_model": lambda c: gold_jax.load_model(c.folder / "none"),
    "save_model": lambda c: gold_jax.save_model(c.student, c.world / "data/train.jsonl" / "x"),
    "load_model_and_tokenizer": lambda c: gold_jax.load_model_and_tokenizer(
        c.student, c.tokenizers[0], dtype="bfloat16", remat=True, eos_token="<no such>"
    ),
    "load_model_and_tokenizer of another's tokenizer": lambda c: gold_jax.load_model_and_tokenizer(
        c.teacher, c.tokenizers[0], dtype="bfloat16", attention="no such"
    ),
    "inspect_pair": lambda c: gold_jax.inspect_pair(*c.tokenizers, {**c.texts, "blank": ""}),
    "inspect_pair of models that are not there": lambda c: gold_jax.inspect_pair(*c.tokenizers, models=True),
    "sample_completions": lambda c: gold_jax.sample_completions(
        c.student, c.chat_tokenizers[0], [*c.prompts, [{"role": 3}]], **c.drawing()
    ),
    "score_completions": lambda c: gold_jax.score_completions(
        c.student, c.chat_tokenizers[0], [*c.examples, *load_examples([{"prompt": "x"}])]
    ),
    "measure_gaps": lambda c: gold_jax.measure_gaps(*c.models_with_tokenizers(), [3], **c.drawing()),
    "load_examples": lambda c: list(load_examples(c.rows + BAD_ROWS)),
    "DistillationLoss": lambda c: c.gradient([*c.examples, *load_examples([{"prompt": "x"}])]),
    "register_comparison": lambda c: c.registered(lambda s, t, o: (s.logp, {})),
}


@pytest.mark.parametrize("what", RETURN)
def test_what_was_handed_over_is_as_it_was_after(what, caller):
    owned = Owned(**vars(caller))
    RETURN[what](caller)
    owned.check()


SETTINGS = {
    "GOLDTrainer with an unknown end token": {"eos_token": "<no such>"},
    "GOLDTrainer that is to evaluate without rows": {"eval_strategy": "steps"},
}


@pytest.mark.parametrize("what", RAISE)
def test_what_was_handed_over_is_as_it_was_after_an_error_of(what, caller):
    more = SETTINGS.get(what, {})
    caller.gold = gold_jax.GOLDConfig(output_dir=str(caller.folder / "gold"), **GOLD, **more)
    owned = Owned(**vars(caller))
    with pytest.raises(Exception) as error:
        RAISE[what](caller)
    assert not isinstance(error.value, AssertionError)
    owned.check()


def test_every_public_name_is_looked_at():
    looked = {name.partition(" ")[0].partition(".")[0] for name in RETURN}
    assert set(gold_jax.__all__) - {"__version__"} <= looked


COMMANDS = {
    "train": (train, ["--teacher_model_name_or_path", "{}/teacher", "--max_steps=1", "--max_new_tokens=6"]),
    "sft": (sft, ["--max_steps=1"]),
    "evaluate": (evaluate, ["--max_samples=2", "--json"]),
    "generate": (generate, ["--prompt", "Go on", "and on", "--max_new_tokens=4"]),
}


@pytest.mark.parametrize("name", [*COMMANDS, "inspect"])
@pytest.mark.parametrize("wrong", [False, True])
def test_a_command_leaves_its_arguments_and_folders_alone(name, wrong, world, tmp_path):
    if name == "inspect":
        main, argv = inspect.main, ["--student", f"{world}/student", "--teacher", f"{world}/teacher", "--models=false"]
    else:
        module, more = COMMANDS[name]
        main = module.main
        argv = ["--model_name_or_path", f"{world}/student", "--dataset_name", f"{world}/data"]
        argv += ["--output_dir", str(tmp_path)] if name in ("train", "sft") else []
        argv += [part.format(world) for part in more]
    if wrong:
        argv += ["--seed", "no number"] if name != "inspect" else ["--max_length", "no number"]
    read = lambda: {p: p.read_bytes() for p in sorted(world.rglob("*")) if p.is_file()}  # noqa: E731
    owned, before = Owned(argv=argv), read()
    try:
        main(argv)
    except (ValueError, SystemExit) as error:
        assert wrong, error
    owned.check()
    assert read() == before


@pytest.mark.parametrize("side", [0, 1])
def test_a_tokenizer_that_cuts_and_fills_for_its_owner_reads_whole_texts_here(side, caller):
    mine, plain = gold_jax.ChatTokenizer(caller.tokenizers[side]), caller.chat_tokenizers[side]
    for one, other in zip(mine.encode_prompts(caller.prompts), plain.encode_prompts(caller.prompts)):
        np.testing.assert_array_equal(one, other)
    text = "The quick brown fox jumps over the lazy dog."
    np.testing.assert_array_equal(mine.encode_completion(text).ids, plain.encode_completion(text).ids)
    chat = caller.rows[0]["messages"]
    np.testing.assert_array_equal(mine.encode_turns(chat)[0], plain.encode_turns(chat)[0])


def test_a_model_is_written_over_its_own_folder(world, tmp_path):
    folder = tiny.write_student(tmp_path / "student")
    model = gold_jax.load_model(folder)
    owned = Owned(model=model)
    gold_jax.save_model(model, folder)
    owned.check()
    assert Owned(model=gold_jax.load_model(folder)).before["model"]["arrays"] == owned.before["model"]["arrays"]
