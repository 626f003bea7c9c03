"""Weights whose bitstream stays on a CUDA device: checked and indexed at their first use there.

From then on they are decoded and multiplied there, in the current stream and without the host, so
that a CUDA graph can hold it.
"""

import threading
import warnings
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from torchcodec_weights import container
from torchcodec_weights.codecs import cuda
from torchcodec_weights.codecs.cuda import Launch
from torchcodec_weights.codecs.ectcq import ECTCQ, gpu
from torchcodec_weights.codecs.ectcq.gpu import ResidentMatrix
from torchcodec_weights.decoding import Matrix

_lock = threading.Lock()
_resident: WeakKeyDictionary[Matrix, ResidentMatrix] = WeakKeyDictionary()
_failed: set[int] = set()  # devices for which the kernels could not be compiled


def resident_matrix(matrix: Matrix) -> ResidentMatrix | None:
    """The matrix on the CUDA device where its bitstream is, or None where the CPU must decode it.

    The first call for a matrix reads its bitstream on the host and waits for the device.

    Raises:
        CodecError: a tile is corrupt.
    """
    qdata = matrix.tensors[0]
    if not qdata.is_cuda or not isinstance(matrix.codec, ECTCQ) or matrix.header.across != 1:
        return None
    with _lock:
        known = _resident.get(matrix)
        if known is not None and known.data_address == qdata.data_ptr():
            return known
        launch = _kernels(qdata.device)
        if launch is None:
            return None
        with torch.cuda.device(qdata.device):
            _resident[matrix] = made = index_matrix(matrix, launch)
        return made


def _kernels(device: torch.device) -> Launch | None:
    index = torch.cuda.current_device() if device.index is None else device.index
    if cuda.missing() is not None or index in _failed:
        return None
    try:
        return gpu.kernels(index)
    except Exception as error:  # cuda-core's errors have no public base class
        _failed.add(index)
        warnings.warn(
            f"the kernels of codec 'ectcq' do not compile for {torch.cuda.get_device_name(index)}, "
            f"so the CPU decodes: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


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
    places = [np.empty(0, np.uint64)]
    values = [np.empty(0, np.uint8)]
    for index in np.flatnonzero(header.tiles["payload_size"]):
        _, outliers = container.read_tile(stored.data, header, int(index))
        first = header.blocks[int(index)].first_row * header.cols
        places.append(outliers.positions.astype(np.uint64) + np.uint64(first))
        values.append(outliers.values)
    # In two dimensions, as an empty tensor of one has no view in another dtype.
    width = getattr(torch, header.dtype).itemsize
    stored_values = torch.from_numpy(np.concatenate(values).reshape(-1, width))
    exact = stored_values.view(getattr(torch, header.dtype))[:, 0].float()
    qdata: Tensor = matrix.tensors[0]
    tables = codec.tables(stored)
    return ResidentMatrix(stored, tables, np.concatenate(places), exact.numpy(), qdata, launch)
