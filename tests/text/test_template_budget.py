"""Templates that have no end, or grow without bound, are an error within seconds and without their memory."""

import time

import pytest
import toy_tokenizers as toys

from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.template import ChatTemplate

USER = [{"role": "user", "content": "the fox?"}]
TURNS = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
DOUBLED = "{%% set ns = namespace(s='ab') %%}{%% for i in range(60) %%}%s{%% endfor %%}"
LONG_LIST = (
    "{%% set l = range(99999) | list %%}{%% set m = range(99999) | list %%}{%% set t = 'a' * 400000 %%}"
    "{%% for i in range(99999) %%}%s{%% endfor %%}"
)

LONG = "{% set x = 'a' * 400000 %}"
STEPS, TEXT, NUMBER = "takes more than .* steps", "makes a text of .* characters", "states or computes"
ENDLESS = {
    "{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}": STEPS,
    "{% set x = 'a' * 400000 %}{% for i in range(9**5) %}{{ x }}{% endfor %}": STEPS,
    "{% for i in range(9**5) %}" + "x" * 50_000 + "{% endfor %}": STEPS,
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}": STEPS,
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}": "RecursionError",
    "{{ 1 // (messages | length - 1) }}": "ZeroDivisionError",
    "{{ 'abc'.index('z') }}": "ValueError: substring not found",
    "{% for i in range(10**9) %}{% endfor %}": NUMBER,
    "{% for i in range(9999999) %}{% endfor %}": "Range too big",
    "{{ 10 ** 10 ** 10 }}": NUMBER,
    "{{ 'a' * 10**9 }}": NUMBER,
    "{{ 'a' * 9999999 }}": TEXT,
    "{{ ([0] * 9999999) | length }}": TEXT,
    "{{ 'a' | center(1000000000) }}": NUMBER,
    "{{ 'a'.ljust(9999999) }}": TEXT,
    "{{ 'a\nb' | indent(9999999) }}": "it indents lines by 9,999,999 characters",
    "{{ ('a\n' * 100000) | indent(1000000) }}": "it indents lines by 1,000,000 characters",
    "{{ ('a\n' * 100000) | indent('x' * 100000) }}": "it indents lines by 100,000 characters",
    "{{ ('\t' * 100000).expandtabs(1000000) }}": "it indents lines by 1,000,000 characters",
    "{{ range(9999) | list | tojson(indent=1000000) }}": "it indents lines by 1,000,000 characters",
    "{{ '%1000000000d' % 1 }}": "formats a value to the width",
    "{{ '%1000000000d' | format(1) }}": "formats a value to the width",
    "{{ '{:>1000000000}'.format(1) }}": "formats a value to the width",
    "{{ lipsum(n=9999999) }}": "lipsum",
    "{% for i in range(50000) recursive %}{% if loop.depth == 1 %}{% set _ = loop(range(99999)) %}{% endif %}{% endfor %}": STEPS,
    LONG_LIST % "{% set x = -1 in l %}": STEPS,
    LONG_LIST % "{% set x = l == m %}": STEPS,
    LONG_LIST % "{% set x = l | sum %}": STEPS,
    LONG_LIST % "{% set x = t.count('aa') %}": STEPS,
    "{% set f = '%' ~ '1999999999' ~ 'd' %}{{ f % 1 }}": "formats a value to the width",
    "{% set f = '{:' ~ '1999999999' ~ '}' %}{{ f.format(1) }}": "formats a value to the width",
    "{{ '%*d' % (1999999999, 1) }}": NUMBER,
    "{{ 'a' | center(('1' * 10) | int) }}": NUMBER,
    "{{ 'a'.zfill(('1' * 10) | int) }}": NUMBER,
    LONG + "{{ x.replace('a', x) }}": TEXT,
    LONG + "{{ x | replace('a', x) }}": TEXT,
    LONG + "{{ [x] | map('replace', 'a', x) | list }}": "applies the filter replace",
    LONG + "{% filter replace('a', x) %}{{ x }}{% endfilter %}": "applies the filter replace",
    LONG + "{% set y | replace('a', x) %}{{ x }}{% endset %}": "applies the filter replace",
    "{% filter indent(999999) %}a\nb{% endfilter %}": "applies the filter indent",
    "{{ ['a'] * 99 | map('center', 999999) | list }}": "applies the filter center",
    LONG + "{{ [1] | map('rep' ~ 'lace', 'a', x) | list }}": "a computed name",
    LONG + "{{ x.join(range(99999) | list | map('string')) }}": TEXT,
    LONG + "{{ range(99999) | join(x) }}": TEXT,
    LONG + "{{ range(99999) | join(d=x) }}": TEXT,
    LONG + "{{ x.translate({97: x}) }}": TEXT,
    LONG + "{{ ([x] * 9999) | string }}": TEXT,
    LONG + "{{ ([x] * 9999) | tojson }}": TEXT,
    LONG + "{{ [x] * 9999 }}": TEXT,
    LONG + "{{ '' ~ ([x] * 9999) }}": TEXT,
    LONG + "{{ '%s' % ([x] * 9999) }}": TEXT,
    LONG + "{{ '{}'.format([x] * 9999) }}": TEXT,
    LONG + "{{ ('{0}' * 9999).format(x) }}": "formats 9,999 values",
    LONG + "{{ ('%(a)s' * 9999) % {'a': x} }}": "formats 9,999 values",
    "{% set ns = namespace(s=['ab']) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}": TEXT,
    DOUBLED % "{% set ns.s = ns.s ~ ns.s %}": TEXT,
    DOUBLED % "{% set ns.s = ns.s + ns.s %}": TEXT,
    DOUBLED % "{% set ns.s = [ns.s, ns.s] | join %}": TEXT,
    DOUBLED % "{% set ns.s = ns.s.replace('b', 'bbb') %}": TEXT,
    DOUBLED % "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}": TEXT,
}


@pytest.mark.parametrize("source", ENDLESS, ids=lambda source: source[:40])
def test_a_template_without_end_is_an_error_that_names_it_and_its_fault(source):
    began = time.process_time()
    with pytest.raises(
        ValueError, match=f"the chat template of a TokenizersBackend (refuses|was stopped on) .*{ENDLESS[source]}"
    ):
        ChatTokenizer(toys.byte_level(), chat_template=source + TURNS).render(USER)
    assert time.process_time() - began < 20


def test_what_a_conversation_says_is_no_fault_of_the_template():
    long = [{"role": role, "content": "12345678901 words " * 500} for role in ("user", "assistant")] * 200
    nested = "{% for m in messages %}{% for other in messages[loop.index :] %}{% endfor %}{% endfor %}"
    template = ChatTemplate(toys.byte_level(), nested + TURNS)
    assert template.render(long).count("words") == 200_000


def test_replacing_a_few_counts_those_few():
    """A long text in the place of one character of many."""
    source = "{{ ('a' * 100000).replace('a', 'b' * 1000, 2) | length }} {{ ('a' * 100000) | replace('a', 'b' * 1000, 2) | length }}"
    assert ChatTemplate(toys.byte_level(), source).render(USER) == "101998 101998"


def test_counting_changes_nothing_of_what_a_template_writes():
    source = (
        "{% macro shout(text) %}{{ caller() }}{{ text | upper }}{% endmacro %}"
        "{% set head %}{{ messages | length }} turns{% endset %}{% set low | lower %}ABC{% endset %}{{ head }}{{ low }}\n"
        "{% for m in messages if m.role != 'system' recursive %}{{ loop.index }}/{{ loop.length }} {{ loop.revindex0 }} "
        "{{- loop.previtem.content if loop.previtem }}{% if loop.last %}!{% endif %}"
        "{% if m.parts %}{{ loop(m.parts) }}{% endif %}{% else %}nobody{% endfor %}"
        "{% filter trim %}  {{ messages[0:1] | tojson }}  {% endfilter %}{{ unknown }}{{ (7 % 4 + 2 * 3 ** 2) ~ 'x' * 3 }}"
        "{% call shout('%s-%d' % ('a', 2)) %}{% generation %}said{% endgeneration %}{% endcall %}"
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        "{{ 'aXbX'.replace('X', '--', 1) }}{{ 'aXbX' | replace('X', '--') }}{{ 12 | replace(1, 'y', count=1) }}"
        "{{ ', '.join(['a', 'b']) }}{{ ['a', 1, none] | join(', ') }}{{ messages | join(d='; ', attribute='role') }}"
        "{{ messages | map(attribute='content') | map('replace', 'the', 'a') | join }}{{ 'abc'.translate({97: 'z'}) }}"
        "{{ '%s %s' % ('a', [1]) }}{{ '%(a)s' | format(a=2) }}{{ '{} {x}'.format(1, x=[2]) }}{{ [messages, 1] }}"
        "{% filter replace('a', 'b') | upper %}aXa{% endfilter %}{% filter upper | replace('A', 'b') %}aXa{% endfilter %}"
        "{% set y | join('-') | upper %}abc{% endset %}{{ y }}"
        "{% filter indent(2) %}a\nb{% endfilter %}{{ {'a': [1]} | tojson(indent=1) }}{{ 'a' ~ [1] ~ none }}"
    )
    messages = [*USER, {"role": "assistant", "content": "the dog.", "parts": [{"role": "x", "content": "y"}]}]
    tokenizer = toys.byte_level()
    expected = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False)
    assert ChatTemplate(tokenizer, source).render(messages) == expected
