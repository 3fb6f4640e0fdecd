"""Small random models, vocabularies and rows of aligned tokens, and every method as a loss over them."""

import jax
import numpy as np

from gold_jax.loss_spec import LossSpec, comparisons, presets
from gold_jax.models.config import DecoderConfig
from gold_jax.models.decoder import Decoder
from gold_jax.models.functional import split
from gold_jax.models.rope import Rope
from gold_jax.text.batch import Row, SideTokens, build_batches
from gold_jax.text.process_shard import ProcessShard
from gold_jax.text.vocabulary import VocabularyMap
from gold_jax.training.objective import make_distillation_loss
from gold_jax.training.teacher import freeze_teacher

V, W, K = 37, 41, 25
BETAS = (0.0, 0.5, 1.0)
GIVEN = {"matched_weight": 1.0, "unmatched_weight": 1.0, "temperature": 5.0}


def options(compare, **given):
    """Those of `GIVEN` and of the given that the comparison has."""
    return {name: value for name, value in (GIVEN | given).items() if name in comparisons()[compare].options}


SPECS = [
    LossSpec(*point, options(point[2], beta=BETAS[i % 3]), name=name)
    for i, (name, point) in enumerate(presets().items())
    if point[1] != "positional"
    and name not in ("sorted", "hybrid", "shared", "shared_rest")  # others have these points
] + [
    LossSpec("observed", "all", "hybrid", {"beta": 1.0}, crossentropy_weight=0.5, name="observed"),
    LossSpec("chain", "all", "events", {"beta": 0.0}, name="chain_events"),
    LossSpec("boundary", "all", "shared_rest", name="shared_rest", student_temperature=0.7, teacher_temperature=1.3),
    LossSpec(
        "boundary", "all", "events", {"beta": 0.0}, distillation_weight=0.5, crossentropy_weight=1.0, name="mixed"
    ),
]
STOPS = ((3, 5), (7, 2, 11))


def decoder(vocabulary, seed, tied=True):
    config = DecoderConfig(
        family="llama", vocab_size=vocabulary, width=16, mlp_width=24, layers=2, heads=2, kv_heads=1, head_dim=8,
        norm_eps=1e-5, activation="silu", ropes=(Rope(10000.0), Rope(10000.0)), sliding=(False, False), window=None, tied=tied,
        query_scale=8**-0.5,
    )  # fmt: skip
    model = Decoder.from_config(config, seed)
    _, params = split(model)
    # Distributions that differ, as trained models' do.
    return model.replace({**params, "embedding": params["embedding"] * 20})


def vocabulary(seed=0):
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(n).astype(np.int32) for n in (V, W)]
    routes = [np.sort(rng.integers(0, K + 1, n - K)).astype(np.int32) for n in (V, W)]
    return VocabularyMap(*orders, K, K, V, W, *routes)


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        groups = int(rng.integers(1, 6))
        sides = []
        for size in (V, W):
            group = np.repeat(np.arange(groups), rng.integers(1, 3, groups))
            prompt = rng.integers(0, size, int(rng.integers(1, 7))).astype(np.int32)
            sides.append(SideTokens(prompt, rng.integers(0, size, len(group)).astype(np.int32), group))
        made.append(Row(*sides, groups=groups, text="", stopped=False))
    return made


def built(spec, tied=True, place=lambda model, where: model, placements=(None, None), importance=None):
    """The loss of a method, the student's parameters, the constants."""
    student, teacher = place(decoder(V, 1), placements[0]), place(decoder(W, 2, tied), placements[1])
    graph, params = split(student)
    vocabularies = vocabulary()
    teacher_graph, teacher_params = split(teacher)
    constants = freeze_teacher(teacher_graph, teacher_params, vocabularies, STOPS)
    options = dict(chunk=4, importance=importance)
    return make_distillation_loss(graph, teacher_graph, spec, vocabularies, **options), params, constants


def drawn(count, seed=0):
    """All but every third of `rows` as another student would have drawn them."""
    rng, made = np.random.default_rng(seed), rows(count, seed)
    ids = {i: row.student.completion for i, row in enumerate(made) if i % 3}
    return {i: (x, rng.uniform(-6, -1, len(x)).astype(np.float32)) for i, x in ids.items()}


def batches(spec, micro, normalization="groups", count=8, lines=1, seed=0, drawn=None):
    """The micro-batches of one global batch."""
    made = build_batches(
        rows(count, seed),
        micro,
        merge=spec.merge,
        groups=spec.groups,
        text=spec.of_text,
        normalization=normalization,
        process_shard=ProcessShard.single_process(lines),
        drawn=drawn,
    )
    return jax.tree.map(jax.numpy.asarray, made)
