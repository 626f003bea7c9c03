"""A codec from another package, by entry point: the class of docs/adding_a_codec.md as printed."""

import re
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torchcodec_weights import CodecError, CodecTensor, available_codecs, codec_weight_only
from torchcodec_weights.codecs import registry

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
def test_where_it_is_missing_the_file_says_so(query: Tensor) -> None:
    coded = CodecTensor.from_hp(query, codec_weight_only("deflate", bits=4))
    registry._codecs.cache_clear()
    registry.entry_points = lambda group: []  # type: ignore[assignment]
    with pytest.raises(CodecError, match="encoded with the codec 'deflate'"):
        coded.dequantize()
