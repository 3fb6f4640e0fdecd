"""The flags of devices and processes; without JAX, because flags are read before it starts."""

from __future__ import annotations

import dataclasses
from typing import Any

from .fields import flag

AXES = ("data", "fsdp", "tensor")
LAYOUTS = ("fsdp", "full", "replicated")


def read_mesh(text: str | None) -> dict[str, int]:
    """The axes that are named and their sizes; `auto` and None name none.

    >>> read_mesh("fsdp=4,tensor=2")
    {'fsdp': 4, 'tensor': 2}

    Raises:
        ValueError: another form, an axis that does not exist or is named twice, or a size below 1.
    """
    found: dict[str, int] = {}
    for part in "" if text in (None, "auto") else text.replace(" ", "").split(","):
        name, _, size = part.partition("=")
        if name not in AXES or not size.isdecimal() or int(size) < 1 or name in found:
            raise ValueError(
                f"--mesh is {text!r}; it must be auto, or sizes of {', '.join(AXES)}, each once and at least 1, such as "
                "fsdp=4,tensor=2."
            )
        found[name] = int(size)
    return found


def mesh_flag() -> Any:
    """The field `mesh` of a command that does not train."""
    return flag(
        None, "Sizes of the mesh's axes, as in training, such as fsdp=4,tensor=2; none or auto: fsdp over all devices."
    )


@dataclasses.dataclass(kw_only=True)
class MeshFlags:
    """Over which devices a run is spread, and how its processes find each other."""

    mesh: str | None = flag(
        None,
        "Sizes of the axes data, fsdp and tensor over which the run is spread, such as fsdp=4,tensor=2; rows are shared out to "
        "data x fsdp. None or auto: fsdp over all devices.",
    )
    layout: str = flag(
        "fsdp",
        "What a model's width is cut over: fsdp; full: data and fsdp; replicated: neither.",
        choices=LAYOUTS,
    )
    coordinator_address: str | None = flag(
        None,
        "HOST:PORT of process 0, in a run of several processes; none: found out on TPU pods, under Slurm and Open MPI, or by "
        "JAX_COORDINATOR_ADDRESS.",
    )
    num_processes: int | None = flag(None, "How many processes the run has; none: as above, JAX_NUM_PROCESSES.")
    process_id: int | None = flag(None, "Which of them this is, from 0; none: as above, JAX_PROCESS_ID.")
    process_timeout: float = flag(
        60.0, "Seconds after which a process that does not answer is taken for lost, and the others end."
    )

    def check_mesh(self) -> None:
        """Raises ValueError where `mesh` is none."""
        read_mesh(self.mesh)
