"""Trace files written by hand: protobuf's wire format for what `training.trace` reads."""

STATS = ("step_num", "hlo_op", "hlo_module", "program_id", "run_id", "tf_op", "Hlo Proto")


def varint(number: int) -> bytes:
    """An integer in base 128, lowest digits first."""
    out = bytearray()
    while number >= 128:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def message(*fields) -> bytes:
    """A message of (number, value); a value is an int, text, or the bytes of another message."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(data)) + data
    return out


def event(name, start, end, **stats):
    """What `plane` takes: something that lasted from one second to another."""
    return name, start, end, stats


def plane(name, lines=None, programs=None) -> bytes:
    """A plane of {line: [event]}, or of {"jit_f(7)": program}."""
    lines, programs = lines or {}, programs or {}
    names = sorted({e[0] for events in lines.values() for e in events})
    made = [(2, name)]
    for key, stat in enumerate(STATS, 1):
        made.append((5, message((1, key), (2, message((1, key), (2, stat))))))
    for key, one in enumerate(names, 1):
        made.append((4, message((1, key), (2, message((1, key), (2, one))))))
    for key, (one, program) in enumerate(programs.items(), 1):
        proto = message((1, STATS.index("Hlo Proto") + 1), (6, message((1, program))))
        made.append((4, message((1, key), (2, message((1, key), (2, one), (5, proto))))))
    for line, events in lines.items():
        inside = [(2, line)]
        for one, start, end, stats in events:
            values = [
                message((1, STATS.index(stat) + 1), (4 if isinstance(value, int) else 5, value))
                for stat, value in stats.items()
            ]
            times = [(2, round(start * 1e12)), (3, round((end - start) * 1e12))]
            inside.append((4, message((1, names.index(one) + 1), *times, *((4, value) for value in values))))
        made.append((3, message(*inside)))
    return message(*made)


def program(**computations) -> bytes:
    """A compiled program of {computation: [(name, opcode, scope, operands, called computations)]}."""
    numbers = {name: number for number, name in enumerate(computations, 1)}
    ids, made = {}, []
    for name, instructions in computations.items():
        inside = [(1, name), (5, numbers[name])]
        for one, opcode, scope, operands, calls in instructions:
            ids[one] = len(ids) + 1
            fields = [(1, one), (2, opcode), (35, ids[one])]
            fields += [(7, message((2, scope)))] if scope else []
            fields += [(36, b"".join(varint(ids[o]) for o in operands))] if operands else []
            fields += [(38, numbers[c]) for c in calls]  # not packed, which readers have to take as well
            inside.append((2, message(*fields)))
        made.append((3, message(*inside)))
    return message(*made)


def write(path, *planes):
    """The planes as a trace file; returns its path."""
    path.write_bytes(message(*((1, one) for one in planes)))
    return path


def step(number, start, end, *others) -> bytes:
    """The host's plane with a step and other events of the thread that trains."""
    return plane("/host:CPU", {"python": [event("train", start, end, step_num=number), *others]})
