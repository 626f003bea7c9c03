"""The command line, `torchcodec-weights`: one module for each of its commands."""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NoReturn

from safetensors import SafetensorError

from torchcodec_weights.cli import codecs, compress, decompress, evaluate, inspect, sweep, verify
from torchcodec_weights.cli.messages import escaped_messages, show
from torchcodec_weights.errors import CodecError
from torchcodec_weights.policy import allowed_codecs
from torchcodec_weights.system.terminal import printable

_COMMANDS = (compress, decompress, inspect, verify, evaluate, sweep, codecs)
_FAILED, _BAD_INPUT, _INTERRUPTED = 1, 2, 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: its arguments, by default the process's own.

    Returns:
        The exit status: 0 on success, 1 if a command failed, 2 for bad input, 130 after Ctrl-C.

    Raises:
        SystemExit: with status 2, if the arguments cannot be parsed.
    """
    parser = _Parser(
        prog="torchcodec-weights",
        description="Neural-network weights as codec bitstreams.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    args = parser.parse_args(argv)
    allowed = getattr(args, "allow_codecs", None)
    with escaped_messages(), ExitStack() as stack:
        try:
            if allowed is not None:
                stack.enter_context(allowed_codecs([n.strip() for n in allowed.split(",")]))
            args.run(args)
        except (CodecError, SafetensorError, OSError, ModuleNotFoundError) as error:
            return _report(error, _FAILED)
        except ValueError as error:
            return _report(error, _BAD_INPUT)
        except KeyboardInterrupt:
            return _report("interrupted", _INTERRUPTED)
    return 0


def _report(error: Exception | str, status: int) -> int:
    show("error", error)
    return status
