"""Runs a command, and makes errors an exit status."""

import argparse
from contextlib import ExitStack
from importlib import import_module

from safetensors import SafetensorError

from torchcodec_weights.cli.messages import escaped_messages, show
from torchcodec_weights.errors import CodecError
from torchcodec_weights.policy import allowed_codecs
from torchcodec_weights.system.package import import_package

_WITHOUT_PACKAGE = ("inspect",)  # which imports it where it needs it
_FAILED, _BAD_INPUT, _INTERRUPTED = 1, 2, 130


def run(args: argparse.Namespace) -> int:
    """Run a command; returns the exit status, as `cli.main` does.

    Args:
        args: what `cli.arguments.parse` returned.
    """
    allowed = getattr(args, "allow_codecs", None)
    with escaped_messages(), ExitStack() as stack:
        try:
            if args.module not in _WITHOUT_PACKAGE:
                import_package()
            command = import_module(f"torchcodec_weights.cli.{args.module}")
            if allowed is not None:
                stack.enter_context(allowed_codecs([n.strip() for n in allowed.split(",")]))
            command.run(args)
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
