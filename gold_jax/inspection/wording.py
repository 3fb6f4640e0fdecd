"""What the terminal and the page call the numbers."""

#: Attributes of `Unmatched`.
UNMATCHED = {
    "rows": "all",
    "routed": "  give to their longest matched prefix",
    "whitespace": "    of these, runs of white space",
    "numerals": "    of these, numerals of several digits",
    "lost": "  give to none (such as special tokens)",
}
#: Kinds of examples of `Unmatched`.
KINDS = {"whitespace": "white space", "numerals": "numerals", "others": "others"}
#: Attributes of `Mass`.
MASS = {
    "strings": "on entries matched by strings",
    "surfaces": "on entries matched by surfaces",
    "projected": "the same after projection",
    "routed": "brought in by projection",
}
#: Parts of the routed mass.
ROUTED = {
    "whitespace": "  the part of runs of white space",
    "numerals": "  the part of numerals of several digits",
}
#: What a bar of the whole mass is made of.
STACK = {
    "matched": "matched by surfaces",
    "routed": "to a prefix: other entries",
    "whitespace": "to a prefix: runs of white space",
    "numerals": "to a prefix: numerals of several digits",
    "lost": "to none",
}
