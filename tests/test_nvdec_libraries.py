"""Without PyNvVideoCodec, or without a library of NVIDIA's driver that it needs: one clear message.

The package is the real one, up to the point where it fails. In the place of libraries that must be
there for it to get so far, libnvidia-encode and libcuda, are empty ones that are compiled here.
"""

import ctypes
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_PROGRAM = """
import ctypes, json, sys, warnings
from pathlib import Path

import torch
from torchcodec_weights import CodecTensor, codec_weight_only
from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.codecs.video import nvdec
from torchcodec_weights.decoders import choice
from torchcodec_weights.format.tiling import Window
from torchcodec_weights.matrix.opened import open_matrix

if sys.argv[1:] == ["absent"]:
    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name == "PyNvVideoCodec":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Absent())
else:
    # The loader takes a library of the same name that is there already.
    libraries = [ctypes.CDLL(path, ctypes.RTLD_GLOBAL) for path in sys.argv[1:]]

cuda = torch.device("cuda", 0)
weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
tensors = {
    codec: CodecTensor.from_hp(weight, codec_weight_only(codec, bits=4, preset="fast"))
    for codec in ("hevc", "h264")
}
dense = {codec: tensor.dequantize() for codec, tensor in tensors.items()}
assert all((weight - other).std() < 0.15 for other in dense.values())
said = {"warnings": [], "available": [], "reports": [], "taken": 0}
for codec, tensor in tensors.items():
    matrix, window = open_matrix(*tensor.coded), Window(*tensor.resolved_window)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            for method in ("decode", "rows", "multiply"):
                # None: the CPU is to decode for the device, as it does here.
                found = choice._first(matrix, window, cuda, method, lambda decoder: decoder)
                said["taken"] += found is not None
    said["warnings"] += [str(w.message) for w in caught if w.category is RuntimeWarning]
    said["available"].append(choice.with_device(get_codec(codec).info(), cuda).decoders["cuda"])
    said["reports"].append(choice.decoder_name(codec, cuda, matrix))
    assert torch.equal(tensor.dequantize(), dense[codec])
said["imported"] = nvdec.pynvvideocodec()[0] is not None
print(json.dumps(said))
"""

DRIVER = (
    "PyNvVideoCodec does not find {}, a library of NVIDIA's driver: install the driver's libraries "
    "for video encoding and decoding, or start the container with "
    "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
)


def run(*arguments: str | Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return said


def check(said: dict[str, Any], reason: str) -> None:
    """The CPU decodes, one warning for each codec says why, and lists and reports do as well."""
    codecs = ("hevc", "h264")
    assert said["taken"] == 0
    assert said["warnings"] == [
        f"codec {codec!r} is decoded on the CPU and uploaded: {reason}" for codec in codecs
    ]
    expected = [f"{codec} (PyAV) on the CPU, uploaded ({reason})" for codec in codecs]
    assert said["available"] == said["reports"] == expected


def needs_no(library: str) -> None:
    """Skip where the driver brings a library, which then cannot be missing."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return
    pytest.skip(f"{library} is here")


@pytest.fixture(scope="module")
def package() -> Path:
    """The folder of the real PyNvVideoCodec."""
    spec = importlib.util.find_spec("PyNvVideoCodec")
    if spec is None or spec.origin is None:
        pytest.skip("PyNvVideoCodec is not installed")
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def encode_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A libnvidia-encode that knows NVENC 13.0, and can nothing else."""
    source = "int NvEncodeAPIGetMaxSupportedVersion(unsigned *v) { *v = 13 << 4; return 0; }"
    return library(tmp_path_factory.mktemp("encode") / "libnvidia-encode.so.1", source)


@pytest.fixture(scope="module")
def cuda_library(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A libcuda with the functions that PyNvVideoCodec is linked to, none of which does a thing."""
    (module,) = package.glob("PyNvVideoCodec_130.*.so")
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", module], capture_output=True, text=True, check=True
    ).stdout.split()
    names = sorted({name for name in symbols if name.startswith("cu") and name[2].isupper()})
    assert names
    source = "\n".join(f"int {name}() {{ return 999; }}" for name in names)
    return library(tmp_path_factory.mktemp("cuda") / "libcuda.so.1", source)


def library(path: Path, source: str) -> Path:
    compiler = shutil.which("cc")
    if compiler is None or shutil.which("nm") is None:
        pytest.skip("there is no C compiler")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-xc", "-", f"-Wl,-soname,{path.name}", "-o", path],
        input=source,
        text=True,
        check=True,
    )
    return path


def test_without_the_package() -> None:
    said = run("absent")
    assert not said["imported"]
    check(said, "PyNvVideoCodec is not installed: pip install 'torchcodec-weights[nvdec]'")


def test_without_libnvidia_encode(package: Path) -> None:
    needs_no("libnvidia-encode.so.1")
    said = run()
    assert not said["imported"]
    check(said, DRIVER.format("libnvidia-encode.so.1"))


def test_without_libnvcuvid(package: Path, encode_library: Path, cuda_library: Path) -> None:
    """The package can be imported, and fails when it is asked what the chip decodes."""
    needs_no("libnvcuvid.so.1")
    needs_no("libcuda.so.1")
    said = run(encode_library, cuda_library)
    assert said["imported"]
    check(said, DRIVER.format("libnvcuvid.so.1"))
