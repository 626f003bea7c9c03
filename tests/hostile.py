"""Weights taken apart and put together with lies in them, under checksums that are right."""

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from torchcodec_weights import CodecTensor
from torchcodec_weights.format.container import crc32c, parse_header
from torchcodec_weights.format.dtypes import dtype_name

NAME = "layers.0.weight"

_FIXED = struct.Struct("<4sHBBIIQIIIIfff")


@dataclass
class Parts:
    """Everything that a weight is stored as. Sizes and checksums are computed, unless given.

    Attributes:
        tiles: payload, outlier section and unit of each tile.
        header: fields of the fixed header that are to hold something else than what is right.
    """

    codec: bytes
    dtype: int
    rows: int
    cols: int
    bases: tuple[float, float]
    private: bytes
    tiles: list[tuple[bytes, bytes, float]]
    scale: np.ndarray
    act_pre_scale: np.ndarray
    zero_point: np.ndarray | None
    across: int = 1
    order: int = 0
    version: int | None = None
    header: dict[str, int] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)


def parts_of(weight: CodecTensor) -> Parts:
    """Take a weight apart."""
    data = weight.qdata.numpy()
    header = parse_header(data.data)
    tiles = []
    for entry, offset in zip(header.tiles, header.offsets.tolist(), strict=True):
        end = offset + int(entry["payload_size"])
        outliers = data[end : end + int(entry["outliers_size"])].tobytes()
        tiles.append((data[offset:end].tobytes(), outliers, float(entry["unit"])))
    zero_point = weight.zero_point
    return Parts(
        codec=header.codec.encode(),
        dtype=data[6],
        rows=header.rows,
        cols=header.cols,
        bases=(header.row_base, header.col_base),
        private=header.private,
        tiles=tiles,
        scale=weight.scale.numpy().copy(),
        act_pre_scale=weight.act_pre_scale.numpy().copy(),
        zero_point=None if zero_point is None else zero_point.numpy().copy(),
        across=header.across,
        order=header.order,
        attributes={
            "logical_shape": list(weight.logical_shape),
            "logical_dtype": weight.logical_dtype,
            "window": weight.window,
            "transposed": weight.transposed,
        },
    )


def packed(parts: Parts) -> bytes:
    """The container."""
    version = parts.version or (3 if parts.order else 2 if parts.across > 1 else 1)
    body = b"".join(payload + outliers for payload, outliers, _ in parts.tiles)
    table = b"".join(
        struct.pack("<IIfI", len(payload), len(outliers), unit, crc32c(payload + outliers))
        for payload, outliers, unit in parts.tiles
    )
    size = _FIXED.size + (4 if version > 1 else 0) + (4 if version > 2 else 0)
    size += len(parts.codec) + len(parts.private) + len(table) + 4
    vectors = [parts.scale.tobytes()]
    vectors += [] if parts.zero_point is None else [parts.zero_point.tobytes()]
    vectors += [parts.act_pre_scale.tobytes()]
    fields = {
        "magic": b"TCWB",
        "version": version,
        "dtype": parts.dtype,
        "name_size": len(parts.codec),
        "header_size": size,
        "private_size": len(parts.private),
        "total_size": size + len(body),
        "rows": parts.rows,
        "cols": parts.cols,
        "tiles": len(parts.tiles),
        "vectors_crc": crc32c(*vectors),
        "row_base": parts.bases[0],
        "col_base": parts.bases[1],
        "snr_db": 20.0,
    }
    head = _FIXED.pack(*(fields | parts.header).values())
    head += struct.pack("<I", parts.across) if version > 1 else b""
    head += struct.pack("<I", parts.order) if version > 2 else b""
    head += parts.codec + parts.private + table
    return head + struct.pack("<I", crc32c(head)) + body


def _tensor(array: np.ndarray | None) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(np.array(array))


def weight_of(parts: Parts) -> CodecTensor:
    """A weight that says and holds what the parts are, unchecked as from a file."""
    return CodecTensor(
        qdata=torch.frombuffer(bytearray(packed(parts)), dtype=torch.uint8),
        scale=_tensor(parts.scale),
        act_pre_scale=_tensor(parts.act_pre_scale),
        zero_point=_tensor(parts.zero_point),
        **parts.attributes,
    )


def stored(path: Path, tensor: CodecTensor, name: str = NAME) -> Path:
    """A safetensors file as `save_file` writes it, of a weight that it would not write."""
    module, _, parameter = name.rpartition(".")
    parts = {
        f"{module}._{parameter}_{part}": value
        for part in ("qdata", "scale", "act_pre_scale", "zero_point")
        if (value := getattr(tensor, part)) is not None
    }
    dtype = dtype_name(tensor.logical_dtype)
    entry = {
        "_type": "CodecTensor",
        "_data": {
            "logical_shape": tensor.logical_shape,
            "logical_dtype": {"_type": "torch.dtype", "_data": dtype},
            "window": tensor.window,
            "transposed": tensor.transposed,
        },
        "_tensor_data_names": [key.rpartition(f"_{parameter}_")[2] for key in parts],
    }
    metadata = {name: json.dumps(entry), "tensor_names": json.dumps([name]), "format": "pt"}
    safetensors.torch.save_file(parts, path, metadata)
    return path
