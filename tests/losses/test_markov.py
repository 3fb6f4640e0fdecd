"""Two models of one distribution over texts, written out over two vocabularies: what a comparison then finds.

The text is a Markov chain over bytes. A model of it gives every token the probability that the tokenizer's own reading
(the longest entry at every place) goes on with that token, given the tokens before it.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gold_jax.losses.compare import COMPARISONS, GroupDistribution
from gold_jax.text.align import group_ends
from gold_jax.text.surface import Surfaces
from gold_jax.text.vocabulary import VocabularyMap
from losses.arranged import compared
from losses.reference import Options

ALPHABET = b"abc"
PROJECTING = [name for name, line in COMPARISONS.items() if line.projects]
AHEAD = 4  # bytes that can decide how a text is read: the longest entry has three


def chain(seed=0):
    """`[3, 3]` probability of the next byte after each."""
    return np.random.default_rng(seed).dirichlet([1.0, 1.0, 1.0], 3)


class Model:
    """The chain over one vocabulary."""

    def __init__(self, entries, transition):
        self.entries = [entry.encode() for entry in entries]
        self.longest = sorted(self.entries, key=len, reverse=True)
        self.transition = transition
        self.futures = [bytes(f) for f in itertools.product(ALPHABET, repeat=AHEAD)]
        self.surfaces = Surfaces(
            [*self.entries, None], [*(e.decode() for e in self.entries), "<pad>"], np.zeros(len(entries) + 1, bool)
        )

    def read(self, text):
        """The tokens of a text, as entries; what is left at the end when nothing fits any more is not read."""
        tokens = []
        while text and (entry := next((e for e in self.longest if text.startswith(e)), None)):
            tokens.append(entry)
            text = text[len(entry) :]
        return tokens

    def distribution(self, before):
        """`[V + 1]` probabilities of the next token after the tokens `before`; the last is padding's."""
        past = b"".join(before[-AHEAD:])
        found = np.zeros(len(self.entries) + 1)
        for future in self.futures:
            tokens = self.read(past + future)
            kept = tokens[: len(before[-AHEAD:])]
            if kept != before[-AHEAD:] or len(tokens) <= len(kept):
                continue  # with this future the text would have been read in another way
            steps = zip((past[-1:] + future)[:-1], future)
            weight = np.prod([self.transition[ALPHABET.index(a), ALPHABET.index(b)] for a, b in steps])
            found[self.entries.index(tokens[len(kept)])] += weight
        return found / found.sum()


def texts(count, transition, seed=1):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        text = [rng.integers(3)]
        while len(text) < 24:
            text.append(rng.choice(3, p=transition[text[-1]]))
        yield bytes(ALPHABET[i] for i in text)


def both(student_entries, teacher_entries, count=12):
    """All groups of some texts as `GroupDistribution` of both models, under `boundary`, and the options."""
    transition = chain()
    models = [Model(entries, transition) for entries in (student_entries, teacher_entries)]
    sizes = [len(m.surfaces) for m in models]
    vocabulary = VocabularyMap.build(
        models[0].surfaces, models[1].surfaces, student_size=sizes[0], teacher_size=sizes[1]
    )
    k = vocabulary.matched
    found = [[], []]
    for text in texts(count, transition):
        readings = [m.read(text) for m in models]
        ends = [np.cumsum([len(t) for t in tokens]) for tokens in readings]
        last = np.intersect1d(*ends).max()
        readings = [tokens[: int((e <= last).sum())] for tokens, e in zip(readings, ends)]
        *groups, groups_count = group_ends(*(e[e <= last] for e in ends))
        for side, (model, tokens, group) in enumerate(zip(models, readings, groups)):
            order = (vocabulary.student_order, vocabulary.teacher_order)[side]
            ranks = np.argsort(order)
            for g in range(1, groups_count):  # the first group has no state before it
                (at,) = np.flatnonzero(group == g)[[0]]
                inside = np.flatnonzero(group == g)
                p = [model.distribution(tokens[:i]) for i in inside]
                ids = [model.entries.index(tokens[i]) for i in inside]
                rest = sum(np.log(q[i]) for q, i in zip(p[1:], ids[1:]))
                with np.errstate(divide="ignore"):
                    found[side].append((np.log(p[0])[order], ranks[ids[0]], rest, len(inside) == 1))
                assert at == inside[0]
    sides = []
    for side, route in enumerate((vocabulary.student_prefix_of_unmatched, vocabulary.teacher_prefix_of_unmatched)):
        logp, ranks, rest, whole = map(np.array, zip(*found[side]))
        event = np.r_[np.arange(k), route]
        siblings = np.array([(event == e).sum() - 1 for e in event])
        zero = np.zeros(len(ranks))
        sides.append(GroupDistribution(logp, zero, zero, ranks, rest, whole, route, siblings))
    return sides, Options(k, 0.0)


PREFIX_FREE = [
    (["a", "ba", "bb", "bc", "c"], ["a", "b", "ca", "cb", "cc"]),
    (["a", "b", "c"], ["aa", "ab", "ac", "b", "ca", "cb", "cc"]),
    (["aa", "ab", "ac", "b", "c"], ["a", "ba", "bba", "bbb", "bbc", "bc", "c"]),
]


@pytest.mark.parametrize("compare", PROJECTING)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("pair", PREFIX_FREE, ids=lambda p: "|".join(p[0]) + "←" + "|".join(p[1]))
def test_models_of_one_distribution_have_no_loss_over_prefix_free_vocabularies(pair, compare, beta):
    (s, t), options = both(*pair)
    with jax.enable_x64(True):
        s, t = jax.tree.map(jnp.asarray, (s, t))
        loss, _ = compared(compare, s, t, Options(options.matched, beta))
    assert len(loss) > 60 and jnp.abs(loss).max() < 1e-9


# Where an entry begins with another, a model reads the shorter only when the longer does not stand there, and after it
# knows that; the other model, with other entries, does not. What then remains between equal distributions, in nats of
# Jensen-Shannon divergence (at most 0.69; a KL would be infinite, for either rules out what the other allows):
OVERLAPPING = [
    (["a", "b", "c", "ab"], ["a", "b", "c", "bc"], 0.061, 0.076),
    (["a", "b", "c", "ab", "ca", "abc"], ["a", "b", "c", "ab", "bb", "cc"], 0.126, 0.148),
    (["a", "b", "c"], ["a", "b", "c", "ab", "bca"], 0.033, 0.033),
]


@pytest.mark.parametrize("student, teacher, projected, events", OVERLAPPING)
def test_what_remains_where_entries_begin_with_each_other_is_small(student, teacher, projected, events):
    (s, t), options = both(student, teacher)
    with jax.enable_x64(True):
        s, t = jax.tree.map(jnp.asarray, (s, t))
        found = {name: float(compared(name, s, t, Options(options.matched, 0.5))[0].mean()) for name in PROJECTING}
    assert found["projected"] == pytest.approx(projected, abs=1e-3)
    assert found["events"] == pytest.approx(events, abs=1e-3)
