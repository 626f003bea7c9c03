"""The package's `__init__`, which the program `torchcodec-weights` runs when a command needs it."""

import sys


def import_package() -> None:
    """Run the package's `__init__`, if that has not begun yet.

    It imports PyTorch and torchao, which takes seconds. Where the package was imported as usual it
    ran before everything else. The program makes the package's module without it
    (torchcodec_weights_cli.py); then this is to be called before modules are imported that take
    names from the package, or that expect what it registers with PyTorch.
    """
    package = sys.modules[__name__.partition(".")[0]]
    if not hasattr(package, "torch"):  # its first statement imports that
        assert package.__spec__ is not None
        assert package.__spec__.loader is not None
        package.__spec__.loader.exec_module(package)
