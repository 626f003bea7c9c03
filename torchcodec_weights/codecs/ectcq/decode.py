"""Decodes tiles of a matrix in ECTCQ on the CPU, by rows or by columns."""

from torchcodec_weights.codecs.common.compiled import matrix_view
from torchcodec_weights.codecs.ectcq import column_kernels, kernels
from torchcodec_weights.codecs.ectcq.columns import decoder_classes_of_matrix, is_by_columns
from torchcodec_weights.codecs.ectcq.model import tables_of_matrix
from torchcodec_weights.codecs.records import StoredMatrix


def decode_tiles(matrix: StoredMatrix, tiles: range, out: int, dtype: str, threads: int) -> None:
    """Decode consecutive tiles, as `BaseCodec.decode_tiles`.

    Raises:
        CodecError: a tile is corrupt.
    """
    view = matrix_view(matrix, tiles)
    if is_by_columns(matrix.private):
        classes = decoder_classes_of_matrix(matrix)
        column_kernels.decode_matrix(classes, view, out, dtype, threads)
    else:
        kernels.decode_matrix(tables_of_matrix(matrix), view, out, dtype, threads)
