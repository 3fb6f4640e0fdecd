"""One conversation as the two chat templates write it, and in what kind they differ."""

import re
from typing import Any, NamedTuple

from gold_jax.inspection.characters import visible
from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.template import PLAIN_TEMPLATE, Conversation, unwritten_parts

QUESTION = {"role": "user", "content": "What is 37 times 48?"}
ANSWER = {"role": "assistant", "content": "It is 1776."}
_TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
_DATE = re.compile(r"26 July? 2024|2024-07-26|07/26/(20)?24")  # as `template.FIXED_DATE`
_OWN_WORDS = 4  # before the first message; the names of roles are fewer
#: What is said of a template that does and of one that does not.
_KINDS = {
    "chat": ("is a chat template", "is plain text under headings (its tokenizer has none)"),
    "system": ("writes a system prompt of its own", "writes none"),
    "takes system": ("takes system messages", "does not"),
    "opens": ("opens a thinking block in the generation prompt", "does not"),
    "block": ("writes a thinking block before the answer", "writes none"),
    "tools": ("renders tools", "ignores them"),
    "date": ("writes a date", "writes none"),
}


class Format(NamedTuple):
    """A conversation as one model reads it."""

    stops: str  # its stop tokens
    prompt: str
    answer: str  # what follows the prompt, with what ends it

    @property
    def shown(self) -> tuple[str, str]:
        """Prompt and answer, with signs at the ends of lines and for what cannot be seen."""
        prompt, answer = (visible(x.encode()).replace("·", " ").replace("↵", "↵\n") for x in (self.prompt, self.answer))
        return prompt, answer.removesuffix("\n")


class Prompts(NamedTuple):
    """Question and answer as both models read them, and where the formats differ, one sentence each."""

    student: Format
    teacher: Format
    differences: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As nested dicts."""
        sides = {"student": self.student._asdict(), "teacher": self.teacher._asdict()}
        return {"messages": [QUESTION, ANSWER], **sides, "differences": list(self.differences)}


def compare_prompts(student: ChatTokenizer, teacher: ChatTokenizer) -> Prompts:
    """Both models' form of one question and answer; ValueError where a template refuses it."""
    sides = {"student": student, "teacher": teacher}
    answers = [side.answer([QUESTION, ANSWER]) for side in sides.values()]
    formats = [
        Format(x.describe().removeprefix(f"{x.template.origin}, "), a.prompt, a.text + x.template.tail)
        for x, a in zip(sides.values(), answers)
    ]
    ours, theirs = (_kinds(*pair) for pair in zip(sides.values(), answers))
    differences = []
    for kind, (does, does_not) in _KINDS.items():
        if ours[kind] != theirs[kind]:
            one, other = sides if ours[kind] else reversed(sides)
            differences.append(f"The {one}'s template {does}, the {other}'s {does_not}.")
    if answers[0].text != answers[1].text:
        differences.append(
            "The templates render the answer differently; both models read it as the student's template writes it."
        )
    return Prompts(*formats, tuple(differences))


def _kinds(side: ChatTokenizer, answer) -> dict[str, bool]:
    before, _, behind = answer.prompt.partition(QUESTION["content"])
    for special in side.special_strings_in(before):
        before = before.replace(special, " ")
    return {
        "chat": PLAIN_TEMPLATE not in side.template.source,
        "system": len(re.findall(r"[^\W\d_]{2,}", before)) > _OWN_WORDS,
        "takes system": side.template.takes_system,
        "opens": "think" in behind,
        "block": "think" in answer.text,
        "tools": "tools" not in unwritten_parts(side.template, Conversation([QUESTION], tools=[_TOOL])),
        "date": bool(_DATE.search(answer.prompt)),
    }
