"""The quickstart's two tokenizers, as different as real families are.

The teacher's is a byte-level BPE that has seen many numbers in words; the student's is built as SentencePiece's BPE is
(`▁` for blanks, byte fallback) from text with few of them, so that it cuts such words into other and smaller pieces.
Training a BPE gives the same merges every time, which training a Unigram model does not (its sums depend on the threads).
"""

import json
import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tools.quickstart.language import tokenizer_text

TEACHER_SIZE, STUDENT_SIZE = 640, 576
TEACHER_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As in Llama 2's template a blank stands before every content; the answer's first token then holds it.
STUDENT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<answer> {{ message['content'] }}{{ eos_token }}"
    "{% else %}<question> {{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)


def make_teacher_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of `TEACHER_SIZE` entries; `<|end|>` ends turns."""
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TEACHER_SIZE,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_text(random.Random("teacher"), 4_000, stories=0.4), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=special[2:],
        chat_template=TEACHER_TEMPLATE,
    )


def make_student_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE of `STUDENT_SIZE` entries in SentencePiece's manner, 256 of them single bytes; `</s>` ends answers."""
    special = ["<unk>", "<s>", "</s>", "<question>", "<answer>"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(vocab_size=STUDENT_SIZE, special_tokens=special + fallback, show_progress=False)
    tokenizer.train_from_iterator(tokenizer_text(random.Random("student"), 4_000, stories=0.4), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=_with_plain_bytes(tokenizer, fallback),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        additional_special_tokens=special[3:],
        chat_template=STUDENT_TEMPLATE,
    )


def _with_plain_bytes(tokenizer: Tokenizer, fallback: list[str]) -> Tokenizer:
    """The bytes had to be special to get their places from the trainer; afterwards they are entries like others."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in fallback]
    return Tokenizer.from_str(json.dumps(state))
