"""Programs that do not import the package open its files: what PyTorch calls at `import torch`.

Each program is a process of its own, in a directory without the package.
"""

import os
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import pytest
import torch
from conftest import tiny_llama

import torchcodec_weights_autoload
from torchcodec_weights import codec_weight_only, quantize_, save_file
from torchcodec_weights.models.huggingface import save_compressed

GROUP = "Programs that do not import torchcodec_weights"
PROJECTION = "model.layers.1.mlp.up_proj.weight"
SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"
# What programs begin with.
HEAD = """
import sys
import torch

def imported():
    return "torchcodec_weights" in sys.modules

class Missing:
    def __init__(self, *names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

assert not imported()
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small Llama, encoded, as `model/`, `state.pt` and `state.safetensors`."""
    folder = tmp_path_factory.mktemp("files")
    model = tiny_llama()
    config = codec_weight_only(bits=5, preset="fast")
    quantize_(model, config)
    save_compressed(model, folder / "model", config, embeddings=False)
    ids = torch.tensor([[1, 5, 7, 300]])
    with torch.no_grad():
        torch.save(model(ids).logits, folder / "logits.pt")
    weights = {PROJECTION: model.get_parameter(PROJECTION).detach()}
    torch.save(weights, folder / "state.pt")
    save_file(weights, folder / "state.safetensors")
    torch.save(weights[PROJECTION].dequantize(), folder / "dense.pt")
    return folder


def run(program: str, folder: Path, **variables: str) -> str:
    """What a program prints that runs in a directory; it must end well."""
    environment = {name: value for name, value in os.environ.items() if name != SWITCH}
    done = subprocess.run(
        [sys.executable, "-P", "-c", HEAD + dedent(program)],
        cwd=folder,
        env=environment | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_installed_module_is_that_of_this_tree() -> None:
    """CMake copies it, into editable environments too; `make .venv/.installed` brings it there."""
    installed = Path(torchcodec_weights_autoload.__file__)
    source = Path(__file__).parent.parent / installed.name
    assert installed.read_text() == source.read_text()


@pytest.mark.feature(GROUP, "transformers: `from_pretrained` of an encoded model")
def test_from_pretrained(files: Path) -> None:
    run(
        f"""
        from transformers import AutoModelForCausalLM

        assert not imported()
        model = AutoModelForCausalLM.from_pretrained("model")
        assert type(model.get_parameter({PROJECTION!r})).__name__ == "CodecTensor"
        with torch.no_grad():
            logits = model(torch.tensor([[1, 5, 7, 300]])).logits
        assert torch.equal(logits, torch.load("logits.pt"))
        """,
        files,
    )


@pytest.mark.feature(GROUP, "`torch.load(weights_only=True)`")
def test_torch_load(files: Path) -> None:
    """The package is imported in the midst of it, on whatever device is the default then."""
    run(
        f"""
        with torch.device("meta"):
            weights = torch.load("state.pt", weights_only=True)
        weight = weights[{PROJECTION!r}]
        assert type(weight).__name__ == "CodecTensor"
        x = torch.randn(2, 128)
        dense = torch.load("dense.pt")
        assert torch.equal(weight.dequantize(), dense)
        torch.testing.assert_close(
            torch.nn.functional.linear(x, weight), torch.nn.functional.linear(x, dense)
        )
        """,
        files,
    )


@pytest.mark.feature(GROUP, "safetensors files, by torchao's own functions")
def test_safetensors(files: Path) -> None:
    run(
        f"""
        from safetensors import safe_open
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

        assert not imported()
        with safe_open("state.safetensors", "pt") as file:
            plain = {{name: file.get_tensor(name) for name in file.keys()}}
            weights, rest = unflatten_tensor_state_dict(plain, file.metadata())
        assert not rest
        weight = weights[{PROJECTION!r}]
        assert type(weight).__name__ == "CodecTensor"
        assert torch.equal(weight.dequantize(), torch.load("dense.pt"))
        """,
        files,
    )


def test_a_fork_without_transformers(files: Path) -> None:
    run(
        """
        import os

        sys.meta_path.insert(0, Missing("transformers", "accelerate", "peft"))
        child = os.fork()
        if not child:
            torch.load("state.pt")
            os._exit(0 if imported() else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert not imported()
        """,
        files,
    )


def test_files_of_others_import_nothing(files: Path) -> None:
    run(
        """
        import io
        from collections import OrderedDict

        from torchao.core.config import config_from_dict, config_to_dict
        from torchao.prototype.safetensors import safetensors_support
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        class Own:
            pass

        def loaded(value):
            buffer = io.BytesIO()
            torch.save(value, buffer)
            buffer.seek(0)
            return torch.load(buffer, weights_only=True)

        torch.serialization.add_safe_globals([Own])
        assert isinstance(loaded(OrderedDict(a=[torch.ones(2), Own()]))["a"][1], Own)
        parts = [torch.ones(2), torch.ones(3)]
        assert loaded(torch.nested.nested_tensor(parts, layout=torch.jagged)).is_nested
        model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        config = Int8WeightOnlyConfig(version=2)
        quantize_(model, config)
        state = model.state_dict()
        kind = type(state["0.weight"])
        assert kind is not torch.Tensor
        assert type(loaded(state)["0.weight"]) is kind
        assert config_from_dict(config_to_dict(config)) == config
        flat = safetensors_support.flatten_tensor_state_dict(state)
        again, rest = safetensors_support.unflatten_tensor_state_dict(*flat)
        assert type(again["0.weight"]) is kind
        assert torch.serialization.get_unsafe_globals_in_checkpoint("state.pt") == []
        assert not imported()
        """,
        files,
    )


@pytest.mark.filterwarnings("ignore")
def test_a_broken_installation(files: Path, tmp_path: Path) -> None:
    """The package raises, lacks a dependency, is empty, or is not there: said when it is needed."""
    packages = {
        "raises": ("raise ValueError('half of it')", "ValueError: half of it"),
        "lacks": ("import torchao.gone", "No module named 'torchao.gone'"),
        "empty": ("", "No module named 'torchcodec_weights."),
        "absent": (None, "No module named 'torchcodec_weights'"),
    }
    for name, (text, _) in packages.items():
        package = tmp_path / name / "torchcodec_weights"
        package.mkdir(parents=True)
        if text is None:
            package.rmdir()
        else:
            (package / "__init__.py").write_text(text)
    run(
        f"""
        from transformers import AutoModelForCausalLM

        def message(call, argument):
            try:
                call(argument)
            except RuntimeError as error:
                return str(error)

        # An editable install is found before sys.path, one of a wheel in it.
        sys.meta_path[:] = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]
        for name, (text, reason) in {packages!r}.items():
            sys.path.insert(0, f"{{{str(tmp_path)!r}}}/{{name}}")
            if text is None:
                sys.meta_path.insert(0, Missing("torchcodec_weights"))
            sys.modules.pop("torchcodec_weights", None)
            assert torch.load("dense.pt").shape == (256, 128)
            assert not imported()
            for opened in (
                message(torch.load, "state.pt"),
                message(AutoModelForCausalLM.from_pretrained, "model"),
            ):
                assert "torchcodec_weights cannot be imported" in opened, (name, opened)
                assert reason in opened, (name, opened)
        """,
        files,
    )


@pytest.mark.feature(
    GROUP, "`TORCH_DEVICE_BACKEND_AUTOLOAD=0` turns it off", "then import torchcodec_weights first"
)
def test_turned_off(files: Path) -> None:
    run(
        """
        from transformers import AutoModelForCausalLM

        try:
            torch.load("state.pt")
        except Exception as error:
            assert "torchcodec_weights.tensor.CodecTensor" in str(error), error
        else:
            raise AssertionError
        try:
            AutoModelForCausalLM.from_pretrained("model")
        except ValueError as error:
            assert "CodecWeightOnlyConfig" in str(error), error
        else:
            raise AssertionError
        assert not imported()
        import torchcodec_weights

        torch.load("state.pt")
        AutoModelForCausalLM.from_pretrained("model")
        """,
        files,
        **{SWITCH: "0"},
    )


def test_the_list_of_classes_that_may_be_unpickled(files: Path) -> None:
    """Who clears it takes the package's classes out; accelerate clears it and gives it back."""
    run(
        """
        before = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            torch.load("state.pt")
        except Exception as error:
            assert "torchcodec_weights.tensor.CodecTensor was not an allowed global" in str(error)
        else:
            raise AssertionError
        assert not imported()
        for _ in range(2):
            torch.serialization.add_safe_globals(before)
            torch.load("state.pt")
            before = torch.serialization.get_safe_globals()
            torch.serialization.clear_safe_globals()
        """,
        files,
    )


def test_pickles_reach_nothing_else(tmp_path: Path) -> None:
    for path in (
        "torchcodec_weights.system.files.unfinished",
        "torchcodec_weights.tensor.third_party",
        "torchcodec_weights_autoload.import_module",
        "torchcodec_weights_autoload.configurations.CodecWeightOnlyConfig",
        "torchcodec_weights.CodecTensor",
    ):
        module, _, name = path.rpartition(".")
        called = pickle.dumps(("reached",), protocol=2)[2:-1]
        (tmp_path / f"{name}.pkl").write_bytes(
            b"\x80\x02c%s\n%s\n%sR." % (module.encode(), name.encode(), called)
        )
    run(
        """
        from pathlib import Path
        from pickle import UnpicklingError

        for path in Path().glob("*.pkl"):
            try:
                torch.load(path)
            except UnpicklingError as error:
                assert f"{path.stem} was not an allowed global" in str(error), error
            else:
                raise AssertionError(path)
        assert len(list(Path().glob("*.pkl"))) == 5
        assert not imported()
        assert not Path("reached").exists()
        """,
        tmp_path,
    )


def test_codecs_that_are_not_allowed(files: Path) -> None:
    """The environment's policy holds, as nobody can set another before the package is imported."""
    run(
        f"""
        from transformers import AutoModelForCausalLM

        def used():
            weight = torch.load("state.pt")[{PROJECTION!r}]
            torch.nn.functional.linear(torch.ones(1, 128), weight)

        for call in (used, lambda: AutoModelForCausalLM.from_pretrained("model")):
            try:
                call()
            except Exception as error:
                assert "'ectcq'" in str(error), error
                assert "allowed" in str(error), error
            else:
                raise AssertionError(call)
        """,
        files,
        TORCHCODEC_WEIGHTS_ALLOWED_CODECS="lossless",
    )


def test_configurations_reach_nothing_else(tmp_path: Path) -> None:
    """torchao calls what a module that it allows has under a name from `config.json`."""
    run(
        """
        from torchao.core.config import ALLOWED_AO_MODULES, config_from_dict

        ours = {name for name in ALLOWED_AO_MODULES if name.startswith("torchcodec_weights")}
        assert ours == {"torchcodec_weights_autoload.configurations"}


        def refused(*names):
            for name in names:
                try:
                    config_from_dict({"_type": name, "_data": {"name": "this"}})
                except ValueError as error:
                    assert "Failed to find class" in str(error), error
                else:
                    raise AssertionError(name)

        refused("import_module", "register", "suppress", "_Class", "CodecTensor")
        assert "this" not in sys.modules
        assert not imported()
        assert config_from_dict({"_type": "CodecWeightOnlyConfig", "_data": {"bits": 3}}).bits == 3
        assert imported()
        refused("codec_weight_only", "get_codec", "copy", "EncoderSettings", "CodecTensor")
        """,
        tmp_path,
    )


def test_registering_again_and_modules_loaded_again(tmp_path: Path) -> None:
    """The first changes nothing; modules keep their loaders, and are registered with once more."""
    run(
        """
        import importlib
        import inspect
        from importlib.machinery import SourceFileLoader

        import torchcodec_weights_autoload
        import torchao.core.config as config
        from torch import _weights_only_unpickler as unpickler

        before = list(sys.meta_path), unpickler._get_user_allowed_globals
        torchcodec_weights_autoload.register()
        assert (sys.meta_path, unpickler._get_user_allowed_globals) == before
        assert type(config.__loader__) is type(config.__spec__.loader) is SourceFileLoader
        assert "def config_from_dict" in inspect.getsource(config)
        importlib.reload(config)
        assert "torchcodec_weights_autoload.configurations" in config.ALLOWED_AO_MODULES
        """,
        tmp_path,
    )


def test_actions_that_follow_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_late.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    after_import = torchcodec_weights_autoload.after_import
    seen: list[ModuleType] = []
    try:
        after_import("imported_late", seen.append)
        assert not seen
        module = import_module("imported_late")
        assert seen == [module]
        after_import("imported_late", lambda module: module.gone)  # what it raises is passed over
        after_import("imported_late", seen.append)
        assert seen == [module, module]
    finally:
        torchcodec_weights_autoload._ACTIONS.pop("imported_late", None)
        sys.modules.pop("imported_late", None)


def test_a_changed_pytorch_or_torchao_is_left_alone(files: Path) -> None:
    """Without the private names, `import torch` works, and the package, if imported, does."""
    run(
        """
        import torchcodec_weights_autoload as autoload
        from torch import _weights_only_unpickler as unpickler

        torch.serialization.clear_safe_globals()
        lookup = unpickler._get_user_allowed_globals
        del unpickler._get_user_allowed_globals
        autoload.register()
        unpickler._get_user_allowed_globals = lookup
        assert not torch.serialization.get_safe_globals()
        autoload._ACTIONS.update(dict.fromkeys(autoload._ACTIONS, lambda module: module.gone))
        import torchcodec_weights

        torch.load("state.pt")
        """,
        files,
    )
