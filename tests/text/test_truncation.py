import pytest
import tiny_models as tiny
from toy_tokenizers import CHATML, byte_level

from gold_jax import GOLDConfig, SFTConfig, SFTTrainer
from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.data import load_examples
from gold_jax.text.truncation import EndsOfPrompts, keep_end

SYSTEM = {"role": "system", "content": "be kind"}


@pytest.fixture(scope="module")
def chat():
    return ChatTokenizer(byte_level(), chat_template=CHATML)


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


def length(chat, prompt):
    return len(chat.encode_prompt(prompt))


def test_what_fits_is_as_it_was(chat):
    for prompt in ("some text", [SYSTEM, user("q")]):
        assert keep_end(prompt, chat, length(chat, prompt)) is prompt


def test_a_text_keeps_the_longest_end_that_fits(chat):
    text = "".join(f"{i} " for i in range(200))
    found = keep_end(text, chat, 40)
    assert text.endswith(found) and length(chat, found) <= 40 < length(chat, text[-len(found) - 1 :])


def test_turns_go_before_texts_and_the_system_message_stays(chat):
    turns = [SYSTEM, user("one " * 20), answer("1"), user("two " * 20), answer("2"), user("three " * 20)]
    room = length(chat, [SYSTEM, *turns[3:]])
    assert keep_end(turns, chat, room) == [SYSTEM, *turns[3:]]
    shorter = keep_end(turns, chat, length(chat, [SYSTEM, turns[5]]) - 5)
    assert shorter[0] == SYSTEM and len(shorter) == 2 and turns[5]["content"].endswith(shorter[1]["content"])
    assert chat.render(shorter).startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\n")
    assert keep_end(turns, chat, 3) is None and turns[1] == user("one " * 20)


def test_a_system_message_between_turns_stays(chat):
    later = {"role": "system", "content": "be brief"}
    turns = [SYSTEM, user("one " * 20), answer("1"), later, user("two " * 20)]
    short = [SYSTEM, later, turns[4]]
    assert keep_end(turns, chat, length(chat, short)) == short
    found = keep_end(turns, chat, length(chat, short) - 5)
    assert found[:2] == short[:2] and turns[4]["content"].endswith(found[2]["content"])


def test_the_answer_and_the_tools_of_a_row_stay(chat):
    row = {"messages": [SYSTEM, user("x " * 300), answer("the dog.")], "tools": [{"name": "f"}]}
    rows = load_examples([row, {"prompt": "short", "completion": "y"}])
    found = EndsOfPrompts(rows, chat, lambda _: 60)
    assert found[0].completion == "the dog." and found[0].messages[-1] == answer("the dog.")
    assert found[0].messages[:-1] == found[0].prompt and found[0].messages.tools == [{"name": "f"}]
    assert length(chat, found[0].prompt) <= 60 and found[1] == rows[1] and found.shortened == {0}


def test_a_long_prompt_is_learned_with_keep_end_and_left_out_without(world, tmp_path):
    rows = [tiny.conversation(*tiny.ROWS[0]), {"prompt": "seven " * 200, "completion": " eight"}]
    for mode, kept in {"keep_start": 1, "keep_end": 2}.items():
        args = SFTConfig(output_dir=str(tmp_path), max_length=64, max_steps=1, truncation_mode=mode)
        trainer = SFTTrainer(str(world / "student"), args, rows, console=tiny.quiet_console())
        assert len(trainer.loop.data.order.rows) == kept
        assert ("the beginning of 1 prompt was cut off" in " ".join(trainer.notices)) == (kept == 2)
    ids, counted, _ = trainer.loop.run.batches._row(trainer.train_examples[1], 64)
    assert len(ids) <= 64 and trainer.student.chat_tokenizer.decode(ids[counted]) == b" eight"


def test_combinations_that_mean_nothing_are_refused(world, tmp_path):
    with pytest.raises(ValueError, match="keep_end would cut the special tokens"):
        GOLDConfig(truncation_mode="keep_end", special_tokens_in_prompts=True)
    args = SFTConfig(output_dir=str(tmp_path), truncation_mode="keep_end", assistant_only_loss=True)
    with pytest.raises(
        ValueError, match="keep_end shortens prompts, and here every assistant turn is learned; use keep_start"
    ):
        SFTTrainer(str(world / "student"), args, [tiny.conversation(*tiny.ROWS[0])], console=tiny.quiet_console())
