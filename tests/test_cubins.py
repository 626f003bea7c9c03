"""CUDA C++ compiled by NVRTC, which needs no GPU; the cache of machine code; kernels' names."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchcodec_weights.codecs.common import cubins, nvrtc
from torchcodec_weights.errors import DecoderError

needs_nvrtc = pytest.mark.skipif(nvrtc.missing() is not None, reason="needs NVRTC")

SOURCE = """
#define KERNEL(number) \\
  extern "C" __global__ void kernel_##number(float* out) { *out = helper(number, *out); }
__device__ __noinline__ float helper(int times, float x) {
  for (int i = 0; i < times; ++i) x = x * x + 1;
  return x;
}
KERNEL(1)
KERNEL(20)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "torchcodec-weights"


def only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_75", "sm_90", "sm_120"])
def test_kernels_are_named_and_functions_are_not(cache: Path, architecture: str) -> None:
    cubin = cubins.compile_source(SOURCE, architecture)
    assert sorted(cubins.kernel_names(cubin)) == ["kernel_1", "kernel_20"]


@needs_nvrtc
def test_what_was_compiled_is_kept(cache: Path) -> None:
    cubin = cubins.compile_source(SOURCE, "sm_90")
    file = only_file(cache)
    # Another cubin in its place shows that this one is read.
    other = cubins.compile_source("", "sm_90")
    assert other != cubin
    file.write_bytes(next(f for f in cache.iterdir() if f != file).read_bytes())
    assert cubins.compile_source(SOURCE, "sm_90") == other


@needs_nvrtc
def test_sources_and_architectures_have_files_of_their_own(cache: Path) -> None:
    made = [
        cubins.compile_source(source, architecture)
        for source in (SOURCE, SOURCE + "KERNEL(3)")
        for architecture in ("sm_80", "sm_90")
    ]
    assert len(set(made)) == len(made) == len(list(cache.iterdir()))
    assert "kernel_3" in cubins.kernel_names(made[2])


@needs_nvrtc
@pytest.mark.parametrize("damage", ["short", "empty", "a bit", "a folder"])
def test_a_damaged_file_is_compiled_anew(cache: Path, damage: str) -> None:
    cubin = cubins.compile_source(SOURCE, "sm_90")
    file = only_file(cache)
    contents = file.read_bytes()
    if damage == "a folder":
        file.unlink()
        file.mkdir()
    else:
        changed = bytearray(contents)
        changed[len(changed) // 2] ^= 1
        file.write_bytes({"short": contents[:-9], "empty": b"", "a bit": bytes(changed)}[damage])
    assert cubins.compile_source(SOURCE, "sm_90") == cubin
    if damage != "a folder":
        assert only_file(cache).read_bytes() == contents
    assert list(cache.iterdir()) == [file]  # nothing temporary is left


@needs_nvrtc
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = tmp_path / "a file"
    taken.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(taken))
    assert cubins.kernel_names(cubins.compile_source(SOURCE, "sm_90"))
    assert taken.read_bytes() == b""


@needs_nvrtc
def test_without_a_cache_folder_the_home_directory_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "not/absolute"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        cubins.compile_source(SOURCE, "sm_90")
        assert only_file(tmp_path / ".cache" / "torchcodec-weights").suffix == ".cubin"


@needs_nvrtc
def test_a_source_that_does_not_compile(cache: Path) -> None:
    with pytest.raises(DecoderError, match=r'(?s)sm_90.*kernels.cu\(2\).*"no_such_type"'):
        cubins.compile_source("\nno_such_type x;", "sm_90")
    with pytest.raises(DecoderError, match="sm_1"):
        cubins.compile_source(SOURCE, "sm_1")
    assert not cache.exists()


def test_without_nvrtc_it_is_said_what_to_install() -> None:
    """In a process without site-packages' `nvidia`, where the library is not loaded yet."""
    code = """
import sys
sys.modules["nvidia"] = None
import torch
from torchcodec_weights.codecs.common import nvrtc
for torch.version.cuda in ("2.0", "99.1"):
    nvrtc.missing.cache_clear()
    print(nvrtc.missing())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    old, new = run.stdout.splitlines()
    assert old.startswith("NVRTC cannot be loaded (libnvrtc.so.2: ")
    assert old.endswith("pip install 'nvidia-cuda-nvrtc-cu2==2.*'")
    assert new.endswith("pip install 'nvidia-cuda-nvrtc==99.*'")


@needs_nvrtc
def test_the_compiler_is_of_the_version_of_pytorch() -> None:
    major, minor = nvrtc.version()
    assert minor >= 0
    built = torch.version.cuda
    assert major in ((12, 13) if built is None else (int(built.split(".")[0]),))
