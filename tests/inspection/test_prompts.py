"""Both models' form of one conversation stands side by side, and what differs in kind is said."""

import dataclasses

import pytest
import toy_tokenizers as toys
from test_rendering import MADE, printed, report

from gold_jax import inspect_pair
from gold_jax.inspection import page
from gold_jax.inspection.prompts import compare_prompts
from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.template import PLAIN_TEMPLATE

SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful friend of foxes.<|im_end|>\n' }}{% endif %}"
CHANGED = {
    SYSTEM + toys.CHATML: "writes a system prompt of its own",
    toys.CHATML.replace(
        "assistant\n' }}", "assistant\n<think>\n' }}"
    ): "opens a thinking block in the generation prompt",
    "{{ tools | tojson if tools }}" + toys.CHATML: "renders tools",
    "{{ strftime_now('%Y-%m-%d') }}" + toys.CHATML: "writes a date",
    PLAIN_TEMPLATE: "is plain text under headings",
    "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}" + toys.CHATML: "takes system messages",
}


def side(source=toys.CHATML):
    return ChatTokenizer(toys.byte_level(), chat_template=source)


@pytest.mark.parametrize("source", CHANGED)
def test_formats_that_differ_in_kind_are_told(source):
    one, other = compare_prompts(side(source), side()), compare_prompts(side(), side(source))
    assert any(CHANGED[source] in sentence for sentence in one.differences)
    assert any(CHANGED[source] in sentence for sentence in other.differences) and one != other
    assert one.student == other.teacher and one.teacher == other.student


def test_formats_of_one_kind_are_not():
    assert compare_prompts(side(), side()).differences == ()
    assert compare_prompts(side(), side(toys.CHATML.replace("<|im_start|>", "<|endoftext|>"))).differences == ()


def test_the_terminal_the_page_and_the_data_show_both():
    prompts = compare_prompts(side(), side(SYSTEM + toys.CHATML))
    found = dataclasses.replace(report(MADE), prompts=prompts)
    shown, html = printed(found, 120), page.page(found)
    for text in (
        "<|im_start|>user",
        "What is 37 times 48?",
        "You are a helpful friend of foxes.",
        "stops at <|im_end|>",
    ):
        assert text in shown and text.replace("<", "&lt;").replace(">", "&gt;") in html
    assert "The teacher's template writes a system prompt of its own, the student's writes none." in shown
    assert found.to_dict()["prompts"]["student"]["answer"] == "It is 1776.<|im_end|>\n"
    assert found.to_dict()["prompts"]["differences"] == list(prompts.differences)


def test_a_pair_without_a_template_that_can_be_used_has_none():
    refuses = toys.byte_level(template="{{ raise_exception('never') }}{{ '<|im_end|>' }}")
    found = inspect_pair(refuses, toys.byte_level(template=toys.CHATML), "the fox")
    assert found.prompts is None and any("never" in note for note in found.notes)
    assert inspect_pair(toys.byte_level().backend_tokenizer, toys.byte_level(), "the fox").prompts is None
