"""Weights that compiled code opens by itself: as Python does, and only those that Python opens."""

import ctypes
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from torchcodec_weights import CodecError, CodecTensor, codec_weight_only
from torchcodec_weights.codecs.common import compiled
from torchcodec_weights.codecs.ectcq.column_kernels import ColumnClass
from torchcodec_weights.codecs.ectcq.kernels import Tables
from torchcodec_weights.codecs.ectcq.linear import Linear, LinearProduct
from torchcodec_weights.format import container
from torchcodec_weights.format.tiling import Window
from torchcodec_weights.matrix.importance import Importance
from torchcodec_weights.matrix.opened import check_arrays, open_matrix

Coded = tuple[Tensor, Tensor, Tensor | None, Tensor]
HERE = Path(__file__).parent


def prepare(coded: Coded, window: Window, level: int | None = None) -> Linear:
    """What compiled code prepares; CodecError where it refuses."""
    lib = compiled.require("ectcq", Tables, ColumnClass, Linear)
    lib.ectcq_prepare.restype = ctypes.c_char_p
    arguments: list[Any] = []
    for array in coded:
        arguments += (
            [ctypes.c_void_p(), ctypes.c_size_t()]
            if array is None
            else [ctypes.c_void_p(array.data_ptr()), ctypes.c_size_t(array.numel())]
        )
    made = Linear()
    level = compiled.best_level() if level is None else level
    message = lib.ectcq_prepare(
        *arguments, (ctypes.c_int64 * 4)(*window), level, ctypes.byref(made)
    )
    if message is not None:
        raise CodecError(message.decode())
    return made


def contents(layer: Linear) -> dict[str, Any]:
    """Everything in a prepared weight, by name; what pointers point to in their place."""
    m = layer.matrix

    def array(address: int | None, count: int, dtype: str) -> bytes | None:
        return None if not address else ctypes.string_at(address, count * np.dtype(dtype).itemsize)

    found: dict[str, Any] = {
        "offsets": array(m.offsets, m.tiles, "u8"),
        "payload_sizes": array(m.payload_sizes, m.tiles, "u4"),
        "outlier_sizes": array(m.outlier_sizes, m.tiles, "u4"),
        "crcs": array(m.crcs, m.tiles, "u4"),
        "row_scale": array(m.row_scale, m.rows if m.row_stride else 1, "f4"),
        "col_scale": array(m.col_scale, m.cols if m.col_stride else 1, "f4"),
        "column_order": array(m.column_order, m.cols, "u4"),
        "zero_point": array(m.zero_point, m.rows, "f4"),
        "tables": array(layer.tables, ctypes.sizeof(Tables), "u1"),
        "classes": array(layer.classes, layer.class_count * ctypes.sizeof(ColumnClass), "u1"),
        "of_group": array(layer.of_group, -(-m.cols // 32), "u1"),
        "search": layer.search is not None,
    }
    for name in ("data", "size", "tiles", "rows", "cols", "type", "first", "end"):
        found[name] = getattr(m, name)
    for name in ("first_row", "end_row", "first_col", "end_col", "class_count", "states"):
        found[name] = getattr(layer, name)
    return found


def by_python(coded: Coded, window: Window, level: int | None = None) -> LinearProduct:
    matrix = open_matrix(*coded)
    if matrix.codec.name != "ectcq" or not matrix.decodes_whole:
        raise CodecError("none that compiled code multiplies by")
    try:
        container.check_window(matrix.header, window)
    except ValueError as error:
        raise CodecError(str(error)) from None
    tiles = matrix.tiles(window.first_row, window.first_row + window.rows)
    return LinearProduct(matrix.stored(), tiles, window, level)


def weights() -> dict[str, CodecTensor]:
    """Row-major streams and streams by columns, outliers, zero points, sorted columns, dtypes."""
    rng = torch.Generator().manual_seed(0)
    plain = torch.randn(70, 64, generator=rng)
    spiky = plain.clone()
    spiky[3, 5] = 900.0
    columns = np.exp2(np.arange(96) % 9).astype(np.float32)
    importance = Importance(np.ones(300, np.float32), columns)
    wide = torch.randn(300, 96, generator=rng)
    fast = codec_weight_only(bits=4, preset="fast")
    by_columns = codec_weight_only(bits=3, preset="fast").with_importance(importance, 3)
    return {
        "rows": CodecTensor.from_hp(spiky, fast),
        "zero point": CodecTensor.from_hp((plain + torch.arange(70)[:, None]).half(), fast),
        "narrow": CodecTensor.from_hp(torch.randn(20, 40, generator=rng).bfloat16(), fast),
        "columns": CodecTensor.from_hp(wide, by_columns),
        **{
            f"{version} {name}": weight
            for version in (1, 2, 3)
            for name, weight in torch.load(HERE / "data" / f"format{version}.pt").items()
            if isinstance(weight, CodecTensor)
        },
    }


WEIGHTS = weights()


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_same_as_in_python(name: str) -> None:
    coded = WEIGHTS[name].coded
    header = open_matrix(*coded).header
    windows = [
        Window(0, header.rows, 0, header.cols),
        Window(header.rows // 3, header.rows // 2, header.cols // 4, header.cols // 2),
    ]
    for window in windows:
        try:
            expected = by_python(coded, window)
        except CodecError:
            with pytest.raises(CodecError):
                prepare(coded, window)
            continue
        layer = next(part for part in expected._kept if isinstance(part, Linear))
        assert contents(prepare(coded, window)) == contents(layer)


def test_the_same_of_the_corpus() -> None:
    """Of all damaged files, the weights whose arrays are there."""
    found = []
    for path in sorted((HERE / "corpus").glob("*.safetensors")):
        try:
            arrays = load_file(path)
        except SafetensorError:
            continue
        for name in (name for name in arrays if name.endswith("_qdata")):
            stem = name.removesuffix("qdata")
            kinds = ("qdata", "scale", "zero_point", "act_pre_scale")
            coded: Any = tuple(arrays.get(stem + kind) for kind in kinds)
            if coded[1] is None or coded[3] is None:
                continue
            try:  # whoever calls compiled code has checked these
                check_arrays(*coded)
            except CodecError:
                continue
            if coded[2] is not None and not coded[2].numel():
                continue
            refused = []
            for way in (by_python, prepare):
                try:
                    way(coded, Window(0, 16, 0, 32))
                    refused.append(False)
                except CodecError:
                    refused.append(True)
            assert refused[0] == refused[1], path.name
            found.append(refused[0])
    assert len(found) > 30
    assert set(found) == {True, False}


def rewritten(data: NDArray[np.uint8], vectors: bytes) -> NDArray[np.uint8]:
    """A container with the checksums of its header and vectors computed anew."""
    size = int(struct.unpack_from("<I", data, 8)[0]) if len(data) >= 12 else 0
    if 40 <= size <= len(data):
        struct.pack_into("<I", data, 36, container.crc32c(vectors))
        struct.pack_into("<I", data, size - 4, container.crc32c(data[: size - 4].tobytes()))
    return data


@pytest.mark.parametrize("name", ["rows", "zero point", "columns"])
def test_refuses_what_python_refuses(name: str) -> None:
    """Fields that lie under checksums that are right, and containers that are cut short."""
    rng = random.Random(0)
    qdata, *vectors = WEIGHTS[name].coded
    good = qdata.numpy()
    size = int(struct.unpack_from("<I", good, 8)[0])
    outcomes = set()
    for trial in range(1500):
        bad = good.copy()
        changed = [None if v is None else v.clone() for v in vectors]
        for _ in range(rng.randrange(1, 4)):
            bad[rng.randrange(size)] = rng.choice([0, 1, 2, 127, 128, 255, rng.randrange(256)])
        if trial % 5 == 0:
            bad = bad[: rng.randrange(len(bad))].copy()
        if trial % 7 == 0 and changed[0] is not None:
            changed[0] = changed[0][: rng.randrange(len(changed[0]) + 1)].clone()
        joined = b"".join(v.numpy().tobytes() for v in changed if v is not None)
        bad = rewritten(bad, joined)
        coded: Any = torch.from_numpy(bad), *changed
        window = Window(0, 20, 0, 40)
        refused = []
        for way in (by_python, prepare):
            try:
                way(coded, window)
                refused.append(False)
            except CodecError:
                refused.append(True)
        assert refused[0] == refused[1], (trial, bad[:size].tobytes().hex())
        outcomes.add(refused[0])
    assert outcomes == {True, False}
