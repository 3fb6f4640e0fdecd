"""A second implementation of whole runs, in float64 NumPy, that shares no code with the package.

It reads weights and tokenizers from their folders, writes the prompts of the embedded models' chat templates, finds the
bytes that tokens spell, the groups, the matched entries, the losses, and makes AdamW's updates. Everything numerical takes
the array module `xp`, so that the same lines give values under NumPy and gradients under `jax.numpy`. Only `tokenizers`
(text to ids) and, for gradients, JAX are used.

Letters: `B` rows, `T` tokens of a row, `N = B·T`, `G` groups, `V` columns of a model, `K` matched columns.
"""

import dataclasses
import json
import math
import pathlib
import struct

import numpy as np
import tokenizers

SMALLEST = 1e-300
KEPT: dict = {}  # hidden states that NumPy has found, with the weights that they are of


# models


def read_weights(folder) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file by name, float64."""
    data = (pathlib.Path(folder) / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    found = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + size + at for at in about["data_offsets"])
        raw = data[begin:end]
        if about["dtype"] == "BF16":
            values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(raw, {"F32": "<f4", "F64": "<f8"}[about["dtype"]])
        found[name] = values.reshape(about["shape"]).astype(np.float64)
    return found


def write_weights(path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file of float32 tensors."""
    header, at, parts = {"__metadata__": {"format": "pt"}}, 0, []
    for name, values in tensors.items():
        part = np.ascontiguousarray(values, "<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [at, at + len(part)]}
        at, parts = at + len(part), [*parts, part]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pathlib.Path(path).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


def rounded_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 numbers, ties to even, as float64."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return bits.astype(np.uint32).view(np.float32).astype(np.float64).reshape(values.shape)


def hidden_states(xp, weights, config: dict, ids):
    """The states after the last norm, `[B, T, D]`, of a Llama or Qwen 3 that reads `ids [B, T]`."""
    eps, heads, pairs = config["rms_norm_eps"], config["num_attention_heads"], config["num_key_value_heads"]
    size, theta = config["head_dim"], config["rope_theta"]

    def norm(x, name):
        return x / xp.sqrt((x * x).mean(-1, keepdims=True) + eps) * weights[name]

    rows, length = ids.shape
    angles = np.outer(np.arange(length), theta ** (-np.arange(0, size, 2) / size))
    cos, sin = (np.concatenate([f(angles), f(angles)], 1)[:, None, :] for f in (np.cos, np.sin))

    def turned(x):
        half = size // 2
        return x * cos + xp.concatenate([-x[..., half:], x[..., :half]], -1) * sin

    later = np.where(np.arange(length)[:, None] >= np.arange(length)[None, :], 0.0, -1e30)
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        y = norm(x, at + "input_layernorm.weight")
        q, k, v = (
            (y @ weights[f"{at}self_attn.{n}_proj.weight"].T).reshape(rows, length, count, size)
            for n, count in (("q", heads), ("k", pairs), ("v", pairs))
        )
        if config["model_type"] == "qwen3":
            q, k = norm(q, at + "self_attn.q_norm.weight"), norm(k, at + "self_attn.k_norm.weight")
        q, k = turned(q), turned(k)
        k, v = (xp.repeat(z, heads // pairs, axis=2) for z in (k, v))
        scores = xp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(size) + later
        scores = xp.exp(scores - scores.max(-1, keepdims=True))
        scores = scores / scores.sum(-1, keepdims=True)
        y = xp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(rows, length, heads * size)
        x = x + y @ weights[at + "self_attn.o_proj.weight"].T
        y = norm(x, at + "post_attention_layernorm.weight")
        gate = y @ weights[at + "mlp.gate_proj.weight"].T
        up = y @ weights[at + "mlp.up_proj.weight"].T
        x = x + (gate / (1 + xp.exp(-gate)) * up) @ weights[at + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight")


def log_probabilities(xp, weights, config, ids, temperature=1.0):
    """`[B, T, V]`, natural logarithms."""
    name = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    if xp is np:  # the same rows are read again and again
        kept = KEPT.setdefault((id(weights), ids.shape, ids.tobytes()), [weights, None])
        if kept[1] is None:
            kept[1] = hidden_states(xp, weights, config, ids)
        hidden = kept[1]
    else:
        hidden = hidden_states(xp, weights, config, ids)
    logits = hidden @ weights[name].T / temperature
    logits = logits - logits.max(-1, keepdims=True)
    return logits - xp.log(xp.exp(logits).sum(-1, keepdims=True))


# text


def student_style(messages, generate, variables, end):
    """What the embedded student's chat_template.jinja writes; special tokens are tuples, all else is text."""
    pieces = [("<s>",)]
    for message in messages:
        if message["role"] == "assistant":
            pieces += [("<answer>",), " ", message["content"], (end,)]
        else:
            pieces += [("<question>",), " ", message["content"]]
    return pieces + ([("<answer>",)] if generate else [])


def teacher_style(messages, generate, variables, end):
    """The same for the embedded teacher's."""
    pieces = []
    for message in messages:
        pieces += [(f"<|{message['role']}|>",), message["content"], ("<|end|>",)]
    return pieces + ([("<|assistant|>",)] if generate else [])


BYTE_OF = {}
for _byte in range(256):
    _printable = 33 <= _byte <= 126 or 161 <= _byte <= 172 or 174 <= _byte <= 255
    BYTE_OF[chr(_byte) if _printable else chr(256 + sum(c >= "\u0100" for c in BYTE_OF))] = _byte


@dataclasses.dataclass
class Tokens:
    """A completion: its ids, the byte at which each ends (never falling), and which do not spell their text."""

    ids: list[int]
    ends: list[int]
    unknown: list[bool]


class Side:
    """A model with its tokenizer and its template.

    Args:
        folder: config.json, model.safetensors, tokenizer.json.
        style: what its template writes.
        stops: strings of its stop tokens, the one that is written first.
        leads: whether the template writes a blank between the generation prompt and an answer.
        takes_system: whether the template writes system messages.
        variables: the template's variables.
        bfloat16: whether the weights are rounded when they are read.
    """

    def __init__(self, folder, style, stops, *, leads, takes_system=True, variables=None, bfloat16=False, markup=False):
        folder = pathlib.Path(folder)
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = read_weights(folder)
        if bfloat16:
            self.weights = {name: rounded_to_bfloat16(x) for name, x in self.weights.items()}
        self.style, self.leads, self.takes_system, self.markup = style, leads, takes_system, markup
        self.variables = variables or {}
        about = json.loads((folder / "tokenizer.json").read_text())
        self.puts_blank = "Metaspace" in json.dumps(about["pre_tokenizer"])
        self.alone = tokenizers.Tokenizer.from_str(json.dumps(about))
        for part in about["pre_tokenizer"]["pretokenizers"]:
            if part["type"] == "Metaspace":
                part["prepend_scheme"] = "never"
        self.inside = tokenizers.Tokenizer.from_str(json.dumps(about))
        self.inside.encode_special_tokens = True
        vocabulary = self.alone.get_vocab(with_added_tokens=True)
        self.id_of = vocabulary
        self.stops = [vocabulary[s] for s in stops]
        special = {t["id"] for t in about["added_tokens"]} | set(self.stops)
        byte_level = not self.puts_blank
        self.surfaces: dict[int, bytes] = {}
        self.fallback: set[int] = set()
        for string, i in vocabulary.items():
            if i in special:
                continue
            if byte_level:
                self.surfaces[i] = bytes(BYTE_OF[c] for c in string)
            elif len(string) == 6 and string.startswith("<0x"):
                self.surfaces[i] = bytes([int(string[3:5], 16)])
                self.fallback.add(i)
            else:
                self.surfaces[i] = string.replace("\u2581", " ").encode()
        self.size = self.config["vocab_size"]

    # prompts

    def prompt_ids(self, prompt, variables=None) -> list[int]:
        """The ids of a plain text, or of messages up to where the answer begins."""
        if isinstance(prompt, str):
            self.alone.encode_special_tokens = not self.markup
            return self.alone.encode(prompt, add_special_tokens=True).ids if prompt else []
        return self.ids_of(self.style(prompt, True, self.variables | (variables or {}), self.end))

    @property
    def end(self) -> str:
        """The string of the stop token that the template writes."""
        return self.alone.id_to_token(self.stops[0])

    def ids_of(self, pieces) -> list[int]:
        """The ids of what a template wrote; neighbouring texts are read as one."""
        ids, text = [], ""
        for piece in [*pieces, None]:
            if isinstance(piece, str):
                text += piece
                continue
            if text:
                ids += self.inside.encode(text, add_special_tokens=False).ids
                text = ""
            if piece is not None:
                ids.append(self.id_of[piece[0]])
        return ids

    def with_context(self, prompt, context: str):
        """A prompt as a teacher is told it."""
        if not context:
            return prompt
        if isinstance(prompt, str):
            return f"{context}\n\n{prompt}"
        bearer = "system" if self.takes_system else "user"
        for k, message in enumerate(prompt):
            if message["role"] == bearer:
                told = dict(message, content=f"{context}\n\n{message['content']}")
                return [*prompt[:k], told, *prompt[k + 1 :]]
        return [{"role": bearer, "content": context}, *prompt]

    # completions

    def blank_before(self, text: str, prompt) -> bool:
        """Whether the first token of a completion holds a blank that is not the completion's."""
        if isinstance(prompt, str):
            return prompt == "" and self.puts_blank and not text.startswith(" ")
        return self.leads

    def completion(self, text: str, prompt) -> Tokens:
        """The tokens of a completion."""
        lead = self.blank_before(text, prompt)
        encoding = self.inside.encode(" " * lead + text, add_special_tokens=False)
        data = (" " * lead + text).encode()
        ends, unknown = [], [i not in self.surfaces for i in encoding.ids]
        if any(unknown):
            ends = [len((" " * lead + text)[:end].encode()) for _, end in encoding.offsets]
        else:
            ends = np.cumsum([len(self.surfaces[i]) for i in encoding.ids]).tolist()
            assert b"".join(self.surfaces[i] for i in encoding.ids) == data
        return Tokens(encoding.ids, [max(0, e - lead) for e in ends], unknown)

    def spelled(self, ids, prompt) -> tuple[str, Tokens]:
        """The text of drawn ids, without the blank before it, and their ends."""
        data = b"".join(self.surfaces[i] for i in ids)
        ends = np.cumsum([len(self.surfaces[i]) for i in ids]).tolist()
        lead = data.startswith(b" ") and self.blank_before("", prompt)
        return data[lead:].decode(), Tokens(list(ids), [max(0, e - lead) for e in ends], [False] * len(ids))

    def write(self, weights, prompt_ids, limit: int) -> tuple[list[int], bool]:
        """Greedy decoding: the ids without a stop token, and whether one ended them."""
        ids = list(prompt_ids)
        for _ in range(limit):
            logp = log_probabilities(np, weights, self.config, np.array([ids]))[0, -1]
            best = int(np.argmax(logp))
            assert np.sort(logp)[-1] - np.sort(logp)[-2] > 1e-4, "two tokens are too near for another precision"
            if best in self.stops:
                return ids[len(prompt_ids) :], True
            ids.append(best)
        return ids[len(prompt_ids) :], False


# vocabularies


@dataclasses.dataclass
class Match:
    """How columns face each other: a 0/1 matrix `[size, columns]` for each side, the first `K` columns matched.

    `event` names for every column the matched column that it gives to under a projection, `K` where there is none,
    `K + 1` where it is left out.
    """

    matrices: list[np.ndarray]
    events: list[np.ndarray]
    columns: list[dict[int, int]]
    matched: int


def match(student: Side, teacher: Side, mask=(), one=False) -> Match:
    """Match two vocabularies by surfaces, stop tokens by role; `one`: the same entries under the same ids."""
    sides = (student, teacher)
    if one:
        pairs = {i: i for i in range(min(s.size for s in sides))}
    else:
        first = []
        for side in sides:
            entry: dict[bytes, int] = {}
            for i in sorted(side.surfaces, key=lambda i: (i in side.fallback, i)):
                entry.setdefault(side.surfaces[i], i)
            first.append(entry)
        pairs = {i: first[1][surface] for surface, i in first[0].items() if surface in first[1]}
    pairs = {i: j for i, j in pairs.items() if i not in student.stops and j not in teacher.stops}
    pairs[student.stops[0]] = teacher.stops[0]
    ordered = list(pairs.items())
    matched = len(ordered)
    column_of = {student.surfaces[i]: k for k, (i, _) in enumerate(ordered) if i in student.surfaces}
    stop_column = matched - 1
    matrices, events, columns = [], [], []
    for side, place in zip(sides, (0, 1)):
        head = [pair[place] for pair in ordered]
        rest = [i for i in range(side.size) if i not in set(head) and i not in side.stops]
        column = {i: k for k, i in enumerate([*head, *rest])}
        column |= {i: stop_column for i in side.stops}
        matrix = np.zeros((side.size, matched + len(rest)))
        for i, k in column.items():
            matrix[i, k] = 1
        event = list(range(matched))
        for i in rest:
            surface, found = side.surfaces.get(i, b""), matched
            for length in range(len(surface), 0, -1):
                if surface[:length] in column_of:
                    found = column_of[surface[:length]]
                    break
            bare = surface.strip()
            kind = "whitespace" if len(surface) > 1 and not bare else ""
            kind = "numerals" if len(bare) > 1 and bare.isdigit() else kind
            event.append(matched + 1 if kind and kind in mask else found)
        matrices.append(matrix)
        events.append(np.array(event))
        columns.append(column)
    return Match(matrices, events, columns, matched)


# rows


@dataclasses.dataclass
class Half:
    """One side of a row: its prompt, its completion with stop token, the group of each completion token (-1: none)."""

    prompt: list[int]
    tokens: list[int]
    group: np.ndarray

    @property
    def ids(self):
        """The whole sequence."""
        return [*self.prompt, *self.tokens]


@dataclasses.dataclass
class Row:
    """A prompt and completion as both sides read it."""

    halves: list[Half]
    groups: int
    unknown: set[int]
    text: str
    stopped: bool

    def sizes(self, place: int) -> np.ndarray:
        """Tokens of every group on a side."""
        group = self.halves[place].group
        return np.array([(group == g).sum() for g in range(self.groups)], int)


def align(ends: list[list[int]]) -> tuple[list[np.ndarray], int]:
    """The group of every token of both sides: cut wherever both end a token."""
    cuts = sorted((set(ends[0]) & set(ends[1])) - {0})
    return [np.searchsorted(cuts, e, "left").astype(int) for e in ends], len(cuts)


def make_row(student, teacher, prompts, tokens, stopped, text, settings, one=False) -> Row:
    """Aligns a completion's tokens and cuts the row to `max_length` of the student's tokens.

    Args:
        student, teacher: the sides.
        prompts: the ids of both prompts.
        tokens: `Tokens` of both.
        stopped: whether a stop token follows.
        text: the completion.
        settings: the run's.
        one: whether the two have one vocabulary, so that the teacher reads the student's tokens.
    """
    if one or settings["groups"] == "positional":
        count = min(len(t.ids) for t in tokens)
        group = [np.array([k if k < count else -1 for k in range(len(t.ids))], int) for t in tokens]
    else:
        group, count = align([t.ends for t in tokens])
    unknown = {int(g) for t, gs in zip(tokens, group) for g, u in zip(gs, t.unknown) if u and g >= 0}
    halves = []
    taught = stopped and not (settings["uld_skip_student_eos"] or settings["uld_skip_teacher_eos"])
    for side, prompt, t, g in zip((student, teacher), prompts, tokens, group):
        ids = [*t.ids, side.stops[0]] if stopped else list(t.ids)
        halves.append(Half(list(prompt), ids, np.append(g, count if taught else -1) if stopped else g))
    count += taught
    ours = halves[0]
    room = max(0, settings["max_length"] - len(ours.prompt))
    lost = [int(g) for g in ours.group[room:] if g >= 0]
    halves[0] = Half(ours.prompt, ours.tokens[:room], ours.group[:room])
    return Row(halves, min([count, *lost]), unknown, text, stopped)


def counted(row: Row, settings) -> np.ndarray:
    """Which groups count."""
    ours, theirs = row.sizes(0), row.sizes(1)
    keep = (ours > 0) & (theirs > 0)
    if settings["groups"] == "one_to_one":
        keep &= (ours == 1) & (theirs == 1)
    for g in row.unknown:
        if g < row.groups:
            keep[g] = False
    if settings["merge"] != "observed" and row.groups and not all(h.prompt for h in row.halves):
        keep[0] = False
    return keep


def weights_of(masks: list[np.ndarray], normalization: str) -> list[np.ndarray]:
    """What every entry weighs."""
    if normalization == "groups":
        total = max(1, sum(int(m.sum()) for m in masks))
        return [m / total for m in masks]
    return [m / max(1, m.sum()) / len(masks) for m in masks]


# losses


@dataclasses.dataclass
class Plan:
    """What a batch asks of one model's log-probabilities, laid out as `[N, V]`."""

    ids: np.ndarray  # [B, T]
    base: np.ndarray  # [G]
    place: np.ndarray  # [G] column of the token that the distribution is over
    inner: np.ndarray  # [G, M] 0/1: which inner tokens belong to a group
    positions: np.ndarray  # [M] where each inner token is predicted
    inner_ids: np.ndarray  # [M]
    whole: np.ndarray  # [G] whether the text has no inner token


def padded(rows: list[list[int]]) -> np.ndarray:
    """Ids `[B, T]`, zeros behind (which nothing before them sees)."""
    width = max(map(len, rows))
    return np.array([[*row, *[0] * (width - len(row))] for row in rows])


def plan_side(rows: list[Row], keeps, place: int, columns: dict[int, int], merge: str) -> Plan:
    """Where the groups that count read one side."""
    ids = padded([row.halves[place].ids for row in rows])
    width = ids.shape[1]
    base, token, inner, whole = [], [], [], []
    for r, (row, keep) in enumerate(zip(rows, keeps)):
        half = row.halves[place]
        for g in np.flatnonzero(keep):
            at = [len(half.prompt) + int(k) for k in np.flatnonzero(half.group == g)]
            first, last = at[0], at[-1]
            if merge == "chain":
                read, stands, others = last - 1, last, [(k - 1, k) for k in at[:-1]]
            elif merge == "observed":
                read, stands, others = first, first, [(k, k) for k in at[1:]]
            else:
                read, stands, others = first - 1, first, [(k - 1, k) for k in at[1:]]
            base.append(r * width + read)
            token.append(columns[half.ids[stands]])
            whole.append(not others if merge == "boundary" else True)
            inner += [(len(base) - 1, r * width + p, half.ids[k]) for p, k in others]
    matrix = np.zeros((len(base), len(inner)))
    for m, (g, _, _) in enumerate(inner):
        matrix[g, m] = 1
    ints = [np.array(x, int) for x in (base, token, [i[1] for i in inner], [i[2] for i in inner])]
    return Plan(ids, ints[0], ints[1], matrix, ints[2], ints[3], np.array(whole, bool))


def merged(xp, logp, plan: Plan, matrix, merge: str):
    """`p [G, columns]`, what the merge left out `[G]`, and the probability of the text's other tokens `[G]`."""
    flat = logp.reshape(-1, logp.shape[-1])
    p = xp.exp(flat[plan.base]) @ matrix
    share = xp.exp(plan.inner @ flat[plan.positions, plan.inner_ids])
    if merge == "boundary":
        return p, 0 * share, share
    return p * share[:, None], 1 - share, 0 * share + 1


def safe_log(xp, p):
    """A logarithm whose gradient at zero is zero."""
    return xp.log(xp.where(p > SMALLEST, p, 1.0)) + xp.where(p > SMALLEST, 0.0, math.log(SMALLEST))


def divergence(xp, p, q, beta: float):
    """`D_β` of the student's `p` and the teacher's `q`, summed over the last axis."""

    def kl(a, b):
        return (a * (safe_log(xp, a) - safe_log(xp, b))).sum(-1)

    if beta == 0:
        return kl(q, p)
    if beta == 1:
        return kl(p, q)
    m = (1 - beta) * p + beta * q
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def sorted_distance(xp, p, q, top_k: int):
    """L1 of the sorted values, and the mass beyond the largest `top_k`."""
    # What is constant is sorted here: XLA would take seconds to do so while it compiles.
    p, q = ((np if isinstance(x, np.ndarray) else xp).sort(x, axis=-1)[:, ::-1] for x in (p, q))
    tail = 0.0
    if top_k:
        tail = p[:, top_k:].sum(-1) + q[:, top_k:].sum(-1)
        p, q = p[:, :top_k], q[:, :top_k]
    size = max(p.shape[1], q.shape[1])
    p, q = (xp.pad(x, ((0, 0), (0, size - x.shape[1]))) for x in (p, q))
    return xp.abs(p - q).sum(-1), tail


def compare(xp, sides, plans, matching: Match, settings, teacher_size: int):
    """The comparison of every group, `[G]`, and its parts."""
    (p, p_missing, p_rest), (q, q_missing, q_rest) = sides
    kind, beta, k = settings["compare"], settings["beta"], matching.matched
    every = np.arange(len(p))

    if kind == "sorted":
        value, tail = sorted_distance(xp, p, q, settings["uld_top_k"])
        return value, {"tail_bound": tail} if settings["uld_top_k"] else {}
    if kind == "hybrid":
        near = divergence(xp, xp.maximum(p[:, :k], 1e-8), xp.maximum(q[:, :k], 1e-8), beta)
        far, tail = 0.0 * near, 0.0 * near
        if p.shape[1] > k and q.shape[1] > k:
            far, tail = sorted_distance(xp, p[:, k:], q[:, k:], settings["uld_top_k"])
        ours, theirs = settings["uld_hybrid_matched_weight"], settings["uld_hybrid_unmatched_weight"]
        if ours is None:
            ours, theirs = k / teacher_size, 1 - k / teacher_size
        parts = {"matched": near, "unmatched": far}
        return ours * near + theirs * far, parts | ({"tail_bound": tail} if settings["uld_top_k"] else {})
    if kind == "shared":
        p, q = (x[:, :k] / x[:, :k].sum(-1, keepdims=True) for x in (p, q))
        return divergence(xp, p, q, beta), {}
    if kind == "shared_rest":
        p, q = (
            xp.concatenate([x[:, :k], (x[:, k:].sum(-1) + missing)[:, None]], 1)
            for x, missing in ((p, p_missing), (q, q_missing))
        )
        return divergence(xp, p, q, beta), {}
    text_p, text_q = p[every, plans[0].place] * p_rest, q[every, plans[1].place] * q_rest
    if kind == "alm":

        def coin(x):
            x = x ** (1 / settings["alm_temperature"])
            return xp.stack([x, 1 - x], -1)

        return divergence(xp, coin(text_p), coin(text_q), beta), {}
    if kind == "reverse_kl":
        return safe_log(xp, text_p) - safe_log(xp, text_q), {}

    routes = [np.eye(k + 2)[event] for event in matching.events]
    events = []
    for x, missing, route in ((p, p_missing, routes[0]), (q, q_missing, routes[1])):
        events.append(x @ route + missing[:, None] * np.eye(k + 2)[k])
    parts = {"student_unmatched": p[:, k:].sum(-1), "teacher_unmatched": q[:, k:].sum(-1)}
    if kind == "events":
        apart = np.ones(len(p), bool)
        for place in (0, 1) if beta == 1 else (0,):
            members = np.bincount(matching.events[place], minlength=k + 2)
            members[k + 1] = 2
            apart &= ~(plans[place].whole & (members[matching.events[place][plans[place].place]] == 1))
        taken = []
        for x, text, place in ((events[0], text_p, 0), (events[1], text_q, 1)):
            text = text * apart
            at = np.eye(k + 2)[matching.events[place][plans[place].place]]
            taken.append(xp.concatenate([text[:, None], x - at * text[:, None]], 1))
        events = taken
    rest = all((event == k).any() for event in matching.events)
    events = [x[:, : None if rest else -1] for x in (x[:, :-1] for x in events)]
    events = [x / x.sum(-1, keepdims=True) for x in events]
    return divergence(xp, *events, beta), parts


@dataclasses.dataclass
class Batch:
    """Everything that a loss needs beside the student's weights."""

    settings: dict
    rows: list[Row]
    group_weight: np.ndarray
    plans: list[Plan]
    matching: Match
    teacher_sides: tuple
    label_rows: np.ndarray
    label_ids: np.ndarray
    label_weight: np.ndarray
    config: dict
    teacher_size: int


def make_batch(student: Side, teacher: Side, rows: list[Row], settings: dict, one=False) -> Batch:
    """Rows, with all that the teacher says about them."""
    matching = match(student, teacher, settings["projection_mask"], one)
    keeps = [counted(row, settings) for row in rows]
    weight = np.concatenate([w[k] for w, k in zip(weights_of(keeps, settings["normalization"]), keeps)])
    plans = [plan_side(rows, keeps, place, matching.columns[place], settings["merge"]) for place in (0, 1)]
    logp = log_probabilities(np, teacher.weights, teacher.config, plans[1].ids, settings["teacher_temperature"])
    said = merged(np, logp, plans[1], matching.matrices[1], settings["merge"])
    width, at, labels, masks = plans[0].ids.shape[1], [], [], []
    for r, row in enumerate(rows):
        ids, begin = row.halves[0].ids, max(1, len(row.halves[0].prompt))
        at += [r * width + t - 1 for t in range(begin, len(ids))]
        labels += ids[begin:]
        masks.append(np.ones(max(0, len(ids) - begin)))
    label_weight = np.concatenate(weights_of(masks, settings["normalization"]))
    return Batch(
        settings, rows, weight, plans, matching, said, np.array(at), np.array(labels), label_weight, student.config,
        teacher.size,
    )  # fmt: skip


def loss_of(xp, weights, batch: Batch):
    """The loss, and its parts by the names that they are logged under."""
    s = batch.settings
    total, parts = 0.0, {}
    plain = log_probabilities(xp, weights, batch.config, batch.plans[0].ids)
    if s["uld_distillation_weight"]:
        logp = plain
        if s["student_temperature"] != 1:
            logp = log_probabilities(xp, weights, batch.config, batch.plans[0].ids, s["student_temperature"])
        ours = merged(xp, logp, batch.plans[0], batch.matching.matrices[0], s["merge"])
        sides = ours, batch.teacher_sides
        value, found = compare(xp, sides, batch.plans, batch.matching, s, batch.teacher_size)
        total = total + s["uld_distillation_weight"] * (batch.group_weight * value).sum()
        parts |= {name: (batch.group_weight * x).sum() for name, x in found.items()}
    if s["uld_crossentropy_weight"]:
        value, accuracy = cross_entropy(xp, plain, batch.label_rows, batch.label_ids, batch.label_weight)
        total = total + s["uld_crossentropy_weight"] * value
        parts |= {"cross_entropy": value, "token_accuracy": accuracy}
    return total, parts


def cross_entropy(xp, logp, rows, labels, weight):
    """The weighted mean over labels, and the weighted share of those that are the likeliest."""
    flat = logp.reshape(-1, logp.shape[-1])[rows]
    right = (flat.argmax(-1) == labels) * weight
    return -(flat[np.arange(len(labels)), labels] * weight).sum(), right.sum()


DEFAULTS = {
    "merge": None, "groups": None, "compare": None, "loss": None, "beta": 0.5, "normalization": "groups",
    "uld_hybrid_matched_weight": None, "uld_hybrid_unmatched_weight": None, "uld_crossentropy_weight": 0.0,
    "uld_distillation_weight": 1.0, "uld_student_temperature": 1.0, "uld_teacher_temperature": 1.0,
    "uld_skip_student_eos": False, "uld_skip_teacher_eos": False, "uld_top_k": 0, "projection_mask": (),
    "alm_temperature": 100.0, "temperature": 0.9, "use_uld_loss": False, "use_extended_uld": True,
    "uld_use_hybrid_loss": False, "uld_token_merge_strategy": "chain", "max_length": 1024,
}  # fmt: skip
POINTS = {
    "gold": ("chain", "all", "hybrid"),
    "uld": ("chain", "positional", "sorted"),
    "uld_extended": ("chain", "all", "sorted"),
    "gkd": ("chain", "all", "shared"),
    "strict": ("boundary", "one_to_one", "shared"),
    "projected": ("boundary", "all", "projected"),
    "events": ("boundary", "all", "events"),
    "alm": ("boundary", "all", "alm"),
    "reverse_kl": ("boundary", "all", "reverse_kl"),
}


def loss_settings(given: dict, one=False) -> dict:
    """What the flags that were given come to: the point of the grid and its options."""
    s = DEFAULTS | {name: value for name, value in given.items() if name in DEFAULTS}
    name = s["loss"]
    if name is None and s["use_uld_loss"]:
        name = "gold" if s["uld_use_hybrid_loss"] else "uld_extended" if s["use_extended_uld"] else "uld"
    name = name or ("gkd" if one else "gold")
    merge, groups, kind = POINTS[name]
    if s["use_uld_loss"] and s["loss"] is None and not s["use_extended_uld"]:
        groups = "positional"
    if s["uld_token_merge_strategy"] == "observed" and name in ("gold", "uld", "uld_extended"):
        merge = "observed"
    s |= {"merge": s["merge"] or merge, "groups": s["groups"] or groups, "compare": s["compare"] or kind}
    gkd = name == "gkd"
    s["student_temperature"] = s["temperature"] if gkd else s["uld_student_temperature"]
    s["teacher_temperature"] = s["temperature"] if gkd else s["uld_teacher_temperature"]
    return s


# examples


@dataclasses.dataclass
class Example:
    """A row of a data set."""

    prompt: str | list
    completion: str | None
    context: str | None = None
    variables: dict | None = None
    messages: list | None = None


def read_example(row: dict, text_column="text") -> Example:
    """A row in whichever of the forms."""
    context, variables = row.get("teacher_context"), row.get("chat_template_kwargs")
    if row.get("messages"):
        messages = row["messages"]
        return Example(messages[:-1], messages[-1]["content"], context, variables, messages)
    if row.get("prompt") is not None:
        prompt, completion = row["prompt"], row.get("completion")
        if isinstance(completion, list):
            asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            whole = [*asked, *completion]
            return Example(whole[:-1], whole[-1]["content"], context, variables, whole)
        whole = None if isinstance(prompt, str) else [*prompt, {"role": "assistant", "content": completion}]
        return Example(prompt, completion, context, variables, whole)
    return Example("", row[text_column], context)


class Pair:
    """Student and teacher, and how they read examples under a run's settings."""

    def __init__(self, student: Side, teacher: Side, given: dict | None = None):
        self.student, self.teacher = student, teacher
        self.given = given or {}
        self.one = student.id_of == teacher.id_of
        self.settings = loss_settings(self.given, self.one)

    def told(self, example: Example):
        """The prompt as the teacher is told it."""
        contexts = [c for c in (self.given.get("teacher_context"), example.context) if c]
        return self.teacher.with_context(example.prompt, "\n\n".join(contexts))

    def prompts(self, example: Example):
        """Both prompts' ids."""
        return (
            self.student.prompt_ids(example.prompt, example.variables),
            self.teacher.prompt_ids(self.told(example), example.variables),
        )

    def row(self, example: Example, text=None, tokens: Tokens | None = None, stopped=True) -> Row:
        """A row of the data, or of a text that somebody wrote (`tokens`: the ids that the student drew)."""
        text = example.completion if text is None else text
        ours = tokens or self.student.completion(text, example.prompt)
        theirs = ours if self.one else self.teacher.completion(text, self.told(example))
        return make_row(
            self.student, self.teacher, self.prompts(example), (ours, theirs), stopped, text, self.settings, self.one
        )

    def by_student(self, example: Example, weights, limit: int) -> Row:
        """A row that the student writes, always with the likeliest token."""
        ids, stopped = self.student.write(weights, self.prompts(example)[0], limit)
        text, tokens = self.student.spelled(ids, example.prompt)
        return self.row(example, text, tokens, stopped)

    def by_teacher(self, example: Example, limit: int) -> Row:
        """A row that the teacher writes."""
        ids, stopped = self.teacher.write(self.teacher.weights, self.prompts(example)[1], limit)
        return self.row(example, self.teacher.spelled(ids, self.told(example))[0], None, stopped)

    def batch(self, rows: list[Row]) -> Batch:
        """Rows with what the teacher says about them."""
        return make_batch(self.student, self.teacher, rows, self.settings, self.one)

    def evaluate(self, examples: list[Example], weights=None) -> dict[str, float]:
        """`eval_…` as the command logs them."""
        weights = self.student.weights if weights is None else weights
        total, parts = loss_of(np, weights, self.batch([self.row(e) for e in examples]))
        found = {f"eval_{name}": float(x) for name, x in ({"loss": total} | parts).items()}
        return found | {"eval_bits_per_byte": bits_per_byte(self.student, examples, weights)}


def bits_per_byte(side: Side, examples: list[Example], weights=None) -> float:
    """What completions cost a model, without stop tokens; a token with nothing before it counts for nothing."""
    bits = size = 0.0
    for e in examples:
        found = spent(side, side.prompt_ids(e.prompt, e.variables), side.completion(e.completion, e.prompt), weights)
        bits, size = bits + found[0], size + found[1]
    return bits / size


def spent(side: Side, prompt: list[int], tokens: Tokens, weights=None) -> tuple[float, int]:
    """Bits and bytes of a completion's tokens."""
    ids = [*prompt, *tokens.ids]
    logp = log_probabilities(np, side.weights if weights is None else weights, side.config, np.array([ids]))[0]
    begin = max(1, len(prompt))
    bits = -sum(logp[t - 1, ids[t]] for t in range(begin, len(ids))) / math.log(2)
    skipped = tokens.ends[0] if not prompt else 0
    return bits, tokens.ends[-1] - skipped


# updates


def row_order(rows: int, per_step: int, seed: int, step: int) -> list[int]:
    """The rows of an update: shuffled anew in every epoch, the last update of one may have fewer."""
    each = -(-rows // per_step)
    epoch, k = divmod(step, each)
    order = np.random.default_rng((seed, epoch)).permutation(rows)
    return order[k * per_step : (k + 1) * per_step].tolist()


def learning_rate(step: int, total: int, *, peak, kind="linear", options=None, warmup_ratio=0.0, warmup_steps=0):
    """The learning rate of an update, the first of which is number 0."""
    options = options or {}
    warmup = int(warmup_steps) if warmup_steps >= 1 else math.ceil(total * (warmup_steps or warmup_ratio))
    warmup = 0 if kind == "constant" else warmup
    if step < warmup:
        return peak * step / warmup
    if kind in ("constant", "constant_with_warmup"):
        return peak
    left = max(1, total - warmup)
    if kind == "linear":
        return peak * (total - step) / left
    wave = 0.5 * (1 + math.cos(2 * math.pi * options.get("num_cycles", 0.5) * (step - warmup) / left))
    if kind == "cosine":
        return peak * max(0.0, wave)
    floor = options["min_lr"] / peak if "min_lr" in options else options.get("min_lr_rate", 0.1)
    return peak * (wave * (1 - floor) + floor)


class AdamW:
    """PyTorch's, with clipping by the global norm before it."""

    def __init__(self, *, beta1=0.9, beta2=0.999, epsilon=1e-8, decay=0.0, limit=1.0):
        self.beta1, self.beta2, self.epsilon, self.decay, self.limit = beta1, beta2, epsilon, decay, limit
        self.count, self.m, self.v = 0, {}, {}

    def update(self, weights: dict, gradient: dict, rate: float) -> tuple[dict, float]:
        """New weights, and the gradient's norm before it is clipped."""
        self.count += 1
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradient.values()))
        factor = min(1.0, self.limit / norm) if self.limit and norm else 1.0
        new = {}
        for name, w in weights.items():
            g = gradient[name] * factor
            self.m[name] = self.beta1 * self.m.get(name, 0.0) + (1 - self.beta1) * g
            self.v[name] = self.beta2 * self.v.get(name, 0.0) + (1 - self.beta2) * g * g
            m = self.m[name] / (1 - self.beta1**self.count)
            v = self.v[name] / (1 - self.beta2**self.count)
            decay = 0.0 if "norm" in name or "bias" in name else self.decay
            new[name] = w - rate * (m / (np.sqrt(v) + self.epsilon) + decay * w)
        return new, norm


def gradient_of(loss, weights: dict) -> dict:
    """The gradient of `loss(xp, weights)`, by JAX in float64."""
    import jax
    import jax.numpy as jnp

    with jax.enable_x64(True):
        found = jax.jit(jax.grad(lambda w: loss(jnp, w)))({name: jnp.asarray(w) for name, w in weights.items()})
        return {name: np.asarray(g) for name, g in found.items()}


# fine-tuning


def sft_row(side: Side, example: Example, learned: str, max_length: int | None) -> tuple[list[int], np.ndarray]:
    """The ids of a row and which of them are learned: of its `completion`, every `assistant` turn, or `all`."""
    if learned != "completion" and example.messages:
        ids, mark, answer = [], [], False
        text: list = []
        for piece in [*side.style(example.messages, False, side.variables | (example.variables or {}), side.end), None]:
            if isinstance(piece, str):
                text.append(piece)
                continue
            new = side.ids_of(text)
            ids, mark, text = ids + new, mark + [answer] * len(new), []
            if piece is not None:
                ends = piece[0] == side.end
                ids, mark = [*ids, side.id_of[piece[0]]], [*mark, answer and ends]
                answer = piece[0] in ("<answer>", "<|assistant|>")
        mark = np.array(mark)
    else:
        prompt = side.prompt_ids(example.prompt, example.variables)
        ids = [*prompt, *side.completion(example.completion, example.prompt).ids, side.stops[0]]
        mark = np.arange(len(ids)) >= len(prompt)
    mark = np.ones(len(ids), bool) if learned == "all" else mark
    return ids[:max_length], mark[:max_length]


def sft_loss(xp, weights, config, rows):
    """Mean cross-entropy over what is learned of rows from `sft_row`, and the share that is the likeliest."""
    ids = padded([row for row, _ in rows])
    at, labels = [], []
    for r, (row, mark) in enumerate(rows):
        learned = [t for t in range(1, len(row)) if mark[t]]
        at += [r * ids.shape[1] + t - 1 for t in learned]
        labels += [row[t] for t in learned]
    weight = np.full(len(labels), 1 / len(labels))
    return cross_entropy(xp, log_probabilities(xp, weights, config, ids), np.array(at), np.array(labels), weight)
