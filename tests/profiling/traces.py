"""Trace files written by hand, for what `profiling.trace` reads."""

import json

from jax.profiler import ProfileData

STATS = ("step_num", "hlo_op", "hlo_module", "program_id", "run_id", "tf_op")


def event(name, start, end, **stats):
    """What `plane` takes: something that lasted from one second to another."""
    return name, start, end, stats


def plane(name, lines=None) -> str:
    """A plane of {line: [event]}."""
    lines = lines or {}
    names = sorted({e[0] for events in lines.values() for e in events})
    made = [f"name: {json.dumps(name)}"]
    for kind, known in (("stat", STATS), ("event", names)):
        made += [
            f"{kind}_metadata {{ key: {k} value {{ id: {k} name: {json.dumps(n)} }} }}" for k, n in enumerate(known, 1)
        ]
    for line, events in lines.items():
        inside = [f"name: {json.dumps(line)}"]
        for one, start, end, stats in events:
            values = "".join(
                f"stats {{ metadata_id: {STATS.index(stat) + 1} "
                + (f"int64_value: {value} }}" if isinstance(value, int) else f"str_value: {json.dumps(value)} }}")
                for stat, value in stats.items()
            )
            times = f"offset_ps: {round(start * 1e12)} duration_ps: {round((end - start) * 1e12)}"
            inside.append(f"events {{ metadata_id: {names.index(one) + 1} {times} {values} }}")
        made.append(f"lines {{ {' '.join(inside)} }}")
    return f"planes {{ {' '.join(made)} }}"


def write(path, *planes):
    """The planes as a trace file; returns its path."""
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace("\n".join(planes)))
    return path


def step(number, start, end, *others) -> str:
    """The host's plane with a step and other events of the thread that trains."""
    return plane("/host:CPU", {"python": [event("train", start, end, step_num=number), *others]})


def operation(name, start, end, program=7, module="jit_f", run=1):
    """An operation that ran on the CPU."""
    return event(name, start, end, hlo_op=name, hlo_module=module, program_id=program, run_id=run)
