"""The program `torchcodec-weights`, which reads its arguments before it imports the package.

The package imports PyTorch and torchao, which takes seconds; `--help` and errors in arguments need
neither. So the package's module is created here, and its `__init__` is run when the arguments have
been read. What reads them, `torchcodec_weights.cli.arguments`, imports neither.

CMake installs this file, as it does torchcodec_weights_autoload.py.
"""

import sys
from importlib.util import find_spec, module_from_spec


def main() -> int:
    """Run a command with the arguments of this process; returns the exit status."""
    spec = find_spec("torchcodec_weights")
    assert spec is not None
    assert spec.loader is not None
    package = module_from_spec(spec)
    sys.modules[spec.name] = package
    from torchcodec_weights.cli.arguments import parse

    arguments = parse()
    spec.loader.exec_module(package)
    from torchcodec_weights.cli.run import run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
