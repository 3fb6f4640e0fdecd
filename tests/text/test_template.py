import pytest
import toy_tokenizers as toys

from gold_jax.text.template import FIXED_DATE, ChatTemplate

USER = {"role": "user", "content": "the fox?"}
ANSWER = {"role": "assistant", "content": "the dog."}
MORE = [USER, ANSWER, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "72."}]

THINKING = (
    "{% for m in messages %}{% set content = m['content'] %}"
    "{% if m['role'] == 'assistant' %}{% set head, rest = '', content %}"
    "{% if '</think>' in content %}{% set head = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set rest = content.split('</think>')[-1].lstrip('\n') %}{% else %}{% set head, rest = '', content %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.last %}{{ '<think>\n' + head + '\n</think>\n\n' }}{% endif %}{{ rest + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def said(template, messages):
    whole, spans = template.answers(messages)
    return [whole[a:b] for a, b in spans]


def test_the_date_is_always_the_same_one():
    source = "\n{{ strftime_now('%d %B %Y, %H:%M') }}|{{ date_string }}|{{ messages[0]['content'] }}"
    text = ChatTemplate(toys.byte_level(), source).render([USER])
    assert text == f"\n26 July 2024, 00:00|{FIXED_DATE}|the fox?"


def test_the_date_can_be_told():
    template = ChatTemplate(toys.byte_level(), "{{ date_string }}", {"date_string": "1 Jan 2030"})
    assert template.render([USER]) == "1 Jan 2030"


def test_further_arguments_reach_the_template():
    template = ChatTemplate(
        toys.byte_level(), "{% if enable_thinking %}yes{% else %}no{% endif %}", {"enable_thinking": True}
    )
    assert template.render([USER]) == "yes"


def test_a_template_can_be_a_file(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text("file: {{ messages[0]['content'] }}")
    assert ChatTemplate(toys.byte_level(), str(file)).render([USER]) == "file: the fox?"


def test_a_tokenizer_without_a_template_gets_the_plain_one():
    template = ChatTemplate(toys.byte_level())
    assert template.render([USER], generate=True) == "User:\nthe fox?\n\nAssistant:\n"
    assert template.render([USER, ANSWER]) == "User:\nthe fox?\n\nAssistant:\nthe dog.<|im_end|>\n\n"
    assert template.tail == "<|im_end|>\n\n" and not template.lead


def test_a_template_that_refuses_is_quoted_with_the_conversation():
    template = ChatTemplate(toys.sentencepiece(), toys.LLAMA2)
    with pytest.raises(
        ValueError, match="system, user that begins 'be kind': Only user and assistant roles are supported"
    ):
        template.render([{"role": "system", "content": "be kind"}, USER])


def test_a_template_that_misses_something_is_quoted():
    with pytest.raises(ValueError, match="roles user.*can only concatenate str"):
        ChatTemplate(toys.byte_level(), "{{ 'a' + messages[0]['name'] | default(3) }}").render([USER])


def test_a_blank_before_the_answer_is_seen():
    assert ChatTemplate(toys.sentencepiece(), toys.LLAMA2).lead
    assert not ChatTemplate(toys.byte_level(), toys.CHATML).lead


def test_answers_of_every_turn_are_located():
    template = ChatTemplate(toys.byte_level(), toys.CHATML)
    assert said(template, MORE) == ["the dog.", "72."]
    assert said(template, [USER]) == []


def test_answers_that_repeat_other_text_are_told_from_it():
    template = ChatTemplate(toys.byte_level(), toys.CHATML)
    messages = [{"role": "user", "content": "assistant\nyes"}, {"role": "assistant", "content": "yes"}] * 2
    whole, spans = template.answers(messages)
    assert [whole[a:b] for a, b in spans] == ["yes", "yes"]
    assert all(whole[:a].endswith("<|im_start|>assistant\n") for a, _ in spans)


def test_stripped_and_empty_answers_are_located():
    template = ChatTemplate(toys.sentencepiece(), toys.LLAMA2)
    assert said(template, [USER, {"role": "assistant", "content": "  yes \n"}]) == ["yes"]
    assert said(template, [USER, {"role": "assistant", "content": ""}]) == [""]


def test_thinking_counts_where_the_template_writes_it():
    template = ChatTemplate(toys.byte_level(), THINKING)
    first = {"role": "assistant", "content": "<think>\nold\n</think>\n\nfirst"}
    last = {"role": "assistant", "content": "<think>\nnew\n</think>\n\nlast"}
    assert said(template, [USER, first, USER, last]) == ["first", "<think>\nnew\n</think>\n\nlast"]
    assert said(template, [USER, ANSWER]) == ["the dog."]


def test_an_answer_that_is_a_tool_call_without_content_is_located():
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') }}"
        "{% for call in m['tool_calls'] or [] %}{{ '<call>' + call['name'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    assert said(ChatTemplate(toys.byte_level(), source), [USER, call, ANSWER]) == ["<call>look", "the dog."]


def test_an_answer_that_the_template_leaves_out_or_changes_is_named():
    silent = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="turn 1 of a conversation.*'the dog.'.*writes it 0 times"):
        ChatTemplate(toys.byte_level(), silent).answers([USER, ANSWER])
    twice = "{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="writes it 2 times"):
        ChatTemplate(toys.byte_level(), twice).answers([USER, ANSWER])
    upper = "{% for m in messages %}{{ m['content'] | replace('dog', 'cat') }}|{% endfor %}"
    with pytest.raises(ValueError, match="turn 1.*'the cat.' stands in its place"):
        ChatTemplate(toys.byte_level(), upper).answers([USER, ANSWER])
    counting = (
        "{% for m in messages %}{{ m['content'] | length }}:{{ m['content'] }}|{{ m['content'] | length }}|{% endfor %}"
    )
    with pytest.raises(ValueError, match="turn 1.*after it depends"):
        ChatTemplate(toys.byte_level(), counting).answers([USER, ANSWER])


@pytest.mark.assets
def test_real_templates_render_as_transformers_does(assets):
    from transformers import AutoTokenizer

    for folder in ("smollm2-135m-instruct", "tokenizers/qwen3", "tokenizers/gemma3", "tokenizers/llama3_2"):
        tokenizer = AutoTokenizer.from_pretrained(assets / folder)
        expected = tokenizer.apply_chat_template(
            MORE[:3], tokenize=False, add_generation_prompt=True, date_string=FIXED_DATE
        )
        assert ChatTemplate(tokenizer).render(MORE[:3], generate=True) == expected


@pytest.mark.assets
def test_real_templates_give_back_the_answers(assets):
    from transformers import AutoTokenizer

    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nthe dog."}
    for folder in ("smollm2-135m-instruct", "tokenizers/qwen3", "tokenizers/gemma3", "tokenizers/llama3_2"):
        template = ChatTemplate(AutoTokenizer.from_pretrained(assets / folder))
        assert said(template, MORE) == ["the dog.", "72."]
        kept = said(template, [USER, thought, *MORE])
        assert kept[0] == ("the dog." if "qwen3" in folder else thought["content"])
        assert said(template, [USER, thought]) == [thought["content"]]
