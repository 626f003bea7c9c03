"""The decoders under AddressSanitizer and UndefinedBehaviorSanitizer, on damaged bytes."""

import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchcodec_weights import CodecTensor, codec_weight_only
from torchcodec_weights.codecs.ectcq import ECTCQ
from torchcodec_weights.codecs.ectcq.columns import decoder_classes_of
from torchcodec_weights.codecs.ectcq.model import tables_of
from torchcodec_weights.codecs.lossless import Lossless
from torchcodec_weights.codecs.records import EncoderSettings
from torchcodec_weights.format.container import Outliers, pack_outliers
from torchcodec_weights.format.dtypes import DTYPE_CODES
from torchcodec_weights.matrix.importance import Importance

HERE = Path(__file__).parent
CODECS = HERE.parent / "torchcodec_weights" / "codecs"
X86 = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-Wno-maybe-uninitialized", "-Wno-uninitialized"],
    "vbmi2": ["-mavx512bw", "-mavx512vl", "-mavx512vbmi2", "-Wno-maybe-uninitialized"],
}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The compiled codecs under the sanitizers."""
    folder = tmp_path_factory.mktemp("objects")
    return [
        compiled
        for source in sorted(CODECS.glob("**/native/*.cpp"))
        if (compiled := build(source, folder))
    ]


def build(source: Path, folder: Path) -> str | None:
    """Compile a file; None where it is for another processor."""
    machine = platform.machine()
    x86, arm = machine in ("x86_64", "AMD64"), machine in ("aarch64", "arm64")
    kind = source.stem.rpartition("_")[2]
    if (kind in X86 and not x86) or (kind == "neon" and not arm):
        return None
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-Wno-psabi", "-fsanitize=address,undefined"]
    flags += ["-fno-sanitize-recover=all", f"-I{CODECS}", *X86.get(kind, [])]
    flags += ["-DCODECS_X86"] if x86 else ["-DCODECS_NEON"] if arm else []
    target = str(folder / f"{source.parent.parent.name}_{source.stem}.o")
    subprocess.run(["g++", *flags, "-c", str(source), "-o", target], check=True)
    return target


def run_program(name: str, objects: list[str], folder: Path, *arguments: str) -> None:
    program = str(folder / name)
    main = build(HERE / f"{name}.cpp", folder)
    assert main
    link = ["g++", "-fsanitize=address,undefined", "-pthread", main, *objects, "-o", program]
    subprocess.run(link, check=True)
    run = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "results" in run.stdout


def test_no_byte_is_touched_that_is_not_of_int8_levels(objects: list[str], tmp_path: Path) -> None:
    run_program("edges_int8", objects, tmp_path)


def case_of_rows(folder: Path) -> list[str]:
    """The arguments of fuzz_ectcq.cpp."""
    tile = np.random.default_rng(0).standard_normal((9, 71), np.float32)
    codec, settings = ECTCQ(), EncoderSettings("fast")
    private = codec.prepare([tile], 0.5, settings)
    coded = codec.encode(tile, 0.5, float(np.abs(tile).max()), private, settings)
    case = folder / "case"
    case.write_bytes(bytes(tables_of(private, coded.unit)) + coded.payload)
    return [str(case), str(tile.size)]


def case_of_columns(folder: Path) -> list[str]:
    """The arguments of fuzz_ectcq_columns.cpp."""
    rng = np.random.default_rng(0)
    rows, cols = 70, 75
    deviation = np.exp(np.linspace(1.5, -1.5, cols))
    tile = (rng.standard_normal((rows, cols)) * deviation).astype(np.float32)
    codec, settings = ECTCQ(), EncoderSettings("fast")
    private = codec.prepare_columns([tile], 0.5, settings, None)
    coded = codec.encode_columns(tile, 0.5, private, settings, None)
    classes = decoder_classes_of(private, cols, coded.unit)
    positions = np.sort(rng.choice(rows * cols, 40, False)).astype(np.int64)
    values = rng.standard_normal(40).astype(np.float32).view(np.uint8)
    section = pack_outliers(Outliers(positions, values))
    order = rng.permutation(cols).astype(np.uint32)
    case = folder / "case"
    parts = bytes(classes.classes), classes.of_group.tobytes(), order.tobytes()
    case.write_bytes(b"".join(parts) + coded.payload + section)
    sizes = rows, cols, len(classes.classes), len(coded.payload), len(section)
    return [str(case), *map(str, sizes)]


def test_no_byte_is_touched_that_is_not_ectcqs(objects: list[str], tmp_path: Path) -> None:
    run_program("fuzz_ectcq", objects, tmp_path, *case_of_rows(tmp_path))


def test_no_byte_is_touched_that_is_not_of_ectcqs_columns(
    objects: list[str], tmp_path: Path
) -> None:
    run_program("fuzz_ectcq_columns", objects, tmp_path, *case_of_columns(tmp_path))


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_no_byte_is_touched_that_is_not_of_a_weight(
    kind: str, objects: list[str], tmp_path: Path
) -> None:
    weight = torch.randn(70, 96)
    weight[::9, ::13] *= 20  # outliers
    weight += torch.arange(70)[:, None]
    config = codec_weight_only(bits=4, preset="fast")
    if kind == "columns":
        columns = np.exp2(np.arange(96) % 9).astype(np.float32)
        config = config.with_importance(Importance(np.ones(70, np.float32), columns), 4)
    qdata, scale, zero_point, act_pre_scale = CodecTensor.from_hp(weight, config).coded
    arrays = [
        b"" if array is None else array.numpy().tobytes()
        for array in (qdata, scale, act_pre_scale, zero_point)
    ]
    (tmp_path / "case").write_bytes(b"".join(arrays))
    sizes = map(str, map(len, arrays))
    run_program("fuzz_prepared", objects, tmp_path, str(tmp_path / "case"), *sizes)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_no_byte_is_touched_that_is_not_lossless(
    dtype: str, objects: list[str], tmp_path: Path
) -> None:
    values = torch.from_numpy(np.random.default_rng(0).standard_normal((9, 71)))
    values[:, ::2] = 0.5  # for planes with tables of their own
    weight = values.to(getattr(torch, dtype)).view(torch.uint8).numpy().reshape(-1)
    bits: Any = weight.view(np.uint32 if dtype == "float32" else np.uint16).reshape(9, 71)
    codec = Lossless()
    private = codec.prepare_bits([bits], dtype)
    payload, _ = codec.encode_bits(bits, dtype, private)
    (tmp_path / "private").write_bytes(private)
    (tmp_path / "payload").write_bytes(payload)
    files = str(tmp_path / "private"), str(tmp_path / "payload")
    run_program("fuzz_lossless", objects, tmp_path, *files, str(bits.size), str(DTYPE_CODES[dtype]))
