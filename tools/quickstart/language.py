"""All text of the quickstart: numbers in words, small stories, and the conversations that the two models are trained on.

Everything is drawn from seeded generators, so that the same text comes out on every machine.
"""

import random
from collections.abc import Iterator

#: Every number below this has a question.
NUMBERS = 10_000
TEST_ROWS = 200
TRAIN_ROWS = 1_600

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()

_QUESTIONS = ("Write {} in words.", "How do you say {}?", "Please spell {}.")

_PEOPLE = "Anna Boris Clara David Elsa Felix Greta Hugo Ida Jonas Karla Leo Marta Nils Olga Paul".split()
_TRADES = "baker farmer teacher sailor gardener painter doctor miller singer driver".split()
_TRAITS = "old young quiet clever tired cheerful patient hungry friendly careful".split()
_THINGS = "basket lamp boat hat kettle ladder book blanket wagon mirror drum key bridge window".split()
_LOOKS = "red blue green yellow heavy small broken shiny wooden round".split()
_PLACES = "river market mill garden harbour forest station school barn hill village kitchen".split()
_DEEDS = "found carried mended painted sold borrowed hid cleaned forgot admired".split()
_TIMES = ("in the morning", "after lunch", "before sunset", "on a rainy day", "last winter", "every evening")
_ENDINGS = (
    "Nobody knew why.",
    "It was the best day of the year.",
    "Then everyone went home.",
    "The children laughed and asked for more.",
    "That is how the story ends.",
)


def in_words(number: int) -> str:
    """A number in English words.

    Args:
        number: from 0 to 9999.

    >>> in_words(4073)
    'four thousand seventy-three'
    """
    if not 0 <= number < NUMBERS:
        raise ValueError(f"in_words spells numbers from 0 to {NUMBERS - 1}, not {number}")
    words = []
    for unit, name in ((1000, "thousand"), (100, "hundred")):
        if number >= unit:
            words += [_SMALL[number // unit], name]
            number %= unit
    if number >= 20:
        tens, ones = divmod(number, 10)
        words.append(_TENS[tens] + (f"-{_SMALL[ones]}" if ones else ""))
    elif number or not words:
        words.append(_SMALL[number])
    return " ".join(words)


def answer(number: int, spelled: int | None = None) -> str:
    """The answer to a question about a number: the right one, or what it would be if the number were `spelled`."""
    return f"{number} is {in_words(number if spelled is None else spelled)}."


def split_numbers() -> tuple[list[int], list[int]]:
    """All numbers in two parts: those that models may learn from, in random order, and those held out for tests."""
    numbers = list(range(NUMBERS))
    random.Random("which numbers").shuffle(numbers)
    return numbers[TEST_ROWS:], numbers[:TEST_ROWS]


def task_rows(split: str) -> list[dict]:
    """The rows of the data set `embedded:task`: a question and its right answer.

    Args:
        split: "train" or "test"; no number is in both.

    Returns:
        Dicts with `prompt`, a list of one message, and `completion`, a text.
    """
    learned, held_out = split_numbers()
    numbers = held_out if split == "test" else learned[:TRAIN_ROWS]
    rng = random.Random(f"questions of {split}")
    return [_row(number, answer(number), rng) for number in numbers]


def _row(number: int, said: str, rng: random.Random) -> dict:
    return {"prompt": [{"role": "user", "content": rng.choice(_QUESTIONS).format(number)}], "completion": said}


def story(rng: random.Random, person: str, trade: str) -> str:
    """Two sentences about somebody."""
    place = rng.choice(_PLACES)
    thing = f"{rng.choice(_LOOKS)} {rng.choice(_THINGS)}"
    sentences = [f"{person} the {rng.choice(_TRAITS)} {trade} {rng.choice(_DEEDS)} a {thing} near the {place}."]
    if rng.random() < 0.3:
        sentences = [f"{rng.choice(_TIMES).capitalize()} the {trade} {person} walked to the {place}."]
    sentences.append(rng.choice(_ENDINGS))
    return " ".join(sentences)


def _story_row(rng: random.Random) -> dict:
    person, trade = rng.choice(_PEOPLE), rng.choice(_TRADES)
    question = f"Tell me about {person} the {trade}."
    said = story(rng, person, trade)
    return {"prompt": [{"role": "user", "content": question}], "completion": said}


def lessons(rng: random.Random, *, right: bool, stories: float) -> Iterator[dict]:
    """Endless rows to train a model on, in the form of `task_rows`, about numbers that are not held out.

    Args:
        rng: where chance comes from.
        right: whether answers spell the number asked for (the teacher's lessons) or any number of as many digits (the
            student's, which so learns what an answer looks like but not which word stands for which digit).
        stories: share of rows that ask for a story instead of a number.
    """
    learned, _ = split_numbers()
    while True:
        if rng.random() < stories:
            yield _story_row(rng)
            continue
        number = rng.choice(learned)
        low, high = (0, 10) if number < 10 else (10 ** (len(str(number)) - 1), 10 ** len(str(number)))
        yield _row(number, answer(number, number if right else rng.randrange(low, high)), rng)


def tokenizer_text(rng: random.Random, rows: int, *, stories: float) -> list[str]:
    """Questions and answers as plain text for training a tokenizer on."""
    source = lessons(rng, right=True, stories=stories)
    return [part for _, row in zip(range(rows), source) for part in (row["prompt"][0]["content"], row["completion"])]
