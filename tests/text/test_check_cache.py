"""What was found in a data set is taken again for the very same rows, tokenizers and settings alone."""

import json
import os

import datasets
import pytest
from toy_tokenizers import CHATML, byte_level

from gold_jax.text import check_cache
from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.checks import check_examples
from gold_jax.text.data import load_examples
from gold_jax.text.mixture import load_mixture
from gold_jax.text.truncation import EndsOfPrompts

ROWS = [{"prompt": "x" * k, "completion": "y"} for k in range(1, 30)]


def key_of(data, chat=None, **options):
    chat = chat or ChatTokenizer(byte_level(), chat_template=CHATML)
    return {"data": check_cache.data_key(load_examples(data)), "side": check_cache.tokenizer_key(chat, ""), **options}


def test_the_second_time_nothing_is_looked_at(tmp_path):
    chat, asked = ChatTokenizer(byte_level()), []

    def check():
        asked.append(1)
        return check_examples(load_examples(ROWS), chat, budget=20, need_completion="x")

    first, known = check_cache.remembered(tmp_path, {"a": 1}, check)
    assert not known and 0 < len(first.kept) < len(ROWS)
    assert check_cache.remembered(tmp_path, {"a": 1}, check) == (first, True)
    assert check_cache.remembered(tmp_path, {"a": 2}, check) == (first, False)
    for file in tmp_path.glob("*.npz"):
        file.write_bytes(file.read_bytes()[:-40])
    assert check_cache.remembered(tmp_path, {"a": 1}, check) == (first, False)
    assert len(asked) == 3
    nowhere = tmp_path / "file"
    nowhere.touch()
    assert check_cache.remembered(nowhere, {"a": 1}, check) == (first, False)


def test_a_change_of_rows_is_another_key(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    key, changed = key_of(str(file)), file.read_text().replace("xxx", "xxz", 1)
    assert key == key_of(str(file))
    stat = file.stat()
    file.write_text(changed)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size and key_of(str(file)) != key
    part = load_examples(str(file)).first(5)
    assert check_cache.data_key(part) != check_cache.data_key(load_examples(str(file)))


def test_a_data_set_is_told_by_its_fingerprint_and_a_list_is_not_told(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path)
    data = datasets.load_from_disk(tmp_path)
    assert key_of(data) == key_of(datasets.load_from_disk(tmp_path)) != key_of(data.select(range(5)))
    assert key_of(data.map(lambda row: {"completion": "z"})) != key_of(data)
    assert key_of(ROWS)["data"] is None and key_of(data.with_format("numpy"))["data"] is None


@pytest.mark.parametrize("change", [
    {"chat_template": CHATML + " "}, {"template_kwargs": {"add": 1}}, {"special_tokens_in_prompts": True},
    {"embedding_rows": 1000}, {"stop_ids": [3]},
])  # fmt: skip
def test_another_way_of_reading_is_another_key(change):
    plain = {"chat_template": CHATML}
    keys = [check_cache.tokenizer_key(ChatTokenizer(byte_level(), **(plain | more)), "") for more in ({}, {}, change)]
    assert keys[0] == keys[1] != keys[2]


def test_what_is_read_otherwise_is_another_key_and_what_is_not_told_has_none(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row | {"query": "q"}) for row in ROWS))
    file = str(tmp_path / "a.jsonl")
    options = ({}, {"renamed": {"prompt": "query"}}, {"text_column": "body"})
    keys = [check_cache.data_key(load_examples(file, **given)) for given in options]
    assert len(set(map(str, keys))) == 3 and None not in keys
    mixture = load_mixture([{"path": file}, {"path": str(tmp_path / "b.jsonl")}])
    assert len(mixture) == 2 * len(ROWS) and check_cache.data_key(mixture) is None
    shortened = EndsOfPrompts(load_examples(file), ChatTokenizer(byte_level()), lambda _: 5)
    assert check_cache.data_key(shortened) is None
    both = check_cache.data_key(load_examples(str(tmp_path)))
    (tmp_path / "b.jsonl").rename(tmp_path / "c.jsonl")  # errors name files
    assert check_cache.data_key(load_examples(str(tmp_path))) != both
