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
DAG = (  # lists and tuples that are small, and of 2^40 values for whoever goes through them
    "{% set ns = namespace(s=[1], t=[1], u=(1,)) %}{% for i in range(40) %}{% set ns.s = [ns.s, ns.s] %}"
    "{% set ns.t = [ns.t, ns.t] %}{% set ns.u = (ns.u, ns.u) %}{% endfor %}"
)
KEPT = "{%% set ns = namespace(l=[]) %%}{%% for i in range(99999) %%}{%% set ns.l = [ns.l, %s] %%}{%% endfor %%}"
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
    "{{ range(9999) | list | tojson(indent=1000000) }}": TEXT,
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
    LONG + "{{ [x] | map('replace', 'a', x) | list }}": TEXT,
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
    "{{ [1] | slice(9999999) | list | length }}": STEPS,
    "{{ [1] | batch(9999999, 'x') | list | length }}": STEPS,
    "{{ [1] | slice(*[9999999]) | list | length }}": "gives slice its arguments as a list",
    "{{ 1.5 | round(9999999, 'floor') }}": STEPS,
    "{{ (1).to_bytes(5000000000, 'big') }}": STEPS,
    "{{ ([[1] * 900] * 90000) | sum(start=[]) | length }}": STEPS,
    "{{ ([{'a': [1] * 900}] * 90000) | sum('a', []) | length }}": STEPS,
    "{{ ('%9999999d' * 900) % ((1,) * 900) }}": "formats a value to the width",
    "{{ ('{0:9999999}' * 900).format(1) }}": "formats a value to the width",
    "{{ ('%*d' * 499) % ((9999999, 1) * 499) }}": "formats 499 values",
    "{{ ('{0:>{1}}' * 490).format('a', 9999999) }}": "formats 980 values",
    "{{ '{1:>{0[a]}}'.format({'a': 5000000000}, 'x') }}": NUMBER,
    "{{ ['%' ~ '1999999999d'] | map('format', 1) | list }}": "formats a value to the width",
    "{% filter format(1) %}%1999999999d{% endfilter %}": "applies the filter format",
    LONG + "{{ x | map('center', 200) | list | length }}": STEPS,
    LONG + "{{ x.encode().join([x.encode()] * 99999) | length }}": TEXT,
    LONG + "{{ x.encode().replace('a'.encode(), x.encode()) | length }}": TEXT,
    "{{ ('a'.encode() * 9999999 * 9999) | length }}": TEXT,
    LONG + "{% set f = x.replace %}{{ f('a', x) }}": "calls the method replace by another name",
    LONG + "{{ x['replace']('a', x) }}": "calls the method replace by another name",
    LONG + "{% set ns = namespace(join=x.join) %}{{ ns.join([x] * 999) }}": "calls the method join by another name",
    "{% set f = 'a'.ljust %}{{ f(5000000000) }}": "calls the method ljust by another name",
    "{{ ('😀\n' * 200000) | indent(1000) }}": "it indents lines by 1,000 characters",
    DAG + "{{ [ns.s] | tojson(indent=100) }}": TEXT,
    "{% set ns = namespace(s=range(9999) | list) %}{% for i in range(200) %}{% set ns.s = [ns.s] %}{% endfor %}"
    "{{ ns.s | tojson(indent=100) }}": TEXT,
    KEPT % "range(99999) | list": STEPS,
    KEPT % ("[" + "{}," * 5000 + "]"): STEPS,
    KEPT % "range(99999) | batch(1) | map('list') | list": STEPS,
    LONG_LIST % "{% set x = -1 is in l %}": STEPS,
    LONG_LIST % "{% set x = l is eq m %}": STEPS,
    "{% set l = range(99999) | map('string') | list %}{{ l | select('in', range(99999) | list) | list }}": STEPS,
    "{{ ('a' * 400000).rfind('b' + 'a' * 200000) }}": STEPS,
    DOUBLED % "{% set ns.s = ns.s ~ ns.s %}": TEXT,
    DOUBLED % "{% set ns.s = ns.s + ns.s %}": TEXT,
    DOUBLED % "{% set ns.s = [ns.s, ns.s] | join %}": TEXT,
    DOUBLED % "{% set ns.s = ns.s.replace('b', 'bbb') %}": TEXT,
    DOUBLED % "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}": TEXT,
}


ENDLESS |= {
    DAG + "{% set x = " + comparison + " %}": STEPS
    for comparison in (
        "ns.s == ns.t", "ns.s in [ns.t]", "ns.s is eq ns.t", "{ns.u: 1}", "{}.get(ns.u)", "{'a': 1}[ns.u]",
        "[ns.u] | unique | list", "[ns.s, ns.t] | sort", "[ns.s, ns.t] | max", "[ns.s].count(ns.t)",
        "[ns.s] | select('eq', ns.t) | list", "[{'a': ns.s}, {'a': ns.t}] | groupby('a')",
    )
}  # fmt: skip


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
