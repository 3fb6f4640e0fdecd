"""How bytes and numbers are written for people: white space made visible, broken characters as hex."""

import itertools
import math
import re
import unicodedata

_MARKS = {" ": "·", "\n": "↵", "\t": "⇥"}
_UNSEEN = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs")
_LONG_RUN = re.compile(r"([·⇥↵])\1{5,}")


def marked(data: bytes) -> list[tuple[str, bool]]:
    """Bytes as pieces of visible text, each with whether it stands for something that cannot be seen.

    Blanks and line ends become signs, other invisible characters `⟨U+200D⟩`, and bytes that are no whole character of
    UTF-8 `⟨F0 9F⟩`.

    >>> marked(b"\\xf0\\x9f a")
    [('⟨F0 9F⟩', True), ('·', True), ('a', False)]
    """
    pieces = []
    # Escaped so, each byte that is no part of a character becomes a surrogate, which UTF-8 cannot hold itself.
    for kind, run in itertools.groupby(data.decode("utf-8", "surrogateescape"), _kind):
        text = "".join(run)
        if kind == "broken":
            text = f"⟨{text.encode('utf-8', 'surrogateescape').hex(' ').upper()}⟩"
        elif kind == "unseen":
            text = "".join(_MARKS.get(c) or f"⟨U+{ord(c):04X}⟩" for c in text)
        elif unicodedata.category(text[0]).startswith("M"):
            text = "◌" + text  # a circle to stand on, or it would be drawn over the character before it
        pieces.append((text, kind != "seen"))
    return pieces


def _kind(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return "broken"
    is_variation = "\ufe00" <= character <= "\ufe0f"
    return "unseen" if is_variation or unicodedata.category(character) in _UNSEEN else "seen"


def visible(data: bytes) -> str:
    """Bytes as visible text, see `marked`."""
    return "".join(piece for piece, _ in marked(data))


def brief(data: bytes, limit: int = 24) -> str:
    """Bytes as visible text of at most `limit` characters; a long run of one white-space character is counted: `·×31`."""
    text = _LONG_RUN.sub(lambda run: f"{run[1]}×{len(run[0])}", visible(data))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction as `98.6%`; a dash where there is none. Only 1 is `100%`, and only 0 is `0%`."""
    if math.isnan(fraction):
        return "–"
    if fraction in (0, 1):
        return f"{fraction:.0%}"
    least = 10.0 ** -(digits + 2)
    if fraction < least / 2:
        return f"<{least:.{digits}%}"
    return f">{1 - least:.{digits}%}" if fraction > 1 - least / 2 else f"{fraction:.{digits}%}"
