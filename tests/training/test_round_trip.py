"""What is trained is what transformers reads from the folder that is saved: prompt, answer and stop tokens, id by id."""

import numpy as np
import pytest
import real_tokenizers as real
import tiny_models as tiny
import toy_tokenizers as toys
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from gold_jax import SFTConfig, SFTTrainer

pytestmark = pytest.mark.usefixtures("own_cache")
ASKED = [{"role": "user", "content": " What is 2+2?\n"}, {"role": "assistant", "content": "4, größer: “four”."}]
TOLD = [{"role": "system", "content": "Be brief."}, *ASKED, {"role": "user", "content": "And 3?"}, ASKED[-1]]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def trained(tokenizer, tmp_path, template: str | None = None, **changes):
    """A trainer after an update on `ASKED` and `TOLD`; its folder and its checkpoint's are below `out`."""
    model = tiny.write_model(tmp_path / "model", "llama", tokenizer)
    if template is not None:
        (tmp_path / "template.jinja").write_text(template)
        changes |= {"chat_template_path": str(tmp_path / "template.jinja")}
    changes = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2} | changes
    args = SFTConfig(output_dir=str(tmp_path / "out"), max_length=256, **changes)
    trainer = SFTTrainer(str(model), args, [{"messages": ASKED}, {"messages": TOLD}], console=tiny.quiet_console())
    trainer.train()
    return trainer


def check_what_left(trainer, tmp_path, *, ends_as_the_template=True):
    batches, chat_tokenizer = trainer.loop.run.batches, trainer.student.chat_tokenizer
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for example in trainer.train_examples:
            ids, counted, _ = batches._row(example, None)
            learned, messages = ids[counted], example.messages
            prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
            assert prompt == ids[~counted].tolist()
            text = tokenizer.decode(learned[:-1], skip_special_tokens=True)
            assert text.strip().endswith(messages[-1]["content"])
            whole = tokenizer.apply_chat_template(messages, return_dict=False)
            assert not ends_as_the_template or whole[: len(ids)] == ids.tolist()
            assert learned[-1] == chat_tokenizer.stop_id
        for config in (GenerationConfig.from_pretrained(folder), AutoConfig.from_pretrained(folder)):
            assert tuple(np.atleast_1d(config.eos_token_id).tolist()) == chat_tokenizer.stop_ids
        assert tokenizer.eos_token_id in chat_tokenizer.stop_ids


@pytest.mark.assets
@pytest.mark.parametrize("name", ["qwen3", "llama3_2", pytest.param("gemma3", marks=pytest.mark.long)])
def test_a_real_tokenizer_comes_back_with_the_template_that_was_trained(assets, tmp_path, name):
    tokenizer = real.tokenizer(assets / "tokenizers" / name)
    check_what_left(trained(tokenizer, tmp_path, template_kwargs={"enable_thinking": False}), tmp_path)


@pytest.mark.assets
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "tokenizers/gpt2"])
def test_a_template_that_was_given_leaves_with_the_student(assets, tmp_path, name):
    tokenizer = real.tokenizer(assets / name)
    trainer = trained(tokenizer, tmp_path, CHATML)
    # GPT-2 has no `<|im_end|>`: the template writes its letters, and what is learned is the end token.
    lacks = "gpt2" in name
    assert ("'<|im_end|>\\n', which is no stop token" in trainer.student.chat_tokenizer.describe()) == lacks
    check_what_left(trainer, tmp_path, ends_as_the_template=not lacks)


@pytest.mark.assets
def test_a_student_without_a_template_leaves_with_the_plain_one(assets, tmp_path):
    tokenizer = real.tokenizer(assets / "tokenizers" / "gpt2")
    assert tokenizer.chat_template is None
    check_what_left(trained(tokenizer, tmp_path), tmp_path)


@pytest.mark.parametrize("template", [None, toys.CHATML])
def test_a_small_tokenizer_comes_back_with_what_was_trained(tmp_path, template):
    check_what_left(trained(toys.byte_level(), tmp_path, template), tmp_path)


@pytest.mark.live
def test_what_left_stops_in_transformers_where_it_was_trained_to(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    trainer = trained(toys.byte_level(), tmp_path, toys.CHATML, learning_rate=3e-2, max_steps=60, save_steps=60)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    asked = tokenizer.apply_chat_template(ASKED[:1], add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        written = model.generate(asked, max_new_tokens=200, do_sample=False)[0, asked.shape[1] :].tolist()
    assert written[-1] == trainer.student.chat_tokenizer.stop_id and len(written) < 200
