"""Templates that have no end, or grow without bound, are an error within seconds and without their memory."""

import time

import pytest
import toy_tokenizers as toys

from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.template import ChatTemplate

USER = [{"role": "user", "content": "the fox?"}]
TURNS = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
DOUBLED = "{%% set ns = namespace(s='ab', l=[1], n=2) %%}{%% for i in range(60) %%}%s{%% endfor %%}"
LONG = "{% set x = 'a' * 400000 %}"
STEPS, TEXT, LIST, NUMBER = "takes more than .* steps", "makes a text of", "makes a list of", "computes a number of"
ENDLESS = {
    "{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}": STEPS,
    "{% for i in range(9**5) %}{% for j in range(9**5) if false %}{% endfor %}{% endfor %}": STEPS,
    LONG + "{% for i in range(9**5) %}{{ x }}{% endfor %}": STEPS,
    LONG + "{% for i in range(9**5) %}{% set y = x | upper %}{% endfor %}": STEPS,
    "{% for i in range(9**5) %}" + "x" * 50_000 + "{% endfor %}": STEPS,
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}": STEPS,
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}": "RecursionError",
    "{{ 1 // (messages | length - 1) }}": "ZeroDivisionError",
    "{{ 'abc'.index('z') }}": "ValueError: substring not found",
    "{% for i in range(10**9) %}{% endfor %}": "Range too big",
    "{% for i in range(50000) recursive %}{% if loop.depth == 1 %}{% set _ = loop(range(99999)) %}{% endif %}{% endfor %}": STEPS,
    "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = [ns.l, range(99999) | list] %}{% endfor %}": STEPS,
    "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = ns.l + [i] %}{% endfor %}": STEPS,
    "{{ 10 ** 10 ** 10 }}": NUMBER,
    "{{ 'a' * 10**9 }}": TEXT,
    "{{ 'a' * 9999999 }}": TEXT,
    "{{ ([0] * 9999999) | length }}": LIST,
    "{{ 9999999 * [0] }}": LIST,
    "{{ 'a'.ljust(9999999) }}": TEXT,
    LONG + "{{ '%s%s' % (x, x) }}": TEXT,
    LONG + "{{ range(99) | join(x) }}": TEXT,
    LONG + "{{ [x] | map('replace', 'a', 'bb') | join }}": TEXT,
    DOUBLED % "{% set ns.n = ns.n * ns.n %}": NUMBER,
    DOUBLED % "{% set ns.s = ns.s ~ ns.s %}": TEXT,
    DOUBLED % "{% set ns.s = ns.s + ns.s %}": TEXT,
    DOUBLED % "{% set ns.l = ns.l + ns.l %}": LIST,
    DOUBLED % "{% set ns.s = '%s%s' % (ns.s, ns.s) %}": TEXT,
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


def test_what_only_looks_like_much_is_written_as_it_is():
    """Numbers, per cent and braces that are text; what lists, formats and methods do in small."""
    source = (
        "{{ '{\"id\": 12345678901}' }}{{ 'Save 50% (1234567890)' }}{{ {'maximum': 2147483647} | tojson }}{{ 20240726123 }}"
        "{{ seed | default(4294967295) }}{{ '{}'.format(1721952000) }}{{ '{:>{}}'.format('a', 10) }}{{ '%*d' % (8, 3) }}"
        "{{ '{{\"n\": {}, \"id\": 123456}}'.format(1) }}{{ '100%% of 123456: %s' % 1 }}"
        "{{ ([[1, 2]] * 50) | sum(start=[]) | length }}{{ ['<%s>'] | map('format', 'a') | join }}{{ 2.567 | round(2) }}"
        "{% for r in messages | slice(3) %}{{ r | length }}{% endfor %}{{ messages | tojson(indent=4) }}"
        "{{ messages | selectattr('role', 'in', ['user']) | map(attribute='content') | join(',') }}"
        "{{ none | select('odd') | list }}{{ messages | rejectattr('role', 'defined') | list }}{{ 'a' is in ['a'] }}"
        "{{ 'é'.encode('utf-8') | length }}{{ ['a'] | map('replace', 'a', x or '" + 300 * "b" + "') | list }}"
        "{% set get = messages[0].get %}{{ get('role') }}{% for a, b in [(1, 2), (3, 4)] %}{{ a }}{{ {a: b} }}{% endfor %}"
        "{{ messages | groupby('role') | length }}{{ ['b', 'a'] | unique | sort | join }}{{ {'b': 1, 'a': 2} | dictsort }}"
        "{% macro f(a, b=[1]) %}{{ a }}{{ caller() if caller }}{% endmacro %}{{ f(1) }}{% call f(2) %}x{% endcall %}"
        "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ dict(a=1) }}{{ ' a-b '.strip().rsplit('-', 1)[-1] }}"
    )
    tokenizer = toys.byte_level()
    expected = tokenizer.apply_chat_template(USER, chat_template=source, tokenize=False)
    assert ChatTemplate(tokenizer, source).render(USER) == expected


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
