"""A codec from another package, by entry point: the class of docs/adding_a_codec.md as printed."""

import re
import zlib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from torchcodec_weights import (
    CodecError,
    CodecTensor,
    available_codecs,
    codec_weight_only,
    use_decoder,
)
from torchcodec_weights.codecs import registry
from torchcodec_weights.codecs.base import CodecInfo, EncoderSettings, RateCurve, SampleCodec
from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.decoders import choice
from torchcodec_weights.errors import DecoderError

GUIDE = Path(__file__).parent.parent / "docs" / "adding_a_codec.md"


@pytest.fixture
def deflate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    found = re.search(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert found
    names: dict[str, object] = {}
    exec(found[1], names)

    class Entry(EntryPoint):
        def load(self) -> object:
            return names["Deflate"]

    entry = Entry("deflate", "my_package:Deflate", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    registry._codecs.cache_clear()
    yield
    registry._codecs.cache_clear()


@pytest.mark.usefixtures("deflate")
def test_it_works_as_every_other(query: Tensor) -> None:
    assert "deflate" in {info.name for info in available_codecs()}
    coded = CodecTensor.from_hp(query, codec_weight_only("deflate", bits=4))
    assert 3.97 < coded.bits_per_weight <= 4
    assert coded.header.snr_db > 18
    assert torch.nn.functional.linear(torch.ones(1, 384), coded).isfinite().all()


@pytest.mark.usefixtures("deflate")
def test_it_brings_kernels(query: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder of the guide, as it is printed: taken, passed by, and given up."""
    codec = get_codec("deflate")
    names: dict[str, object] = {"Deflate": type(codec), "zlib": zlib, "np": np}
    monkeypatch.setattr(type(codec), "decoders", type(codec).decoders)  # undone at the end
    printed = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (code,) = [text for text in printed if "(Decoder)" in text]
    exec(code, names)
    monkeypatch.setattr(choice, "_failures", {})
    monkeypatch.setattr(choice, "_warned", set())
    coded = CodecTensor.from_hp(query, codec_weight_only("deflate", bits=4))
    with use_decoder("deflate", "cpu"):
        expected = coded.dequantize()
    seen = []
    operators = names["Operators"]
    original = operators.decode  # type: ignore[attr-defined]

    def watched(self: object, *args: object) -> Tensor:
        seen.append(args)
        return original(self, *args)

    monkeypatch.setattr(operators, "decode", watched)
    assert torch.equal(coded.dequantize(), expected)
    assert torch.equal(coded[100:150, 7:99].dequantize(), expected[100:150, 7:99])
    assert len(seen) == 2
    infos = {info.name: info for info in available_codecs()}
    assert infos["deflate"].decoders == {"cpu": "deflate (operators)"}

    blocks = codec_weight_only("deflate", bits=4, tile_shape=(100, 100))
    with pytest.warns(RuntimeWarning, match="its tiles are blocks"):
        CodecTensor.from_hp(query, blocks).dequantize()
    assert len(seen) == 2

    def fails(self: object, *args: object) -> Tensor:
        seen.append(args)
        raise DecoderError("it failed")

    monkeypatch.setattr(operators, "decode", fails)
    with pytest.warns(RuntimeWarning, match="it failed"):
        assert torch.equal(coded.dequantize(), expected)
    assert torch.equal(coded.dequantize(), expected)
    assert len(seen) == 3, "what failed is not tried again"
    use_decoder("deflate", None)  # which forgets failures
    assert torch.equal(coded.dequantize(), expected)
    assert len(seen) == 4


@pytest.mark.usefixtures("deflate")
def test_where_it_is_missing_the_file_says_so(query: Tensor) -> None:
    coded = CodecTensor.from_hp(query, codec_weight_only("deflate", bits=4))
    registry._codecs.cache_clear()
    registry.entry_points = lambda group: []  # type: ignore[assignment]
    with pytest.raises(CodecError, match="encoded with the codec 'deflate'"):
        coded.dequantize()


def test_a_codec_of_pictures_that_reads_no_header_cannot_be_made() -> None:
    """`decode_frame` would be handed any size."""

    class Unread(SampleCodec):
        name = "unread"

        def info(self) -> CodecInfo:
            return CodecInfo(self.name, "none", lossy=True, encoder=None, decoders={})

        def rate_curve(self, settings: EncoderSettings) -> RateCurve:
            raise NotImplementedError

        def depth(self, settings: EncoderSettings) -> int:
            return 8

        def quantizer_steps(self, depth: int) -> dict[int, float]:
            return {1: 1.0}

        def encode_frame(self, frame: np.ndarray, qp: int, settings: EncoderSettings) -> bytes:
            return frame.tobytes()

        def decode_frame(self, payload: bytes) -> tuple[np.ndarray, int]:
            return np.frombuffer(payload, np.uint8).reshape(32, -1), 8

    with pytest.raises(TypeError, match="frame_size"):
        Unread()  # type: ignore[abstract]

    class Read(Unread):
        def frame_size(self, payload: bytes) -> tuple[int, int]:
            return 32, len(payload) // 32

    out = np.empty((32, 40), np.float32)
    Read().decode(bytes(32 * 40), 1.0, b"", (32, 40), out)
    assert (out == -128).all()
    with pytest.raises(CodecError, match="unread stream holds a frame of 400x32 samples, too many"):
        Read().decode(bytes(32 * 400), 1.0, b"", (32, 40), out)
