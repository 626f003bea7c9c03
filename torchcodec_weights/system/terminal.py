"""Escapes text from files for a terminal."""


def printable(text: str) -> str:
    r"""Text with every character escaped that is not printable (`str.isprintable`).

    Names of tensors and files may contain control characters, which terminals execute as commands,
    line breaks, which forge lines, and Unicode's bidirectional overrides, which reorder text. They
    become Python's escapes: "\x1b", "\n", "\u202e".

    Args:
        text: one line.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
