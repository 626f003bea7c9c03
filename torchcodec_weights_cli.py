"""The program `torchcodec-weights`, which imports the package where a command needs it.

The package imports PyTorch and torchao, which takes seconds; `--help`, errors in arguments, and
`inspect` of safetensors files need neither. So the package's module is created here without running
its `__init__`, which `system/package.py` does. Nothing that is imported here imports PyTorch.

CMake installs this file, as it does torchcodec_weights_autoload.py.
"""

import sys
from importlib.util import find_spec, module_from_spec


def main() -> int:
    """Run a command with the arguments of this process; returns the exit status."""
    spec = find_spec("torchcodec_weights")
    assert spec is not None
    package = module_from_spec(spec)
    sys.modules[spec.name] = package
    from torchcodec_weights.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
