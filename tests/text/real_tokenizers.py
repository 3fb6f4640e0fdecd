"""Real tokenizers, each read once in a process; tests write nothing into them."""

import functools
import pathlib

from transformers import AutoTokenizer

from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.surface import Surfaces, surfaces_of


@functools.cache
def tokenizer(folder: pathlib.Path):
    return AutoTokenizer.from_pretrained(folder)


@functools.cache
def chat_tokenizer(folder: pathlib.Path, template: str | None = None) -> ChatTokenizer:
    return ChatTokenizer(tokenizer(folder), chat_template=template)


@functools.cache
def surfaces(folder: pathlib.Path) -> Surfaces:
    return surfaces_of(tokenizer(folder))
