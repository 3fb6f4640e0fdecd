import copy
import pickle

import pytest
import real_tokenizers as real
import toy_tokenizers as toys

from gold_jax.text.template import (
    FIXED_DATE,
    PLAIN_TEMPLATE,
    ChatTemplate,
    Conversation,
    conversation_shape,
    like,
    unwritten_parts,
    with_context,
)

USER = {"role": "user", "content": "the fox?"}
ANSWER = {"role": "assistant", "content": "the dog."}
MORE = [USER, ANSWER, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "72."}]

TOOLS = [{"type": "function", "function": {"name": "look"}}]
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{% for m in messages %}{{ '<turn>' + m['role'] + '\n' + m['content'] | trim + '<end>\n' }}{% endfor %}"
)


def call(content):
    inner = {"name": "look", "arguments": {"at": "sky"}}
    return {"role": "assistant", "content": content, "tool_calls": [{"type": "function", "function": inner}]}


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


@pytest.mark.parametrize(
    "source, text",
    [
        ("{{ strftime_now(format='%Y-%m-%d') }}", "2024-07-26"),
        ("{% set now = strftime_now %}{{ now('%-d. %b %y') }}", "26. Jul 24"),
        ("{% macro today() %}{{ strftime_now('%A') }}{% endmacro %}{{ today() }}", "Friday"),
        ("{% set form = '%H:%M' %}{% for m in messages %}{{ strftime_now(form) }}{% endfor %}", "00:00"),
        ("{% if strftime_now is defined %}{{ strftime_now('%d') | int - 1 }}{% endif %}", "25"),
        ("{% if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif %}{{ date_string }}", FIXED_DATE),
    ],
)  # fmt: skip
def test_the_date_is_fixed_however_a_template_asks_for_it(source, text):
    assert ChatTemplate(toys.byte_level(), source).render([USER]) == text


def test_a_conversation_can_tell_its_own_date():
    template = ChatTemplate(toys.byte_level(), "{{ date_string }}", {"date_string": "1 Jan 2030"})
    assert template.render(Conversation([USER], template_kwargs={"date_string": "2 Feb 2031"})) == "2 Feb 2031"


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


def test_the_plain_template_has_headings_for_system_messages_and_tools():
    told = [{"role": "system", "content": "be kind"}, USER]
    template = ChatTemplate(toys.byte_level())
    assert template.render(told, generate=True) == "System:\nbe kind\n\nUser:\nthe fox?\n\nAssistant:\n"
    text = template.render(Conversation(told, tools=TOOLS), generate=True)
    assert text.startswith('Tools:\n{"type": "function", "function": {"name": "look"}}\n\nSystem:\nbe kind\n\n')
    assert template.takes_system


def test_the_plain_template_writes_calls_and_what_came_of_them():
    template = ChatTemplate(toys.byte_level())
    messages = [USER, call("one moment"), {"role": "tool", "content": "sunny"}, ANSWER]
    assert template.render(messages).split("\n\n")[1:3] == [
        'Assistant:\none moment\n{"name": "look", "arguments": {"at": "sky"}}<|im_end|>', "Tool:\nsunny",
    ]  # fmt: skip
    assert said(template, messages)[0].startswith("one moment\n{")
    assert said(template, [USER, call("")]) == ['{"name": "look", "arguments": {"at": "sky"}}']


# Conversations that tell the template more


def test_tools_and_variables_of_a_conversation_reach_the_template_and_go_before_those_of_the_run():
    template = ChatTemplate(toys.byte_level(), "{{ tools }}|{{ a }}|{{ b }}", {"a": 1, "b": 1})
    assert template.render([USER]) == "None|1|1"
    assert template.render(Conversation([USER], tools=TOOLS, template_kwargs={"a": 2})) == f"{TOOLS}|2|1"


def test_answers_are_located_with_the_tools_and_variables_of_the_conversation():
    template = ChatTemplate(toys.byte_level(), "{{ tools | length }}{{ mood | upper }}" + toys.CHATML)
    told = Conversation(MORE, tools=TOOLS, template_kwargs={"mood": "calm"})
    assert said(template, told) == ["the dog.", "72."]
    assert template.answers(told)[0].startswith("1CALM<|im_start|>")


def test_a_tokenizer_with_a_template_for_tools_uses_it_where_there_are_some():
    tokenizer = toys.byte_level.__wrapped__()
    tokenizer.chat_template = {"default": "no tools", "tool_use": "{{ tools[0].function.name }}"}
    template = ChatTemplate(tokenizer)
    assert template.render([USER]) == "no tools"
    assert template.render(Conversation([USER], tools=TOOLS)) == "look"
    given = ChatTemplate(tokenizer, "given")
    assert given.render(Conversation([USER], tools=TOOLS)) == "given"


def test_variables_with_names_that_rendering_needs_are_refused():
    with pytest.raises(ValueError, match="cannot hold 'tokenize', 'tools', which rendering sets itself; tools have a"):
        ChatTemplate(toys.byte_level(), kwargs={"tools": [], "tokenize": True})


def test_a_conversation_is_a_list_that_remembers():
    told = Conversation(MORE, tools=TOOLS, template_kwargs={"a": 1})
    assert list(told) == MORE and told[0] is USER and isinstance(told, list)
    for other in (told[:2], like(told, MORE[:2]), copy.deepcopy(told)[:2], pickle.loads(pickle.dumps(told))[:2]):
        assert other == Conversation(MORE[:2], tools=TOOLS, template_kwargs={"a": 1})
    assert Conversation(MORE) == MORE and MORE == Conversation(MORE)
    assert told != MORE and told != Conversation(MORE, tools=TOOLS) and told[:1] != told
    assert "tools=[{" in repr(told)


# Context


SYSTEM = {"role": "system", "content": "be kind"}


def test_context_begins_the_system_message():
    template = ChatTemplate(toys.byte_level(), toys.CHATML)
    assert with_context([SYSTEM, USER], "It is 72.", template) == [dict(SYSTEM, content="It is 72.\n\nbe kind"), USER]
    assert with_context([USER], "It is 72.", template) == [{"role": "system", "content": "It is 72."}, USER]
    assert USER["content"] == "the fox?"


def test_context_goes_into_the_first_user_message_where_a_template_takes_no_system_message():
    deaf = "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}|{% endif %}{% endfor %}"
    for source in (toys.LLAMA2, GEMMA2, deaf):
        template = ChatTemplate(toys.sentencepiece(), source)
        assert not template.takes_system
        told = with_context(MORE[:3], "It is 72.", template)
        assert told == [dict(USER, content="It is 72.\n\nthe fox?"), *MORE[1:3]]
        assert "It is 72.\n\nthe fox?" in template.render(told, generate=True)
        assert with_context([ANSWER], "It is 72.", template)[0] == {"role": "user", "content": "It is 72."}


def test_context_of_a_text_goes_before_it_and_an_empty_one_changes_nothing():
    template = ChatTemplate(toys.byte_level())
    assert with_context("the fox", "It is 72.", template) == "It is 72.\n\nthe fox"
    messages = [USER]
    assert with_context(messages, "", template) is messages


def test_context_leaves_the_tools_and_variables_of_a_conversation():
    told = Conversation([USER], tools=TOOLS, template_kwargs={"a": 1})
    for source in (toys.CHATML, toys.LLAMA2):
        assert with_context(told, "It is 72.", ChatTemplate(toys.sentencepiece(), source)).tools is TOOLS
        assert with_context(told, "It is 72.", ChatTemplate(toys.sentencepiece(), source)).template_kwargs == {"a": 1}


def test_whether_a_template_takes_system_messages_is_tried_once(monkeypatch):
    template = ChatTemplate(toys.byte_level(), toys.CHATML)
    assert template.takes_system
    monkeypatch.setattr(template, "render", lambda *_, **__: pytest.fail("rendered again"))
    with_context([USER], "It is 72.", template)


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
    assert said(template, [USER, ANSWER]) == ["<think>\n\n</think>\n\nthe dog."]


OPENS_THINKING = THINKING.replace(
    "<|im_start|>assistant\n' }}{% endif %}", "<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    "source, content, text, follows_prompt",
    [
        (toys.CHATML, "the dog.", "the dog.", True),
        (THINKING, "the dog.", "<think>\n\n</think>\n\nthe dog.", True),
        (THINKING, "<think>\nhm\n</think>\n\nthe dog.", "<think>\nhm\n</think>\n\nthe dog.", True),
        (OPENS_THINKING, "the dog.", "\n</think>\n\nthe dog.", True),
        (OPENS_THINKING, "<think>\nhm\n</think>\n\nthe dog.", "hm\n</think>\n\nthe dog.", True),
        (toys.CHATML.replace("add_generation_prompt %}{{ '", "add_generation_prompt %}{{ '<think>"), "yes", "yes", False),
        (toys.CHATML.replace("m['content']", "m['content'] | trim"), " yes\n", "yes", True),
        (toys.CHATML, " yes\n", " yes\n", True),
    ],
)  # fmt: skip
def test_an_answer_is_what_stands_after_the_generation_prompt(source, content, text, follows_prompt):
    template = ChatTemplate(toys.byte_level(), source)
    messages = [USER, {"role": "assistant", "content": content}]
    answer = template.answer(messages)
    assert (answer.text, answer.follows_prompt) == (text, follows_prompt)
    assert answer.prompt == template.render([USER], generate=True)
    assert said(template, messages) == [text]
    assert said(template, [USER, ANSWER, *messages])[-1] == text
    if follows_prompt:
        assert template.render(messages) == answer.prompt + answer.text + template.tail


def test_an_answer_is_the_same_where_a_blank_stands_before_it():
    template = ChatTemplate(toys.sentencepiece(), toys.LLAMA2)
    assert template.answer([USER, {"role": "assistant", "content": " yes "}])[1:] == ("yes", True)


def test_an_answer_that_the_template_drops_is_no_answer():
    silent = toys.CHATML.replace("m['content']", "(m['content'] if m['role'] == 'user' else '')")
    with pytest.raises(ValueError, match="writes it 0 times"):
        ChatTemplate(toys.byte_level(), silent).answer([USER, ANSWER])


SYSTEM_AND_USER = (
    "{% for m in messages %}{% if m['role'] in ['system', 'user', 'assistant'] %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_what_a_template_leaves_out_is_named():
    template = ChatTemplate(toys.byte_level(), SYSTEM_AND_USER)
    assert unwritten_parts(template, MORE) == []
    roles = [{"role": "human", "content": "q"}, {"role": "gpt", "content": "a"}, USER]
    assert unwritten_parts(template, roles) == ["message 0 of the role 'human'", "message 1 of the role 'gpt'"]
    found = unwritten_parts(template, [USER, call("one moment"), ANSWER])
    assert found == ["the name of tool call 0 of message 1", "the arguments of tool call 0 of message 1"]
    assert unwritten_parts(template, Conversation([USER], tools=TOOLS)) == ["tools"]
    thinks = [USER, ANSWER | {"reasoning_content": "hm"}]
    assert unwritten_parts(template, thinks) == ["reasoning_content"]
    assert (
        unwritten_parts(ChatTemplate(toys.byte_level(), PLAIN_TEMPLATE), Conversation([USER, call("")], tools=TOOLS))
        == []
    )


def test_what_stands_in_the_prompt_alone_counts_as_written_unless_the_whole_is_read_at_once():
    # Mistral's template writes the system message before a last message of the user's only.
    source = "{% for m in messages %}{% if m['role'] != 'system' %}{% if loop.last and messages[0]['role'] == 'system' and m['role'] == 'user' %}{{ messages[0]['content'] }}{% endif %}{{ '[' + m['content'] + ']' }}{% endif %}{% endfor %}"
    template, messages = ChatTemplate(toys.byte_level(), source), [{"role": "system", "content": "s"}, USER, ANSWER]
    assert unwritten_parts(template, messages) == []
    assert unwritten_parts(template, messages, whole=True) == ["message 0 of the role 'system'"]


def test_conversations_of_one_shape_differ_in_their_texts_alone():
    assert conversation_shape(MORE) == conversation_shape([dict(m, content="other") for m in MORE])
    for other in (
        MORE[:3],
        [*MORE[:3], dict(MORE[3], content="")],
        Conversation(MORE, tools=TOOLS),
        [USER, call(""), *MORE[2:]],
    ):
        assert conversation_shape(MORE) != conversation_shape(other)


def test_a_developer_message_is_the_system_message_where_the_template_knows_that_alone():
    developer = [{"role": "developer", "content": "be brief"}, USER]
    assert "system\nbe brief" in ChatTemplate(toys.byte_level(), SYSTEM_AND_USER).render(developer)
    assert "developer\nbe brief" in ChatTemplate(toys.byte_level(), toys.CHATML).render(developer)
    assert developer[0]["role"] == "developer"


def test_tool_calls_are_given_in_the_form_that_the_template_takes():
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['content'] is defined and m['content'] is not none and m['content'] != '' %}{{ m['content'] }}{% elif m['tool_calls'] %}"
        "{% for c in m['tool_calls'] %}{{ c['function']['name'] + '\n' + c['function']['arguments'] }}{% endfor %}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
    )
    template = ChatTemplate(toys.byte_level(), source)
    messages = [USER, call("")]
    assert 'look\n{"at": "sky"}' in template.render(messages) and unwritten_parts(template, messages) == []
    assert messages == [USER, call("")]


def test_an_answer_that_is_a_tool_call_without_content_is_located():
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') }}"
        "{% for call in m['tool_calls'] or [] %}{{ '<call>' + call['name'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    bare = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    assert said(ChatTemplate(toys.byte_level(), source), [USER, bare, ANSWER]) == ["<call>look", "the dog."]


def test_an_answer_whose_content_the_template_drops_for_its_tool_call_is_located():
    source = (
        "{% for m in messages %}{{ m['role'] + ':' }}{% if m['tool_calls'] %}{{ m['tool_calls'][0].function | tojson }}"
        "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    )
    whole = said(ChatTemplate(toys.byte_level(), source), [USER, call("one moment"), ANSWER])
    assert whole == ['{"name": "look", "arguments": {"at": "sky"}}', "the dog."]


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
    for folder in ("smollm2-135m-instruct", "tokenizers/qwen3", "tokenizers/gemma3", "tokenizers/llama3_2"):
        tokenizer = real.tokenizer(assets / folder)
        expected = tokenizer.apply_chat_template(
            MORE[:3], tokenize=False, add_generation_prompt=True, date_string=FIXED_DATE
        )
        assert ChatTemplate(tokenizer).render(MORE[:3], generate=True) == expected


@pytest.mark.assets
def test_real_templates_give_back_the_answers(assets):
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nthe dog."}
    for folder in ("smollm2-135m-instruct", "tokenizers/qwen3", "tokenizers/gemma3", "tokenizers/llama3_2"):
        template = ChatTemplate(real.tokenizer(assets / folder))
        block = "<think>\n\n</think>\n\n" if "qwen3" in folder else ""
        assert said(template, MORE) == ["the dog.", block + "72."]
        kept = said(template, [USER, thought, *MORE])
        assert kept[0] == ("the dog." if "qwen3" in folder else thought["content"])
        assert said(template, [USER, thought]) == [thought["content"]]


@pytest.mark.assets
def test_qwen_thinks_or_not_by_row_before_run(assets):
    tokenizer = real.tokenizer(assets / "tokenizers/qwen3")
    closed = "<think>\n\n</think>\n\n"
    off, on = ({"enable_thinking": value} for value in (False, True))
    for run, row, ends in [({}, None, False), (off, None, True), (off, on, False), ({}, off, True), (on, off, True)]:
        text = ChatTemplate(tokenizer, kwargs=run).render(Conversation([USER], template_kwargs=row), generate=True)
        assert text.endswith(closed) == ends, (run, row)


@pytest.mark.assets
@pytest.mark.parametrize("folder", ["qwen3", "llama3_2"])
def test_real_templates_write_tools_as_transformers_does(assets, folder):
    tokenizer = real.tokenizer(assets / "tokenizers" / folder)
    messages = [USER, call(""), {"role": "tool", "content": "sunny"}, ANSWER]
    expected = tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False, date_string=FIXED_DATE)
    template = ChatTemplate(tokenizer)
    told = Conversation(messages, tools=TOOLS)
    assert template.render(told) == expected and '"name": "look"' in expected
    calls, answer = said(template, told)
    assert '{"name": "look", ' in calls and answer.endswith("the dog.")
    assert said(template, Conversation([USER, call("one moment"), *messages[2:]], tools=TOOLS))[1] == answer


def test_an_answer_is_looked_for_behind_the_earlier_turns():
    # No special token marks a turn; the generation prompt closes the thinking, which earlier turns have empty.
    source = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\n' }}{% else %}"
        "{{ 'Bot:\n<think>' + (m['reasoning_content'] or '') + '</think>\n' + m['content'] + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Bot:\n<think></think>\n' }}{% endif %}"
    )
    template = ChatTemplate(toys.byte_level(), source)
    thinks = {"role": "assistant", "content": "A2", "reasoning_content": "r"}
    messages = [
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "Q2"},
        thinks,
    ]
    try:
        assert "Q2" not in template.answer(messages).text
    except ValueError as error:
        assert "cannot be located" in str(error)
