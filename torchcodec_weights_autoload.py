"""Makes files of torchcodec_weights open in programs that do not import it.

PyTorch calls `register` at `import torch`, by the entry point in the group `torch.backends`, unless
TORCH_DEVICE_BACKEND_AUTOLOAD is 0. So this runs in every program that imports torch. It imports
nothing of the package and raises nothing. The package, whose import takes seconds, is imported by
the first file that names one of its classes:

- `torch.load(weights_only=True)` finds the classes among those that may be unpickled;
- torchao, and so transformers, finds the configuration that `config.json` names, and the tensors of
  safetensors files.

The package has further actions follow imports by `after_import`.

Nothing else is allowed that was not before. `torch.serialization.clear_safe_globals` takes the
classes back.

The private names of PyTorch and torchao that this needs stand here, as `third_party.py` is a part
of the package. tests/test_third_party_parts.py has a test for each. Where one is missing, files
open after `import torchcodec_weights`, as without this module.

CMake installs this file, into editable environments too: where the module of an entry point is
missing, `import torch` fails.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import Any

# The classes that files name, and the modules that they were pickled under.
_CLASSES = {
    "CodecTensor": "torchcodec_weights.tensor",
    "CodecWeightOnlyConfig": "torchcodec_weights.config",
}


def register() -> None:
    """Register with PyTorch, and with torchao once it is imported. Twice is as good as once."""
    for step in (_register_with_torch_load, _register_with_torchao):
        with suppress(Exception):  # any would end `import torch`
            step()


class _Class:
    """A class of the package, imported when it is used."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = f"{_CLASSES[name]}.{name}"
        self.loaded: type | None = None

    def load(self) -> type:
        """The class.

        Raises:
            RuntimeError: the package cannot be imported. torchao would pass over an ImportError,
                and PyTorch would add to an UnpicklingError the advice to load without checks.
        """
        if self.loaded is None:
            try:
                self.loaded = getattr(import_module(_CLASSES[self.name]), self.name)
            except Exception as error:
                raise RuntimeError(
                    f"{self.path} is needed to open this file, but torchcodec_weights cannot be "
                    f"imported: {type(error).__name__}: {error}"
                ) from error
        assert self.loaded is not None
        return self.loaded


_classes = {name: _Class(name) for name in _CLASSES}


class _Allowed(dict[str, Any]):
    """Paths to classes that `torch.load` may unpickle, of which ours are imported at look-up."""

    def __getitem__(self, path: str) -> Any:
        found = super().__getitem__(path)
        return found.load() if isinstance(found, _Class) else found


def _register_with_torch_load() -> None:
    """Add the classes to PyTorch's list of those that `torch.load` may unpickle.

    The list is public, but it takes classes, which would have to be imported. So it is given
    stand-ins, and the private function that the unpickler looks paths up with gets a wrapper that
    replaces them.
    """
    import torch._weights_only_unpickler as unpickler
    from torch.serialization import add_safe_globals

    allowed: Any = unpickler._get_user_allowed_globals
    if getattr(allowed, "__module__", None) == __name__:
        return

    def _get_user_allowed_globals() -> dict[str, Any]:
        return _Allowed(
            (path, (value.loaded or value) if isinstance(value, _Class) else value)
            for path, value in allowed().items()
        )

    unpickler._get_user_allowed_globals = _get_user_allowed_globals
    stand_ins: Any = [(stand_in, stand_in.path) for stand_in in _classes.values()]
    add_safe_globals(stand_ins)


def _register_with_torchao() -> None:
    """Add the classes to torchao's lists when the modules that hold these have been imported."""
    for name, action in _ACTIONS.items():
        if name in sys.modules:
            action(sys.modules[name])
    _find_modules()


def _find_modules() -> None:
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def after_import(name: str, action: Callable[[Any], None]) -> None:
    """Have an action follow the import of a module, or run at once if it was imported already.

    The package calls it, also where PyTorch does not call `register`. What the action raises is
    passed over.
    """
    _ACTIONS[name] = action
    if name in sys.modules:
        with suppress(Exception):
            action(sys.modules[name])
    _find_modules()


def _allow_configuration(module: Any) -> None:
    """torchao imports the modules of this set, and calls what has the name that stands in a file.

    So the module that it is given contains the configuration alone.
    """
    configurations = ModuleType(f"{__name__}.configurations")

    def __getattr__(name: str) -> type:  # noqa: N807 - what Python calls for a module's attributes
        if name != "CodecWeightOnlyConfig":
            raise AttributeError(f"module {configurations.__name__!r} has no attribute {name!r}")
        return _classes[name].load()

    vars(configurations)["__getattr__"] = __getattr__
    sys.modules[configurations.__name__] = configurations
    module.ALLOWED_AO_MODULES.add(configurations.__name__)


def _allow_tensors(module: Any) -> None:
    """torchao calls the class of the name that stands in a safetensors file."""

    def build(cls: type, /, *args: Any, **attributes: Any) -> Any:
        return _classes["CodecTensor"].load()(*args, **attributes)

    name = "CodecTensor"
    module.ALLOWED_CLASSES.setdefault(name, type(name, (), {"__new__": build}))
    if name not in module.ALLOWED_TENSORS_SUBCLASSES:
        module.ALLOWED_TENSORS_SUBCLASSES.append(name)


_ACTIONS: dict[str, Callable[[Any], None]] = {
    "torchao.core.config": _allow_configuration,
    "torchao.prototype.safetensors.safetensors_utils": _allow_tensors,
}


class _Finder:
    """Finds what the other finders find, and has an action follow the import of some modules."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> Any:
        if name not in _ACTIONS:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _Finder) or not hasattr(finder, "find_spec"):
                continue
            spec: Any = finder.find_spec(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader, _ACTIONS[name])
                return spec
        return None


class _Loader:
    """A module's loader, which calls an action on the module after it ran."""

    def __init__(self, loader: Any, action: Callable[[Any], None]) -> None:
        self._loader = loader
        self._action = action

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: Any) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        with suppress(Exception):  # of a torchao that no longer has the list
            self._action(module)
