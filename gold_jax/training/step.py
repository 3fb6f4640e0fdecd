"""The training step, `state, metrics = step(state, batches)`: gradients summed over micro-batches, and one update."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from gold_jax.cpu import release_freed_memory
from gold_jax.models.functional import commit
from gold_jax.training.nonfinite import NonFiniteCounter
from gold_jax.training.objective import Objective, with_hidden


class TrainState(NamedTuple):
    """What an update changes; donated to every step."""

    params: Any  # the student's parameters, float32
    optimizer: Any  # the optimizer's state
    step: jax.Array | np.int32 = np.int32(0)  # updates so far, those left out too
    nonfinite: NonFiniteCounter = NonFiniteCounter()  # how many of them were left out


def state_shardings(optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    """The shardings of a state: what the optimizer keeps of a parameter as the parameter, scalars replicated."""
    shardings = jax.tree.map(lambda x: x.sharding, params)
    one = jax.tree.leaves(shardings)[0]
    replicated = jax.sharding.NamedSharding(one.mesh, P()) if isinstance(one, jax.sharding.NamedSharding) else one
    given, scalars = (jax.eval_shape(optimizer.init, params), shardings), lambda _: replicated
    kept = optax.tree.map_params(optimizer, lambda _, sharding: sharding, *given, transform_non_params=scalars)
    return TrainState(shardings, kept, replicated, NonFiniteCounter(replicated, replicated))


def state_shapes(optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    """The state that a run begins with, as shapes with their shardings, given its parameters or their shapes."""
    state = jax.eval_shape(lambda params: TrainState(params, optimizer.init(params)), params)
    shardings = state_shardings(optimizer, params)
    return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), state, shardings)


def init_state(optimizer: optax.GradientTransformation, params: Any, shardings: TrainState | None = None) -> TrainState:
    """The state that a run begins with. It holds the parameters given, so that the first step donates them."""
    leaves, structure = jax.tree.flatten(None if shardings is None else shardings._replace(params=None))
    return commit(_initializer(optimizer, (structure, tuple(leaves)))(params)._replace(params=params))


@functools.lru_cache(maxsize=8)
def _initializer(optimizer: optax.GradientTransformation, shardings: tuple) -> Callable[[Any], TrainState]:
    """What makes a state but for its parameters, as one program; `shardings` flattened, as they are no key."""

    def rest(params):
        zero = jnp.zeros((), jnp.int32)
        return TrainState(None, optimizer.init(params), zero, NonFiniteCounter(zero, zero))

    return jax.jit(rest, out_shardings=jax.tree.unflatten(*shardings))


class Program:
    """A jitted function that is compiled for new shapes before it runs, not while it does.

    Compiling leaves some hundred MB behind on the host, which are released before the program runs.
    """

    def __init__(self, function: Callable, donate: Sequence[int] = ()):
        self._jitted = jax.jit(function, donate_argnums=donate)
        self.lower = self._jitted.lower  # for arguments or their shapes, perhaps for devices elsewhere
        self._seen: set = set()

    def __call__(self, *args):
        """Calls the function."""
        leaves, structure = jax.tree.flatten(args)
        shapes = structure, tuple((x.shape, x.dtype) for x in leaves)
        if shapes not in self._seen:
            self._seen.add(shapes)
            self._jitted.lower(*args).compile()  # JAX finds it again when the function is called
            release_freed_memory()
        return self._jitted(*args)

    @property
    def compiled(self) -> int:
        """For how many different arguments it has been compiled."""
        return self._jitted._cache_size()


@functools.lru_cache(maxsize=16)
def _program(function: Callable) -> Program:
    """The program of a function that depends on no optimizer, shared by all steps."""
    return Program(function)


@functools.lru_cache(maxsize=8)
def _rates(schedule: optax.Schedule) -> Callable[[Any, Any], jax.Array]:
    """The jitted learning rate of an update, given the number of updates before it and how many were skipped."""

    def learning_rate(step, skipped):
        return schedule(step - skipped)

    return jax.jit(learning_rate)


@functools.lru_cache(maxsize=8)
def _programs(objective: Objective, optimizer: optax.GradientTransformation | None, shardings: tuple) -> dict:
    """The programs of a `Step`, for all steps of one objective and optimizer; `shardings` flattened, as they are no key."""
    shardings = jax.tree.unflatten(*shardings)

    def constrained(tree, sharding):
        return tree if shardings is None else jax.lax.with_sharding_constraint(tree, sharding)

    def gradient(params, constants, batch):
        metrics, grads = jax.value_and_grad(objective.loss, has_aux=True)(params, constants, batch)
        return metrics, constrained(grads, shardings and shardings.params)

    @jax.named_scope("optimizer")
    def update(state: TrainState, grads, loss, rate=None):
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        given_rate = {} if rate is None else {"learning_rate": rate}

        def take(params, optimizer_state, grads):
            updates, optimizer_state = optimizer.update(grads, optimizer_state, params, **given_rate)
            return optax.apply_updates(params, updates), optimizer_state

        def leave(params, optimizer_state, grads):
            return params, optimizer_state

        def branch(*given):
            return jax.lax.cond(finite, take, leave, *given)

        def select(*given):
            return jax.tree.map(lambda new, old: jnp.where(finite, new, old), take(*given), leave(*given))

        # In place, so that old and new state are never held together: GPUs copy what goes into a conditional and what
        # comes out of it, CPUs what is selected from.
        given = state.params, state.optimizer, grads
        params, optimizer_state = jax.lax.platform_dependent(*given, cuda=select, default=branch)
        left_out = 1 - finite.astype(jnp.int32)
        counter = NonFiniteCounter(state.nonfinite.total + left_out, (state.nonfinite.in_a_row + 1) * left_out)
        new = constrained(TrainState(params, optimizer_state, state.step + 1, counter), shardings)
        return new, {"grad_norm": norm, "skipped": left_out}

    def fused(state, constants, batch, rate=None):
        metrics, grads = gradient(state.params, constants, batch)
        state, done = update(state, grads, metrics[0], rate)
        return state, metrics, done

    def add(params, grads, metrics, constants, batch):
        more, new = gradient(params, constants, batch)
        return jax.tree.map(jnp.add, metrics, more), jax.tree.map(jnp.add, grads, new)

    programs = {"fused": Program(fused, donate=(0,)), "evaluate": _program(objective.loss)}
    programs |= {"first": Program(gradient), "add": Program(add, donate=(1, 2))}
    programs["update"] = Program(update, donate=(0,))
    if objective.teacher_forward is not None:
        programs["teacher_forward"] = _program(objective.teacher_forward)
    return programs


class Step:
    """One update, and a loss without one, as jitted programs.

    `programs` are the jitted functions by name: `fused` (gradient and update of a single micro-batch), or `first`, `add`
    and `update` (gradients summed over several), `evaluate`, and `teacher_forward` where there is a teacher. Without an
    optimizer it only evaluates. `constants` are what the objective reads and no update changes, such as the teacher.
    `schedule` gives the learning rate that is passed to the optimizer's `update` as `learning_rate=`; None: none is passed.
    On a mesh `shardings` are those of the state, and `device_put` puts a batch of host arrays there. Steps of one
    objective and optimizer share their programs, whatever the schedule: a second run in a process traces and compiles
    nothing again. The programs of the last 8 pairs are kept.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: optax.GradientTransformation | None,
        constants: Any = (),
        *,
        schedule: optax.Schedule | None = None,
        shardings: TrainState | None = None,
        device_put: Callable[[Any], Any] | None = None,
    ):
        self.objective, self.optimizer, self.constants, self._schedule = objective, optimizer, constants, schedule
        self._device_put = device_put or (lambda batch: batch)
        leaves, structure = jax.tree.flatten(shardings)
        self.programs = _programs(objective, optimizer, (structure, tuple(leaves)))
        self._compiled_before = sum(program.compiled for program in self.programs.values())

    @property
    def compiled(self) -> int:
        """Number of programs compiled since this step was made."""
        return sum(program.compiled for program in self.programs.values()) - self._compiled_before

    def __call__(self, state: TrainState, batches: Sequence[Any]) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update from micro-batches that are normalised together; donates the state, returns while it is computed.

        Beside the new state the metrics `loss`, its parts, `grad_norm` (before clipping) and `skipped`, which is 1
        where loss or gradients are not finite; then parameters and optimizer are what they were.
        """
        run, constants = self.programs, self.constants
        head, rate = self._with_teacher(batches[0]), self.learning_rate(state)
        if len(batches) == 1:
            state, metrics, done = run["fused"](state, constants, head, rate)
        else:
            metrics, grads = run["first"](state.params, constants, head)
            del head  # the teacher's hidden states with it
            for batch in batches[1:]:
                metrics, grads = run["add"](state.params, grads, metrics, constants, self._with_teacher(batch))
            state, done = run["update"](state, grads, metrics[0], rate)
        loss, parts = metrics
        return state, {"loss": loss, **done, **parts}

    def learning_rate(self, state: TrainState) -> jax.Array | None:
        """The learning rate `[]` of the next update; None: the optimizer has its own schedule."""
        return None if self._schedule is None else _rates(self._schedule)(state.step, state.nonfinite.total)

    def skip(self, state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
        """An update that is left out: it counts as one, and nothing is computed. Returns what a call returns."""
        counter, nothing = NonFiniteCounter(*(count + 1 for count in state.nonfinite)), jnp.float32(jnp.nan)
        metrics = {"loss": nothing, "grad_norm": nothing, "skipped": jnp.int32(1)}
        return state._replace(step=state.step + 1, nonfinite=counter), metrics

    def evaluate(self, params: Any, batch: Any, text: Any = None) -> dict[str, jax.Array]:
        """Loss and parts of one batch, no gradient; of labels marked as `text`, `[B, T]`, their `text_nll` too."""
        given = self._with_teacher(batch), self._device_put(text)
        loss, parts = self.programs["evaluate"](params, self.constants, *given)
        return {"loss": loss, **parts}

    def _with_teacher(self, batch: Any) -> Any:
        """A batch on the mesh, after the teacher's forward pass where there is a teacher."""
        batch = self._device_put(batch)
        if "teacher_forward" not in self.programs:
            return batch
        return with_hidden(batch, self.programs["teacher_forward"](self.constants, batch.teacher.packed))
