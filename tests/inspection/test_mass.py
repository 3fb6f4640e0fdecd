"""Where probability lies, against a computation in numpy that knows of no map, no chunk and no padding."""

import re

import numpy as np
import pytest
import tiny_models as tiny

from gold_jax.inspection.mass import measure
from gold_jax.inspection.report import Mass
from gold_jax.inspection.vocabularies import KINDS, Vocabulary, compare
from gold_jax.loading import load_model_and_tokenizer

TEXTS = ["The other dog, over the fox; 24 + 48 = 72.\n    return", "größer 世界 😀", "other foxes"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    student = load_model_and_tokenizer(
        tiny.write_student(folder / "student"), tiny.beginning_tokenizer(), dtype="float32"
    )
    return student, load_model_and_tokenizer(tiny.write_teacher(folder / "teacher"), dtype="float32")


@pytest.fixture(scope="module")
def figures(pair):
    return compare(
        *(
            Vocabulary(who.chat_tokenizer.surfaces, who.model.config.vocab_size, who.chat_tokenizer.stop_ids)
            for who in pair
        )
    )


def directly(who, other, text: str) -> tuple[int, dict]:
    """Positions and mean mass of one text, entry by entry."""
    surfaces, strings = who.chat_tokenizer.surfaces, who.chat_tokenizer.surfaces.strings
    size = who.model.config.vocab_size
    theirs = {entry for entry in other.chat_tokenizer.surfaces.table if entry}
    own: dict[bytes, int] = {}  # which of the entries that spell the same is matched: no fallback, then the lowest id
    for i, entry in enumerate(surfaces.table):
        if entry and (entry not in own or surfaces.is_fallback[own[entry]] > surfaces.is_fallback[i]):
            own[entry] = i
    weights = {name: np.zeros(size) for name in KINDS}
    for i, entry in enumerate(surfaces.table):
        if (
            strings[i] is not None
            and strings[i] in other.chat_tokenizer.surfaces.strings
            and strings.index(strings[i]) == i
        ):
            weights["strings"][i] = 1
        if i == who.chat_tokenizer.stop_id or (entry in theirs and own[entry] == i):
            weights["surfaces"][i] = 1
        elif entry and any(entry[:end] in theirs & set(own) for end in range(1, len(entry) + 1)):
            weights["routed"][i] = 1
            weights["whitespace"][i] = bool(re.fullmatch(rb"\s{2,}", entry))
            weights["numerals"][i] = bool(re.fullmatch(rb"\s*[0-9]{2,}\s*", entry))
    start = who.chat_tokenizer.encode_prompt("").tolist()
    ids = np.array([start + who.chat_tokenizer.encode_completion(text, after="").ids.tolist()])
    hidden = who.model(ids, np.ones(ids.shape, bool))
    logits = np.asarray(who.model.logits(hidden), np.float64)[0, max(1, len(start)) - 1 : -1]
    probability = np.exp(logits - logits.max(-1, keepdims=True))
    probability /= probability.sum(-1, keepdims=True)
    return len(logits), {name: (probability @ weights[name]).mean() for name in KINDS}


@pytest.mark.parametrize("chunk", [5, 128])
@pytest.mark.parametrize("side", [0, 1])
def test_the_mass_of_every_kind_is_what_numpy_finds(side, chunk, pair, figures):
    found, cut = measure(pair[side], TEXTS, figures.rows[side], chunk=chunk)
    assert cut == [False] * len(TEXTS)
    for text, mass in zip(TEXTS, found):
        positions, expected = directly(pair[side], pair[1 - side], text)
        assert mass.positions == positions
        for name in KINDS:
            assert getattr(mass, name) == pytest.approx(expected[name], abs=1e-5), name
        assert 0 < mass.strings < mass.surfaces < 1 and mass.routed > 0
        assert mass.surfaces < mass.projected < 1


def test_both_kinds_of_the_routed_are_put_to_the_test(pair, figures):
    whitespace, numerals = (KINDS.index(name) for name in ("whitespace", "numerals"))
    assert any(rows[whitespace].any() for rows in figures.rows) and any(rows[numerals].any() for rows in figures.rows)


def test_a_token_before_the_text_lets_its_first_token_be_predicted(pair, figures):
    sizes = [who.chat_tokenizer.encode_completion(TEXTS[0], after="").ids.size for who in pair]
    found = [measure(who, TEXTS[:1], rows)[0][0].positions for who, rows in zip(pair, figures.rows)]
    assert found == [sizes[0], sizes[1] - 1]


def test_a_long_text_is_read_as_far_as_it_fits(pair, figures):
    found, cut = measure(pair[0], TEXTS, figures.rows[0], max_length=5)
    assert [mass.positions for mass in found[:2]] == [4, 4] and cut[:2] == [True, True]
    whole, _ = measure(pair[0], TEXTS, figures.rows[0])
    assert found[0].surfaces != whole[0].surfaces


def test_where_nothing_is_predicted_there_is_no_mean(pair, figures):
    found, _ = measure(pair[1], ["x", "foxes"], figures.rows[1], max_length=1)
    assert found[0].positions == 0 and np.isnan(found[0].surfaces) and np.isnan(found[0].share_of_routed("numerals"))
    assert found[0].to_dict() == {"positions": 0} | dict.fromkeys([*KINDS, "projected"])
    assert np.isnan(Mass.mean(found).surfaces)


def test_the_mean_weighs_texts_by_their_positions():
    parts = [Mass(1, 0.2, 0.4, 0.1, 0.1, 0.0), Mass(3, 0.6, 0.8, 0.1, 0.0, 0.1), Mass(0, *[float("nan")] * 5)]
    mean = Mass.mean(parts)
    assert mean.positions == 4 and mean.strings == pytest.approx(0.5) and mean.projected == pytest.approx(0.8)
    assert mean.share_of_routed("numerals") == pytest.approx(0.75)
