"""Weights whose bitstream stays on a CUDA device: checked and indexed at their first use there.

From then on they are decoded and multiplied there, in the current stream and without the host, so
that a CUDA graph can hold it.
"""

import threading
from weakref import WeakKeyDictionary

import numpy as np
import torch

from torchcodec_weights import container
from torchcodec_weights.codecs import cuda
from torchcodec_weights.codecs import device as devices
from torchcodec_weights.codecs.cuda import Launch
from torchcodec_weights.codecs.ectcq import ECTCQ, gpu
from torchcodec_weights.codecs.ectcq.gpu import ResidentMatrix
from torchcodec_weights.decoding import Matrix, exact_weights, refuse_first_use

_lock = threading.Lock()
_resident: WeakKeyDictionary[Matrix, ResidentMatrix] = WeakKeyDictionary()
_failures: dict[int, str] = {}  # why the kernels did not compile, by device


def resident_matrix(matrix: Matrix, device: torch.device) -> ResidentMatrix | None:
    """The matrix as it is on a CUDA device, or None where it is to be decoded on the CPU.

    The first call for a matrix reads its bitstream on the host and waits for the device.

    Raises:
        CodecError: a tile is corrupt, or this first call comes while a CUDA graph is captured.
        CodecUnavailableError: `use_decoder` forces the device's decoder, which cannot be taken.
    """
    qdata = matrix.tensors[0]
    name = matrix.codec.name
    if not isinstance(matrix.codec, ECTCQ) or device.type != "cuda" or qdata.device != device:
        return None
    if devices.chosen(name) == "cpu":
        return None
    with _lock:
        known = _resident.get(matrix)
        if known is not None and known.data_address == qdata.data_ptr():
            return known
        reason = why_not_resident(matrix, device)
        if reason is not None:
            devices.fall_back(name, "its kernels", device, reason)
            return None
        refuse_first_use(device)
        with torch.cuda.device(device):
            _resident[matrix] = made = index_matrix(matrix, gpu.kernels(device.index))
        matrix.host = None  # what it was checked with
        return made


def why_not_resident(matrix: Matrix, device: torch.device) -> str | None:
    """Why the kernels do not decode a matrix in ECTCQ on a CUDA device, None if they do."""
    if devices.chosen(matrix.codec.name) == "cpu":
        return devices.FORCED
    if matrix.header.across != 1:
        return "its tiles are blocks (tile_shape)"
    reason = cuda.missing() or _failures.get(device.index)
    if reason is None:
        try:
            gpu.kernels(device.index)
        except Exception as error:  # cuda-core's errors have no public base class
            name = torch.cuda.get_device_name(device)
            reason = _failures[device.index] = f"its kernels do not compile for {name}: {error}"
    return reason


def index_matrix(matrix: Matrix, launch: Launch) -> ResidentMatrix:
    """Check all tiles of a matrix in ECTCQ, and index it on the device where its bitstream is.

    Args:
        matrix: with tiles of whole rows.
        launch: starts kernels on that device.

    Raises:
        CodecError: a tile is corrupt.
    """
    codec, header, stored = matrix.codec, matrix.header, matrix.stored()
    assert isinstance(codec, ECTCQ)
    present = np.flatnonzero(header.tiles["payload_size"]).tolist()
    outliers = {i: container.read_tile(stored.data, header, i)[1] for i in present}
    places, values = exact_weights(header, outliers)
    return ResidentMatrix(
        stored,
        codec.tables(stored),
        places.astype(np.uint64),
        values.float().numpy(),
        matrix.tensors[0],
        launch,
    )
