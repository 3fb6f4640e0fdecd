"""What is known of a template from one rendering is what it writes for every conversation of the shape."""

import pytest
from test_template import OPENS_THINKING, THINKING
from toy_tokenizers import CHATML, byte_level

from gold_jax.text.template import PLAIN_TEMPLATE, ChatTemplate

LOOP = "{% for m in messages %}<{{ m['role'] }}>"
END = "</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
TEMPLATES = [
    CHATML, THINKING, OPENS_THINKING, PLAIN_TEMPLATE,
    LOOP + "{{ m['content'] | trim }}" + END,
    LOOP + "{{ m.content.lstrip('\n ') + ' ' }}" + END,
    LOOP + "{% set c = (' [' + m.content).strip() %}{{ c.rstrip('x') }}" + END,
    LOOP + "{% set c = m.content %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}{{ c }}" + END,
    LOOP + "{% if m.content.startswith('<tool>') and m.content.endswith('x') %}tool{% endif %}{{ m.content }}" + END,
    LOOP + "{% if m.content %}{{ m.content }}{% else %}nothing{% endif %}" + END,
    LOOP + "{% if m.content == 'stop' or m.content in ['a', 'b'] %}!{% endif %}{{ m.content }}" + END,
    LOOP + "{% if m.content is string and m.content is not mapping and m.content is not none %}{{ m.content }}{% endif %}" + END,
    "{% macro say(c) %} {{ c }} {% endmacro %}" + LOOP + "{{ say(m.content) | trim }}" + END,
    LOOP + "{% set c %}{{ m.content }}.{% endset %}{% if '.' in c %}!{% endif %}{{ c }}" + END,
    "{% set ns = namespace(last='') %}" + LOOP + "{% set ns.last = ns.last + m.content %}{{ ns.last }}" + END,
]  # fmt: skip
# What depends on a content in a way that is not followed: it is rendered.
UNKNOWN = [
    "{% macro say(c) %}[{{ c }}]{% endmacro %}"
    + LOOP
    + "{% set s = say(m.content) | trim %}{{ s }}{{ s | length }}"
    + END,
    LOOP + "{% set c %}{{ m.content }}.{% endset %}{% if 'a.' in c %}!{% endif %}{{ c }}" + END,
    LOOP + "{{ m.content | upper }}" + END,
    LOOP + "{{ m.content | length }}" + END,
    LOOP + "{{ m.content | tojson }}" + END,
    LOOP + "{{ m['role'] ~ m.content }}" + END,
    LOOP + "{{ '%s!' % m.content }}" + END,
    LOOP + "{{ '{}!'.format(m.content) }}" + END,
    LOOP + "{{ m.content.replace('a', 'b') }}" + END,
    LOOP + "{{ 'xyz'.replace(m.content, '') }}" + END,
    LOOP + "{% if m.content in 'abc' %}!{% endif %}{{ m.content }}" + END,
    LOOP + "{% if 'abc'.startswith(m.content) %}!{% endif %}{{ m.content }}" + END,
    LOOP + "{% for char in m.content %}{{ char }}.{% endfor %}" + END,
    LOOP + "{% if m.content is iterable %}i{% endif %}{{ m.content[:1] }}" + END,
    LOOP + "{% if m.content.foo is defined %}f{% endif %}{{ m.content }}" + END,
    LOOP + "{{ {'a': 1}.get(m.content, 2) }}" + END,
    LOOP + "{{ [m.content, 'x'] | join(',') }}" + END,
    LOOP + "{{ m.content | e }}{{ m | string }}" + END,
    LOOP + "{% if m.content < 'm' %}!{% endif %}" + END,
    LOOP + "{% if m.content == messages[0].content %}!{% endif %}{{ m.content }}" + END,
    LOOP + "{% if m.content | trim | string == 'a' %}!{% endif %}" + END,
    # Where a hole could be taken for no string, or have what a string has not.
    LOOP + "{{ m.content if m.content._parts is defined else m.content | upper }}" + END,
    LOOP + "{{ m.content if m.content is callable else m.content | upper }}" + END,
    LOOP + "{{ m.content | upper if m.content is sequence else m.content }}" + END,
    LOOP + "{{ {'stop': 'x'}[m.content] }}{{ m[m.content] }}{{ m.content }}" + END,
    "{% set ns = namespace(stop='x') %}" + LOOP + "{{ ns[m.content] }}{{ m.content }}" + END,
    LOOP + "{{ m.content | int }}{{ m.content | float(5) }}{{ m.content }}" + END,
    LOOP + "{{ messages | map(attribute='content') | map('int') | sum }}{{ m.content }}" + END,
    LOOP + "{% filter upper %}{{ m.content }}{% endfilter %}" + END,
    "{% autoescape true %}" + LOOP + "{{ m.content }}" + END + "{% endautoescape %}",
    LOOP + "{{ m.content * 1 }}{{ m.content % () }}{{ [1, 2][m.content] }}" + END,
    LOOP + "{% for other in messages %}{% for again in messages * 9 %}{{ m.content }}{% endfor %}{% endfor %}" + END,
]
CONTENTS = [
    "ABC", "the dog.", "", " ", "a", "3", "abc", "stop", " a ", "\nb\n", "xx", "<tool>x", "hm</think>\n\nyes", "m", "é\u2028", "'\"<&>", "[",
    "\x000\x00", "{{ x }}", "y" * 12_000, "none", "a.",
]  # fmt: skip


def conversations():
    for k, content in enumerate(CONTENTS):
        other = CONTENTS[(7 * k + 3) % len(CONTENTS)]
        for roles in (("user",), ("user", "assistant"), ("system", "user", "assistant")):
            yield [{"role": role, "content": text} for role, text in zip(roles, (content, other, content))]


def written(render, messages, generate):
    try:
        return render(messages, generate=generate)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("source", TEMPLATES + UNKNOWN)
def test_what_is_written_without_rendering_is_what_rendering_gives(source):
    template = ChatTemplate(byte_level(), source)
    for _ in range(2):
        for messages in conversations():
            for generate in (True, False):
                exact = written(template._render, template._adapted(messages), generate)
                assert written(template.render, messages, generate) == exact
    assert any(template._trace._seen_right) == (source in TEMPLATES)


@pytest.mark.parametrize("source", TEMPLATES)
def test_most_conversations_are_not_rendered_again(source, monkeypatch):
    template = ChatTemplate(byte_level(), source)
    said, other = (
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        for q, a in (("how?", "so."), ("he", "c d"))
    )
    template.answer(said)
    exact = template._render(other)
    monkeypatch.setattr(template, "_render", None)
    assert template.answer(other) and template.render(other) == exact
