"""Rotary position embeddings: one small function per kind, each returning inverse frequencies and a scale.

Facts from `transformers.modeling_rope_utils`; the papers are RoFormer (arXiv 2104.09864), Llama 3 (2407.21783, scaling
by wavelength) and YaRN (2309.00071).
"""

import contextlib
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


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

    @classmethod
    def from_parameters(cls, parameters: dict, *, max_length: int, where: str) -> "Rope":
        """Read one `rope_parameters` dictionary of a transformers config, which errors call `where`.

        `max_length` is `max_position_embeddings`, the original length where the dictionary does not name one.

        Raises:
            ValueError: unknown kind, or a value that the kind needs is missing.
        """
        kind = parameters.get("rope_type") or parameters.get("type") or "default"
        if kind not in _KINDS:
            raise ValueError(f"{where}: rope_type {kind!r} is not known. Known are {', '.join(sorted(_KINDS))}.")
        if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
            partial = parameters["partial_rotary_factor"]
            raise ValueError(
                f"{where}: partial_rotary_factor {partial} is not supported; whole heads are turned (1.0)."
            )
        needed = _KINDS[kind][1]
        missing = [name for name in ("rope_theta", *needed) if parameters.get(name) is None]
        if missing:
            raise ValueError(f"{where}: rope_type {kind!r} needs {', '.join(missing)}, which the config does not give.")
        values = {name: float(parameters[name]) for name in needed}
        if kind in ("llama3", "yarn"):
            values["original_length"] = int(parameters.get("original_max_position_embeddings") or max_length)
        if kind == "yarn":
            given = (name for name in ("beta_fast", "beta_slow") if parameters.get(name))
            values |= {name: float(parameters[name]) for name in given}
            values["attention_factor"] = _yarn_attention_factor(parameters)
            values["truncate"] = bool(parameters.get("truncate", True))
        theta = float(parameters["rope_theta"])
        positive = {"rope_theta": theta} | {
            name: values[name] for name in ("factor", "original_length") if name in values
        }
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{where}: {name} is {value:g}; it must be greater than 0.")
        return cls(theta, kind, **values)

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Angle per position of each pair of channels: float32 [head_dim / 2]."""
        plain = self.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        return _KINDS[self.kind][0](self, plain, head_dim).astype(np.float32)

    def is_finite(self, head_dim: int) -> bool:
        """Whether all angles and the scale are finite, and the scale positive."""
        with np.errstate(all="ignore"), contextlib.suppress(ArithmeticError, ValueError):
            return bool(np.isfinite(self.inverse_frequencies(head_dim)).all()) and 0 < self.attention_factor < math.inf
        return False

    def tables(self, positions: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines, float32 [..., head_dim / 2], of int positions [...]."""
        angles = positions.astype(jnp.float32)[..., None] * self.inverse_frequencies(head_dim)
        return jnp.cos(angles) * self.attention_factor, jnp.sin(angles) * self.attention_factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Heads x [B, T, heads, head_dim] turned by their positions, in float32; cos, sin: float32 [B, T, head_dim / 2].

    Channel i pairs with channel i + head_dim / 2, as in transformers. Of x's shape and dtype.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _linear(rope: Rope, plain: np.ndarray, head_dim: int) -> np.ndarray:
    return plain / rope.factor


def _llama3(rope: Rope, plain: np.ndarray, head_dim: int) -> np.ndarray:
    # Turns per original context: many turns keep their frequency, few are slowed down, a ramp joins the two.
    turns = rope.original_length * plain / (2 * math.pi)
    keep = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return keep * plain + (1 - keep) * plain / rope.factor


def _yarn(rope: Rope, plain: np.ndarray, head_dim: int) -> np.ndarray:
    def channel(turns: float) -> float:
        return head_dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    slow = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0, 1)
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


# A kind's function from plain inverse frequencies to its own, and the values that it needs.
_KINDS = {
    "default": (_linear, ()),  # by the factor 1
    "linear": (_linear, ("factor",)),
    "llama3": (_llama3, ("factor", "low_freq_factor", "high_freq_factor")),
    "yarn": (_yarn, ("factor",)),
}
