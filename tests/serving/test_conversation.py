"""`python -m gold_jax.generate --chat`, line by line."""

import io
import json

import pytest
import tiny_models as tiny

import gold_jax
from gold_jax import generate
from gold_jax.loading import load_model_and_tokenizer
from gold_jax.serving import conversation
from gold_jax.text.data import load_examples

STUDENT = ["--chat", "--model_name_or_path", "embedded:student"]
QUESTIONS = ["How do you say 5168?", "How do you say 12?"]


def talk(monkeypatch, capsys, lines, *flags) -> tuple[list[str], str]:
    """What the command answers to lines, and what it says beside that."""
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    generate.main([*STUDENT, *flags])
    told, said = capsys.readouterr()
    return told.splitlines(), said


def answer_to(*messages, **settings) -> str:
    roles = ("user", "assistant") * len(messages)
    prompt = [{"role": role, "content": text} for role, text in zip(roles, messages)]
    options = {"max_new_tokens": 128, "temperature": 0.0} | settings
    return gold_jax.sample_completions("embedded:student", prompts=[prompt], **options)[0].text


def test_answers_are_those_of_generate_turn_by_turn(monkeypatch, capsys):
    first = answer_to(QUESTIONS[0])
    lines = [*QUESTIONS, "/undo", "", "/nonsense", "/help", "/quit", "never read"]
    told, said = talk(monkeypatch, capsys, lines)
    assert told == [first, answer_to(QUESTIONS[0], first, QUESTIONS[1])]
    assert "2 messages left" in said and "no command /nonsense" in said and "/save FILE" in said


def test_a_saved_conversation_is_a_row_that_train_reads(monkeypatch, capsys, tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = ["/save", "/undo", "/system Be brief.", *QUESTIONS, "/retry", f"/save {path}", "/undo", f"/save {path}"]
    told, said = talk(monkeypatch, capsys, lines)
    assert said.count("nothing has been answered yet") == 2 and "always the same" in said and told[1] == told[2]
    one, other = (json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines())
    assert [m["content"] for m in one] == ["Be brief.", QUESTIONS[0], told[0], QUESTIONS[1], told[1]]
    assert other == one[:3] and f"appended to {path}\n" in said
    assert [example.completion for example in load_examples(str(path))] == [told[1], told[0]]


def test_a_retry_draws_again_and_what_is_cut_is_said(monkeypatch, capsys, tmp_path):
    flags = ("--temperature", "0.9", "--seed", "3", "--max_new_tokens", "6")
    told, said = talk(monkeypatch, capsys, [QUESTIONS[0], "/retry", f"/save {tmp_path / 'rows'}"], *flags)
    prompts = [[{"role": "user", "content": QUESTIONS[0]}]] * 2
    wanted = gold_jax.sample_completions("embedded:student", prompts=prompts, key=3, temperature=0.9, max_new_tokens=6)
    assert told == [d.text for d in wanted] and said.count("(cut after 6 tokens: --max_new_tokens)") == 2
    assert "; incomplete answers in it: 1" in said


def test_ctrl_c_stops_the_answer_and_not_the_program(monkeypatch, capsys):
    whole = answer_to(QUESTIONS[0])
    real, interrupted = conversation.Writing.add, []

    def add(self, tokens):
        if interrupted:
            return real(self, tokens)
        interrupted.append(tokens)
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation.Writing, "add", add)
    told, said = talk(monkeypatch, capsys, [QUESTIONS[0], "/retry"])
    assert told == ["", whole] and "(stopped)" in said


def test_what_does_not_fit_is_taken_back(monkeypatch, capsys):
    told, said = talk(monkeypatch, capsys, ["many words " * 400, QUESTIONS[0]])
    assert told == [answer_to(QUESTIONS[0])] and "more than the 512 tokens that fit" in said


def test_a_model_without_a_template_gets_the_plain_one(tmp_path):
    tiny.write_student(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    tiny.beginning_tokenizer().save_pretrained(tmp_path)
    loaded = load_model_and_tokenizer(tmp_path)
    sampling = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
    chat, told = conversation.Chat(loaded, max_length=64, max_new_tokens=4, seed=0, **sampling), []
    chat.messages.append({"role": "user", "content": "What is 24 + 48?"})
    chat.answer(told.append)
    chat.close()
    prompt = [{"role": "user", "content": "What is 24 + 48?"}]
    (wanted,) = gold_jax.sample_completions(loaded, None, [prompt], temperature=0.0, max_new_tokens=4)
    assert "".join(told) == wanted.text and "plain" in loaded.chat_tokenizer.describe()


def test_flags_of_prompts_are_refused():
    with pytest.raises(ValueError, match="--chat reads messages from the terminal; leave out --prompt"):
        generate.main([*STUDENT, "--prompt", "a"])
