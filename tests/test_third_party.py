"""A codec from another package, by entry point: the class of docs/adding_a_codec.md as printed."""

import os
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
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
    save_file,
    use_decoder,
)
from torchcodec_weights.codecs import names, registry
from torchcodec_weights.codecs.ectcq import ECTCQ
from torchcodec_weights.codecs.headers.fields import Picture, uncropped
from torchcodec_weights.codecs.pictures import SampleCodec
from torchcodec_weights.codecs.records import CodecInfo, EncoderSettings, RateCurve
from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.decoders import choice
from torchcodec_weights.errors import CodecUnavailableError, DecoderError
from torchcodec_weights.models.report import report_tensors

GUIDE = Path(__file__).parent.parent / "docs" / "adding_a_codec.md"


def install(site: Path, package: str, modules: dict[str, str], entries: dict[str, str]) -> None:
    """What an installer writes for a package with entry points of our group."""
    for name, source in modules.items():
        (site / f"{name}.py").write_text(source)
    folder = site / f"{package.replace('-', '_')}-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"[{names.GROUP}]", *(f"{name} = {value}" for name, value in entries.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")


def forget() -> None:
    names.entries.cache_clear()
    registry._loaded.cache_clear()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder where packages can be installed for the time of a test."""
    known = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    yield tmp_path
    forget()
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) == str(tmp_path / f"{name}.py"):
            del sys.modules[name]


def printed() -> str:
    """The class of the guide."""
    found = re.search(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert found
    return found[1]


@pytest.fixture
def deflate(site: Path) -> None:
    install(site, "my-package", {"my_package": printed()}, {"deflate": "my_package:Deflate"})


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
def test_the_program_lists_its_weights(query: Tensor, site: Path) -> None:
    """Its module imports names from the package, which `inspect` does not import before."""
    names = "import torchcodec_weights\n\nassert torchcodec_weights.codec_weight_only\n"
    (site / "my_package.py").write_text(names + printed())
    coded = CodecTensor.from_hp(query, codec_weight_only("deflate", bits=4))
    save_file({"w": coded}, path := site / "m.safetensors")
    command = [sys.executable, "-c", "from torchcodec_weights_cli import main; main()"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [*command, "inspect", str(path)], capture_output=True, text=True, env=environment
    )
    assert done.stdout == f"{report_tensors([('w', coded)])}\n", done.stderr


@pytest.mark.usefixtures("deflate")
def test_where_it_is_missing_the_file_says_so(query: Tensor, site: Path) -> None:
    coded = CodecTensor.from_hp(query, codec_weight_only("deflate", bits=4))
    shutil.rmtree(site / "my_package-1.0.dist-info")
    forget()
    with pytest.raises(CodecError, match="encoded with the codec 'deflate'"):
        coded.dequantize()


BROKEN = {
    "import": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "attribute": ("", "AttributeError: module 'broken' has no attribute 'Codec'"),
    "kind": ("Codec = print", "TypeError: <built-in function print> is not a class derived from"),
    "name": (
        "from torchcodec_weights.codecs.lossless import Lossless as Codec",
        "ValueError: its codec is named 'lossless'; both names must be the same",
    ),
}


@pytest.mark.parametrize(("source", "says"), BROKEN.values(), ids=BROKEN)
@pytest.mark.usefixtures("deflate")
def test_a_codec_that_cannot_be_loaded_breaks_no_other(
    source: str, says: str, site: Path, query: Tensor
) -> None:
    install(site, "bad-package", {"broken": source}, {"bad": "broken:Codec"})
    told = re.escape(
        f"codec 'bad': entry point 'bad' (broken:Codec) of package 'bad-package' cannot be "
        f"loaded: {says}"
    )
    for name in ("ectcq", "deflate"):
        assert CodecTensor.from_hp(query, codec_weight_only(name, bits=4)).codec == name
    with pytest.raises(CodecUnavailableError, match=told):
        get_codec("bad")
    infos = {info.name: info for info in available_codecs()}
    assert re.match(told, infos["bad"].missing or "")
    assert infos["bad"].encoder is None
    assert not infos["bad"].decoders
    assert infos["deflate"].missing is None
    with pytest.raises(ValueError, match=r"known: 'ectcq', .*'lossless', 'deflate', 'bad'$"):
        get_codec("none")


def test_a_codec_is_loaded_when_it_is_asked_for(site: Path) -> None:
    modules = {"wanted": printed(), "unwanted": printed().replace('"deflate"', '"other"')}
    install(site, "two", modules, {"deflate": "wanted:Deflate", "other": "unwanted:Deflate"})
    assert get_codec("deflate").name == "deflate"
    assert "unwanted" not in sys.modules
    assert get_codec("other").name == "other"


def test_a_codec_that_cannot_be_asked_is_listed(site: Path) -> None:
    source = printed().replace("return CodecInfo(", "raise OSError('no driver') or CodecInfo(")
    install(site, "my-package", {"my_package": source}, {"deflate": "my_package:Deflate"})
    infos = {info.name: info for info in available_codecs()}
    assert infos["deflate"].missing == (
        "info() of entry point 'deflate' (my_package:Deflate) of package 'my-package' raised "
        "OSError: no driver"
    )


@pytest.mark.usefixtures("deflate")
def test_a_report_says_what_is_wrong_with_a_codec(query: Tensor, site: Path) -> None:
    coded = CodecTensor.from_hp(query, codec_weight_only("deflate", bits=4))
    install(site, "their-package", {}, {"deflate": "my_package:Deflate"})
    forget()  # as in the next process
    (row,) = report_tensors([("w", coded)]).weights
    assert row.codec == "deflate"
    assert row.decoder.startswith("none: codec 'deflate' is registered more than once")


@pytest.mark.usefixtures("deflate")
def test_two_packages_with_one_name_are_told(site: Path) -> None:
    install(site, "their-package", {}, {"deflate": "my_package:Deflate"})
    told = "registered more than once: .*package '(my|their)-package' and .*'(my|their)-package'"
    with pytest.raises(CodecUnavailableError, match=told) as caught:
        get_codec("deflate")
    assert {"'my-package'", "'their-package'"} <= set(
        re.findall(r"'\S+-package'", str(caught.value))
    )
    infos = [info for info in available_codecs() if info.name == "deflate"]
    assert [info.missing for info in infos] == [str(caught.value)]
    assert get_codec("ectcq").name == "ectcq"


def test_a_built_in_codec_keeps_its_name(site: Path) -> None:
    install(site, "my-package", {"my_package": printed()}, {"ectcq": "my_package:Deflate"})
    told = (
        r"entry point 'ectcq' \(my_package:Deflate\) of package 'my-package' has the name of a "
        "codec of package 'torchcodec-weights'; the latter is used"
    )
    with pytest.warns(UserWarning, match=told):
        infos = available_codecs()
    assert [info.name for info in infos].count("ectcq") == 1
    assert isinstance(get_codec("ectcq"), ECTCQ)
    assert "my_package" not in sys.modules


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

    with pytest.raises(TypeError, match="read_header"):
        Unread()  # type: ignore[abstract]

    class Read(Unread):
        def read_header(self, payload: bytes) -> Picture:
            return uncropped(32, len(payload) // 32, depth=8)

    out = np.empty((32, 40), np.float32)
    Read().decode(bytes(32 * 40), 1.0, b"", (32, 40), out)
    assert (out == -128).all()
    with pytest.raises(CodecError, match="unread stream holds a frame of 400x32 samples, too many"):
        Read().decode(bytes(32 * 400), 1.0, b"", (32, 40), out)
