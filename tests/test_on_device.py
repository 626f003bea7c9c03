"""Decoding for a device, as far as it can be run without one.

Pictures are decoded by the codecs' own decoders, and laid out as those of a device lay them out;
the arithmetic that follows them is the one that runs on a GPU, here on CPU tensors.
"""

import ctypes
import re
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import coded, fastest
from test_order import important
from torch import Tensor

from torchcodec_weights import (
    CodecError,
    CodecTensor,
    CodecUnavailableError,
    codec_weight_only,
    compression_report,
    use_decoder,
)
from torchcodec_weights.codecs.decoder import Decoder
from torchcodec_weights.codecs.image import nvimage
from torchcodec_weights.codecs.pictures import (
    DeviceDecoder,
    SampleCodec,
    Samples,
    allocate_pictures,
)
from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.codecs.video import nvdec
from torchcodec_weights.codecs.video.picture import Picture, read_picture
from torchcodec_weights.decoders import choice, pictures
from torchcodec_weights.decoders.cpu import decode_matrix
from torchcodec_weights.errors import DecoderError
from torchcodec_weights.format.container import SORTED_COLUMNS, SORTED_ROWS, read_tile
from torchcodec_weights.format.tiling import Window
from torchcodec_weights.matrix.opened import OpenedMatrix, open_matrix

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("forgotten_choices")

CUDA = torch.device("cuda", 0)
VIDEO = [("hevc", 8), ("hevc", 10), ("h264", 8), ("vp9", 8), ("av1", 8), ("av1", 10)]
IMAGE = [("jpeg2000", 8), ("jpeg2000", 16), ("htj2k", 8), ("htj2k", 16)]


class HostDecoder(DeviceDecoder):
    """The codec's own decoder, with samples in the layout in which the hardware writes them."""

    name: ClassVar[str] = "host"

    def __init__(self, reason: str | None = None, *, error: int = 0) -> None:
        self.reason, self.error = reason, error
        self.decoded = 0

    def missing(self, codec: SampleCodec, device: torch.device) -> str | None:
        return self.reason

    def decode(
        self,
        codec: SampleCodec,
        payloads: Sequence[bytes],
        pictures: Sequence[Picture],
        device: torch.device,
    ) -> Samples:
        depth = pictures[0].depth
        buffer, surfaces = allocate_pictures(pictures, nvdec.surface_dtype(depth), device)
        buffer.random_()  # memory is not cleared, and what follows a picture must not be used
        for payload, surface in zip(payloads, surfaces, strict=True):
            frame, found = codec.decode_frame(payload)
            assert found == depth
            self.decoded += 1
            samples = torch.from_numpy(frame.astype(np.int32)) + self.error
            surface.copy_((samples << 6 if depth == 10 else samples).to(surface.dtype))
        if depth == 16:
            return Samples(nvimage.unpack(buffer, depth), depth)
        return Samples(nvdec.unpack_(buffer, depth), depth)


def opened(tensor: CodecTensor) -> tuple[OpenedMatrix, Window]:
    return open_matrix(*tensor.coded), Window(*tensor.resolved_window)


def payload_of(matrix: OpenedMatrix) -> bytes:
    return read_tile(matrix.stored().data, matrix.header, 0)[0]


def taken(
    matrix: OpenedMatrix, device: torch.device, fails: str | None = None
) -> DeviceDecoder | None:
    """Which decoder of pictures decodes a matrix for a device; None where the CPU does."""
    used: list[DeviceDecoder] = []

    def use(decoder: Decoder) -> torch.Tensor:
        if fails is not None:
            raise DecoderError(fails)
        assert isinstance(decoder, pictures.PictureDecoder)
        used.append(decoder._decoder)
        return torch.empty(0)

    window = Window(0, matrix.header.rows, 0, matrix.header.cols)
    found = choice._first(matrix, window, device, "decode", use)
    assert (found is None) == (not used)
    return used[0] if used else None


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, DeviceDecoder], None]:
    """Make a decoder the device decoder of a codec."""

    def install(codec: str, decoder: DeviceDecoder) -> None:
        monkeypatch.setattr(type(get_codec(codec)), "device_decoder", decoder)

    return install


@pytest.mark.parametrize(("codec", "depth"), VIDEO + IMAGE)
def test_arithmetic_is_that_of_the_cpu(spiky: Tensor, codec: str, depth: int | None) -> None:
    weight = spiky + torch.linspace(-3, 3, len(spiky))[:, None] * spiky.std()
    tensor = coded(weight, codec, depth)
    assert tensor.zero_point is not None
    matrix, window = opened(tensor)
    assert len(matrix.header.tiles) > 1
    assert matrix.header.tiles["outliers_size"].any()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for part in (window, Window(100, 90, 0, 1536), Window(380, 4, 17, 300)):
            decoder = HostDecoder()
            found = pictures.decode_pictures(matrix.codec, matrix, part, dtype, CPU, decoder)
            assert found.is_contiguous()
            assert torch.equal(found, decode_matrix(matrix, part, dtype))
            assert decoder.decoded <= len(matrix.header.tiles)


@pytest.mark.parametrize(("codec", "depth"), [("hevc", 10), ("h264", 8), ("htj2k", 16)])
def test_sorted_rows_and_columns_come_back(codec: str, depth: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1027, 1024, generator=generator)
    weight[::50, ::200] *= 30
    depth_or_none = depth if len(get_codec(codec).bit_depths) > 1 else None
    config = codec_weight_only(codec, bits=4, preset=fastest(codec), bit_depth=depth_or_none)
    tensor = CodecTensor.from_hp(weight, config.with_importance(important(weight), 4))
    matrix, window = opened(tensor)
    assert matrix.header.order == SORTED_ROWS | SORTED_COLUMNS
    assert len({block.rows for block in matrix.header.blocks}) == 2
    assert matrix.header.tiles["outliers_size"].any()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for part in (window, Window(250, 530, 0, 1024), Window(1026, 1, 17, 300)):
            found = pictures.decode_pictures(matrix.codec, matrix, part, dtype, CPU, HostDecoder())
            assert torch.equal(found, decode_matrix(matrix, part, dtype))


@pytest.mark.parametrize("group", [1, 2, 5, 64])
@pytest.mark.parametrize("codec", ["h264", "jpeg2000"])
def test_blocks_of_several_sizes_in_groups(
    query: Tensor, codec: str, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups that begin and end within a row of blocks."""
    monkeypatch.setattr(pictures, "_GROUP", group)
    weight = query[:383, :379] + torch.linspace(-1, 1, 383)[:, None] * query.std()
    tensor = coded(weight.contiguous(), codec, tile_shape=(100, 150), tile_steps="adaptive")
    matrix, window = opened(tensor)
    blocks = matrix.header.blocks
    assert matrix.header.across == 3
    assert {block.rows for block in blocks} == {95, 96}
    assert {block.cols for block in blocks} == {126, 127}
    assert tensor.zero_point is not None
    for dtype in (torch.float32, torch.bfloat16):
        for part in (window, Window(90, 200, 140, 30), Window(382, 1, 0, 379)):
            found = pictures.decode_pictures(matrix.codec, matrix, part, dtype, CPU, HostDecoder())
            assert torch.equal(found, decode_matrix(matrix, part, dtype))


def test_pictures_of_several_sizes_in_one_buffer(query: Tensor) -> None:
    """Rows that fill their pictures, and one row more, which takes further lines."""
    matrix, window = opened(coded(query[:321].contiguous(), "jpeg2000", tile_shape=(65, 384)))
    pictures_of = {
        matrix.codec.read_header(read_tile(matrix.stored().data, matrix.header, index)[0])
        for index in range(len(matrix.header.tiles))
    }
    assert {picture.size for picture in pictures_of} == {(64, 384), (72, 384)}
    found = pictures.decode_pictures(
        matrix.codec, matrix, window, torch.float32, CPU, HostDecoder()
    )
    assert torch.equal(found, decode_matrix(matrix, window, torch.float32))


def test_groups_are_bounded(query: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, window = opened(coded(query, "h264", tile_shape=(64, 384)))
    sizes: list[int] = []

    class Watched(HostDecoder):
        def decode(self, codec: SampleCodec, payloads: Sequence[bytes], *rest: Any) -> Samples:
            sizes.append(len(payloads))
            return super().decode(codec, payloads, *rest)

    for tiles, weights, expected in (
        (64, 2**24, [6]),
        (4, 2**24, [3, 3]),
        (5, 2**24, [3, 3]),
        (64, 2 * 64 * 384, [2, 2, 2]),
        (64, 1, [1] * 6),
    ):
        monkeypatch.setattr(pictures, "_GROUP", tiles)
        monkeypatch.setattr(pictures, "_GROUP_WEIGHTS", weights)
        sizes.clear()
        found = pictures.decode_pictures(
            matrix.codec, matrix, window, torch.float32, CPU, Watched()
        )
        assert sizes == expected
        assert torch.equal(found, decode_matrix(matrix, window, torch.float32))


def test_every_header_is_read_once_at_each_use(
    query: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, window = opened(coded(query[:383].contiguous(), "h264", tile_shape=(64, 384)))
    codec = type(matrix.codec)
    read: list[bytes] = []
    original = codec.read_header
    monkeypatch.setattr(
        codec, "read_header", lambda self, data: (read.append(data), original(self, data))[1]
    )
    decoder = pictures.PictureDecoder(matrix.codec, HostDecoder())
    # The first picture of a size is decoded on the CPU too, which reads its header once more.
    decoder.decode(matrix, window, torch.float32, CPU)
    for _ in range(2):
        assert decoder.refusal(matrix, window, CPU) is None
        read.clear()
        assert decoder.refusal(matrix, window, CPU) is None
        decoder.decode(matrix, window, torch.float32, CPU)
        # `decode_frame`, which is no hardware, reads it for itself.
        assert len(read) == 2 * len(set(read)) == 2 * len(matrix.header.tiles)


def test_what_a_decoder_refuses_is_not_decoded(coded_query: CodecTensor) -> None:
    class Small(HostDecoder):
        asked = 0

        def refusal(self, codec: SampleCodec, picture: Picture, device: torch.device) -> str | None:
            self.asked += 1
            return f"{picture.width}x{picture.height} is too large"

    matrix, window = opened(coded_query)
    host = Small()
    decoder = pictures.PictureDecoder(matrix.codec, host)
    for _ in range(3):
        assert decoder.refusal(matrix, window, CPU) == "384x384 is too large"
    assert host.asked == 1
    with pytest.raises(DecoderError, match="384x384 is too large"):
        decoder.decode(matrix, window, torch.float32, CPU)
    assert host.decoded == 0


def test_pictures_of_different_depths_are_not_decoded_together(query: Tensor) -> None:
    narrow, wide = (opened(coded(query, "hevc", depth))[0] for depth in (8, 10))
    host = HostDecoder()
    payloads = [payload_of(narrow), payload_of(wide)]
    blocks = [narrow.header.blocks[0]] * 2
    with pytest.raises(DecoderError, match="pictures of different depths"):
        pictures._decode_group(narrow.codec, host, payloads, blocks, CPU)
    assert host.decoded == 0


def test_other_samples_than_the_cpus_are_refused(coded_query: CodecTensor) -> None:
    matrix, window = opened(coded_query)
    with pytest.raises(DecoderError, match="host returns other samples than the CPU's"):
        pictures.decode_pictures(
            matrix.codec, matrix, window, torch.float32, CPU, HostDecoder(error=1)
        )


def test_a_picture_of_a_kind_is_compared_once(
    coded_query: CodecTensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, window = opened(coded_query)
    codec = type(matrix.codec)
    compared = []
    original = codec.decode_frame
    monkeypatch.setattr(codec, "decode_frame", lambda *a: (compared.append(1), original(*a))[1])
    for _ in range(3):
        pictures.decode_pictures(matrix.codec, matrix, window, torch.float32, CPU, HostDecoder())
    assert len(compared) == 4  # three by the decoder


def test_a_corrupt_tile_is_not_handed_to_a_decoder(query: Tensor) -> None:
    tensor = coded(query, "h264")
    tensor.qdata[-100] ^= 1
    matrix, window = opened(tensor)
    decoder = HostDecoder()
    with pytest.raises(CodecError, match="tile 0 is corrupt"):
        pictures.decode_pictures(matrix.codec, matrix, window, torch.float32, CPU, decoder)
    assert decoder.decoded == 0


@pytest.mark.parametrize(("codec", "depth"), [*VIDEO, ("h264", 10)])
@pytest.mark.parametrize("shape", [(40, 72), (384, 384), (77, 1536), (9, 14336)])
def test_headers_say_what_the_decoder_returns(
    codec: str, depth: int, shape: tuple[int, int]
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    bit_depth = depth if len(get_codec(codec).bit_depths) > 1 else None
    config = codec_weight_only(codec, step=0.5, preset=fastest(codec), bit_depth=bit_depth)
    matrix, _ = opened(CodecTensor.from_hp(weight, config))
    payload = payload_of(matrix)
    assert isinstance(matrix.codec, SampleCodec)
    frame, bits = matrix.codec.decode_frame(payload)
    picture = read_picture(codec, payload)
    assert (picture.height, picture.width, picture.depth) == (*frame.shape, bits)
    assert picture.coded_width >= picture.width
    assert picture.coded_height >= picture.height
    for size in range(0, 60, 3):
        with pytest.raises(CodecError, match="video stream"):
            read_picture(codec, bytes(size))
        if size < 8:
            with pytest.raises(CodecError, match="video stream"):
                read_picture(codec, payload[:size])


@pytest.mark.parametrize("codec", ["hevc", "vp9", "av1"])
@pytest.mark.parametrize("rows", [144, 200, 290, 1000])
@pytest.mark.parametrize("cols", [1024, 2048, 4096, 14336])
def test_tiles_of_wide_matrices_are_high_enough_for_hardware(
    codec: str, rows: int, cols: int
) -> None:
    from torchcodec_weights.format.tiling import frame_shape, tile_grid

    weights = get_codec(codec).weights_per_tile(cols)
    for block in tile_grid((rows, cols), None, weights):
        assert frame_shape(block.rows * cols, cols)[0] >= 144


HEVC = nvdec.Capabilities(True, 7, 144, 8192, 144, 8192, 262144)


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        (Picture(4096, 192, 4096, 192, 10), None),
        (Picture(4096, 140, 4096, 160, 10), None),
        (Picture(4096, 64, 4096, 64, 10), "4096x64, and the chip takes 144x144 to 8192x8192"),
        (Picture(8200, 192, 8200, 192, 10), "8200x192"),
        (Picture(8192, 8192, 8192, 8192 + 16, 10), "8192x8208"),
    ],
)
def test_pictures_that_a_chip_takes(picture: Picture, reason: str | None) -> None:
    found = HEVC.refusal(picture)
    assert found is None if reason is None else reason in str(found)
    small = HEVC._replace(max_macroblocks=100)
    assert "the chip takes" in str(small.refusal(picture))
    none = nvdec.Capabilities(False, 0, 0, 0, 0, 0, 0)
    assert none.refusal(picture) == "the chip does not decode it at 10 bits"


def test_idle_pool_keeps_kinds_apart_and_the_last_used() -> None:
    made: list[tuple[str, int]] = []

    def create(kind: str) -> tuple[str, int]:
        made.append((kind, len(made)))
        return made[-1]

    pool = nvdec.IdlePool(create, 2)
    a, b, c = pool.take("x"), pool.take("x"), pool.take("y")
    assert made == [("x", 0), ("x", 1), ("y", 2)]
    pool.give_back("x", a)
    pool.give_back("x", b)
    assert pool.take("x") == b
    assert pool.take("y") == ("y", 3)
    pool.give_back("x", b)
    pool.give_back("y", c)  # one too many: the longest idle goes
    assert pool.take("x") == b
    assert pool.take("x") == ("x", 4)


def test_idle_pool_never_lends_one_twice() -> None:
    pool: nvdec.IdlePool[object] = nvdec.IdlePool(lambda kind: object(), 8)
    lent: set[object] = set()
    lock = threading.Lock()
    twice = []

    def work() -> None:
        for _ in range(300):
            item = pool.take("kind")
            with lock:
                if item in lent:
                    twice.append(item)
                lent.add(item)
            with lock:
                lent.discard(item)
            pool.give_back("kind", item)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not twice


@pytest.mark.parametrize(("codec", "depth"), VIDEO)
def test_packets_hold_the_stream(
    query: Tensor, codec: str, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a session feeds, read through the packet's address, decodes to the picture."""
    matrix, _ = opened(coded(query, codec, depth))
    payload = payload_of(matrix)
    module = SimpleNamespace(
        PacketData=SimpleNamespace, VideoPacketFlag=SimpleNamespace(ENDOFPICTURE=8)
    )
    monkeypatch.setattr(nvdec, "pynvvideocodec", lambda: (module, None))
    kind = matrix.codec
    assert isinstance(kind, SampleCodec)

    class Decoder:
        def Decode(self, packet: SimpleNamespace) -> list[object]:  # noqa: N802
            data = ctypes.string_at(packet.bsl_data, packet.bsl) if packet.bsl else b""
            if not data:
                return []
            assert packet.decode_flag == 8
            if data != payload:
                raise RuntimeError("no such\nstream\n\nat its source:1")
            return [kind.decode_frame(data)[0]]

    session = nvdec._Session.__new__(nvdec._Session)
    session._decoder = Decoder()
    (frame,) = session._feed(payload)
    assert np.array_equal(frame, kind.decode_frame(payload)[0])
    assert session._feed(b"") == []
    with pytest.raises(DecoderError, match=r"^NVDEC failed: no such stream$"):
        session._feed(payload[:-1])


@pytest.mark.parametrize(("codec", "depth"), IMAGE)
def test_whole_pictures_give_the_samples_of_the_cpu(
    query: Tensor, codec: str, depth: int | None
) -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    functions = {"jpeg2000": "jpeg2k_decode", "htj2k": "htj2k_decode"}
    matrix, _ = opened(coded(query, codec, depth))
    payload = payload_of(matrix)
    whole = torch.from_numpy(getattr(imagecodecs, functions[codec])(payload))
    assert isinstance(matrix.codec, SampleCodec)
    expected, bits = matrix.codec.decode_frame(payload)
    picture = matrix.codec.read_header(payload)
    assert (*picture.size, picture.depth) == (*expected.shape, bits)
    for image in (whole, whole[None]):
        found = nvimage.unpack(nvimage.frame_of(codec, image, picture), bits)
        assert np.array_equal(found.numpy(), expected)
    for wrong in (
        whole[None, None],
        whole.to(torch.int32),
        whole[None].expand(3, -1, -1),
        whole[:-2],
        whole[0],
    ):
        with pytest.raises(DecoderError, match=f"of a {codec} stream"):
            nvimage.frame_of(codec, wrong, picture)


@pytest.mark.parametrize(("codec", "depth"), IMAGE)
def test_nvimagecodec_reads_our_streams(query: Tensor, codec: str, depth: int | None) -> None:
    """By its decoders for the CPU, which are not ours to use, but parse and deliver alike."""
    module = pytest.importorskip("nvidia.nvimgcodec")
    matrix, _ = opened(coded(query, codec, depth))
    payload = payload_of(matrix)
    decoder = module.Decoder(
        device_id=module.NVIMGCODEC_DEVICE_CPU_ONLY,
        backends=[module.Backend(module.BackendKind.CPU_ONLY)],
    )
    (image,) = decoder.decode([module.CodeStream(payload)], params=nvimage.decode_params())
    assert isinstance(matrix.codec, SampleCodec)
    expected, bits = matrix.codec.decode_frame(payload)
    picture = matrix.codec.read_header(payload)
    found = nvimage.frame_of(codec, torch.from_numpy(np.array(image)), picture)
    assert np.array_equal(nvimage.unpack(found, bits).numpy(), expected)


def test_the_device_decodes_what_it_takes(
    coded_query: CodecTensor, install: Callable[[str, DeviceDecoder], None]
) -> None:
    matrix, _ = opened(coded_query)
    decoder = HostDecoder()
    install("h264", decoder)
    assert taken(matrix, CUDA) is decoder
    assert choice.decoder_name(matrix.codec.name, CUDA, matrix) == "host"
    with use_decoder("h264", "cpu"):
        assert taken(matrix, CUDA) is None
        name = choice.decoder_name(matrix.codec.name, CUDA, matrix)
        assert name == "h264 (PyAV) on the CPU, uploaded (use_decoder says so)"
    assert taken(matrix, CUDA) is decoder


def test_one_warning_for_each_codec_and_reason(
    coded_query: CodecTensor, install: Callable[[str, DeviceDecoder], None]
) -> None:
    matrix, _ = opened(coded_query)
    install("h264", HostDecoder("the engines are asleep"))
    with pytest.warns(RuntimeWarning, match="'h264' is decoded on the CPU .* asleep"):
        assert taken(matrix, CUDA) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert taken(matrix, CUDA) is None
    assert "asleep" in choice.decoder_name(matrix.codec.name, CUDA, matrix)
    install("h264", HostDecoder("the engines are gone"))
    with pytest.warns(RuntimeWarning, match="gone"):
        assert taken(matrix, CUDA) is None
    with (
        use_decoder("h264", "cuda"),
        pytest.raises(CodecUnavailableError, match=r"gone; use_decoder\('h264', None\)"),
    ):
        taken(matrix, CUDA)


def test_a_decoder_that_failed_is_not_tried_again(
    coded_query: CodecTensor, install: Callable[[str, DeviceDecoder], None]
) -> None:
    matrix, _ = opened(coded_query)
    decoder = HostDecoder()
    install("h264", decoder)
    with pytest.warns(RuntimeWarning, match="it failed"):
        assert taken(matrix, CUDA, fails="it failed") is None
    assert taken(matrix, CUDA) is None
    assert "it failed" in choice.decoder_name(matrix.codec.name, CUDA, matrix)
    assert taken(matrix, torch.device("cuda", 1)) is decoder
    use_decoder("h264", None)
    assert taken(matrix, CUDA) is decoder


def test_use_decoder_says_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="codec='vcd' is not a known codec"):
        use_decoder("vcd", "cpu")
    with pytest.raises(ValueError, match=r"decoder='gpu' .* allowed: 'cpu', 'cuda', None"):
        use_decoder("hevc", "gpu")
    for codec in ("vvc", "jpeg"):
        with pytest.raises(ValueError, match=f"decoder='cuda' with codec '{codec}': .*'cpu', None"):
            use_decoder(codec, "cuda")
    with use_decoder("hevc", "cuda"):
        with use_decoder("hevc", "cpu"):
            assert choice.chosen("hevc") == "cpu"
        assert choice.chosen("hevc") == "cuda"
    assert choice.chosen("hevc") is None


def test_decoders_for_cuda_by_name() -> None:
    """As `available_codecs()` lists them on a machine with a GPU."""
    expected = {
        "vvc": "vvc (PyAV) on the CPU, uploaded",
        "jpeg": "libjpeg-turbo (imagecodecs) on the CPU, uploaded",
        "jpegxl": "libjxl (imagecodecs) on the CPU, uploaded",
        "lossless": f"{get_codec('lossless').info().decoders['cpu']} on the CPU, uploaded",
    }
    for name, text in expected.items():
        codec = get_codec(name)
        assert choice.with_device(codec.info(), CUDA).decoders["cuda"] == text


def test_the_report_names_the_decoder(coded_query: CodecTensor) -> None:
    model = torch.nn.Linear(384, 384, bias=False)
    model.weight = torch.nn.Parameter(coded_query, requires_grad=False)
    report = compression_report(model)
    assert report.weights[0].decoder == "h264 (PyAV)"
    assert "h264 (PyAV)" in str(report)
    assert '"decoder": "h264 (PyAV)"' in report.to_json()


@pytest.mark.parametrize(
    ("package", "source", "load", "reason"),
    [
        ("PyNvVideoCodec", None, nvdec.pynvvideocodec, r"not installed: pip install .*\[nvdec\]"),
        (
            "PyNvVideoCodec",
            "raise RuntimeError('Driver version\\nis too old\\n\\nHave you tried')",
            nvdec.pynvvideocodec,
            r"^PyNvVideoCodec cannot be used: Driver version is too old$",
        ),
        (
            "PyNvVideoCodec",
            "import of_something_else",
            nvdec.pynvvideocodec,
            r"cannot be used: No module named 'of_something_else'$",
        ),
        (
            "PyNvVideoCodec",
            "import ctypes; ctypes.CDLL('libnvcuvid.so.0')",
            nvdec.pynvvideocodec,
            r"does not find libnvcuvid\.so\.0, a library of NVIDIA's driver: install",
        ),
        ("nvidia.nvimgcodec", None, nvimage.nvimgcodec, r"not installed: pip .*\[nvimage\]"),
        (
            "nvidia.nvimgcodec",
            "raise RuntimeError('no driver')",
            nvimage.nvimgcodec,
            "cannot be imported: no driver",
        ),
    ],
)
def test_packages_that_cannot_be_imported_say_why(
    package: str,
    source: str | None,
    load: Callable[[], tuple[object, str | None]],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package.split(".")[0]]:
        monkeypatch.delitem(sys.modules, name)
    if source is not None:
        folder = tmp_path.joinpath(*package.split("."))
        folder.mkdir(parents=True)
        for parent in {folder, folder.parent} - {tmp_path}:
            (parent / "__init__.py").write_text("")
        (folder / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.setattr(sys, "meta_path", [_Blocked((package,)), *sys.meta_path])
    load.cache_clear()  # type: ignore[attr-defined]
    try:
        module, found = load()
        assert module is None
        assert re.search(reason, str(found))
    finally:
        load.cache_clear()  # type: ignore[attr-defined]


class _Blocked:
    """An import hook that knows no package of some names."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


_ALONE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names} or name == "nvidia.nvimgcodec":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())

import torch
import torchcodec_weights as tw

weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
for codec, options in (("ectcq", {{"bits": 4}}), ("lossless", {{}})):
    coded = tw.CodecTensor.from_hp(weight, tw.codec_weight_only(codec, **options))
    decoded = coded.dequantize()
    assert (decoded - weight).std() < 0.1, codec
    torch.nn.functional.linear(weight, coded)
infos = {{info.name: info for info in tw.available_codecs()}}
assert infos["ectcq"].encoder
assert "pip install av" in infos["hevc"].missing
assert "torchcodec-weights[image]" in infos["jpeg"].missing
for codec, install in (("hevc", "pip install av"), ("vvc", "pip install"), ("jpeg", "[image]")):
    try:
        tw.CodecTensor.from_hp(weight, tw.codec_weight_only(codec, bits=2))
    except tw.CodecUnavailableError as error:
        assert install in str(error), error
    else:
        raise AssertionError(codec)
print("alone")
"""


def test_works_alone_and_says_what_is_missing_when_asked() -> None:
    """Without PyAV, FFmpeg, imagecodecs and NVIDIA's packages."""
    names = ("av", "imageio_ffmpeg", "imagecodecs", "PyNvVideoCodec")
    program = textwrap.dedent(_ALONE).format(names=set(names))
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip().endswith("alone")
