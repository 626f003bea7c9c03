"""The command line, `torchcodec-weights`: one module for each of its commands."""

from collections.abc import Sequence

from torchcodec_weights.cli.arguments import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: its arguments, by default the process's own.

    Returns:
        The exit status: 0 on success, 1 if a command failed, 2 for bad input, 130 after Ctrl-C.

    Raises:
        SystemExit: with status 2, if the arguments cannot be parsed.
    """
    arguments = parse(argv)
    from torchcodec_weights.cli.run import run  # whose imports take seconds

    return run(arguments)
