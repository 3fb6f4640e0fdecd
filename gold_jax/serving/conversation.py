"""A chat with a model in the terminal: `python -m gold_jax.generate --chat`."""

import contextlib
import json
import queue
import sys
from collections.abc import Callable

from gold_jax import progress
from gold_jax.loading import LoadedModel
from gold_jax.serving.batcher import Batcher, Request
from gold_jax.serving.writing import Writing
from gold_jax.text.template import Conversation
from gold_jax.wording import plural

HELP = """\
/retry        answer the last message again
/undo         remove the last message and its answer
/system TEXT  set the system message; without TEXT: remove it
/save FILE    append the conversation to a JSONL file that gold_jax.train reads
/quit         end, as Ctrl-D does; Ctrl-C stops an answer
Every other line is a message, also a command with a space before it."""
_LEAST = 256  # least cache length: fewer compilations while a conversation grows


class Chat:
    """A conversation with a model.

    Args:
        loaded: the model.
        max_length: most tokens of the conversation.
        max_new_tokens, temperature, top_k, top_p, seed: of an answer; the k-th is the k-th completion of that seed.
    """

    def __init__(self, loaded: LoadedModel, *, max_length: int, max_new_tokens: int, seed: int, **sampling):
        self.chat, self.max_new_tokens, self.seed, self.sampling = loaded.chat_tokenizer, max_new_tokens, seed, sampling
        self.messages: list[dict] = []
        self.system = ""
        self.cut: set[int] = set()  # indices of incomplete answers
        self.answers = 0
        options = {"rows": 1, "queue_size": 1, "max_length": max_length, "least": _LEAST}
        self.batcher = Batcher(loaded.model, self.chat.stop_ids, **options)
        self.batcher.compile(max(_LEAST, max_new_tokens + 1), scoring=False)  # what the first message needs

    def close(self) -> None:
        """Ends the thread that decodes."""
        self.batcher.close()

    def conversation(self) -> list[dict]:
        """All messages, the system's first."""
        return [{"role": "system", "content": self.system}] * bool(self.system) + self.messages

    def answer(self, send: Callable[[str], None]) -> str:
        """Answers the messages, streams the text to `send` and appends it; returns why it is incomplete, or "".

        ValueError: the template refuses the messages, or they are too long. KeyboardInterrupt stops the answer.
        """
        most = self.batcher.max_length
        prompt = Conversation(self.conversation())
        ids = self.chat.encode_prompt(prompt, limit=most)
        if len(ids) >= most:
            raise ValueError(f"the conversation has more than the {most} tokens that fit; /undo shortens it")
        events: queue.SimpleQueue = queue.SimpleQueue()
        new = min(self.max_new_tokens, most - len(ids))
        with progress.displayed():
            self.batcher.compile(len(ids) + new, scoring=False)
        request = Request(ids, lambda *event: events.put(event), new, self.seed, self.answers, **self.sampling)
        writing, why = Writing(self.chat, prompt), ""
        self.answers += 1
        self.batcher.submit([request])
        try:
            while writing.finish is None:
                kind, value = events.get()
                if kind == "error":
                    raise ValueError(value)
                send(writing.add(value) if kind == "tokens" else writing.end(value))
            if writing.finish == "length":
                full = f"the conversation fills the {most} tokens that fit"
                why = f"cut after {new} tokens: {'--max_new_tokens' if new == self.max_new_tokens else full}"
        except KeyboardInterrupt:
            why = "stopped"
        finally:
            self.batcher.cancel(request)
        self.messages.append({"role": "assistant", "content": writing.text})
        if why:
            self.cut.add(len(self.messages) - 1)
        return why

    def take_back(self, whole: bool) -> None:
        """Removes the last answer, and with `whole` the message before it; ValueError if there is none."""
        if len(self.messages) < 2:
            raise ValueError("nothing has been answered yet")
        del self.messages[-2 if whole else -1 :]
        self.cut -= {*range(len(self.messages), len(self.messages) + 2)}

    def save(self, path: str) -> str:
        """Appends the conversation to a file and returns a line about it; OSError or ValueError if it cannot."""
        if not path or not self.messages:
            raise ValueError("/save FILE needs a file" if self.messages else "nothing has been answered yet")
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": self.conversation()}, ensure_ascii=False) + "\n")
        cut = f"; incomplete answers in it: {len(self.cut)}" if self.cut else ""
        return f"appended to {path}{cut}"


def converse(chat: Chat) -> None:
    """Reads lines from stdin until its end or /quit; answers go to stdout, everything else to stderr."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  lines can be edited
        _say("/help lists commands, Ctrl-C stops an answer, Ctrl-D ends")
    progress.stop_display()  # it would be written into answers
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            _say("\n/quit or Ctrl-D ends")
            continue
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        try:
            _do(chat, command, rest.strip(), line)
        except (ValueError, OSError) as error:
            _say(f"{error}")
        except KeyboardInterrupt:  # before an answer began, or after it
            if chat.messages and chat.messages[-1]["role"] == "user":
                chat.messages.pop()
            _say("")


def _do(chat: Chat, command: str, rest: str, line: str) -> None:
    """Runs one line: a command or a message."""
    if command == "/help":
        _say(HELP)
    elif command == "/undo":
        chat.take_back(whole=True)
        _say(f"{plural(len(chat.messages), 'message')} left")
    elif command == "/system":
        chat.system = rest
        _say("the system message is set" if rest else "the system message is removed")
    elif command == "/save":
        _say(chat.save(rest))
    elif command == "/retry":
        chat.take_back(whole=False)
        if not chat.sampling["temperature"]:
            _say("at --temperature 0 the answer is always the same")
        _answer(chat)
    elif command.startswith("/"):
        _say(f"there is no command {command}; /help lists them")
    elif line.strip():
        chat.messages.append({"role": "user", "content": line.strip()})
        _answer(chat)


def _answer(chat: Chat) -> None:
    """Writes an answer to stdout; after an error the question is removed."""
    try:
        why = chat.answer(lambda text: print(text, end="", flush=True))
    except ValueError:
        chat.messages.pop()
        raise
    print(flush=True)
    if why:
        _say(f"({why})")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
