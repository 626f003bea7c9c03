"""The container: one matrix's bitstreams in one array of bytes, versioned and checksummed.

The layout is specified, with a worked example, in docs/bitstream.md. All numbers are
little-endian. Every byte is covered by a CRC-32C (RFC 3720, appendix B.4): the header with the
tile table by one at its end, each tile by one in the table, and the vectors that are stored beside
the container (scale, zero_point, act_pre_scale) by one in the header.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from math import isfinite

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from torchcodec_weights.errors import CodecError
from torchcodec_weights.format.dtypes import DTYPE_CODES, ITEM_SIZES
from torchcodec_weights.format.tiling import TileGrid, Window

MAGIC = b"TCWB"
VERSION = 3

_FIXED = struct.Struct("<4sHBBIIQIIIIfff")
_ACROSS = struct.Struct("<I")  # from version 2 on, after the fixed header
_ORDER = struct.Struct("<I")  # from version 3 on, after that
_TILE = np.dtype(
    [("payload_size", "<u4"), ("outliers_size", "<u4"), ("unit", "<f4"), ("crc", "<u4")]
)
_DTYPE_NAMES = {code: name for name, code in DTYPE_CODES.items()}
_CRC = _SIZE = struct.Struct("<I")
_SNR = struct.Struct("<f")  # the last of the fixed header
_SIZE_OFFSET = 8  # of header_size
_ESCAPE = 0xFFFF
_CHUNK = 2**16  # words of an outlier section that are unpacked at a time

MAX_WEIGHTS = 2**40
MAX_TILE_WEIGHTS = 2**31 - 1
"""Weights of a matrix and of a tile. Below these, no product of sizes overflows 64 bits anywhere;
the compiled code checks the second again (codecs/common/native/matrix.h)."""


SORTED_COLUMNS = 1
"""Flag of `Header.order`: codecs got the columns sorted by `act_pre_scale` (format/order.py)."""
SORTED_ROWS = 2
"""Flag of `Header.order`: codecs got the rows of each tile sorted by `scale`."""


@dataclass(frozen=True)
class Outliers:
    """Weights of a tile that are stored exactly.

    Attributes:
        positions: int64 (n,), row-major within the tile, strictly increasing.
        values: raw bytes of the weights' own dtype, as uint8 (n * itemsize,).
    """

    positions: NDArray[np.int64]
    values: NDArray[np.uint8]


@dataclass(frozen=True)
class Header:
    """Everything about a matrix but its payloads.

    Attributes:
        codec: name of the codec.
        dtype: dtype of the weights that were encoded, one of `DTYPE_CODES`.
        rows, cols: shape of the matrix.
        row_base, col_base: largest magnitudes of the row and column scales (see `normalize`).
        snr_db: 10 log10(energy of the weights / energy of the error), measured by the encoder.
        vectors_crc: CRC-32C over the bytes of scale, zero_point and act_pre_scale.
        private: the codec's own data, shared by all tiles.
        tiles: the tile table: payload_size, outliers_size, unit and crc of each.
        across: number of tiles beside each other; 1 if tiles are whole rows.
        order: in which order of rows and columns codecs got the weights: 0, or a sum of
            `SORTED_COLUMNS` and `SORTED_ROWS`.
        total_size: bytes of the whole container.
        raw: all bytes of the header, which identify the content. Its CRC does not, as it is easy to
            find another header with the same CRC.
    """

    codec: str
    dtype: str
    rows: int
    cols: int
    row_base: float
    col_base: float
    snr_db: float
    vectors_crc: int
    private: bytes
    tiles: NDArray[np.void]
    across: int
    order: int
    total_size: int
    raw: bytes

    @cached_property
    def offsets(self) -> NDArray[np.uint64]:
        """Where the payloads begin: uint64 (tiles,), in bytes."""
        sizes = _tile_bytes(self.tiles)
        return np.add.accumulate(sizes) - sizes + np.uint64(len(self.raw))

    @cached_property
    def blocks(self) -> TileGrid:
        """Rows and columns of each tile."""
        return TileGrid((self.rows, self.cols), len(self.tiles) // self.across, self.across)

    @property
    def present_weights(self) -> int:
        """Upper bound of the weights that can be decoded: those in tiles that are present."""
        present = int(np.count_nonzero(self.tiles["payload_size"]))
        return min(self.rows * self.cols, present * self.blocks.largest)


def _tile_bytes(tiles: NDArray[np.void]) -> NDArray[np.uint64]:
    """Bytes of each tile: uint64 (tiles,)."""
    return np.add(tiles["payload_size"], tiles["outliers_size"], dtype=np.uint64)


def crc32c(*pieces: bytes | memoryview) -> int:
    """CRC-32C over the concatenation of `pieces`."""
    crc = 0
    for piece in pieces:
        crc = google_crc32c.extend(crc, bytes(piece))
    return crc


class Crc32c:
    """CRC-32C of bytes that come one piece after the other."""

    def __init__(self) -> None:
        self.value = 0

    def update(self, piece: bytes | memoryview) -> None:
        """Add a piece."""
        self.value = google_crc32c.extend(self.value, bytes(piece))


def pack_outliers(outliers: Outliers) -> bytes:
    """Bytes of an outlier section: 16-bit gaps between positions (0xFFFF adds 65,535 to the next
    gap), then the values.
    """
    if not len(outliers.positions):
        return b""
    gaps = np.diff(outliers.positions, prepend=-1) - 1
    escapes = gaps // _ESCAPE
    words = np.full(len(gaps) + int(escapes.sum()), _ESCAPE, "<u2")
    words[np.cumsum(escapes + 1) - 1] = gaps % _ESCAPE
    return struct.pack("<I", len(words)) + words.tobytes() + outliers.values.tobytes()


def unpack_outliers(data: bytes, itemsize: int, weights: int) -> Outliers:
    """Inverse of `pack_outliers`, for a tile of `weights` weights.

    Raises:
        CodecError: the section is malformed or names a position outside the tile.
    """
    if not data:
        return Outliers(np.empty(0, np.int64), np.empty(0, np.uint8))
    if len(data) < 4 or len(data) < 4 + 2 * (count := struct.unpack_from("<I", data)[0]):
        raise CodecError("outlier section of a tile is cut short")
    words = np.frombuffer(data, "<u2", count, 4)
    values = np.frombuffer(data, np.uint8, offset=4 + 2 * count)
    placed = int(np.count_nonzero(words != _ESCAPE))
    if len(values) != itemsize * placed:
        raise CodecError(
            f"outlier section of a tile holds {len(values)} bytes of values for {placed} "
            f"positions of {itemsize} bytes"
        )
    if placed > weights:
        raise CodecError(f"{placed} outliers in a tile of {weights} weights")
    positions = np.empty(placed, np.int64)
    done, last = 0, -1
    # In chunks, as each word of two bytes takes 25 bytes of temporary arrays.
    for start in range(0, count, _CHUNK):
        piece = words[start : start + _CHUNK].astype(np.int64)
        ends = last + np.cumsum(np.where(piece == _ESCAPE, _ESCAPE, piece + 1))
        found = ends[piece != _ESCAPE]
        positions[done : done + len(found)] = found
        done, last = done + len(found), int(ends[-1])
    if placed and positions[-1] >= weights:
        raise CodecError(f"outlier at position {positions[-1]} of a tile of {weights} weights")
    return Outliers(positions, values)


def header_size(codec: str, private: bytes, tiles: int, across: int, order: int) -> int:
    """Bytes of the header with its tile table and CRC."""
    size = _start_of_name(_version_for(across, order))
    return size + len(codec) + len(private) + _TILE.itemsize * tiles + _CRC.size


def _version_for(across: int, order: int) -> int:
    """The lowest version that has the fields that are needed."""
    return 3 if order else 2 if across > 1 else 1


def _start_of_name(version: int) -> int:
    later = (_ACROSS.size if version > 1 else 0) + (_ORDER.size if version > 2 else 0)
    return _FIXED.size + later


def pack(
    *,
    codec: str,
    dtype: str,
    shape: tuple[int, int],
    bases: tuple[float, float],
    snr_db: float,
    vectors_crc: int,
    private: bytes,
    payloads: Sequence[bytes],
    outliers: Sequence[bytes],
    units: Sequence[float],
    across: int = 1,
    order: int = 0,
) -> bytearray:
    """Build a container from `Header`'s fields and each tile's payload, outliers and unit."""
    table = [
        (len(payload), len(out), unit, crc32c(payload, out))
        for payload, out, unit in zip(payloads, outliers, units, strict=True)
    ]
    tiles = np.array(table, _TILE)
    head = _pack_header(
        codec, dtype, shape, bases, snr_db, vectors_crc, private, tiles, across, order
    )
    pairs = zip(payloads, outliers, strict=True)
    return bytearray().join([head, *(piece for pair in pairs for piece in pair)])


def set_snr(data: bytearray, snr_db: float) -> None:
    """Write another SNR into a container, in place, with the header's checksum."""
    (size,) = _SIZE.unpack_from(data, _SIZE_OFFSET)
    _SNR.pack_into(data, _FIXED.size - _SNR.size, snr_db)
    end = size - _CRC.size
    _CRC.pack_into(data, end, crc32c(memoryview(data)[:end]))


def _pack_header(
    codec: str,
    dtype: str,
    shape: tuple[int, int],
    bases: tuple[float, float],
    snr_db: float,
    vectors_crc: int,
    private: bytes,
    table: NDArray[np.void],
    across: int,
    order: int,
) -> bytes:
    version = _version_for(across, order)
    size = header_size(codec, private, len(table), across, order)
    body = int(table["payload_size"].sum(dtype=np.int64))
    body += int(table["outliers_size"].sum(dtype=np.int64))
    head = _FIXED.pack(
        MAGIC,
        version,
        DTYPE_CODES[dtype],
        len(codec),
        size,
        len(private),
        size + body,
        *shape,
        len(table),
        vectors_crc,
        *bases,
        snr_db,
    )
    head += _ACROSS.pack(across) if version > 1 else b""
    head += _ORDER.pack(order) if version > 2 else b""
    head += codec.encode("ascii") + private + table.tobytes()
    return head + _CRC.pack(crc32c(head))


def select_tiles(
    containers: Sequence[memoryview], headers: Sequence[Header], tiles: range
) -> NDArray[np.uint8]:
    """One container with some of the tiles of a matrix; the others are left out.

    A tile that is left out has no payload and keeps its entry in the table.

    Args:
        containers: of one matrix; each tile is copied from the first that holds it.
        headers: of the containers.
        tiles: indices of the tiles to keep.

    Returns:
        uint8 (bytes,), a container.

    Raises:
        CodecError: the containers are not of one matrix.
        ValueError: a tile is in none of them.
    """
    first = headers[0]
    table = first.tiles.copy()
    table[["payload_size", "outliers_size", "crc"]] = 0
    pieces: list[memoryview] = []
    for header in headers:
        if not of_one_matrix(first, header):
            raise CodecError("slices of different weights cannot be joined")
    for index in tiles:
        for data, header in zip(containers, headers, strict=True):
            entry = header.tiles[index]
            if entry["payload_size"]:
                start = int(header.offsets[index])
                size = int(entry["payload_size"]) + int(entry["outliers_size"])
                pieces.append(data[start : start + size])
                table[index] = entry
                break
        else:
            raise ValueError(f"tile {index} is in none of the slices")
    head = _pack_header(
        first.codec,
        first.dtype,
        (first.rows, first.cols),
        (first.row_base, first.col_base),
        first.snr_db,
        first.vectors_crc,
        first.private,
        table,
        first.across,
        first.order,
    )
    return np.frombuffer(bytearray(b"".join([head, *pieces])), np.uint8)


def of_one_matrix(first: Header, second: Header) -> bool:
    """Whether two containers hold tiles of one matrix, as slices of a weight do.

    Everything that tiles are decoded with is equal, and so are the tiles that both hold.
    """
    if any(getattr(first, name) != getattr(second, name) for name in _OF_MATRIX):
        return False
    if not np.array_equal(first.tiles["unit"], second.tiles["unit"]):
        return False
    both = (first.tiles["payload_size"] > 0) & (second.tiles["payload_size"] > 0)
    return np.array_equal(first.tiles[both], second.tiles[both])


_OF_MATRIX = (
    "codec", "dtype", "rows", "cols", "row_base", "col_base", "vectors_crc", "private", "across",
    "order",
)  # fmt: skip


def parse_header(data: memoryview) -> Header:
    """Read and check a header.

    Args:
        data: the whole container, bytes.

    Raises:
        CodecError: not a container, cut short, corrupt, or from a newer version of the format.
    """
    return read_header(lambda count: bytes(data[:count]), len(data))


def read_header(read: Callable[[int], bytes], total: int) -> Header:
    """As `parse_header`, for callers that have no view of the container.

    Args:
        read: returns the first n bytes of the container, given n.
        total: bytes of the container.

    Raises:
        CodecError: as in `parse_header`.
    """
    if total < _FIXED.size:
        raise CodecError(f"container of {total} bytes is shorter than its fixed header")
    (
        magic,
        version,
        dtype,
        name_size,
        size,
        private_size,
        total_size,
        rows,
        cols,
        tiles,
        vectors_crc,
        row_base,
        col_base,
        snr_db,
    ) = _FIXED.unpack(read(_FIXED.size))
    if magic != MAGIC:
        raise CodecError(f"not a codec weight: starts with {bytes(magic)!r}, not {MAGIC!r}")
    if version > VERSION:
        raise CodecError(
            f"container format {version} is newer than {VERSION}, the newest that this version of "
            "torchcodec_weights reads: upgrade torchcodec_weights"
        )
    name_start = _start_of_name(version)
    expected = name_start + name_size + private_size + _TILE.itemsize * tiles + _CRC.size
    if size != expected or size > total:
        raise CodecError("container header is corrupt or cut short: its sizes do not agree")
    raw = read(size)
    (crc,) = _CRC.unpack_from(raw, size - _CRC.size)
    if google_crc32c.value(raw[: -_CRC.size]) != crc:
        raise CodecError("container header is corrupt: its CRC-32C does not match")
    (across,) = _ACROSS.unpack_from(raw, _FIXED.size) if version > 1 else (1,)
    (order,) = _ORDER.unpack_from(raw, _start_of_name(2)) if version > 2 else (0,)
    name_end = name_start + name_size
    table_start = name_end + private_size
    down, odd = divmod(tiles, across) if across else (0, 1)
    tiled = not odd and 1 <= down <= rows and across <= cols
    ordered = order <= SORTED_COLUMNS + SORTED_ROWS and (order == 0 or across == 1)
    if version < 1 or dtype not in _DTYPE_NAMES or not tiled or not ordered:
        raise CodecError(f"container header holds values that format {version} does not allow")
    tile = -(-rows // down) * -(-cols // across)
    if rows * cols > MAX_WEIGHTS or tile > MAX_TILE_WEIGHTS:
        raise CodecError(
            f"container of {rows}x{cols} weights in {tiles} tiles: allowed: {MAX_WEIGHTS} weights "
            f"in all, {MAX_TILE_WEIGHTS} in a tile"
        )
    if not (isfinite(row_base) and isfinite(col_base)):
        raise CodecError(f"container has scales of up to {row_base} and {col_base}")
    table = np.frombuffer(raw, _TILE, tiles, table_start)
    if not all(map(isfinite, table["unit"].tolist())):  # of a few, faster than NumPy
        raise CodecError("container's tile table holds a unit that is not finite")
    if size + int(np.add.reduce(_tile_bytes(table))) != total_size:
        raise CodecError("container's tile table does not add up to its size")
    if total_size != total:
        raise CodecError(f"container of {total_size} bytes is {total} bytes long")
    return Header(
        codec=raw[name_start:name_end].decode("ascii", "replace"),
        dtype=_DTYPE_NAMES[dtype],
        rows=rows,
        cols=cols,
        row_base=row_base,
        col_base=col_base,
        snr_db=snr_db,
        vectors_crc=vectors_crc,
        private=raw[name_end:table_start],
        tiles=table,
        across=across,
        order=order,
        total_size=total_size,
        raw=raw,
    )


def header_bytes(data: memoryview) -> bytes:
    """All bytes of a container's header, without checking it."""
    (size,) = _SIZE.unpack_from(data, _SIZE_OFFSET)
    return bytes(data[:size])


def binding_digest(name: str, header: bytes) -> str:
    """Digest that binds a weight to its name in a file: BLAKE2b of both, 128 bits, in hexadecimal.

    The header stands for the bitstream, as it holds the CRC of everything else.

    Args:
        name: of the weight in the file.
        header: all bytes of the header (`Header.raw`).
    """
    bound = name.encode(errors="surrogatepass") + b"\0" + header
    return blake2b(bound, digest_size=16).hexdigest()


def read_tile(data: memoryview, header: Header, index: int) -> tuple[bytes, Outliers]:
    """Check and read a tile: its payload and its outliers.

    Raises:
        CodecError: the tile's CRC does not match or its outlier section is malformed.
    """
    entry, start_byte = header.tiles[index], int(header.offsets[index])
    end = start_byte + int(entry["payload_size"])
    payload = bytes(data[start_byte:end])
    section = bytes(data[end : end + int(entry["outliers_size"])])
    if crc32c(payload, section) != entry["crc"]:
        raise CodecError(f"tile {index} is corrupt: its CRC-32C does not match")
    block = header.blocks[index]
    itemsize = ITEM_SIZES[header.dtype]
    return payload, unpack_outliers(section, itemsize, block.rows * block.cols)


def check_window(header: Header, window: Window) -> None:
    """Reject a window of rows and columns that a matrix does not have.

    Raises:
        ValueError: names the window and the shape.
    """
    first_row, rows, first_col, cols = window
    if not (
        0 <= first_row < first_row + rows <= header.rows
        and 0 <= first_col < first_col + cols <= header.cols
    ):
        raise ValueError(
            f"rows {first_row} to {first_row + rows} and columns {first_col} to {first_col + cols} "
            f"of a matrix of {header.rows}x{header.cols}"
        )


def exact_weights(
    header: Header, outliers: Mapping[int, Outliers]
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """The weights of some tiles that are stored exactly.

    Args:
        outliers: by tile.

    Returns:
        Their positions in the matrix (n,), row-major, tile after tile; and their bytes
        (n, itemsize).
    """
    itemsize = ITEM_SIZES[header.dtype]
    places, values = [np.empty(0, np.int64)], [np.empty(0, np.uint8)]
    for index, stored in outliers.items():
        block = header.blocks[index]
        row, col = np.divmod(stored.positions, block.cols)
        places.append((row + block.first_row) * header.cols + col + block.first_col)
        values.append(stored.values)
    return np.concatenate(places), np.concatenate(values).reshape(-1, itemsize)
