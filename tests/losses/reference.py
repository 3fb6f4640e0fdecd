"""Every comparison and merge in slow float64 numpy, written from the formulas of the design and of the papers."""

import dataclasses

import numpy as np

from gold_jax.text.batch import Row, SideTokens


@dataclasses.dataclass
class Side:
    """One group as one model sees it: its merged distribution (columns ordered), and its text."""

    p: np.ndarray  # [V]
    token_column: int  # column of the text's token that the distribution is over
    text: float  # probability of the whole text
    is_single_token: bool  # the distribution holds all of the text's tokens but that one
    prefix_column: np.ndarray  # [V - K]


@dataclasses.dataclass
class Options:
    """What a comparison is told of the vocabularies, and its own options, of which each reads those that it has."""

    matched: int
    beta: float = 0.5
    matched_weight: float | None = None
    unmatched_weight: float | None = None
    top_k: int = 0
    unprefixed: bool = True
    masked: bool = False
    temperature: float = 100.0


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def merged(half: SideTokens, group: int, hidden, head, order, route, merge: str) -> Side:
    """A group of one side of a row."""
    at = [len(half.prompt) + i for i in np.flatnonzero(half.group == group)]
    tokens = half.completion[half.group == group]
    predict = np.exp(log_softmax(hidden @ head.T))
    text = np.prod([predict[p - 1, x] for p, x in zip(at, tokens)])
    row_of_token = np.argsort(order)
    if merge == "chain":
        inner = np.prod([predict[p - 1, x] for p, x in zip(at[:-1], tokens[:-1])])
        return Side((predict[at[-1] - 1] * inner)[order], row_of_token[tokens[-1]], text, True, route)
    if merge == "observed":
        inner = np.prod([predict[p, x] for p, x in zip(at[1:], tokens[1:])])
        return Side((predict[at[0]] * inner)[order], row_of_token[tokens[-1]], text, True, route)
    return Side(predict[at[0] - 1][order], row_of_token[tokens[0]], text, len(at) == 1, route)


def jsd(p, q, beta):
    m = (1 - beta) * p + beta * q

    def kl(a, b):
        there = a > 0
        return np.sum(a[there] * np.log(a[there] / b[there]))

    return kl(q, p) if beta == 0 else kl(p, q) if beta == 1 else beta * kl(q, m) + (1 - beta) * kl(p, m)


def l1(p, q):
    n = max(len(p), len(q))
    return np.abs(np.sort(np.pad(p, (0, n - len(p)))) - np.sort(np.pad(q, (0, n - len(q))))).sum()


def bucket(side: Side, k: int):
    return np.append(side.p[:k], 1 - side.p[:k].sum())


def events(side: Side, k: int, options, text: bool):
    """Probabilities of prefixes, of what has none and, if asked for, of the text: a dictionary walked entry by entry."""

    def event(column):
        return column if column < k else side.prefix_column[column - k]

    found = np.zeros(k + 3)
    for column, p in enumerate(side.p):
        found[event(column)] += p
    found[k] += 1 - side.p.sum()
    if text:
        found[event(side.token_column)] -= side.text
        found[k + 2] = side.text
    kept = np.delete(found, [k + 1] if options.unprefixed else [k, k + 1])
    return kept / kept.sum()


def alone(side: Side, k: int) -> bool:
    event = np.r_[np.arange(k), side.prefix_column]
    return side.is_single_token and event[side.token_column] <= k and (event == event[side.token_column]).sum() == 1


def compare(name: str, s: Side, t: Side, o, frozen: float | None = None) -> float:
    """The loss of one group. `frozen`: for `reverse_kl`, the reward to hold fixed, whose slope is then the gradient."""
    k = o.matched
    if name == "sorted":
        return l1(s.p, t.p)
    if name == "hybrid":
        a, b = np.maximum(s.p[:k], 1e-8), np.maximum(t.p[:k], 1e-8)
        one, other = (
            (k / len(t.p), 1 - k / len(t.p)) if o.matched_weight is None else (o.matched_weight, o.unmatched_weight)
        )
        return one * jsd(a, b, o.beta) + other * l1(s.p[k:], t.p[k:])
    if name == "shared":
        return jsd(s.p[:k] / s.p[:k].sum(), t.p[:k] / t.p[:k].sum(), o.beta)
    if name == "shared_rest":
        return jsd(bucket(s, k), bucket(t, k), o.beta)
    if name == "projected":
        return jsd(events(s, k, o, False), events(t, k, o, False), o.beta)
    if name == "events":
        text = not (alone(s, k) or (o.beta == 1 and alone(t, k)))
        return jsd(events(s, k, o, text), events(t, k, o, text), o.beta)
    if name == "alm":
        a, b = (np.power(side.text, 1 / o.temperature) for side in (s, t))
        return jsd(np.array([a, 1 - a]), np.array([b, 1 - b]), o.beta)
    assert name == "reverse_kl"
    reward = np.log(s.text / t.text) if frozen is None else frozen
    return reward if frozen is None else reward * np.log(s.text)


def groups_of(row: Row, kind: str):
    for g in range(row.groups):
        single = (row.student.group == g).sum() == (row.teacher.group == g).sum() == 1
        if kind == "all" or single:
            yield g
