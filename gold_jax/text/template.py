"""Chat templates: what a model reads for a conversation, the same on every day, and where the answers stand in it."""

import os

from gold_jax.text.surface import excerpt, name_of

#: What stands for today in templates that ask for the date.
FIXED_DATE = "26 Jul 2024"
_STRFTIME = {
    "%d": "26", "%-d": "26", "%e": "26", "%m": "07", "%-m": "7", "%Y": "2024", "%y": "24", "%b": "Jul", "%h": "Jul",
    "%B": "July", "%a": "Fri", "%A": "Friday", "%j": "208", "%u": "5", "%w": "5", "%H": "00", "%-H": "0", "%I": "12",
    "%-I": "12", "%M": "00", "%-M": "0", "%S": "00", "%-S": "0", "%p": "AM", "%F": "2024-07-26", "%T": "00:00:00",
    "%D": "07/26/24", "%x": "07/26/24", "%X": "00:00:00", "%c": "Fri Jul 26 00:00:00 2024", "%f": "000000",
    "%Z": "", "%z": "",
}  # fmt: skip

#: The format for a tokenizer that brings no template: a heading line for each turn, the end token after each answer.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token | default('', true) }}{% endif %}"
    "{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)

_MARK = "qZ7probeX3answerK9"


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: a transformers tokenizer.
        source: another template (Jinja) in the place of the tokenizer's own.
        kwargs: what else the template is to be told, such as `enable_thinking`.

    Attributes:
        source: the Jinja source in use: the one given, else the tokenizer's own, else `PLAIN_TEMPLATE` (after the
            tokenizer's beginning-of-text token, if it puts one before plain text).
        lead: whether the template writes one blank between the generation prompt and the answer, as Llama 2's does.
        tail: what the template writes after an answer that ends the conversation.
    """

    def __init__(self, tokenizer, source: str | None = None, kwargs: dict | None = None):
        self._tokenizer = tokenizer
        self._kwargs = {"date_string": FIXED_DATE} | (kwargs or {})
        own = getattr(tokenizer, "chat_template", None)
        if source is not None and os.path.isfile(source):
            with open(source, encoding="utf-8") as file:
                source = file.read()
        elif source is None and own:
            source = tokenizer.get_chat_template()
        if source is None:
            begins = tokenizer.bos_token_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
            source = ("{{ bos_token }}" if begins else "") + PLAIN_TEMPLATE
        self.source = source
        self._fixed = _date_macro() + source if "strftime_now" in source else source
        self.lead, self.tail = self._probe()

    def render(self, messages: list[dict], *, generate: bool = False) -> str:
        """The text that the model reads for a conversation.

        Args:
            messages: dicts with `role` and `content`.
            generate: whether the beginning of an assistant's answer is to follow.

        Raises:
            ValueError: the template refuses the conversation; with its own words.
        """
        import jinja2

        try:
            return self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._fixed,
                tokenize=False,
                add_generation_prompt=generate,
                **self._kwargs,
            )
        except (jinja2.exceptions.TemplateError, TypeError, KeyError, AttributeError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            first = str(messages[0].get("content")) if messages else ""
            raise ValueError(
                f"the chat template of {name_of(self._tokenizer)} refuses a conversation of the roles {roles} that begins "
                f"{excerpt(first)}: {error}; bring the messages into the form it takes, or pass another chat template"
            ) from error

    def answers(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        """A whole conversation, and the characters `[start, end)` of every assistant's answer in it.

        An answer is what the template makes of its content (stripped, or without its thinking where the template drops
        that); thinking that the template does write is part of it.

        Raises:
            ValueError: an answer cannot be located exactly in what the template writes.
        """
        whole = self.render(messages)
        spans: list[tuple[int, int]] = []
        for turn, message in enumerate(messages):
            if message.get("role") == "assistant":
                spans.append(self._locate(messages, turn, whole))
                if len(spans) > 1 and spans[-1][0] < spans[-2][1]:
                    raise self._lost(messages, turn, "it stands before the one before it")
        return whole, spans

    def _locate(self, messages: list[dict], turn: int, whole: str) -> tuple[int, int]:
        content = messages[turn].get("content") or ""
        # Render once more with a word of ours for the answer: what stands around the word stands around the answer.
        marked = self.render([*messages[:turn], {"role": "assistant", "content": _MARK}, *messages[turn + 1 :]])
        if marked.count(_MARK) != 1:
            raise self._lost(messages, turn, f"the template writes it {marked.count(_MARK)} times")
        before, after = marked.split(_MARK)
        end = len(whole) - len(after)
        if not whole.endswith(after):
            raise self._lost(messages, turn, "what the template writes after it depends on what it says")
        begin = len(before)
        if not whole.startswith(before) or begin > end:
            begin = self._after_generation_prompt(messages[:turn], before, whole, end)
        if begin is None:
            raise self._lost(messages, turn, "what the template writes before it depends on what it says")
        found, wanted = ("".join(text.split()) for text in (whole[begin:end], content))
        if not (wanted.endswith(found) or found.endswith(wanted)):
            raise self._lost(messages, turn, f"{excerpt(whole[begin:end])} stands in its place")
        return begin, end

    def _after_generation_prompt(self, earlier: list[dict], before: str, whole: str, end: int) -> int | None:
        """Where an answer begins whose content changes what the template puts before it: thinking, for one."""
        if not earlier:
            return None
        base, prompt = self.render(earlier), self.render(earlier, generate=True)
        header = prompt.removeprefix(base)
        if not prompt.startswith(base) or not header:
            return None
        at = whole.rfind(header, 0, len(os.path.commonprefix([before, whole])))
        begin = at + len(header)
        return begin if at >= 0 and begin <= end else None

    def _lost(self, messages: list[dict], turn: int, why: str) -> ValueError:
        return ValueError(
            f"turn {turn} of a conversation, the assistant's {excerpt(messages[turn].get('content') or '')}, cannot be located in "
            f"what the chat template of {name_of(self._tokenizer)} writes: {why}; pass another chat template"
        )

    def _probe(self) -> tuple[bool, str]:
        question = [{"role": "user", "content": "Hello?"}]
        try:
            prompt = self.render(question, generate=True)
            whole = self.render([*question, {"role": "assistant", "content": _MARK}])
        except ValueError:  # a template for other conversations than this one: nothing can be read off it
            return False, ""
        before, _, tail = whole.rpartition(_MARK)
        return before == prompt + " ", tail


def _date_macro() -> str:
    """Jinja that shadows `strftime_now` with a fixed date (values given to templates must be plain data)."""
    steps = "".join(f" | replace('{directive}', '{value}')" for directive, value in _STRFTIME.items())
    # The empty expression keeps Jinja from eating a newline at the template's start.
    return "{% macro strftime_now(format) %}{{ format" + steps + " }}{% endmacro %}{{ '' }}"
