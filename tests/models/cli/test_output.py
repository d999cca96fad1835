"""Escaping of untrusted text, and one-line errors."""

import os
import sys
import unicodedata

import pytest

from pallas_attn_models.cli.output import one_line, printable, quiet_failures

TEXTS = {
    "no-break and thin spaces": "10\u202f000 \u20ac\u00a0! a\u2009b\u200a\u2007c\u2060d\ufeff",
    "joiners": "\U0001f469\u200d\U0001f52c \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u0915\u094d\u200d\u0937",
    "soft hyphens and wide spaces": "Donau\u00addampf \u6771\u4eac\u3000\u00a7",
    "flags, tags, selectors": "\u2764\ufe0f \U0001f1eb\U0001f1f7 "
    "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "emoji of any age": "".join(chr(c) for c in range(0x1FA70, 0x1FB00)),
    "marks of direction": "\u200e\u200f\u061c abc \u05d0",
    "separators, private use": "a\u2028b\u2029c \ue0b0 \U000f0001",
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_is_printed_as_it_is(name):
    assert printable(TEXTS[name]) == TEXTS[name]


def test_only_control_characters_are_escaped():
    acts = {c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in ("Cc", "Cs")}
    acts |= {c for c in map(chr, range(0x3000)) if unicodedata.bidirectional(c) in OVERRIDES}
    for c in map(chr, range(sys.maxunicode + 1)):
        shown = printable(c)
        assert (shown != c) == (c in acts), ascii(c)
        assert shown.isascii() or shown == c


OVERRIDES = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def test_escapes_can_be_read_and_some_are_kept():
    assert printable("a\x1b[2J\x07\u202e\x9b\x7f\ud800\n\t") == "a\\x1b[2J\\x07\\u202e\\x9b\\x7f\\ud800\\n\\t"
    assert printable("a\n\t\r", keep="\n\t") == "a\n\t\\r"


def test_an_error_is_one_line_of_bounded_length():
    assert one_line("a\n b\r\n\tc\x1b[1m\u2028d") == "a b c\\x1b[1m d"
    long = one_line("x" * 10**6)
    assert len(long) < 1100
    assert "1000000 characters" in long


def test_stderr_of_a_library_is_dropped_if_it_fails_and_kept_if_not(capfd):
    with quiet_failures():
        os.write(2, b"kept\n")

    def fail():
        with quiet_failures():
            os.write(2, b"dropped\n")
            raise ValueError("it fails")

    with pytest.raises(ValueError, match="it fails"):
        fail()
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "kept\nafter\n"
