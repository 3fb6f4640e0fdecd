import json

import datasets
import pytest
import tiny_models as tiny

from gold_jax.config import DataArguments, RunFacts, SFTConfig, named_without_effect
from gold_jax.config.parsing import FlagError, parse_args
from gold_jax.text.chat import ChatTokenizer
from gold_jax.text.checks import check_examples
from gold_jax.text.data import load_examples
from gold_jax.text.mixture import load_evaluations, load_mixture


@pytest.fixture
def folder(tmp_path):
    def write(name, count, **more):
        rows = [{"prompt": f"{name} {i}", "completion": str(i), **more} for i in range(count)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("a.jsonl", 6)
    write("b.jsonl", 10, system="s")
    (tmp_path / "b").mkdir()
    for split in ("train", "test"):
        write(f"b/{split}.jsonl", 2)
    return tmp_path


def entries(text):
    """What a YAML file says of `datasets`."""
    return parse_args(["--config", str(text)], DataArguments)[0].datasets


def prompts(examples):
    return [example.prompt for example in examples]


def test_data_sets_of_a_yaml_file_follow_each_other(folder):
    path = folder / "run.yaml"
    path.write_text(
        f"datasets:\n- path: {folder}/a.jsonl\n  split: 'train[:2]'\n"
        f"- path: json\n  data_files: {folder}/b/t*.jsonl\n  columns: {{question: prompt, answer: completion}}\n"
        f"- path: {folder}\n  data_files: {{train: [b.jsonl]}}\n  columns: [prompt]\n"
    )
    found = load_mixture(entries(path))
    assert prompts(found)[:2] == ["a.jsonl 0", "a.jsonl 1"] and len(found) == 2 + 4 + 10
    assert found[2].prompt == [{"role": "user", "content": "b/test.jsonl 0"}] and found[2].completion == "0"
    assert found[6].completion is None and found[6].unread == ("completion", "system")
    assert found.notices == [f"the mixture has 2 rows of {folder}/a.jsonl, 4 rows of json, 10 rows of {folder}"]
    assert prompts(found.first(3)) == prompts(found)[:3]


def test_fractions_are_trl_s(folder):
    both = [{"path": f"{folder}/a.jsonl", "fraction": 3}, {"path": f"{folder}/b.jsonl", "fraction": 1}]
    assert prompts(load_mixture(both)) == [*(f"a.jsonl {i}" for i in range(6)), "b.jsonl 0", "b.jsonl 1"]


def test_a_share_of_no_row_is_refused(folder):
    both = [{"path": f"{folder}/a.jsonl", "fraction": 0.99}, {"path": f"{folder}/b.jsonl", "fraction": 0.01}]
    with pytest.raises(ValueError, match="the fraction 0.01 of .*b.jsonl comes to no row beside 6 of the others"):
        load_mixture(both)


def test_a_share_need_not_reach_a_named_column(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "u"}]} for _ in range(4)]
    paths = [tiny.write_rows(tmp_path / f"{n}.jsonl", [*rows, rows[0] | {"f": "[]"}]) for n in "ab"]
    columns = {"messages": "messages", "tools": "f"}
    both = [{"path": str(p), "fraction": k + 1, "columns": columns} for k, p in enumerate(paths)]
    assert len(load_mixture(both)) == 2 + 5


def test_patterns_go_into_folders_whatever_these_are_called(tmp_path):
    for name in ("x[1]/s/t.jsonl", "x[1]/t.jsonl"):
        tiny.write_rows(tmp_path / name, [{"text": name}])
    for pattern, count in {"s/*.jsonl": 1, "**/t.jsonl": 2, str(tmp_path / "x*/t.jsonl"): 1}.items():
        assert len(load_mixture([{"path": str(tmp_path / "x[1]"), "data_files": pattern}])) == count


def test_evaluation_splits_have_the_names_of_their_data_sets(folder):
    listed = [
        {"path": f"{folder}/b", "eval_split": "test"},
        {"path": f"{folder}/b", "name": "c", "eval_split": "train"},
    ]
    found = load_evaluations([*listed, {"path": f"{folder}/a.jsonl"}])
    assert {name: prompts(rows)[0] for name, rows in found.items()} == {"b": "b/test.jsonl 0", "c": "b/train.jsonl 0"}
    with pytest.raises(ValueError, match="two data sets of the name 'b'"):
        load_evaluations([listed[0], listed[0]])


def test_a_digest_of_what_is_learned_covers_a_mixture(folder):
    def digest(*names):
        mixture = load_mixture([{"path": f"{folder}/{name}.jsonl"} for name in names])
        return check_examples(mixture, chat, budget=None, need_completion="it is learned").digest

    from toy_tokenizers import byte_level

    chat = ChatTokenizer(byte_level())
    assert digest("a", "b") == digest("a", "b") != digest("b", "a") != digest("b")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("a", "--datasets is 'a'; it must be a list of data sets, each with a path"),
        ([{"name": "x"}], "data set 0 has no path"),
        ([{"path": "x", "weight": 1}], "data set 0 has 'weight'"),
        ([{"path": "x", "colums": []}], "has 'colums'; the nearest is columns"),
        ([{"path": "x", "fraction": 1}, {"path": "y"}], "give it to all or to none"),
        ([{"path": "x", "fraction": 0}], "has the fraction 0; it must be greater than 0"),
        ([{"path": "x", "columns": "prompt"}], "has the columns 'prompt'; they must be a list, or a mapping"),
    ],
)
def test_what_is_no_list_of_data_sets_is_refused(value, says):
    with pytest.raises(ValueError, match=says):
        DataArguments(datasets=value)


def test_flags_of_one_data_set_and_streaming_are_answered(tmp_path):
    data = DataArguments(datasets=[{"path": "x"}], dataset_train_split="other")
    (line,) = named_without_effect(data, RunFacts(SFTConfig(), data=data))
    assert line == "--dataset_train_split: no effect with datasets, where each data set has its own."
    for key in ("streaming: true", "test_split_size: 0.1"):
        (tmp_path / "run.yaml").write_text(f"datasets: [{{path: x}}]\n{key}\n")
        with pytest.raises(FlagError, match="is not supported here"):
            entries(tmp_path / "run.yaml")


# Folders of unlike files


def test_parquet_files_of_unlike_columns_are_read_each_by_its_own(tmp_path):
    asked, call = {"role": "user", "content": "q"}, {"function": {"name": "f", "arguments": {"x": 1}}}
    rows = {
        "1": {"messages": [asked, {"role": "assistant", "content": "a"}]},
        "2": {"messages": [asked, {"role": "assistant", "content": "b", "tool_calls": [call]}], "level": 3},
        "3": {"messages": [asked, {"role": "assistant", "content": "c"}], "teacher_context": "t"},
    }
    for name, row in rows.items():
        datasets.Dataset.from_list([row]).to_parquet(tmp_path / f"{name}.parquet")
    found = load_examples(tmp_path)
    assert list(found) == list(load_examples([*rows.values()])) and found[1].unread == ("level",)
    assert prompts(load_examples(tmp_path, split="train[1:]")) == prompts(found)[1:]
    datasets.Dataset.from_list([{"messages": 3}]).to_parquet(tmp_path / "4.parquet")
    with pytest.raises(
        ValueError, match=r"row 3 of .* 'messages' must be a list .*not a int \(it stands in 4.parquet\)"
    ):
        load_examples(tmp_path)[3]


def test_a_row_of_one_json_file_of_several_is_told_with_its_file(tmp_path):
    for name, row in {"a": {"prompt": "x"}, "b": {"prompt": 3}}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"row 1 of .*'prompt' must be text .*\(it stands in b.jsonl\)"):
        load_examples(tmp_path)[1]
