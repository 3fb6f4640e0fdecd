"""Strings that tokenizers find hard, by the thousand: many scripts, code, numbers, blanks, emoji, bytes that were damaged."""

import random

from hypothesis import strategies as st

SCRIPTS = [
    (0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x600, 0x6FF),
    (0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3),
    (0x1F300, 0x1FAFF), (0x1D400, 0x1D7FF), (0x2000, 0x206F), (0, 0x1F),
]  # fmt: skip
SPECIAL = [
    "<|im_end|>", "<|im_start|>", "</s>", "<s>", "<unk>", "<pad>", "<|endoftext|>", "<end_of_turn>", "<|eot_id|>", "<bos>",
    "<eos>", "[INST]", "[SEP]", "[UNK]", "<think>", "</think>", "<table>", "<unused7>", "<0x0A>", "<0xE2>",
]  # fmt: skip
EMOJI = ["👨‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "😀", "🇩🇪", "❤️", "1️⃣", "🧑🏿‍🚀", "☃", "\u200d", "\ufe0f"]
BLANKS = [
    "\r\n",
    "\n",
    "\n\n\n",
    "\t\t",
    "\t",
    "    ",
    "  ",
    " ",
    "\u3000",
    "\ufeff",
    "\u00a0",
    "\u2028",
    "\x0b",
    " \n \n",
]
PHRASES = [
    *SPECIAL, *EMOJI, *BLANKS, "▁", "▁▁ x", "1234567", "3.14159", "0000", "e\u0301", "\u212b", "ﬁ", "가", "㌀", "Ġ", "Ċ", "é",
    "def f(x):\n    return x\n", "for (int i=0;i<10;++i) {", "http://a.b/c?d=e&f=g", "don't", "I'LL", "naïve", "größer",
    " the", "The ", "\\frac{1}{2}", "$$", "日本語", "Привет", "مرحبا", "नमस्ते", "ไทย", "\x00", "\x7f", "!!!???...", "İ", "ẞ",
]  # fmt: skip
WORDS = (
    "the quick brown fox jumps over lazy dogs there are answers and questions about numbers größer schöner Où êtes vous "
    "Привет мир это текст 世界 日本語 これは テスト 안녕 세계 مرحبا بالعالم नमस्ते दुनिया It's don't we'll The And However, therefore: end. "
    "internationalization unbelievable 2024 3.14 x² e-mail @user #tag"
).split()
CODE = [
    "def ", "return ", "    ", "        ", "\n", "self.", "x", "_name", "(", ")", "[i]", "{", "}", " = ", " == ", "+=", "0x1F",
    "// ", "# ", "import numpy as np", "std::vector<int>", "->", ";", '"text"', "'", "\\n", "\t", "lambda x: ", "<div>", "</div>",
]  # fmt: skip
#: Runs that make one token of many bytes, or very many tokens.
LONG = [
    " " * 10_000,
    "7" * 10_000,
    "\n" * 3_000,
    "a" * 5_000,
    "e" + "\u0301" * 2_000,
    "👨‍👩‍👧‍👦" * 500,
    "\t \t " * 1_000,
]


def random_strings(count: int, seed: int = 0) -> list[str]:
    """Phrases and characters of random scripts, one to eight of them."""
    rng = random.Random(seed)
    strings = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 8)):
            parts.append(rng.choice(PHRASES) if rng.random() < 0.5 else _letters(rng, rng.randint(1, 8)))
            if rng.random() < 0.4:
                parts.append(" ")
        strings.append("".join(parts))
    return strings


def _letters(rng: random.Random, count: int) -> str:
    low, high = rng.choice(SCRIPTS)
    return "".join([chr(low + int(rng.random() * (high - low + 1))) for _ in range(count)])


def _words(rng, size):
    return " ".join(rng.choices(WORDS, k=1 + size // 6))


def _scripts(rng, size):
    return "".join([_letters(rng, rng.randint(1, 12)) for _ in range(1 + size // 14)])


def _code(rng, size):
    return "".join(rng.choices(CODE, k=1 + size // 4))


def _numbers(rng, size):
    marks = rng.choices([" ", ", ", ".", "", "-", " + ", " = ", "e", "\n"], k=1 + size // 5)
    return "".join([f"{int(10 ** (rng.random() * 9))}{mark}" for mark in marks])


def _blanks(rng, size):
    return "".join(rng.choices([*BLANKS, "x", "the", "."], k=1 + size // 2))


def _emoji(rng, size):
    return "".join(rng.choices([*EMOJI, " ", "ok"], k=1 + size // 6))


def _phrases(rng, size):
    return "".join(rng.choices([*PHRASES, " ", " the"], k=1 + size // 6))


def _bytes(rng, size):
    return rng.randbytes(size).decode(errors="replace")


def _runs(rng, size):
    return "".join(
        [rng.choice([" ", "0", "9", "\n", "a", "=", "-", "é", "▁", "\t"]) * rng.randint(1, size) for _ in "123"]
    )


_MAKERS = (_words, _words, _scripts, _code, _numbers, _blanks, _emoji, _phrases, _bytes, _runs)


def mixed_strings(count: int, seed: int = 0, largest: int = 200) -> list[str]:
    """Strings of 1 to `largest` bytes of every kind in turn, short ones more often; every fifth is damaged.

    A damaged one is cut inside a character or has bytes changed, and shows U+FFFD there.
    """
    rng = random.Random(seed)
    strings = []
    for k in range(count):
        size = 1 + int(largest * rng.random() ** 2)
        data = rng.choice(_MAKERS)(rng, size).encode()[:size]
        if k % 5 == 0:
            data = bytearray(data)
            for _ in range(rng.randint(0, 2)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        # What U+FFFD adds in bytes is cut off again, with whole characters.
        text = bytes(data).decode(errors="replace" if k % 5 == 0 else "ignore")
        strings.append(text.encode()[:largest].decode(errors="ignore") or "x")
    return strings


def texts(largest: int = 12) -> st.SearchStrategy[str]:
    """Texts for hypothesis: any characters but lone surrogates, and the phrases above."""
    return st.lists(
        st.one_of(st.sampled_from([*PHRASES, " "]), st.text(st.characters(codec="utf-8"), max_size=4)), max_size=largest
    ).map("".join)
