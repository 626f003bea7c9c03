"""The wheel for AArch64, built by a cross compiler, and ECTCQ's kernels of it, run in an emulator.

Nothing here says how fast they are.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from test_ectcq import tiled
from test_ectcq_columns import cut, stored_matrix, varied
from test_order import important
from test_sanitizer import CODECS, HERE, case_of_columns, case_of_rows
from torch import Tensor

from torchcodec_weights import CodecTensor, codec_weight_only
from torchcodec_weights.codecs.ectcq.columns import decoder_classes_of_matrix
from torchcodec_weights.codecs.ectcq.model import tables_of_matrix
from torchcodec_weights.codecs.records import StoredMatrix
from torchcodec_weights.matrix.opened import open_matrix

COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
X86 = ("_avx2", "_avx512", "_vbmi2")
LIBRARY = "torchcodec_weights/codecs/common/libcodecs.so"

pytestmark = pytest.mark.skipif(
    not COMPILER or not EMULATOR, reason="needs g++-aarch64-linux-gnu and qemu-user"
)


def build(names: list[str], folder: Path, *flags: str) -> list[Path]:
    """Programs of tests/, with the compiled codecs."""
    common = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-ffp-contract=off"]

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.parent.parent.name}_{source.stem}.o")
        command = [*common, *flags, "-DCODECS_NEON", f"-I{CODECS}", "-c", str(source), "-o", target]
        subprocess.run([str(COMPILER), *command], check=True)
        return target

    ours = [one for one in CODECS.glob("**/native/*.cpp") if not one.stem.endswith(X86)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, ours))
        mains = list(pool.map(compile_one, [HERE / f"{name}.cpp" for name in names]))
    for name, main in zip(names, mains, strict=True):
        link = [*flags, "-pthread", main, *objects, "-o", str(folder / name)]
        subprocess.run([str(COMPILER), *link], check=True)
    return [folder / name for name in names]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    target = {"SYSTEM_NAME": "Linux", "SYSTEM_PROCESSOR": "aarch64", "CXX_COMPILER": COMPILER}
    options = " ".join(f"-DCMAKE_{name}={value}" for name, value in target.items())
    # Python's name for the platform is in the wheel's tag.
    environment = {"CMAKE_ARGS": options, "_PYTHON_HOST_PLATFORM": "linux-aarch64"}
    pip = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation"]
    command = [*pip, "--wheel-dir", str(folder), str(HERE.parent)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """every_kernel.cpp, linked with the wheel's library."""
    folder = tmp_path_factory.mktemp("aarch64")
    library = ZipFile(wheel).extract(LIBRARY, folder)
    built = folder / "every_kernel"
    source = HERE / "every_kernel.cpp"
    command = [str(COMPILER), "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{CODECS}"]
    command += [str(source), library, f"-Wl,-rpath,{Path(library).parent}", "-o", str(built)]
    subprocess.run(command, check=True)
    return built


def emulated(program: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run it, with the cross compiler's libraries."""
    shown = subprocess.run(
        [str(COMPILER), "-print-file-name=libc.so.6"], capture_output=True, text=True, check=True
    )
    libraries = Path(shown.stdout.strip()).resolve().parent.parent
    # Leaks are found by tracing the process, which the emulator does not do.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [str(EMULATOR), "-L", str(libraries), str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def agree(program: Path, matrix: StoredMatrix, columns: bool, folder: Path) -> bytes:
    """Run the program over a matrix; returns its weights, float32."""
    if columns:
        classes = decoder_classes_of_matrix(matrix)
        tables = [bytes(classes.classes), classes.of_group.tobytes()]
        kinds = len(classes.classes), classes.states
    else:
        tables, kinds = [bytes(tables_of_matrix(matrix))], (0, 0)
    zero_point, order = matrix.zero_point, matrix.column_order
    sizes = [matrix.rows, matrix.cols, len(matrix.offsets), len(matrix.data), *kinds]
    arrays = [
        matrix.offsets.astype(np.uint64), matrix.payload_sizes, matrix.outlier_sizes, matrix.crcs,
        matrix.row_scale, matrix.col_scale,
    ]  # fmt: skip
    arrays += [one for one in (zero_point, order) if one is not None]
    optional = order is not None, zero_point is not None
    head = np.array([*sizes, *optional], np.uint64).tobytes()
    case, decoded = folder / "case", folder / "decoded"
    parts = [head, *tables, *(array.tobytes() for array in arrays), bytes(matrix.data)]
    case.write_bytes(b"".join(parts))
    run = emulated(program, case, decoded)
    assert (run.returncode, run.stdout) == (0, "3 levels agree\n"), run.stdout + run.stderr
    return decoded.read_bytes()


def test_the_wheel_is_for_aarch64(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-linux_aarch64.whl")
    head = ZipFile(wheel).read(LIBRARY)[:20]
    assert head[:4] == b"\x7fELF"
    assert int.from_bytes(head[18:20], "little") == 183  # EM_AARCH64


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("columns", [False, True])
def test_weights_of_a_model_have_the_bits_that_they_have_here(
    program: Path, tmp_path: Path, bits: int, columns: bool, query: Tensor, spiky: Tensor
) -> None:
    config = codec_weight_only("ectcq", bits=bits, preset="fast")
    for weight in (query, spiky[:, :700]):  # one tile, and more
        own = config.with_importance(important(weight), bits) if columns else config
        tensor = CodecTensor.from_hp(weight, own)
        matrix = open_matrix(
            tensor.qdata, tensor.scale, tensor.zero_point, tensor.act_pre_scale
        ).stored()
        assert (matrix.column_order is not None) == columns
        assert agree(program, matrix, columns, tmp_path) == tensor.dequantize().numpy().tobytes()


@pytest.mark.parametrize("tiles", [1, 2, 5])
@pytest.mark.parametrize("step", [1.4, 0.6, 0.24, 0.12, 0.06])
@pytest.mark.parametrize("cols", [32, 331])
def test_rows(program: Path, tmp_path: Path, tiles: int, step: float, cols: int) -> None:
    """Alphabets from a few symbols to more than registers hold; streams in pairs and alone."""
    agree(program, tiled(tiles, cols, step), False, tmp_path)


@pytest.mark.parametrize("tiles", [1, 2, 5])
@pytest.mark.parametrize("step", [1.4, 0.6, 0.24, 0.12, 0.06])
@pytest.mark.parametrize("cols", [32, 70])
@pytest.mark.parametrize("permuted", [False, True])
def test_columns(
    program: Path, tmp_path: Path, tiles: int, step: float, cols: int, permuted: bool
) -> None:
    outliers = [(3, 5, 9.0), (4, cols - 1, -7.0), (67 * tiles - 1, 0, 8.0)]
    z = varied(67 * tiles + tiles // 2, cols, 0.8)
    order = np.random.default_rng(1).permutation(cols).astype(np.uint32) if permuted else None
    parts = cut(z, tiles)
    matrix = stored_matrix(parts, step, order=order, scales=True, outliers=outliers)
    agree(program, matrix, True, tmp_path)


def test_no_byte_is_touched_that_is_not_a_streams(tmp_path: Path) -> None:
    """Damaged streams under the sanitizers, as in test_sanitizer.py."""
    cases = {"fuzz_ectcq": case_of_rows, "fuzz_ectcq_columns": case_of_columns}
    sanitize = "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
    for program, case in zip(build(list(cases), tmp_path, *sanitize), cases.values(), strict=True):
        run = emulated(program, *case(tmp_path))
        assert run.returncode == 0, run.stdout + run.stderr
        assert "results" in run.stdout
