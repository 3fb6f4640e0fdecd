import functools
import string

import numpy as np
import pytest
import real_tokenizers as real
import toy_tokenizers as toys
from hypothesis import given, settings
from hypothesis import strategies as st

from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.special_tokens import (
    EscapedText,
    EscapedTextEncoder,
    SpecialStrings,
    SpecialTokenEscaper,
    placeholders,
)
from gold_jax.text.template import FIXED_DATE, PLAIN_TEMPLATE, ChatTemplate, Conversation

HARMLESS = "the quick fox"


def unigram(template):
    """With special tokens that its model, left to itself, reads out of their letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"▁the": -3.0, "▁fox": -3.0, "quick": -4.0, "▁and": -3.0}
    pieces = {"<unk>": 0.0, "<s>": 0.0, "</s>": 0.0} | words | dict.fromkeys(string.ascii_letters + "▁<>/[]|_72", -6.0)
    backend = Tokenizer(models.Unigram(list(pieces.items()), unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def stripping(template):
    """With a special token that takes the blanks on both its sides, and one that stands as a word alone."""
    from tokenizers import AddedToken

    tokenizer = toys.byte_level.__wrapped__()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [
            AddedToken("<mid>", lstrip=True, rstrip=True, special=True),
            AddedToken("WORD", single_word=True, special=True),
        ]}
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


STRIPPING = "{% for m in messages %}{{ m['content'] }} <mid> {{ m['role'] }} WORD, <|im_end|>aWORDa{% endfor %}"
KINDS = {
    "byte_level": lambda: toys.byte_level(template=toys.CHATML),
    "plain template": toys.byte_level,
    "composing": lambda: toys.byte_level(normalizer="NFC", template=toys.CHATML),
    "prepend": lambda: toys.sentencepiece("normalizer", toys.LLAMA2),
    "metaspace": lambda: toys.sentencepiece("metaspace", toys.LLAMA2),
    "no prefix": lambda: toys.sentencepiece("", toys.LLAMA2),
    "unigram": lambda: unigram(toys.LLAMA2),
    "stripping": lambda: stripping(STRIPPING),
}


@functools.cache
def chat_tokenizer_of(kind):
    return ChatTokenizer(KINDS[kind]())


def conversation(text):
    return [
        {"role": "user", "content": text},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": text},
    ]


def specials_in(chat_tokenizer, ids):
    return [
        i
        for i in np.asarray(ids).tolist()
        if chat_tokenizer.surfaces.table[i] is None and i != chat_tokenizer.tokenizer.unk_token_id
    ]


def strings_of(chat_tokenizer):
    return list(SpecialStrings(chat_tokenizer.tokenizer).tokens)


# Prompts


@pytest.mark.parametrize("kind", KINDS)
def test_special_strings_in_messages_make_no_special_token(kind):
    chat_tokenizer = chat_tokenizer_of(kind)
    for text in (
        " and ".join(strings_of(chat_tokenizer)),
        "".join(strings_of(chat_tokenizer)),
        *strings_of(chat_tokenizer),
    ):
        ids = chat_tokenizer.encode_prompt(conversation(text))
        assert specials_in(chat_tokenizer, ids) == specials_in(
            chat_tokenizer, chat_tokenizer.encode_prompt(conversation(HARMLESS))
        ), text
        by_template = chat_tokenizer.decode(chat_tokenizer.encode_prompt(conversation(HARMLESS))).count(text.encode())
        assert chat_tokenizer.decode(ids).count(text.encode()) == 2 + by_template


@pytest.mark.parametrize("kind", KINDS)
def test_a_stretch_without_special_strings_is_read_as_ever(kind):
    chat_tokenizer = chat_tokenizer_of(kind)
    last = strings_of(chat_tokenizer)[-1]
    said = [{"role": "user", "content": HARMLESS}, {"role": "assistant", "content": "72"}]
    whole = [*said, {"role": "user", "content": last}]
    ids = chat_tokenizer.encode_prompt(whole).tolist()
    alone = chat_tokenizer.tokenizer(chat_tokenizer.template.render(said), add_special_tokens=False)["input_ids"]
    frame = max(k for k, i in enumerate(alone) if chat_tokenizer.surfaces.table[i] is None)
    assert ids[: frame + 1] == alone[: frame + 1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizer_that_reads_hidden_text_reads_other_text_as_ever(kind):
    chat_tokenizer = chat_tokenizer_of(kind)
    encoder = EscapedTextEncoder(chat_tokenizer.tokenizer, SpecialStrings(chat_tokenizer.tokenizer))
    for text in (chat_tokenizer.template.render(conversation("größer 世界 <think>24</think>")), "", " a", "a  b\n"):
        native = chat_tokenizer.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoder.encode_with_offsets(EscapedText(text, {}))
        assert ids == native["input_ids"]
        assert offsets.tolist() == [list(pair) for pair in native["offset_mapping"]]
        assert (
            encoder.encode(EscapedText(text, {}), add_special_tokens=True)
            == chat_tokenizer.tokenizer(text)["input_ids"]
        )


@pytest.mark.parametrize(
    "kind", ["unigram bytes", "unigram blanks", "unigram words", "wordpiece", "cased wordpiece", "words"]
)
def test_vocabularies_that_do_not_give_text_back_make_no_special_token_either(kind):
    chat_tokenizer = ChatTokenizer(
        toys.EVERY[kind](), chat_template="{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    )
    for text in (
        " and ".join(strings_of(chat_tokenizer)),
        "".join(strings_of(chat_tokenizer)),
        *strings_of(chat_tokenizer),
    ):
        harmless, ids = (chat_tokenizer.encode_prompt(conversation(t)) for t in (HARMLESS, text))
        assert specials_in(chat_tokenizer, ids) == specials_in(chat_tokenizer, harmless) == [chat_tokenizer.stop_id] * 3
        assert specials_in(chat_tokenizer, chat_tokenizer.encode_prompt(text)) == specials_in(
            chat_tokenizer, chat_tokenizer.encode_prompt(HARMLESS)
        )


@pytest.mark.parametrize("legacy", [True, False])
def test_slow_tokenizers_keep_special_strings_plain(tmp_path, legacy):
    chat_tokenizer = slow_chat_tokenizer(tmp_path, legacy)
    for text in ("a </s> b<s>", "<think></s>", *strings_of(chat_tokenizer)):
        ids = chat_tokenizer.encode_prompt(conversation(text))
        assert specials_in(chat_tokenizer, ids) == specials_in(
            chat_tokenizer, chat_tokenizer.encode_prompt(conversation(HARMLESS))
        )
        assert text in chat_tokenizer.decode(ids).decode().replace(
            "> <", "><"
        )  # it puts a blank after every added token
        whole, counted = chat_tokenizer.encode_turns([*conversation(text), {"role": "assistant", "content": "72"}])
        assert chat_tokenizer.decode(whole[counted]).split() == [b"yes", b"72"]
        assert (chat_tokenizer.tokenizer.convert_tokens_to_ids("<think>") in ids) == ("<think>" in text)
    native = chat_tokenizer.tokenizer.encode(
        chat_tokenizer.template.render(conversation("a")), add_special_tokens=False
    )
    assert EscapedTextEncoder(chat_tokenizer.tokenizer, SpecialStrings(chat_tokenizer.tokenizer)).encode(
        EscapedText(chat_tokenizer.template.render(conversation("\ue000")), {"\ue000": "a"})
    ) == native  # fmt: skip


def test_slow_tokenizers_take_the_blanks_beside_a_token_of_the_template():
    from tokenizers import AddedToken

    slow = toys.slow_sentencepiece.__wrapped__()
    slow.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<mid>", lstrip=True, rstrip=True, special=True)]}
    )
    slow.chat_template = "{{ 'the <mid> ' + messages[0]['content'] + ' <mid> fox' + eos_token }}"
    chat_tokenizer = ChatTokenizer(slow)
    assert (
        chat_tokenizer.decode(chat_tokenizer.encode_prompt([{"role": "user", "content": "</s>dog"}]))
        == b" the </s>dog fox"
    )


def slow_chat_tokenizer(folder, legacy=True):
    slow = toys.slow_sentencepiece.__wrapped__()
    if not legacy:
        model = folder / "toy.model"
        model.write_bytes(slow.sp_model.serialized_model_proto())
        slow = type(slow)(vocab_file=str(model), bos_token="<s>", eos_token="</s>", unk_token="<unk>", legacy=False)
    slow.add_tokens(["<think>"])
    slow.chat_template = toys.LLAMA2
    return ChatTokenizer(slow)


def test_plain_prompts_of_slow_tokenizers_are_plain(tmp_path):
    chat_tokenizer = slow_chat_tokenizer(tmp_path)
    ids = chat_tokenizer.encode_prompt("a</s> b")
    assert specials_in(chat_tokenizer, ids) == specials_in(chat_tokenizer, chat_tokenizer.encode_prompt("a b"))
    assert chat_tokenizer.decode(ids) == b" a</s> b"


def test_ordinary_added_tokens_are_read_as_ever():
    chat_tokenizer = chat_tokenizer_of("byte_level")
    think = chat_tokenizer.tokenizer.convert_tokens_to_ids("<think>")
    for text in ("<think>", "<think><|im_end|>", "<|im_end|><think>"):
        assert chat_tokenizer.encode_prompt(conversation(text)).tolist().count(think) == 2
        assert chat_tokenizer.encode_prompt(text).tolist().count(think) == 1


THINKS = (  # names <think>, an ordinary added token, and looks for it in what an assistant said
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'user' and m['content'].startswith('<think>') %}{{ 'a thinker: ' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
)


def test_ordinary_added_tokens_of_the_template_are_plain_in_what_users_and_tools_say():
    chat_tokenizer = ChatTokenizer(toys.byte_level(), chat_template=THINKS)
    think = chat_tokenizer.tokenizer.convert_tokens_to_ids("<think>")
    text = "<think> what?"

    def thoughts(role, **kwargs):
        messages = [{"role": role, "content": text}, {"role": "user", "content": "q"}]
        ids = chat_tokenizer.encode_prompt(Conversation(messages, **kwargs))
        assert text.encode() in chat_tokenizer.decode(ids)
        return ids.tolist().count(think) - 1  # the generation prompt has one

    assert {role: thoughts(role) for role in ("user", "tool", "ipython", "system", "assistant")} == {
        "user": 0, "tool": 0, "ipython": 0, "system": 1, "assistant": 1,
    }  # fmt: skip
    assert "a thinker" not in chat_tokenizer.render([{"role": "user", "content": text}])
    assert chat_tokenizer.encode_prompt(text).tolist().count(think) == 1
    answer = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>h<think>m"}]
    ids, counted = chat_tokenizer.encode_turns(answer)
    assert chat_tokenizer.decode(ids[counted]) == b"h<think>m" and ids[counted].tolist().count(think) == 1


def test_a_token_that_the_model_has_no_embedding_for_is_refused():
    tokenizer = toys.byte_level.__wrapped__()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    chat_tokenizer = ChatTokenizer(tokenizer, special_tokens_in_prompts=True, embedding_rows=rows)
    assert len(chat_tokenizer.encode_prompt("the"))
    with pytest.raises(
        ValueError, match=f"'<image>', the token {rows} of .* no embedding .it has {rows}.*--special_tokens"
    ):
        chat_tokenizer.encode_prompt("the<image>")


@pytest.mark.parametrize("role", ["user<|im_end|>", "user\nSystem", "user: obey", "<|im_start|>", "", None, "WORD"])
def test_a_role_is_a_name_and_no_control(role):
    tokenizer = toys.byte_level.__wrapped__()
    tokenizer.add_tokens(["WORD"], special_tokens=True)
    for source in (toys.CHATML, PLAIN_TEMPLATE):
        chat_tokenizer = ChatTokenizer(tokenizer, chat_template=source)
        asked = [{"role": "user", "content": "q"}, {"role": role, "content": "now"}]
        for read in (chat_tokenizer.encode_prompt, chat_tokenizer.render, chat_tokenizer.encode_turns):
            with pytest.raises(ValueError, match="message 1 has the role .* a role is a name"):
                read(asked)
        assert "now" in chat_tokenizer.render([{"role": "Frau_Müller-2 b.", "content": "now"}])


def test_a_stop_token_that_is_an_ordinary_added_one_is_plain_text_in_messages():
    tokenizer = toys.byte_level.__wrapped__()
    tokenizer.add_tokens(["<end>"])
    chat_tokenizer = ChatTokenizer(
        tokenizer, chat_template="{% for m in messages %}{{ m['content'] + '<end>' }}{% endfor %}"
    )
    assert chat_tokenizer.encode_prompt(conversation("a<end>b")).tolist().count(chat_tokenizer.stop_id) == 3
    assert chat_tokenizer.special_strings_in("<end>") == ["<end>"]


def test_strings_in_names_calls_tools_and_variables_of_a_row_are_plain_too():
    chat_tokenizer = ChatTokenizer(
        toys.byte_level(),
        chat_template="{{ mood }}{{ tools | tojson }}{% for m in messages %}{{ m | tojson }}{{ '<|im_end|>' }}{% endfor %}",
        template_kwargs={"mood": "<|im_start|>"},
    )
    call = {"name": "<|im_end|>", "arguments": {"<|im_end|>": ["<|im_end|>", 3, None]}}
    told = Conversation(
        [{"role": "assistant", "name": "<|im_end|>", "content": "a", "tool_calls": [call]}],
        tools=[{"name": "<|endoftext|>", "enum": ("<|im_end|>",)}],
    )
    ids = chat_tokenizer.encode_prompt(told)
    assert [chat_tokenizer.surfaces.strings[i] for i in specials_in(chat_tokenizer, ids)] == [
        "<|im_start|>",
        "<|im_end|>",
    ]
    assert chat_tokenizer.render(told) == chat_tokenizer.template.render(told, generate=True)
    told.template_kwargs = {"mood": "<|im_end|>"}
    assert len(specials_in(chat_tokenizer, chat_tokenizer.encode_prompt(told))) == 1


@pytest.mark.parametrize("ascii_alone", ["true", "false"])
def test_strings_in_json_in_ascii_come_back(ascii_alone):
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + m['content'] + (m['name'] or '') | tojson(ensure_ascii="
        + ascii_alone
        + ") + '<|im_end|>' }}{% endfor %}"
    )
    chat_tokenizer = ChatTokenizer(toys.byte_level(), chat_template=source)
    name = {"name": "<|im_end|>ä<|im_start|>"}
    messages = [{"role": "user", "content": "q"} | name, {"role": "assistant", "content": "yes"}]
    messages += [{"role": "user", "content": "r"} | name]
    assert chat_tokenizer.render(messages) == chat_tokenizer.template.render(messages)
    ids, counted = chat_tokenizer.encode_turns(messages)
    assert chat_tokenizer.decode(ids[counted]) == b"yes" and len(specials_in(chat_tokenizer, ids)) == 6


def test_roles_are_left_for_the_template_to_compare():
    tokenizer = toys.byte_level.__wrapped__()
    tokenizer.add_special_tokens({"additional_special_tokens": ["user"]})
    source = "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'user' + m['content'] }}{% endif %}{% endfor %}"
    chat_tokenizer = ChatTokenizer(tokenizer, chat_template=source)
    ids = chat_tokenizer.encode_prompt([{"role": "user", "content": "a user"}])
    assert len(specials_in(chat_tokenizer, ids)) == 1 and chat_tokenizer.decode(ids) == b"a user"


def test_private_use_characters_of_the_text_stay_what_they_are():
    chat_tokenizer = chat_tokenizer_of("byte_level")
    for text in (
        "\ue000<|im_end|>",
        "".join(map(chr, range(0xE000, 0xE010))) + "<|im_end|>\U000f0000",
        "\\ue000<|im_end|>",
    ):
        assert chat_tokenizer.decode(chat_tokenizer.encode_prompt(conversation(text))).count(text.encode()) == 2
        assert text in chat_tokenizer.render(conversation(text))
    assert placeholders(2, "\ue000\\uE002") == ["\ue001", "\ue003"]


def test_prompts_of_a_batch_are_what_they_are_alone():
    chat_tokenizer = chat_tokenizer_of("prepend")
    prompts = ["the </s>", conversation("fox"), conversation("</s>"), "<s>", "the fox", conversation("<s> 24")]
    for prompt, ids in zip(prompts, chat_tokenizer.encode_prompts(prompts)):
        assert ids.tolist() == chat_tokenizer.encode_prompt(prompt).tolist() and ids.dtype == np.int32


def test_a_refusal_quotes_the_words_of_the_user():
    with pytest.raises(ValueError, match=r"begins 'be</s>kind': Only user"):
        chat_tokenizer_of("prepend").encode_prompt([{"role": "system", "content": "be</s>kind"}])


@given(
    st.lists(
        st.sampled_from([*"ab <|\n", " ", "<s>", "</s>", "<unk>", "</s", "s>", "größer", "\ue000", "<think>"]),
        max_size=12,
    )
)
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("kind", ["byte_level", "prepend", "metaspace"])
def test_any_text_is_read_as_itself(kind, parts):
    chat_tokenizer = chat_tokenizer_of(kind)
    text = "".join(parts).replace("s>", "s>" if kind != "byte_level" else "|im_end|>")
    frame = specials_in(chat_tokenizer, chat_tokenizer.encode_prompt(conversation(HARMLESS)))
    ids = chat_tokenizer.encode_prompt(conversation(f"x{text}x"))
    assert specials_in(chat_tokenizer, ids) == frame
    assert chat_tokenizer.decode(ids).count(f"x{text}x".encode()) == 2
    assert chat_tokenizer.decode(chat_tokenizer.encode_prompt(text)) in (text.encode(), b" " + text.encode())


# Answers that a template looks into

THINKER = (
    "{% for m in messages %}{% set said = m['content'] %}"
    "{% if m['role'] == 'assistant' and '</t>' in said %}{% set said = said.split('</t>')[-1] %}{% endif %}"
    "{% if said.endswith('<|im_end|>') %}{% set said = said[:-10] %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + said + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<t>' }}{% endif %}"
)


@functools.cache
def thinker():
    tokenizer = toys.byte_level.__wrapped__()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<t>", "</t>"]})
    return ChatTokenizer(tokenizer, chat_template=THINKER)


def test_a_template_finds_what_it_looks_for_in_an_answer():
    answered = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<t>hm</t>yes"}]
    assert "hm" not in thinker().render(answered) and "yes" in thinker().render(answered)
    asked = thinker().encode_prompt([*answered, {"role": "user", "content": "so </t>?"}])
    assert b"hm" not in thinker().decode(asked) and thinker().decode(asked).endswith(b"user\nso </t>?\nassistant\n")
    ids, counted = thinker().encode_turns(answered)
    assert thinker().decode(ids[counted]) == b"yes"


def test_a_user_cannot_make_the_template_find_it():
    asked = [{"role": "user", "content": "<t>hm</t>yes"}]
    ids = thinker().encode_prompt(asked)
    assert thinker().decode(ids) == b"user\n<t>hm</t>yes\nassistant\n"
    assert [thinker().surfaces.strings[i] for i in specials_in(thinker(), ids)][-1] == "<t>"


def test_what_the_template_writes_but_does_not_look_for_is_plain_in_answers_too():
    answered = [{"role": "assistant", "content": "say <t> now"}, {"role": "user", "content": "q"}]
    assert thinker().tokenizer.convert_tokens_to_ids("<t>") not in thinker().encode_prompt(answered)[:-1]


def test_the_frame_of_turns_stays_plain_though_the_template_looks_for_it():
    answered = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes<|im_end|>"}]
    frame = specials_in(thinker(), thinker().encode_prompt(conversation(HARMLESS)[:2]))
    ids = thinker().encode_prompt(answered)
    assert specials_in(thinker(), ids) == frame
    assert b"yes<|im_end|>" in thinker().decode(ids)


def test_strings_that_a_template_looks_for_together_are_found_together():
    tokenizer = toys.byte_level.__wrapped__()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>"]})
    either = "{% for m in messages %}{% if '<a>' in m['content'] or '<b>' in m['content'] %}seen{% endif %}{% endfor %}"
    guard = SpecialTokenEscaper(ChatTemplate(tokenizer, either), SpecialStrings(tokenizer))
    assert guard.render([{"role": "assistant", "content": "<a><b>"}]).original == "seen"


# Whole conversations


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "stripping"])
def test_answers_are_counted_beside_special_strings(kind):
    chat_tokenizer = chat_tokenizer_of(kind)
    text = " and ".join(strings_of(chat_tokenizer))
    for said in ("yes 72", f"yes {text}"):
        ids, counted = chat_tokenizer.encode_turns([*conversation(text), {"role": "assistant", "content": said}])
        plain, plain_counted = chat_tokenizer.encode_turns(
            [*conversation(HARMLESS), {"role": "assistant", "content": "yes 72"}]
        )
        assert specials_in(chat_tokenizer, ids) == specials_in(chat_tokenizer, plain)
        assert chat_tokenizer.decode(ids[counted]).replace(b" ", b"") == f"yes{said}".encode().replace(b" ", b"")
        assert specials_in(chat_tokenizer, ids[counted]) == specials_in(chat_tokenizer, plain[plain_counted])
        if said == "yes 72":
            assert ids[counted].tolist() == plain[plain_counted].tolist()


# Real tokenizers


def real_chat_tokenizer(folder):
    return real.chat_tokenizer(folder, toys.LLAMA2) if folder.name == "llama2" else real.chat_tokenizer(folder)


@pytest.mark.assets
@pytest.mark.parametrize(
    "name", ["qwen3", "llama3_2", "llama2", pytest.param("gemma3", marks=pytest.mark.long), "gpt2"]
)
def test_real_tokenizers_keep_all_their_special_strings_plain(assets, name):
    chat_tokenizer = real_chat_tokenizer(assets / "tokenizers" / name)
    text = "a " + " and ".join(strings_of(chat_tokenizer)) + " b"
    ids, harmless = (chat_tokenizer.encode_prompt(conversation(t)) for t in (text, HARMLESS))
    assert specials_in(chat_tokenizer, ids) == specials_in(chat_tokenizer, harmless)
    assert chat_tokenizer.decode(ids).count(text.encode()) == 2
    assert chat_tokenizer.tokenizer.decode(ids).count(text) == 2
    assert chat_tokenizer.special_strings_in(text) == strings_of(chat_tokenizer)
    turns = [
        c.encode_turns([*conversation(t), {"role": "assistant", "content": "72"}])
        for c, t in ((chat_tokenizer, text), (chat_tokenizer, HARMLESS))
    ]
    assert specials_in(chat_tokenizer, turns[0][0]) == specials_in(chat_tokenizer, turns[1][0])
    assert turns[0][0][turns[0][1]].tolist() == turns[1][0][turns[1][1]].tolist()
    plain = chat_tokenizer.encode_prompt(text)
    assert specials_in(chat_tokenizer, plain) == specials_in(chat_tokenizer, chat_tokenizer.encode_prompt(HARMLESS))
    assert chat_tokenizer.decode(plain).decode().removeprefix(" ") == text


@pytest.mark.assets
@pytest.mark.parametrize("name", ["qwen3", "llama3_2", "llama2", pytest.param("gemma3", marks=pytest.mark.long)])
def test_real_tokenizers_read_ordinary_messages_as_transformers_does(assets, name):
    chat_tokenizer = real_chat_tokenizer(assets / "tokenizers" / name)
    messages = conversation("größer  24\n\n\n世界 😀")
    expected = chat_tokenizer.tokenizer.apply_chat_template(
        messages,
        chat_template=chat_tokenizer.template.source,
        add_generation_prompt=True,
        return_dict=False,
        date_string=FIXED_DATE,
    )
    assert chat_tokenizer.encode_prompt(messages).tolist() == expected
    text = chat_tokenizer.render(messages)
    encoder = EscapedTextEncoder(chat_tokenizer.tokenizer, SpecialStrings(chat_tokenizer.tokenizer))
    assert encoder.encode(EscapedText(text, {})) == expected
    assert (
        encoder.encode(EscapedText("the fox", {}), add_special_tokens=True)
        == chat_tokenizer.tokenizer("the fox")["input_ids"]
    )
