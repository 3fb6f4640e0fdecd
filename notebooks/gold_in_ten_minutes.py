# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # GOLD in ten minutes
#
# A teacher trains a student that cuts text in another way. The student answers prompts itself, the teacher scores
# what it wrote, and the loss compares the two distributions over the same bytes.
#
# Everything here runs on two CPU cores in about two minutes: the two models and the task are part of the package, and
# nothing is downloaded.

# %%
import importlib.util

from IPython import get_ipython

if importlib.util.find_spec("gold_jax") is None:  # from the checkout that this notebook is in
    print("Installing gold_jax from this checkout, which takes a minute or two ...")
    get_ipython().run_line_magic("pip", "install --quiet '..[notebooks]'")

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import gold_jax
import gold_jax.report

student = gold_jax.load_model_and_tokenizer("embedded:student")
teacher = gold_jax.load_model_and_tokenizer("embedded:teacher")

# %% [markdown]
# ## A row, and what each model reads
#
# Rows are conversations, prompts with completions, prompts alone, or texts. Each model renders a prompt with its own
# chat template.

# %%
rows = gold_jax.load_examples("embedded:task")
test_rows = gold_jax.load_examples("embedded:task", split="test[:48]")
row = rows[2]
print("the row      ", row.messages)
print("student reads", student.chat_tokenizer.render(row.prompt))
print("teacher reads", teacher.chat_tokenizer.render(row.prompt))

# %% [markdown]
# ## The pair
#
# Both tokenizers spell the same bytes. Where both end a token, a *group* ends. Most groups are one token against one;
# the coloured ones are not.

# %%
gold_jax.align(student, teacher, row.completion)

# %% [markdown]
# Vocabulary entries match where they spell the same bytes. An entry without a partner still has a longest prefix that
# the other vocabulary knows.

# %%
gold_jax.match_vocabularies(student, teacher)

# %% [markdown]
# `inspect_pair` puts it together, with the two models' probabilities. Do this before you train a new pair.

# %%
gold_jax.inspect_pair(student, teacher, {"a row": row.completion})

# %% [markdown]
# ## One loss and its gradient
#
# `DistillationLoss` is a function of the student's parameters and a batch. There is no trainer in it.

# %%
loss = gold_jax.DistillationLoss(student, teacher, "gold")
batch = loss.batch(rows[:16])
(value, parts), gradient = jax.value_and_grad(loss, has_aux=True)(loss.params, batch)
print(f"{value:.4f} nats,", {name: round(float(x), 4) for name, x in parts.items()})
print(f"norm of the gradient {optax.global_norm(gradient):.4f}")

# %%
batch

# %% [markdown]
# ## A loss of your own
#
# A comparison is a function of **one group's** two distributions. The first `overlap.matched` columns of both sides mean
# the same entries. This one is `KL(teacher ‖ α·teacher + (1-α)·student)`, from DistiLLM. Change the cell and run it again:
# what is made afterwards uses the new function.


# %%
@gold_jax.register_comparison("skew_kl")
def skew_kl(student, teacher, overlap, *, alpha: float = 0.1):
    p, q = (jax.nn.softmax(side.logp[: overlap.matched]) for side in (student, teacher))
    mixture = alpha * q + (1 - alpha) * p
    divergence = jnp.sum(q * (jnp.log(q + 1e-9) - jnp.log(mixture + 1e-9)))
    return divergence, {"overlap_mass": jnp.exp(student.logp[: overlap.matched]).sum()}


value, parts = gold_jax.loss(student, teacher, rows[:16], "skew_kl")
print(f"{value:.4f} nats,", {name: round(float(x), 4) for name, x in parts.items()})

# %% [markdown]
# ## Train with it
#
# The settings are TRL's, by the same names. `compare` names the function above. Half of the batches are the student's
# own answers (`lmbda=0.5`). On two cores this takes about a minute, half of it for compiling.

# %%
config = gold_jax.GOLDConfig(
    output_dir="runs/skew_kl",
    loss="gold",
    compare="skew_kl",
    loss_kwargs={"alpha": 0.02},
    lmbda=0.5,
    max_steps=200,
    per_device_train_batch_size=16,
    learning_rate=3e-3,
    warmup_steps=20,
    adam_beta2=0.99,
    max_length=64,
    max_completion_length=24,
    length_buckets=1,  # few padded shapes, few compilations
    gradient_checkpointing=False,
    logging_steps=10,
    log_completions=True,
    log_completions_steps=100,
    num_completions_to_print=4,
    eval_on_start=True,
    eval_strategy="steps",
    eval_steps=50,
    per_device_eval_batch_size=48,
    predict_with_generate=True,
    eval_gaps=True,
    save_strategy="no",
)
trainer = gold_jax.GOLDTrainer("embedded:student", "embedded:teacher", config, rows, test_rows)
result = trainer.train()

# %%
trainer

# %% [markdown]
# `log_history` has every logged line. The forward gap is what the student pays beyond the teacher on the teacher's text;
# the reverse gap what the teacher pays beyond the student on the student's text. In a run this short the loss rises
# before it falls, and the reverse gap closes first.

# %%
keys = {
    "loss": ("loss",),
    "gap to the teacher, bits per byte": ("eval_forward_gap", "eval_reverse_gap"),
}
figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
for axis, (title, names) in zip(axes, keys.items()):
    for name in names:
        points = [(line["step"], line[name]) for line in trainer.log_history if name in line]
        axis.plot(*zip(*points), marker=".", label=name)
    axis.set(title=title, xlabel="update", ylim=(0, None))
    axis.legend()

# %% [markdown]
# ## What the student writes, before and after

# %%
trained = gold_jax.LoadedModel(trainer.model, student.chat_tokenizer, "trained")
prompts = [row.prompt for row in test_rows[:4]]
for who in (student, trained):
    written = gold_jax.sample_completions(who, prompts=prompts, max_new_tokens=24, temperature=0.0)
    print(f"{who.name:17}", *(completion.text for completion in written), sep="\n  ")
share = gold_jax.exact_match(trained, rows=test_rows, max_new_tokens=24)
print(f"exact matches of {len(test_rows)}: {share:.2f}")

# %% [markdown]
# ## A loop of your own
#
# The same library without the trainer: any optax optimizer, any schedule of on-policy batches. The jitted step takes
# the loss as an argument, because arrays that a function closes over become constants of the program. Ten updates show
# the loop, not success: as above, the loss rises before it falls.

# %%
loss = gold_jax.DistillationLoss(
    student, teacher, gold_jax.GOLDConfig(loss="gold", beta=0.0), max_length=64
)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(2e-3, b2=0.99))


@functools.partial(jax.jit, donate_argnums=(0, 1))
def step(params, state, loss, batch):
    (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value


params = jax.tree.map(jnp.copy, loss.params)  # the step donates what it is given
state = optimizer.init(params)
random = np.random.default_rng(0)
values = []
for update in range(10):
    chosen = [rows[int(i)] for i in random.choice(len(rows), 16)]
    completions = None  # the rows' own
    if update % 2:  # on-policy: what the student writes now
        options = {"max_new_tokens": 24, "key": update, "batch_size": 16}
        prompts = [row.prompt for row in chosen]
        completions = gold_jax.sample_completions(loss.student(params), prompts=prompts, **options)
    params, state, value = step(params, state, loss, loss.batch(chosen, completions))
    values.append(value)
print("off-policy", *(f"{x:.3f}" for x in values[::2]))
print("on-policy ", *(f"{x:.3f}" for x in values[1::2]))

# %% [markdown]
# ## Save it, open it elsewhere
#
# The trainer has saved a Hugging Face folder: safetensors, config, tokenizer and chat template. transformers, vLLM and
# this package open it. `gold_jax.save_model` writes one of a model of your own.

# %%
from transformers import AutoTokenizer

gold_jax.save_model(loss.student(params), "runs/own_loop")
tokenizer = AutoTokenizer.from_pretrained("runs/own_loop")
print(tokenizer.apply_chat_template(row.prompt, tokenize=False, add_generation_prompt=True))
again = gold_jax.load_model_and_tokenizer("runs/skew_kl")
print(
    gold_jax.sample_completions(again, prompts=[row.prompt], max_new_tokens=24, temperature=0.0)[
        0
    ].text
)

# %% [markdown]
# ## The report
#
# A run leaves its log, its settings and what was measured. `Report` shows them as one page; the trainer's
# `report=True` writes it as a file. Two folders are shown beside each other.

# %%
report = gold_jax.report.Report("runs/skew_kl")
report.runs[0]

# %% tags=["unsaved"]
report  # the whole page, with curves that show their numbers under the pointer; not kept in the file, for its size

# %% [markdown]
# Next: [a TPU or a GPU](on_a_tpu_or_gpu.ipynb), [the losses](../docs/losses.md), [data](../docs/data.md),
# [the API](../docs/api.md), [coming from TRL](../docs/coming-from-trl.md).
