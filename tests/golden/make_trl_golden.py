"""Makes `trl_losses.json`: TRL's GOLD losses and gradients on numbers that the tests can make again.

    python tests/golden/make_trl_golden.py [ASSETS]

Run it where `torch==2.13.0 trl==1.16.0` are installed; the tests themselves need neither. With ASSETS (see
tests/fetch_assets.py) the cases over real tokenizers are written too. Everything runs in float64, so what is written
is TRL's arithmetic without its rounding. Inputs come from `inputs()`, which the tests import: hidden states and heads
from a seeded generator, logits their product.
"""

import itertools
import json
import os
import pathlib
import sys
import types

import numpy as np

HERE = pathlib.Path(__file__).parent
PROMPT, WIDTH = 3, 6
TEXTS = [
    "The year 1984 had 366 days, give or take; naïve façades cost €12.50 (about $13.37).",
    "def add(a, b):\n    return a + b\n\nprint(add(2024, 17))  # 2041",
]
PAIRS = [("gpt2", "smollm2"), ("llama3_2", "qwen3"), ("qwen3", "llama3_2")]
STRATEGIES = {"chain": "bayesian", "observed": "observed"}


def synthetic():
    """Two small vocabularies that share 25 strings, and two rows of spans that meet now and then."""
    student = {f"t{i}": i for i in range(40)}
    teacher = {f"t{i + 15}": i for i in range(30)} | {f"u{i}": 30 + i for i in range(20)}
    s_lengths, t_lengths = (
        [[4, 2, 2, 6, 1, 3, 2], [1, 1, 5, 3, 4, 4, 2]],
        [[2, 2, 4, 6, 4, 1, 1], [2, 5, 1, 2, 4, 4, 2]],
    )
    rng = np.random.default_rng(7)
    rows = []
    for s, t in zip(s_lengths, t_lengths):
        ids = [rng.integers(0, n, len(x)).tolist() for n, x in ((40, s), (50, t))]
        ends = [np.cumsum(x).tolist() for x in (s, t)]
        rows.append(dict(student_ids=ids[0], teacher_ids=ids[1], student_ends=ends[0], teacher_ends=ends[1]))
    return student, teacher, rows


def inputs(rows, student_size, teacher_size):
    """Hidden states `[B, PROMPT + T, WIDTH]` of both sides (zero padded) and heads `[V, WIDTH]`, float64."""
    rng = np.random.default_rng(11)
    out = []
    for name, size in (("student", student_size), ("teacher", teacher_size)):
        longest = max(len(r[f"{name}_ids"]) for r in rows)
        out += [rng.standard_normal((len(rows), PROMPT + longest, WIDTH)), rng.standard_normal((size, WIDTH))]
    return out


def cases(real=False):
    """Each point of the grid that TRL has: (merge, extended, hybrid, weights, beta)."""
    betas = (0.0, 1.0) if real else (0.0, 0.3, 1.0)
    for merge in STRATEGIES:
        yield merge, True, False, None, 0.0
        yield merge, False, False, None, 0.0
        for weights, beta in itertools.product(((1.0, 1.0), None, (0.7, 0.2)), betas):
            yield merge, True, True, weights, beta


def _trl(case, student_vocab, teacher_vocab, rows, sizes):
    import torch
    from trl.experimental.gold.gold_trainer import ULDLoss

    merge, extended, hybrid, weights, beta = case
    config = types.SimpleNamespace(
        uld_crossentropy_weight=0.0, uld_distillation_weight=1.0, uld_student_temperature=0.9,
        uld_teacher_temperature=1.2, uld_skip_student_eos=False, uld_skip_teacher_eos=False,
        use_extended_uld=extended, uld_token_merge_strategy=STRATEGIES[merge], uld_use_hybrid_loss=hybrid,
        uld_hybrid_matched_weight=weights and weights[0], uld_hybrid_unmatched_weight=weights and weights[1], beta=beta,
    )  # fmt: skip
    vocab = [types.SimpleNamespace(get_vocab=lambda v=v: v) for v in (student_vocab, teacher_vocab)]
    loss = ULDLoss(config, *vocab)
    hs, ws, ht, wt = (torch.tensor(x) for x in inputs(rows, *sizes))
    hs.requires_grad_(), ws.requires_grad_()

    def side(name, hidden):
        length = hidden.shape[1]
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        labels = torch.full((len(rows), length), -100)
        spans = torch.zeros(len(rows), length, 2, dtype=torch.long)
        for i, row in enumerate(rows):
            n = len(row[f"{name}_ids"])
            ids[i, PROMPT : PROMPT + n] = labels[i, PROMPT : PROMPT + n] = torch.tensor(row[f"{name}_ids"])
            spans[i, PROMPT : PROMPT + n, 1] = torch.tensor(row[f"{name}_ends"])
        return ids, labels, spans

    (s_ids, s_labels, s_spans), (t_ids, t_labels, t_spans) = side("student", hs), side("teacher", ht)
    value = loss(hs @ ws.T, ht @ wt.T, s_labels, t_labels, s_ids, t_ids, s_spans, t_spans)
    value.backward()
    probe = np.random.default_rng(5).standard_normal((sizes[0], 2))
    return dict(
        merge=merge, extended=extended, hybrid=hybrid, weights=weights, beta=beta, loss=value.item(),
        d_hidden=hs.grad.numpy().round(12).tolist(), d_head=(ws.grad.numpy().T @ probe).round(12).tolist(),
    )  # fmt: skip


def _gkd():
    import torch
    from trl.experimental.gold.gold_trainer import GOLDTrainer

    out = []
    _, _, rows = synthetic()
    h, w, ht, _ = inputs(rows, 40, 40)
    for beta, temperature in itertools.product((0.0, 0.3, 1.0), (1.0, 0.9)):
        hs, ws = torch.tensor(h, requires_grad=True), torch.tensor(w, requires_grad=True)
        teacher = torch.tensor(ht[:, : h.shape[1]]) @ torch.tensor(inputs(rows, 40, 40)[3]).T
        labels = torch.full(hs.shape[:2], -100)
        labels[:, PROMPT:] = 0
        value = GOLDTrainer.generalized_jsd_loss(
            (hs @ ws.T)[:, :-1], teacher[:, :-1], labels[:, 1:], beta=beta, temperature=temperature
        )
        value.backward()
        out.append(dict(beta=beta, temperature=temperature, loss=value.item(), d_hidden=hs.grad.numpy().tolist()))
    return out


def _encode(tokenizer, text):
    from trl.experimental.utils import encode_with_byte_offsets

    ids, spans = encode_with_byte_offsets(tokenizer.backend_tokenizer, [text])[0]
    return ids, [end for _, end in spans]


def _real(assets):
    from transformers import AutoTokenizer

    names = {"smollm2": "smollm2-135m-instruct"}
    out = []
    for pair in PAIRS:
        tokenizers = [AutoTokenizer.from_pretrained(assets / names.get(n, f"tokenizers/{n}")) for n in pair]
        rows = []
        for text in TEXTS:
            (s, s_ends), (t, t_ends) = (_encode(tok, text) for tok in tokenizers)
            rows.append(dict(student_ids=s, teacher_ids=t, student_ends=s_ends, teacher_ends=t_ends))
        sizes = [max(t.get_vocab().values()) + 1 for t in tokenizers]
        vocabularies = [t.get_vocab() for t in tokenizers]
        for case in cases(real=True):
            print(pair, case, flush=True)
            out.append(dict(pair=pair) | _trl(case, *vocabularies, rows, sizes))
    return out


def main():
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    student, teacher, rows = synthetic()
    golden = dict(
        synthetic=[_trl(c, student, teacher, rows, (40, 50)) for c in cases()],
        gkd=_gkd(),
        real=_real(pathlib.Path(sys.argv[1])) if len(sys.argv) > 1 else [],
    )
    (HERE / "trl_losses.json").write_text(json.dumps(golden))


if __name__ == "__main__":
    main()
