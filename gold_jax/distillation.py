"""One distillation loss as a function of the student's parameters, for gradients and custom training loops."""

import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from gold_jax.bucketing import ShapeSet
from gold_jax.config import GOLDConfig
from gold_jax.loading import LoadedModel, as_loaded_model
from gold_jax.loss_spec import LossSpec
from gold_jax.losses.fused_head import chunk_size
from gold_jax.models.functional import Params, commit, merge, split
from gold_jax.text.batch import Batch
from gold_jax.text.data import Example, as_examples
from gold_jax.text.detokenize import SampledCompletion
from gold_jax.training.batches import DistillationBatchBuilder
from gold_jax.training.build import match_pair
from gold_jax.training.objective import Objective, make_distillation_loss
from gold_jax.training.teacher import StepConstants, freeze_teacher
from gold_jax.wording import plural, quoted

_DEFAULT_LENGTH = 1024  # tokens of prompt and completion, as GOLDConfig's


@dataclasses.dataclass(frozen=True, eq=False)
class _Static:
    """The static part of a `DistillationLoss` as a pytree; compared and hashed by identity."""

    names: tuple[str, str]  # of student and teacher
    objective: Objective
    batches: DistillationBatchBuilder
    shapes: ShapeSet  # of the batches so far


@jax.tree_util.register_pytree_node_class
class DistillationLoss:
    """The distillation loss between two models: `loss(params, batch) -> (value, parts)`.

    `params` are the student's parameters, `batch` what `loss.batch(rows)` gives. `value` is a float32 scalar in nats, the
    mean over the groups of the batch, and `parts` a dict of scalars that make it up. The gradient is
    `jax.value_and_grad(loss, has_aux=True)(params, batch)`; the teacher is a constant, and second derivatives are not
    defined. A call is jitted. The loss is a pytree whose leaves are the teacher's arrays: give it to a jitted function of
    your own as an argument, since arrays of a closure are constants, which are copied into the program.

    Args:
        student, teacher: a folder, a hub id or `embedded:…`, or a `LoadedModel`; both are read in float32.
        spec: the loss: a value of `--loss` such as "gold", a `LossSpec`, or a `GOLDConfig`, whose loss flags are used.
        max_length: most student tokens of prompt and completion together; None: that of the `GOLDConfig`, else 1024.
        chunk: positions whose logits are held at once; None: the platform's default.

    Attributes:
        params: the student's parameters as they were loaded, which are the model's own arrays: copy them before they are
            donated. A copy of the loss made by `jax.tree.map` or by jit has none.
        spec: the `LossSpec`.

    Raises:
        ValueError: the spec does not apply to the pair, such as "gkd" with two tokenizers.
        TypeError: `spec` is of another type.
        FileNotFoundError: a named model is not found.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        spec: LossSpec | GOLDConfig | str = "gold",
        *,
        max_length: int | None = None,
        chunk: int | None = None,
    ):
        if not isinstance(spec, LossSpec | GOLDConfig | str):
            raise TypeError(f"spec is {quoted(spec)}; it must be the name of a loss, a LossSpec or a GOLDConfig")
        for name, value in (("max_length", max_length), ("chunk", chunk)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1, or None")
        student, teacher = (as_loaded_model(side) for side in (student, teacher))
        given = GOLDConfig(loss=spec, lmbda=1.0) if isinstance(spec, str) else spec
        config = given if isinstance(given, GOLDConfig) else None
        mask = given.mask if config is None else config.projection_mask
        match = match_pair(student, teacher, mask)
        spec = given if config is None else config.loss_spec(match.same or match.related)
        spec.check()
        (graph, params), (teacher_graph, teacher_params) = split(student.model), split(teacher.model)
        chunk = chunk_size(chunk, student.model.platform)
        objective = make_distillation_loss(graph, teacher_graph, spec, match.vocabulary, chunk=chunk)
        max_length = max_length or (_DEFAULT_LENGTH if config is None else config.max_length)
        tokenizers = student.chat_tokenizer, teacher.chat_tokenizer
        context = None if config is None else config.teacher_context
        short = student.model.config.max_decode_length, teacher.model.config.max_decode_length
        batches = DistillationBatchBuilder(
            *tokenizers, graph, spec, match.same, max_length, teacher_context=context, short_lengths=short
        )
        self.params: Params = commit(params)
        self._constants: StepConstants = freeze_teacher(
            teacher_graph, commit(teacher_params), match.vocabulary, match.stops
        )
        self._static = _Static((student.name, teacher.name), objective, batches, ShapeSet(batches.length_buckets))

    @property
    def spec(self) -> LossSpec:
        """The loss, fully specified."""
        return self._static.batches.spec

    def batch(
        self, rows: Sequence[Example | Mapping], completions: Sequence[str | SampledCompletion] | None = None
    ) -> Batch:
        """Encodes rows for both models, aligns and pads them; the arrays are numpy arrays.

        Batches of the same number of rows are padded to few shapes, so that few programs are compiled. Rows that
        `max_length` cuts, and rows of which nothing counts in the loss, are counted in a warning.

        Args:
            rows: what `load_examples` gives, or takes.
            completions: one for each row in place of its own: texts, or what `sample_completions` returns for the student.

        Raises:
            ValueError: there are no rows, a row has no completion, or nothing in any row counts in the loss.
        """
        examples = as_examples(rows)
        if not examples:
            raise ValueError("the batch is empty: give at least one row")
        given = [e.completion for e in examples] if completions is None else list(completions)
        if len(given) != len(examples):
            raise ValueError(f"there are {len(given)} completions for {len(examples)} rows; give one for each")
        if None in given:
            raise ValueError(
                f"row {given.index(None)} has a prompt but no completion; give rows with answers, or completions="
            )
        builder = self._static.batches
        if completions is None:
            given = [e.completion_for(builder.student) for e in examples]
        batch, cut, empty = builder.one_batch(examples, given, self._static.shapes)
        if len(empty) == len(examples):
            raise ValueError("nothing in these rows counts in the loss: their completions are empty or cut off")
        reasons = (f"are cut at max_length {builder.max_length}", cut), ("have nothing that counts in the loss", empty)
        for words, numbers in reasons:
            if numbers:
                what = f"{len(numbers)} of {plural(len(examples), 'row')} {words} (the first is row {numbers[0]})"
                warnings.warn(what, stacklevel=2)
        return batch

    def student(self, params: Params | None = None) -> LoadedModel:
        """The student with `params` (None: the loaded ones), for `sample_completions`, `save_model` and others."""
        builder = self._static.batches
        model = merge(builder.student_graph, self.params if params is None else params)
        return LoadedModel(model, builder.student, self._static.names[0])

    def __call__(self, params: Params, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss `[]` of a batch, and its parts `[]`."""
        return _value(self._static.objective, params, self._constants, batch)

    def __repr__(self) -> str:
        student, teacher = self._static.names
        return f"DistillationLoss({student} from {teacher}, {self.spec.describe()})"

    def tree_flatten(self) -> tuple[tuple[StepConstants], _Static]:
        """The teacher's arrays and the static part."""
        return (self._constants,), self._static

    @classmethod
    def tree_unflatten(cls, static: _Static, arrays: tuple) -> "DistillationLoss":
        """The loss of `tree_flatten`."""
        loss = object.__new__(cls)
        (loss._constants,), loss._static = arrays, static
        return loss


@functools.partial(jax.jit, static_argnums=0)
def _value(objective: Objective, params: Params, constants: StepConstants, batch: Batch):
    return objective(params, constants, batch)


def loss(
    student: Any, teacher: Any, rows: Sequence[Example | Mapping], spec: LossSpec | GOLDConfig | str = "gold"
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The distillation loss `[]` of rows in nats, and its parts `[]`.

    Arguments and errors are those of `DistillationLoss` and its `batch`; use these for gradients.
    """
    distillation_loss = DistillationLoss(student, teacher, spec)
    return distillation_loss(distillation_loss.params, distillation_loss.batch(rows))
