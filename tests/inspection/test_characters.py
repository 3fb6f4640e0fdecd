import pytest

from gold_jax.inspection.characters import brief, marked, percent, visible


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b" the", "·the"),
        (b"a\n\tb", "a↵⇥b"),
        ("größer".encode(), "größer"),
        ("世界 😀".encode(), "世界·😀"),
        ("😀".encode()[:2], "⟨F0 9F⟩"),
        ("😀".encode()[2:] + b"!", "⟨98 80⟩!"),
        (b" \xd0", "·⟨D0⟩"),
        (b"\r\x1b[31m", "⟨U+000D⟩⟨U+001B⟩[31m"),
        ("a\u200db\u00a0".encode(), "a⟨U+200D⟩b⟨U+00A0⟩"),
        ("\u202e".encode(), "⟨U+202E⟩"),
        ("\u0301".encode(), "◌\u0301"),
        ("⟨F0⟩".encode(), "⟨F0⟩"),
        (b"", ""),
    ],
)
def test_everything_in_a_token_can_be_seen(data, shown):
    assert visible(data) == shown


def test_signs_are_told_from_characters():
    assert marked("· \xb7".encode()) == [("·", False), ("·", True), ("·", False)]
    assert marked(b"a\xff\n") == [("a", False), ("⟨FF⟩", True), ("↵", True)]


def test_long_runs_of_blanks_are_counted_and_long_entries_cut():
    assert brief(b"\n" + b" " * 31) == "↵·×31"
    assert brief(b"  x") == "··x"
    assert brief(b"0" * 12) == "0" * 12
    assert brief(b"a" * 50, limit=10) == "aaaaaaaaa…"


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (0.0, "0%"),
        (1.0, "100%"),
        (0.5, "50.0%"),
        (0.00001, "<0.1%"),
        (0.99999, ">99.9%"),
        (float("nan"), "–"),
    ],
)
def test_only_the_whole_is_a_hundred_percent(share, shown):
    assert percent(share) == shown
