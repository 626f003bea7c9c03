"""What is shown on a terminal commands it nothing."""

import pytest

from torchcodec_weights.system.terminal import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0 größe 重み …", "model.layers.0 größe 重み …"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\x9b2J\x00\x7f", "\\x9b2J\\x00\\x7f"),
        ("a\nb\rc\td", "a\\nb\\rc\\td"),
        ("\u202eabc\u2066\u200b\u2028", "\\u202eabc\\u2066\\u200b\\u2028"),
        ("\udcff", "\\udcff"),
        ("\U000e0041", "\\U000e0041"),
        ("C:\\x", "C:\\x"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown
