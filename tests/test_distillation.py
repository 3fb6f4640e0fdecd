"""One loss as a function, and comparisons that are registered from outside the package."""

import functools
import json
import sys
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models as tiny

import gold_jax
from gold_jax import GOLDConfig, LossSpec
from gold_jax.custom_comparisons import load_comparison
from gold_jax.loss_spec import comparisons
from gold_jax.models.functional import split
from gold_jax.text.detokenize import SampledCompletion

ROWS = [{"prompt": q, "completion": a} for q, a in tiny.ROWS[:3]]
SPECS = ["gold", "uld", "events", "alm", LossSpec("boundary", "one_to_one", "projected", {"beta": 1.0}, 0.25)]


@pytest.fixture(scope="module")
def pair(world):
    return [gold_jax.load_model_and_tokenizer(world / name) for name in ("student", "teacher")]


@pytest.fixture
def own_table(monkeypatch):
    """The table of comparisons, which is afterwards as it was."""
    table = comparisons()
    kept = dict(table)
    yield table
    table.clear()
    table.update(kept)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_loss_is_that_of_a_trainer(spec, pair, world, tmp_path):
    options = dict(output_dir=str(tmp_path), per_device_eval_batch_size=3, max_steps=1)
    if isinstance(spec, str):
        config = GOLDConfig(**options, loss=spec)
    else:
        point = dict(merge=spec.merge, groups=spec.groups, compare=spec.compare, beta=spec.options["beta"])
        config = GOLDConfig(**options, loss="gold", **point, uld_crossentropy_weight=spec.crossentropy_weight)
    trainer = gold_jax.GOLDTrainer(*pair, config, ROWS, eval_dataset=ROWS, console=tiny.quiet_console())
    wanted = trainer.evaluate()["eval_loss"]
    for given in (spec, config):
        value, parts = gold_jax.loss(*pair, ROWS, given)
        np.testing.assert_allclose(float(value), wanted, rtol=1e-6)
        assert all(x.shape == () for x in parts.values())


def test_the_gradient_is_that_of_finite_differences_inside_jit_and_outside(pair):
    loss = gold_jax.DistillationLoss(*pair, "gold")
    batch = loss.batch(gold_jax.load_examples(ROWS))
    (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(loss.params, batch)
    jitted = jax.jit(lambda loss, *given: jax.value_and_grad(loss, has_aux=True)(*given))
    (again, _), other = jitted(loss, loss.params, batch)
    np.testing.assert_allclose(value, again, rtol=1e-6)
    chex.assert_trees_all_close(gradient, other, rtol=1e-4, atol=1e-7)
    step = 1e-3 / optax.global_norm(gradient)

    def along(distance):
        return loss(jax.tree.map(lambda p, g: p + distance * g, loss.params, gradient), batch)[0]

    up, down = along(step), along(-step)
    # Rounding of values about 1 in float32, over a step of 2e-3, is 1e-4.
    np.testing.assert_allclose((up - down) / (2 * step), optax.global_norm(gradient) ** 2, rtol=5e-3)


def test_the_teacher_is_an_argument_of_a_program_and_no_constant_in_it(pair):
    loss = gold_jax.DistillationLoss(*pair, "gold")
    batch = loss.batch(ROWS)
    text = jax.jit(lambda loss, params, batch: loss(params, batch)[0]).lower(loss, loss.params, batch).as_text()
    largest = max(x.size for x in jax.tree.leaves(loss))
    assert largest > 1000 and len(text.replace("\n", "")) < 40 * 10**5
    assert not any('dense<"0x' in line for line in text.splitlines())
    copy = jax.tree.map(lambda x: x, loss)
    np.testing.assert_array_equal(copy(loss.params, batch)[0], loss(loss.params, batch)[0])


def test_a_loop_of_ones_own_learns_and_its_student_is_saved(pair, tmp_path):
    loss, optimizer = gold_jax.DistillationLoss(*pair, "gold"), optax.adamw(1e-2)

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(loss, params, state, batch):
        (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    params = jax.tree.map(jnp.copy, loss.params)
    state, batch, values = optimizer.init(params), loss.batch(ROWS), []
    for _ in range(8):
        params, state, value = step(loss, params, state, batch)
        values.append(float(value))
    assert values[-1] < 0.8 * values[0]
    student = loss.student(params)
    gold_jax.save_model(student, tmp_path / "saved")
    again = gold_jax.load_model_and_tokenizer(tmp_path / "saved")
    chex.assert_trees_all_equal(split(again.model)[1], dict(params))
    options = dict(prompts=[row["prompt"] for row in ROWS], max_new_tokens=16, key=1)
    drawn, wanted = (gold_jax.sample_completions(model, **options) for model in (again, student))
    assert [d.text for d in drawn] == [d.text for d in wanted]
    on_policy = loss.batch([{"prompt": row["prompt"]} for row in ROWS], drawn)
    assert jax.tree.map(np.shape, loss.batch(ROWS[:2] + ROWS[:1])) == jax.tree.map(np.shape, batch)  # shorter rows
    assert (on_policy.labels.weight > 0).sum() == sum(len(d.ids) + d.stopped for d in drawn) > 0


def test_a_loaded_model_is_taken_wherever_a_model_is_with_its_own_template(world, tmp_path):
    template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}{{ eos_token if not add_generation_prompt }}"
    loaded = gold_jax.load_model_and_tokenizer(world / "student", chat_template=template)
    again = gold_jax.load_model_and_tokenizer(loaded)
    assert again.name == loaded.name and again.chat_tokenizer.template.source == template
    assert again.chat_tokenizer.stop_ids == loaded.chat_tokenizer.stop_ids
    config = GOLDConfig(output_dir=str(tmp_path), max_steps=1)
    trainer = gold_jax.GOLDTrainer(loaded, world / "teacher", config, ROWS, console=tiny.quiet_console())
    assert trainer.student.chat_tokenizer.template.source == template
    gold_jax.save_model(loaded, tmp_path / "saved")
    saved = gold_jax.load_model_and_tokenizer(tmp_path / "saved").chat_tokenizer
    messages = [{"role": "user", "content": "Hello?"}]
    assert saved.render(messages) == loaded.chat_tokenizer.render(messages) == "Hello?|"


@pytest.mark.parametrize(
    "rows, completions, wrong",
    [
        ([{"prompt": "a"}], None, "row 0 has a prompt but no completion"),
        (ROWS, ["one"], "1 completions for 3 rows"),
        ([{"prompt": "Hi?", "completion": ""}], [""], None),
        ([], None, "empty"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_refused(rows, completions, wrong, pair):
    loss = gold_jax.DistillationLoss(*pair, "gold")
    if wrong is None:  # an end is learned too
        assert loss.batch(rows, completions).weight.sum() > 0
        return
    with pytest.raises(ValueError, match=wrong):
        loss.batch(rows, completions)


def test_rows_that_are_cut_or_empty_are_counted_in_a_warning(pair):
    long, drawn = {"prompt": "Hi?", "completion": "def there " * 40}, gold_jax.DistillationLoss(*pair, "gold")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn.batch(ROWS)
    with pytest.warns(UserWarning, match=r"^1 of 4 rows are cut at max_length 64 \(the first is row 1\)$"):
        batch = gold_jax.DistillationLoss(*pair, "gold", max_length=64).batch([ROWS[0], long, *ROWS[1:]])
    assert (batch.labels.weight > 0).sum(1)[1] == 64 - len(pair[0].chat_tokenizer.encode_prompt("Hi?"))
    none = np.zeros(0, np.int32)
    nothing = SampledCompletion(none, none.reshape(0, 2), none.astype(bool), text="", stopped=False)
    with pytest.warns(UserWarning, match=r"^1 of 2 rows have nothing that counts in the loss \(the first is row 1\)$"):
        drawn.batch(ROWS[:2], [ROWS[0]["completion"], nothing])


def test_a_loss_that_means_nothing_for_the_pair_is_refused(pair):
    with pytest.raises(ValueError, match="gkd"):
        gold_jax.DistillationLoss(*pair, "gkd")
    with pytest.raises(ValueError, match="--loss is 'nonsense'"):
        gold_jax.DistillationLoss(*pair, "nonsense")


def kl(student, teacher, overlap, *, weight: float = 1.0):
    k = overlap.matched
    p, q = (jax.nn.log_softmax(side.scores[:k]) for side in (student, teacher))
    return weight * jnp.sum(jnp.exp(q) * (q - p)), {"own": jnp.max(p)}


def test_a_registered_comparison_is_used_by_name(pair, own_table):
    assert gold_jax.register_comparison("own_kl", kl) is kl
    wanted = gold_jax.loss(*pair, ROWS, GOLDConfig(loss="strict", beta=0.0))[0]
    point = dict(loss="strict", compare="own_kl")
    value, parts = gold_jax.loss(*pair, ROWS, GOLDConfig(**point))
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    assert "own" in parts
    half = gold_jax.loss(*pair, ROWS, GOLDConfig(**point, loss_kwargs={"weight": 0.5}))[0]
    np.testing.assert_allclose(half, wanted / 2, rtol=1e-6)

    @gold_jax.register_comparison("own_kl")  # the cell again, changed
    def doubled(student, teacher, overlap):
        return kl(student, teacher, overlap, weight=2.0)

    np.testing.assert_allclose(gold_jax.loss(*pair, ROWS, GOLDConfig(**point))[0], 2 * wanted, rtol=1e-6)
    assert GOLDConfig(loss="own_kl").loss_spec(False).describe() == "own_kl: boundary/all/own_kl"


def text_cost(student, teacher, overlap, *, weight: float = 1.0):
    return weight * (student.suffix_logp - teacher.suffix_logp) ** 2, {}


def test_what_was_made_before_a_name_is_registered_again_stays_as_it_was(pair, own_table, tmp_path):
    gold_jax.register_comparison("own", text_cost, reads_text=True)
    loss = gold_jax.DistillationLoss(*pair, "own")
    options = dict(output_dir=str(tmp_path), loss="own", max_steps=1, per_device_eval_batch_size=3, lmbda=0.0)
    trainer = gold_jax.GOLDTrainer(*pair, GOLDConfig(**options), ROWS, eval_dataset=ROWS, console=tiny.quiet_console())
    wanted = loss(loss.params, loss.batch(ROWS))[0]
    assert wanted > 1

    @gold_jax.register_comparison("own")  # it reads no text, and has other options
    def nothing(student, teacher, overlap, *, other: float = 1.0):
        return 0 * jnp.sum(student.logp), {}

    np.testing.assert_array_equal(loss(loss.params, loss.batch(ROWS))[0], wanted)
    np.testing.assert_allclose(trainer.evaluate()["eval_loss"], wanted, rtol=1e-6)
    assert trainer.train().training_loss > 1
    assert "weight 1.0" in repr(loss) and "weight 1.0" in trainer.spec.describe()
    np.testing.assert_array_equal(gold_jax.loss(*pair, ROWS, loss.spec)[0], wanted)
    assert gold_jax.loss(*pair, ROWS, "own")[0] == 0


SCALE = 1.0


def test_a_function_that_is_registered_again_is_traced_again(pair, own_table, monkeypatch):
    def scaled(student, teacher, overlap):
        return SCALE * jnp.sum(jnp.exp(student.logp[:3])), {}

    values = []
    for scale in (1.0, 3.0):
        monkeypatch.setitem(globals(), "SCALE", scale)
        gold_jax.register_comparison("own", scaled)
        values.append(gold_jax.loss(*pair, ROWS, "own")[0])
    np.testing.assert_allclose(values[1], 3 * values[0], rtol=1e-6)


@pytest.mark.parametrize(
    "given, wrong",
    [
        (dict(groups="al"), "groups is 'al'; it must be one of all, one_to_one, positional"),
        (dict(compare="nope"), "compare is 'nope'; it must be one of sorted, hybrid"),
        (dict(student_temperature=0.0), "student_temperature is 0.0; it must be a number greater than 0"),
        (dict(distillation_weight=-1.0), "distillation_weight is -1.0; it must be a number at least 0"),
    ],
)
def test_a_spec_that_is_none_is_refused(given, wrong):
    with pytest.raises(ValueError, match=wrong):
        LossSpec(**given)


def test_arguments_that_a_loss_does_not_take_are_refused(pair):
    with pytest.raises(TypeError, match="spec is None; it must be the name of a loss"):
        gold_jax.DistillationLoss(*pair, None)
    with pytest.raises(ValueError, match="max_length is 0; it must be at least 1"):
        gold_jax.DistillationLoss(*pair, max_length=0)


def listed(student, teacher, overlap, *, powers: list = ()):
    return jnp.sum(student.logp), {}


@pytest.mark.parametrize(
    "name, function, error, wrong",
    [
        ("alm", kl, ValueError, "'alm': there is a loss of that name"),
        ("gold", kl, ValueError, "'gold': there is a loss of that name"),
        ("x", lambda s, t, o: (s.logp, {}), ValueError, r"returns an array \(3,\)"),
        ("x", lambda s, t, o: jnp.sum(s.logp), ValueError, "must return"),
        ("x", lambda s, t, o, *, alpha: (jnp.sum(s.logp), {}), TypeError, "'alpha' needs a type and a default"),
        ("x", lambda s, t: (jnp.sum(s.logp), {}), TypeError, "positional"),
        ("x", listed, TypeError, "'powers' is of type <class 'list'>; it must be one of"),
    ],
)
def test_what_is_no_comparison_is_refused_when_it_is_registered(name, function, error, wrong, own_table):
    before = dict(own_table)
    with pytest.raises(error, match=wrong):
        gold_jax.register_comparison(name, function)
    assert own_table == before


SOURCE = """
import jax
import jax.numpy as jnp

def squares(student, teacher, overlap, *, power: float = 2.0):
    k = overlap.matched
    p, q = (jax.nn.softmax(side.scores[:k]) for side in (student, teacher))
    return jnp.sum(jnp.abs(p - q) ** power), {}
"""


def test_the_command_line_names_a_function_of_a_file_or_module(world, tmp_path, own_table, monkeypatch, capsys):
    from gold_jax import train

    (tmp_path / "my_losses.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    models = f"--model_name_or_path {world}/student --teacher_model_name_or_path {world}/teacher"
    for k, name in enumerate(["my_losses.py:squares", "my_losses:squares"]):
        line = f"{models} --dataset_name {world}/data --output_dir out{k} --max_steps 1 --lmbda 0 --compare {name}"
        train.main([*line.split(), "--loss_kwargs", '{"power": 2.5}'])
        shown = capsys.readouterr().out
        assert f"gold: chain/all/{name}, power 2.5" in " ".join(shown.split())
        settings = json.loads((tmp_path / f"out{k}" / "summary.json").read_text())
        assert name in json.dumps(settings["settings"])


def test_a_file_that_has_changed_is_read_again(pair, tmp_path, own_table, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = tmp_path / "own.py"
    text = "from __future__ import annotations\nimport dataclasses\nimport jax.numpy as jnp\n\n"
    text += "@dataclasses.dataclass\nclass Scale:\n    by: float = {}\n\n"
    text += "def total(student, teacher, overlap):\n    return Scale().by * jnp.sum(jnp.exp(student.logp[:3])), {{}}\n"
    values = []
    for scale in (1.0, 2.0):
        file.write_text(text.format(scale))
        config = GOLDConfig(loss=f"{file}:total")
        values.append(gold_jax.loss(*pair, ROWS, config)[0])
    np.testing.assert_allclose(values[1], 2 * values[0], rtol=1e-6)
    line = own_table[f"{file}:total"]
    load_comparison(f"{file}:total")
    file.unlink()
    load_comparison(f"{file}:total")
    assert own_table[f"{file}:total"] is line


def test_what_a_file_prints_is_no_output_of_the_command(tmp_path, own_table, capsys):
    (tmp_path / "loud.py").write_text("print('loud')\n" + SOURCE)
    load_comparison(f"{tmp_path}/loud.py:squares")
    assert capsys.readouterr() == ("", "loud\n")


@pytest.mark.parametrize("text", ["raise SystemExit", "import sys\nsys.exit('bye')"])
def test_a_file_that_ends_the_process_is_named(text, tmp_path, own_table):
    (tmp_path / "script.py").write_text(text)
    with pytest.raises(ValueError, match=r"script.py:loss' cannot be loaded \(SystemExit"):
        load_comparison(f"{tmp_path}/script.py:loss")
    assert f"{tmp_path}/script.py" not in sys.modules


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("nowhere:squares", "ModuleNotFoundError"),
        ("nowhere.py:squares", "FileNotFoundError"),
        ("math:squares", "no attribute 'squares'"),
        ("math:pi", "TypeError"),
        (":", "the comparison ':' cannot be loaded"),
    ],
)
def test_a_function_that_is_not_there_is_named(name, wrong, own_table):
    with pytest.raises(ValueError, match=wrong):
        load_comparison(name)
    with pytest.raises(ValueError, match="--compare: the comparison .* cannot be loaded"):
        GOLDConfig(compare=name)
