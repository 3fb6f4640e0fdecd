import functools

import numpy as np
import pytest
import real_tokenizers as real
import toy_tokenizers as toys
from hypothesis import given, settings
from hypothesis import strategies as st

from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.detokenize import completion_from_ids
from gold_jax.text.template import ChatTemplate, Conversation, like

USER = {"role": "user", "content": "the fox?"}
ANSWER = {"role": "assistant", "content": "the dog."}
MORE = [USER, ANSWER, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "72."}]


@functools.cache
def chatml_tokenizer():
    return ChatTokenizer(toys.byte_level(template=toys.CHATML))


@pytest.fixture
def chatml():
    return chatml_tokenizer()


@pytest.fixture(scope="module")
def llama2():
    return ChatTokenizer(toys.sentencepiece(template=toys.LLAMA2))


def tokens(chat_tokenizer, ids):
    return [chat_tokenizer.surfaces.strings[i] for i in np.asarray(ids).tolist()]


def ids_of(chat_tokenizer, text):
    return chat_tokenizer.encode_completion(text).ids.tolist()


# Stop tokens


def test_the_stop_token_is_what_the_template_writes_after_an_answer(chatml, llama2):
    assert tokens(chatml, [chatml.stop_id]) == ["<|im_end|>"]
    assert tokens(llama2, [llama2.stop_id]) == ["</s>"]


def test_the_stop_token_of_the_template_goes_before_the_end_token():
    tokenizer = toys.byte_level.__wrapped__(template=toys.CHATML)
    tokenizer.eos_token = "<|endoftext|>"
    chat_tokenizer = ChatTokenizer(tokenizer, stop_ids=[1, 2])
    assert chat_tokenizer.stop_id == 2
    assert chat_tokenizer.stop_ids == (2, 0, 1)


def test_without_a_template_the_end_token_stops():
    assert ChatTokenizer(toys.byte_level()).stop_ids == (2,)


def test_a_template_that_writes_no_stop_token_leaves_the_end_token():
    chat_tokenizer = ChatTokenizer(
        toys.byte_level(), chat_template="{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    )
    assert chat_tokenizer.stop_id == 2


def test_a_stop_token_that_is_an_ordinary_added_one_is_found_and_spells_nothing():
    tokenizer = toys.byte_level.__wrapped__()
    tokenizer.add_tokens(["<end>"])
    chat_tokenizer = ChatTokenizer(
        tokenizer, chat_template="{% for m in messages %}{{ m['content'] + '<end>' }}{% endfor %}"
    )
    assert tokens(chat_tokenizer, [chat_tokenizer.stop_id]) == ["<end>"]
    assert chat_tokenizer.surfaces.table[chat_tokenizer.stop_id] is None


def test_no_stop_token_at_all_is_refused():
    tokenizer = toys.byte_level.__wrapped__()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no end token.*set eos_token"):
        ChatTokenizer(tokenizer, chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")


def test_a_tokenizer_that_loses_blanks_is_refused():
    from tokenizers import pre_tokenizers

    tokenizer = toys.byte_level.__wrapped__()
    # As a class of another family would set it: blanks are where words are cut, and are not encoded.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(ValueError, match="does not give text back: of 'the fox is 72' it makes 'thefoxis72'"):
        ChatTokenizer(tokenizer)


def test_padding_falls_back_to_the_end_token(chatml, llama2):
    assert tokens(chatml, [chatml.pad_id]) == ["<|endoftext|>"]
    assert tokens(llama2, [llama2.pad_id]) == ["</s>"]


# Prompts


def test_messages_are_read_through_the_template_alone(chatml, llama2):
    assert tokens(chatml, chatml.encode_prompt([USER]))[0] == "<|im_start|>"
    assert chatml.render([USER]) == "<|im_start|>user\nthe fox?<|im_end|>\n<|im_start|>assistant\n"
    assert tokens(llama2, llama2.encode_prompt([USER])).count("<s>") == 1


def test_prompts_of_a_batch_are_what_they_are_alone(llama2):
    prompts = ["the fox", [USER], "<s>the", MORE[:3], ""]
    for prompt, ids in zip(prompts, llama2.encode_prompts(prompts)):
        assert ids.tolist() == llama2.encode_prompt(prompt).tolist()
        assert ids.dtype == np.int32
    assert llama2.encode_prompts([]) == []


def with_specials(*, markup=False, **kwargs):
    from tokenizers.processors import TemplateProcessing

    tokenizer = toys.sentencepiece.__wrapped__("normalizer")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        special_tokens=[("<s>", 1), ("</s>", 2)], pair="$A $B", **kwargs
    )
    return ChatTokenizer(tokenizer, special_tokens_in_prompts=markup)


def test_plain_prompts_get_the_tokenizer_own_special_tokens_once():
    chat_tokenizer = with_specials(single="<s> $A")
    assert tokens(chat_tokenizer, chat_tokenizer.encode_prompt("the"))[0] == "<s>"
    assert tokens(chat_tokenizer, chat_tokenizer.encode_prompt("")) == ["<s>"]


def test_special_strings_in_plain_prompts_are_plain_text():
    chat_tokenizer = with_specials(single="<s> $A </s>")
    for text in ("<s>the", "the</s>", "a <unk> b"):
        ids = chat_tokenizer.encode_prompt(text)
        assert tokens(chat_tokenizer, ids)[0] == "<s>" and chat_tokenizer.surfaces.table[ids[-1]] is not None
        assert [i for i in ids.tolist() if chat_tokenizer.surfaces.table[i] is None] == [1]
        assert chat_tokenizer.decode(ids) == b" " + text.encode()


def test_a_prompt_that_was_rendered_before_can_be_read_with_its_special_tokens():
    chat_tokenizer = with_specials(single="<s> $A </s>", markup=True)
    assert tokens(chat_tokenizer, chat_tokenizer.encode_prompt("<s>the")).count("<s>") == 1
    assert tokens(chat_tokenizer, chat_tokenizer.encode_prompt("the</s>"))[-1] == "</s>"
    assert chat_tokenizer.render("<s>the") == "<s>the"


def test_callers_can_ask_for_special_strings(chatml):
    assert chatml.special_strings_in("a<|im_end|>b<|im_start|><|im_end|><think>") == ["<|im_end|>", "<|im_start|>"]
    assert chatml.special_strings_in("the fox") == []


def test_plain_prompts_do_not_end_with_an_end_token():
    chat_tokenizer = with_specials(single="<s> $A </s>")
    assert "</s>" not in tokens(chat_tokenizer, chat_tokenizer.encode_prompt("the fox"))
    assert "</s>" not in tokens(chat_tokenizer, chat_tokenizer.encode_prompt("the</s>"))


def test_the_plain_template_begins_as_the_tokenizer_begins_a_text():
    assert with_specials(single="<s> $A").render([USER]).startswith("<s>User:")


def test_a_conversation_brings_its_tools_and_variables():
    chat_tokenizer = ChatTokenizer(
        toys.byte_level(), chat_template="{{ tools }}{{ mood }}" + toys.CHATML, template_kwargs={"mood": "!"}
    )
    told = Conversation([USER], tools=[{"name": "look"}], template_kwargs={"mood": "?"})
    assert chat_tokenizer.render(told).startswith("[{'name': 'look'}]?<|im_start|>")
    ids = [chat_tokenizer.encode_prompt(p).tolist() for p in ([USER], told)]
    assert [chat_tokenizer.encode_prompts([[USER], told])[k].tolist() for k in (0, 1)] == ids
    whole, counted = chat_tokenizer.encode_turns(like(told, MORE))
    assert (
        chat_tokenizer.decode(whole).startswith(b"[{'name'") and chat_tokenizer.decode(whole[counted]) == b"the dog.72."
    )


def test_context_goes_before_a_prompt_as_the_template_takes_it(chatml, llama2):
    assert chatml.with_context([USER], "It is 72.") == [{"role": "system", "content": "It is 72."}, USER]
    assert llama2.with_context([USER], "It is 72.")[0]["content"] == "It is 72.\n\nthe fox?"
    assert llama2.with_context("the fox?", "It is 72.") == "It is 72.\n\nthe fox?"


# Completions


def test_special_strings_in_a_completion_are_plain_text(chatml):
    encoded = chatml.encode_completion("a<|im_end|>b")
    assert not set(encoded.ids.tolist()) & {0, 1, 2}
    assert chatml.decode(encoded.ids) == b"a<|im_end|>b"


def test_the_first_token_holds_the_blank_that_the_template_writes(llama2):
    encoded = llama2.encode_completion("the dog", after=[USER])
    assert tokens(llama2, encoded.ids)[0] == "▁the"
    assert encoded.spans[0].tolist() == [0, 3]


def test_a_completion_of_a_plain_prompt_follows_without_a_blank(llama2):
    assert llama2.decode(llama2.encode_completion("the dog", after="prompt:").ids) == b"the dog"


def test_a_text_from_its_beginning_is_cut_as_the_tokenizer_cuts_it(llama2, chatml):
    whole = llama2.tokenizer.encode("the dog", add_special_tokens=False)
    encoded = llama2.encode_completion("the dog", after="")
    assert encoded.ids.tolist() == whole
    assert encoded.spans[0].tolist() == [0, 3]
    assert chatml.decode(chatml.encode_completion("the dog", after="").ids) == b"the dog"


def test_completions_of_a_batch_follow_their_own_prompts(llama2):
    after = [[USER], "x", "", None]
    batch = llama2.encode_completions(["the dog"] * 4, after=after)
    for prompt, encoded in zip(after, batch):
        assert encoded.ids.tolist() == llama2.encode_completion("the dog", after=prompt).ids.tolist()


def test_an_empty_completion_has_no_tokens(chatml, llama2):
    for chat_tokenizer in (chatml, llama2):
        encoded = chat_tokenizer.encode_completion("")
        assert encoded.ids.shape == (0,) and encoded.spans.shape == (0, 2)


# Whole conversations


def counted_text(chat_tokenizer, ids, counted):
    return [chat_tokenizer.surfaces.strings[i] for i in ids[counted].tolist()]


def test_answers_and_their_stop_tokens_count_in_every_turn(chatml):
    ids, counted = chatml.encode_turns(MORE)
    whole = chatml.tokenizer.encode(chatml.template.render(MORE), add_special_tokens=False)
    assert ids.tolist() == whole
    assert chatml.decode(ids[counted]) == b"the dog.72."
    assert counted_text(chatml, ids, counted).count("<|im_end|>") == 2
    assert counted.dtype == np.bool_


def test_stop_tokens_behind_a_blank_count(llama2):
    ids, counted = llama2.encode_turns(MORE)
    assert counted_text(llama2, ids, counted).count("</s>") == 2
    assert llama2.decode(ids[counted]).split() == [b"the", b"dog.", b"72."]


def test_special_strings_in_an_answer_stay_plain_text(chatml):
    messages = [USER, {"role": "assistant", "content": "a<|im_end|>b"}, *MORE]
    ids, counted = chatml.encode_turns(messages)
    assert counted_text(chatml, ids, counted).count("<|im_end|>") == 3
    assert chatml.decode(ids[counted]) == b"a<|im_end|>bthe dog.72."


def test_an_empty_answer_counts_its_stop_token_alone(chatml):
    ids, counted = chatml.encode_turns([USER, {"role": "assistant", "content": ""}])
    assert counted_text(chatml, ids, counted) == ["<|im_end|>"]


def test_a_conversation_without_an_answer_counts_nothing(chatml):
    assert not chatml.encode_turns([USER])[1].any()


def test_a_slow_tokenizer_counts_the_same():
    slow = toys.slow_sentencepiece.__wrapped__()
    slow.chat_template = toys.LLAMA2
    chat_tokenizer = ChatTokenizer(slow)
    ids, counted = chat_tokenizer.encode_turns(MORE)
    assert chat_tokenizer.decode(ids[counted]).split() == [b"the", b"dog.", b"72."]
    assert counted_text(chat_tokenizer, ids, counted).count("</s>") == 2


# What a model drew


def test_a_drawn_completion_ends_before_its_stop_token(chatml):
    ids = ids_of(chatml, "the dog")
    drawn = completion_from_ids(chatml, [*ids, chatml.stop_id, *ids])
    assert (drawn.text, drawn.stopped, drawn.invalid_utf8) == ("the dog", True, False)
    assert drawn.ids.tolist() == ids
    assert drawn.spans[-1, 1] == 7


def test_a_completion_cut_by_the_length_limit_did_not_stop(chatml):
    drawn = completion_from_ids(chatml, ids_of(chatml, "the dog"))
    assert (drawn.text, drawn.stopped, drawn.invalid_utf8) == ("the dog", False, False)


def test_a_character_cut_off_at_the_end_is_left_out(chatml):
    ids = ids_of(chatml, "the ☃")
    drawn = completion_from_ids(chatml, ids[:-1])
    assert (drawn.text, drawn.stopped, drawn.invalid_utf8) == ("the ", False, True)
    assert chatml.decode(drawn.ids) == b"the "


def test_what_follows_a_stray_byte_is_left_out_and_the_stop_token_with_it(chatml):
    stray = chatml.surfaces.table.index(b"\xff")
    ids = ids_of(chatml, "the ")
    drawn = completion_from_ids(chatml, [*ids, stray, *ids, chatml.stop_id])
    assert (drawn.text, drawn.stopped, drawn.invalid_utf8) == ("the ", False, True)
    assert drawn.ids.tolist() == ids


@pytest.mark.parametrize("stray", [0, 1, 10_000, -1])
def test_what_follows_a_token_without_a_surface_is_left_out(chatml, stray):
    ids = ids_of(chatml, "the ")
    drawn = completion_from_ids(chatml, [*ids, stray, *ids])
    assert (drawn.text, drawn.invalid_utf8) == ("the ", True)


def test_a_completion_that_is_damaged_from_the_start_is_empty(chatml):
    drawn = completion_from_ids(chatml, [chatml.surfaces.table.index(b"\x98"), *ids_of(chatml, "the")])
    assert (drawn.text, drawn.invalid_utf8) == ("", True)
    assert drawn.spans.shape == (0, 2)


def test_nothing_drawn_is_an_empty_completion(chatml):
    drawn = completion_from_ids(chatml, [])
    assert (drawn.text, drawn.stopped, drawn.invalid_utf8) == ("", False, False)
    assert completion_from_ids(chatml, [chatml.stop_id]).stopped


def test_the_blank_of_the_template_is_no_part_of_a_drawn_completion(llama2):
    ids = llama2.encode_completion("the dog", after=[USER]).ids
    drawn = completion_from_ids(llama2, ids, after=[USER])
    assert drawn.text == "the dog"
    assert drawn.spans.tolist() == llama2.encode_completion("the dog", after=[USER]).spans.tolist()
    assert completion_from_ids(llama2, ids, after="prompt:").text == " the dog"


@given(st.lists(st.integers(-2, 430), max_size=12))
@settings(max_examples=300, deadline=None)
def test_any_ids_keep_the_longest_whole_prefix(ids):
    chat_tokenizer = chatml_tokenizer()
    drawn = completion_from_ids(chat_tokenizer, ids)
    limit = ids.index(chat_tokenizer.stop_id) if chat_tokenizer.stop_id in ids else len(ids)
    best = 0
    for k in range(limit + 1):
        if k and (
            not 0 <= ids[k - 1] < len(chat_tokenizer.surfaces) or chat_tokenizer.surfaces.table[ids[k - 1]] is None
        ):
            break
        try:
            chat_tokenizer.surfaces.join(ids[:k]).decode()
            best = k
        except UnicodeDecodeError:
            pass
    assert drawn.ids.tolist() == ids[:best]
    assert drawn.text.encode() == chat_tokenizer.surfaces.join(ids[:best])
    assert drawn.invalid_utf8 == (best < limit)
    assert drawn.stopped == (best == limit < len(ids))


@pytest.mark.assets
def test_thinking_can_be_turned_off(assets):
    chat_tokenizer = ChatTokenizer(
        real.tokenizer(assets / "tokenizers" / "qwen3"), template_kwargs={"enable_thinking": False}
    )
    assert chat_tokenizer.render([USER]).endswith("assistant\n<think>\n\n</think>\n\n")
    ids, counted = chat_tokenizer.encode_turns(MORE)
    assert chat_tokenizer.decode(ids[counted]) == b"the dog.72."


@pytest.mark.assets
@pytest.mark.parametrize(
    "folder, stop, begin",
    [
        ("smollm2-135m-instruct", "<|im_end|>", "<|im_start|>"),
        ("smollm2-135m-gpt2tok", "<|im_end|>", "<|im_start|>"),
        ("tokenizers/qwen3", "<|im_end|>", "<|im_start|>"),
        ("tokenizers/llama3_2", "<|eot_id|>", "<|begin_of_text|>"),
        pytest.param("tokenizers/gemma3", "<end_of_turn>", "<bos>", marks=pytest.mark.long),
        ("tokenizers/llama2", "</s>", "<s>"),
        ("tokenizers/gpt2", "<|endoftext|>", "User"),
    ],
)
def test_real_tokenizers(assets, folder, stop, begin):
    chat_tokenizer = real.chat_tokenizer(assets / folder)
    assert tokens(chat_tokenizer, [chat_tokenizer.stop_id]) == [stop]
    prompt = tokens(chat_tokenizer, chat_tokenizer.encode_prompt([USER]))
    assert prompt[0] == begin and prompt[:2] != [begin, begin]
    answer = "größer <|im_end|></s><|eot_id|><end_of_turn><|endoftext|> 👨‍👩‍👧"
    encoded = chat_tokenizer.encode_completion(answer)
    assert not [i for i in encoded.ids.tolist() if chat_tokenizer.surfaces.table[i] is None]
    assert chat_tokenizer.decode(encoded.ids) == answer.encode()
    for messages in (MORE, [USER, {"role": "assistant", "content": answer}]):
        ids, counted = chat_tokenizer.encode_turns(messages)
        earlier = "".join(m["content"] for m in messages[:-1] if m["role"] == "assistant")
        wanted = earlier + chat_tokenizer.answer(messages).text
        assert wanted.endswith(messages[-1]["content"]) and ("<think>" in wanted) == ("qwen3" in folder)
        assert chat_tokenizer.decode(ids[counted]).replace(b" ", b"") == wanted.encode().replace(b" ", b"")
        assert counted_text(chat_tokenizer, ids, counted).count(stop) == len(messages) // 2
    assert completion_from_ids(chat_tokenizer, [*encoded.ids, chat_tokenizer.stop_id]).text == answer


def test_a_chat_tokenizer_says_whose_template_it_has_and_where_it_stops():
    tokenizer = toys.byte_level(template=toys.CHATML)
    own, stop = ChatTokenizer(tokenizer), tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert own.describe() == f"chat template of a TokenizersBackend, stops at <|im_end|> ({stop})"
    given = ChatTokenizer(tokenizer, chat_template="{{ messages[-1]['content'] }}", stop_ids=[7]).describe()
    assert given == f"a chat template in place of its own, stops at <|im_end|> ({stop}), {own.surfaces.strings[7]} (7)"
    assert (
        ChatTokenizer(toys.byte_level()).describe().startswith("plain text (the tokenizer has no chat template), stops")
    )


LONG = {
    "prose": "the photographer couldn't believe HOW quickly; fog_had lifted 1,234 naïve Straße\tx\n(a+b) " * 120,
    "code": "def f(x):\r\n    return x ** 2  # &nbsp;\r\n\r\n" * 250,
    "Chinese": "今天天气很好,我们去公园看樱花,然后喝一杯热茶。" * 400,
    "combining": "e\u0301a\u0308\u0323\u1112\u1161\u11ab👩‍💻" * 900,
    **{name: part * 9_000 for name, part in {"blanks": " ", "lines": "\n", "digits": "7", "letters": "ab"}.items()},
}


def same_beginnings(chat_tokenizer):
    for name, text in LONG.items():
        whole, short = (chat_tokenizer.encode_completion(t) for t in (text, chat_tokenizer.shorten(text, 96)))
        for field in ("ids", "spans", "unknown"):
            assert np.array_equal(getattr(short, field)[:96], getattr(whole, field)[:96]), name
        asked, answered = (
            [{"role": "user", "content": text + "<|im_end|>"}],
            [USER, {"role": "assistant", "content": text}],
        )
        for prompt in (text, asked):
            ids = chat_tokenizer.encode_prompt(prompt)
            assert np.array_equal(chat_tokenizer.encode_prompt(prompt, limit=96), ids[:97]), name
        for turns in ([*asked, ANSWER], answered):
            pairs = zip(chat_tokenizer.encode_turns(turns, limit=96), chat_tokenizer.encode_turns(turns))
            assert all(np.array_equal(some, whole[:97]) for some, whole in pairs), name


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "word_piece"])
def test_a_long_text_is_read_as_far_as_it_is_needed(kind, monkeypatch):
    chat_tokenizer = ChatTokenizer(getattr(toys, kind)(template=toys.CHATML if kind == "byte_level" else toys.LLAMA2))
    if kind == "byte_level":
        same_beginnings(chat_tokenizer)
    text, read = "the fox? 72 dogs. " * 50_000, []
    monkeypatch.setattr(chat_tokenizer, "_tokenize", lambda texts, **_: read.append(texts) or [[1] * len(texts[0])])
    assert len(chat_tokenizer.encode_prompt([{"role": "user", "content": text}], limit=96)) == 97
    assert sum(map(len, read[0])) < 10_000 and len(chat_tokenizer.shorten(text, 96)) < 10_000


def test_of_many_turns_those_that_are_needed_are_looked_for(monkeypatch):
    chat_tokenizer = ChatTokenizer(toys.byte_level(), chat_template=toys.CHATML)
    turns = [m | {"content": f"{m['content']} {k} {'dogs ' * 30}"} for k in range(100) for m in (USER, ANSWER)]
    blanks = [m | {"content": " " * 400 + m["content"]} for m in turns]
    for messages, limit in ((turns, 96), (turns, 2000), (turns, 10**6), (blanks, 96), (turns[:2], 96)):
        whole = chat_tokenizer.encode_turns(messages)
        for some, every in zip(chat_tokenizer.encode_turns(messages, limit=limit), whole):
            assert np.array_equal(some, every[: limit + 1])
    located = []
    monkeypatch.setattr(
        chat_tokenizer.template, "_locate", lambda *a: located.append(a) or ChatTemplate._locate(template, *a)
    )
    template = ChatTemplate(chat_tokenizer.tokenizer, toys.CHATML)
    chat_tokenizer.encode_turns(turns, limit=96)
    assert 0 < len(located) < 40


@pytest.mark.assets
@pytest.mark.parametrize("name", ["qwen3", "llama3_2", "llama2", "gemma3", "gpt2", "deepseek_v3"])
def test_real_tokenizers_read_the_beginning_of_a_long_text_as_in_the_whole(assets, name):
    same_beginnings(real.chat_tokenizer(assets / "tokenizers" / name))


def test_the_blank_that_a_template_writes_before_an_answer_counts_as_part_of_it(llama2):
    chat_tokenizer = llama2
    ids, counted = chat_tokenizer.encode_turns(
        [{"role": "user", "content": "one"}, {"role": "assistant", "content": "24 dogs"}]
    )
    answer = [*ids_of(chat_tokenizer, "24 dogs"), chat_tokenizer.stop_id]
    said = ids[counted].tolist()
    assert chat_tokenizer.decode(said).startswith(b" 24 dogs")
    assert (
        said[-1] == chat_tokenizer.stop_id
        and chat_tokenizer.decode(said).strip() == chat_tokenizer.decode(answer).strip()
    )
