"""Rotary position embeddings: one small function per kind, each returning inverse frequencies and a scale.

Facts from `transformers.modeling_rope_utils`; the papers are RoFormer (arXiv 2104.09864), Llama 3 (2407.21783, scaling
by wavelength), YaRN (2309.00071) and LongRoPE (2402.13753).
"""

import contextlib
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gold_jax.wording import quoted


@dataclasses.dataclass(frozen=True)
class Rope:
    """Everything that decides the angles of one kind of layer; fields that a kind does not use keep their defaults."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    partial: float = 1.0  # share of a head's channels that is rotated, its first ones
    # By which `longrope` divides the plain frequencies, in rows of up to `original_length` tokens and in longer ones.
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @classmethod
    def from_parameters(cls, parameters: dict, head_dim: int, *, max_length: int, where: str) -> "Rope":
        """Read one `rope_parameters` dictionary of a transformers config, which errors call `where`.

        `max_length` is `max_position_embeddings`, the original length where the dictionary does not name one.

        Raises:
            ValueError: unknown kind, or a value that the kind needs is missing.
        """
        kind = parameters.get("rope_type") or parameters.get("type") or "default"
        if kind not in _KINDS:
            raise ValueError(f"{where}: rope_type {kind!r} is not known. Known are {', '.join(sorted(_KINDS))}.")
        read = ("rope_theta", "partial_rotary_factor", *(_OF_SCALED if kind != "default" else ()))
        numbers = {name: parameters[name] for name in read if parameters.get(name) is not None}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{where}: {name} is {quoted(value)}; it must be a number greater than 0.")
        partial = float(numbers.get("partial_rotary_factor", 1.0))
        size = int(head_dim * partial) if 0 < partial <= 1 else 0  # rounded down, as in transformers
        if size < 2 or size % 2:
            raise ValueError(
                f"{where}: partial_rotary_factor {partial:g} rotates {size} of {head_dim} channels; it must be an even number."
            )
        needed = _KINDS[kind][1]
        missing = [name for name in ("rope_theta", *needed) if parameters.get(name) is None]
        if missing:
            raise ValueError(f"{where}: rope_type {kind!r} needs {', '.join(missing)}, which the config does not give.")
        values = {name: float(parameters[name]) for name in needed if kind != "longrope"}
        if kind in ("llama3", "yarn", "longrope"):
            values["original_length"] = math.ceil(numbers.get("original_max_position_embeddings", max_length))
        if kind == "yarn":
            given = (name for name in ("beta_fast", "beta_slow") if parameters.get(name))
            values |= {name: float(parameters[name]) for name in given}
            values["attention_factor"] = _yarn_attention_factor(parameters)
            values["truncate"] = bool(parameters.get("truncate", True))
        if kind == "longrope":
            values |= {f"{name}s": _channel_factors(parameters[name], name, size, where) for name in needed}
            values["attention_factor"] = _longrope_attention_factor(parameters, max_length, values["original_length"])
        return cls(float(parameters["rope_theta"]), kind, partial=partial, **values)

    def inverse_frequencies(self, head_dim: int, *, long: bool = False) -> np.ndarray:
        """Angle per position of each pair of channels, float32 [R / 2], R of `head_dim` channels being rotated.

        `long`: in rows of more than `short_length` tokens.
        """
        size = int(head_dim * self.partial)
        plain = self.theta ** -(np.arange(0, size, 2, dtype=np.float64) / size)
        if long:
            return (plain / np.asarray(self.long_factors)).astype(np.float32)
        return _KINDS[self.kind][0](self, plain, size).astype(np.float32)

    @property
    def short_length(self) -> int | None:
        """Up to how many tokens rows are rotated alike; None: whatever their length."""
        return self.original_length if self.kind == "longrope" else None

    def is_finite(self, head_dim: int) -> bool:
        """Whether all angles and the scale are finite, and the scale positive."""
        with np.errstate(all="ignore"), contextlib.suppress(ArithmeticError, ValueError):
            kinds = (False, True) if self.kind == "longrope" else (False,)
            finite = all(np.isfinite(self.inverse_frequencies(head_dim, long=long)).all() for long in kinds)
            return finite and 0 < self.attention_factor < math.inf
        return False

    def tables(
        self, positions: jax.Array, head_dim: int, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines, float32 [..., R / 2], of int positions [...], R of `head_dim` channels being rotated.

        `lengths`, which broadcast to positions, are the rows'; None: none is longer than `short_length`.
        """
        frequencies = self.inverse_frequencies(head_dim)
        if lengths is not None and self.short_length is not None:
            is_long = (lengths > self.short_length)[..., None]
            frequencies = jnp.where(is_long, self.inverse_frequencies(head_dim, long=True), frequencies)
        angles = positions.astype(jnp.float32)[..., None] * frequencies
        return jnp.cos(angles) * self.attention_factor, jnp.sin(angles) * self.attention_factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Heads x [B, T, heads, head_dim] turned by their positions, in float32; cos, sin: float32 [B, T, R / 2].

    Of the first R channels, i pairs with i + R / 2, as in transformers; the others stay. Of x's shape and dtype.
    """
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)


def _linear(rope: Rope, plain: np.ndarray, size: int) -> np.ndarray:
    return plain / rope.factor


def _llama3(rope: Rope, plain: np.ndarray, size: int) -> np.ndarray:
    # Turns per original context: many turns keep their frequency, few are slowed down, a ramp joins the two.
    turns = rope.original_length * plain / (2 * math.pi)
    keep = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return keep * plain + (1 - keep) * plain / rope.factor


def _yarn(rope: Rope, plain: np.ndarray, size: int) -> np.ndarray:
    def channel(turns: float) -> float:
        return size * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    slow = np.clip((np.arange(size // 2) - low) / max(high - low, 0.001), 0, 1)
    return (1 - slow) * plain + slow * plain / rope.factor


def _yarn_attention_factor(parameters: dict) -> float:
    def scale(weight: float) -> float:
        factor = float(parameters["factor"])
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return scale(parameters["mscale"]) / scale(parameters["mscale_all_dim"])
    return scale(1.0)


def _longrope(rope: Rope, plain: np.ndarray, size: int) -> np.ndarray:
    return plain / np.asarray(rope.short_factors)


def _channel_factors(factors: Any, name: str, size: int, where: str) -> tuple[float, ...]:
    """One factor for each pair of channels."""
    given = factors if isinstance(factors, list) else []
    if len(given) != size // 2 or not all(isinstance(x, int | float) and 0 < x < math.inf for x in given):
        needed = f"a list of {size // 2} numbers greater than 0, one for each pair of channels"
        raise ValueError(f"{where}: {name} is {quoted(factors)}; it must be {needed}.")
    return tuple(map(float, factors))


def _longrope_attention_factor(parameters: dict, max_length: int, original_length: int) -> float:
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    factor = parameters.get("factor") or max_length / original_length
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_length))


# Numbers that the kinds but "default" read.
_OF_SCALED = ("factor", "attention_factor", "original_max_position_embeddings")
# A kind's function from plain inverse frequencies to its own, and the values that it needs.
_KINDS = {
    "default": (_linear, ()),  # by the factor 1
    "linear": (_linear, ("factor",)),
    "llama3": (_llama3, ("factor", "low_freq_factor", "high_freq_factor")),
    "yarn": (_yarn, ("factor",)),
    "longrope": (_longrope, ("short_factor", "long_factor")),
}
