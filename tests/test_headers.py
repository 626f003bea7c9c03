"""`inspect` of safetensors reads headers alone: it says what the loaded tensors say."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hostile import NAME
from torch import Tensor

from torchcodec_weights import CodecTensor, allowed_codecs, codec_weight_only, save_file
from torchcodec_weights.cli.inspect_tensors import report
from torchcodec_weights.cli.weights import iterate_path
from torchcodec_weights.codecs.names import BUILT_IN
from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.errors import CodecError
from torchcodec_weights.format.container import header_bytes, parse_header
from torchcodec_weights.models import headers
from torchcodec_weights.models.checkpoint import FORMAT_DTYPES, load_file
from torchcodec_weights.models.folder import safetensors_files
from torchcodec_weights.models.headers import header_table
from torchcodec_weights.models.table import Table

TESTS = Path(__file__).parent


def outcome(table: Callable[[], Table | None]) -> tuple[object, ...]:
    """The table and its JSON; or the error."""
    try:
        found = table()
    except Exception as error:
        return type(error), str(error)
    assert found is not None
    return str(found), found.to_json()


def of_headers(path: Path) -> Table | None:
    return header_table(safetensors_files(path), path)


def same(path: Path) -> tuple[object, ...]:
    """What `inspect` says by headers, after a comparison with what it says of the tensors."""
    told = outcome(lambda: of_headers(path))
    assert told == outcome(lambda: report(path, None, None))
    return told


def weight(codec: str = "ectcq", seed: int = 0, dtype: torch.dtype = torch.float32) -> CodecTensor:
    matrix = torch.randn(96, 128, generator=torch.Generator().manual_seed(seed)).to(dtype)
    target = {} if codec == "lossless" else {"bits": 4}
    return CodecTensor.from_hp(matrix, codec_weight_only(codec, **target))


def plain(dtype: torch.dtype) -> Tensor:
    return torch.arange(6).reshape(2, 3).view(torch.uint8).flatten()[:48].view(dtype)


@pytest.mark.parametrize("codec", BUILT_IN)
def test_codecs(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"layer.weight": weight(codec), "bias": torch.ones(3)}, path)
    table, _ = same(path)
    assert "1 weights:" in str(table)
    assert get_codec(codec).decoders(torch.device("cpu")) == (), "else headers would not name it"


def test_what_a_file_can_hold(tmp_path: Path) -> None:
    """Dtypes, slices, views, other dimensions, tied weights, what lies beside them."""
    tensors: dict[str, Tensor] = {
        f"plain.{name}": plain(dtype) for name, dtype in FORMAT_DTYPES.items()
    }
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tensors[f"coded.{dtype}"] = weight(dtype=dtype)
    coded = weight(seed=1)
    tensors |= {"whole": coded, "tied": coded, "turned": coded.t(), "slice": coded[8:40, 2:66]}
    tensors |= {"turned slice": coded[8:40].t(), "kept": coded[:32].contiguous()}
    experts = torch.randn(4, 32, 64, generator=torch.Generator().manual_seed(2))
    tensors["experts"] = CodecTensor.from_hp(experts, codec_weight_only("ectcq", bits=3))
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(1.0)}
    save_file(tensors, path := tmp_path / "m.safetensors", {"license": "none"})
    _, text = same(path)
    rows = {row["name"]: row for row in json.loads(str(text))["weights"]}
    assert len(rows) == 9
    assert "tied" not in rows
    assert rows["slice"]["shape"] == [32, 64]


@pytest.mark.parametrize("version", [1, 2, 3])
def test_formats(tmp_path: Path, version: int) -> None:
    stored = torch.load(TESTS / "data" / f"format{version}.pt", weights_only=True)
    coded = {name: value for name, value in stored.items() if isinstance(value, CodecTensor)}
    assert coded
    versions = {parse_header(value.qdata.numpy().data).raw[4] for value in coded.values()}
    assert version in versions
    save_file(coded, tmp_path / "m.safetensors")
    same(tmp_path / "m.safetensors")


def split(folder: Path, tensors: Mapping[str, Tensor], indexed: bool) -> None:
    """Write tensors to two files, the parts of each weight in both."""
    save_file(tensors, whole := folder / "whole")
    inner = safetensors.torch.load_file(whole)
    with safetensors.safe_open(whole, "pt") as file:
        strings = file.metadata()
    whole.unlink()
    places = {}
    for number in range(2):
        path = folder / f"{number}.safetensors"
        names = sorted(inner)[number::2]
        safetensors.torch.save_file({name: inner[name] for name in names}, path, strings)
        places.update(dict.fromkeys(names, path.name))
    if indexed:
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("indexed", [True, False])
def test_directories(tmp_path: Path, indexed: bool) -> None:
    coded = weight()
    split(tmp_path, {"a": coded, "b": coded, "c.d": weight("lossless")}, indexed)
    assert "2 weights:" in str(same(tmp_path)[0])
    (tmp_path / "1.safetensors").unlink()
    kind, message = same(tmp_path)
    assert kind is (FileNotFoundError if indexed else CodecError), message
    (tmp_path / "config.json").write_text('{"torchcodec_weights_unfinished": 1}')
    assert same(tmp_path)[0] is ValueError


@pytest.mark.parametrize(
    "path", sorted((TESTS / "corpus").glob("*.safetensors")), ids=lambda path: path.stem
)
def test_files_that_lie(path: Path, tmp_path: Path) -> None:
    """Each is refused with the same words: all that fuzzing has found messages with."""
    kind, _ = same(path)
    assert kind is CodecError or not isinstance(kind, type)
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(path, folder)
    same(folder)


def test_damage(tmp_path: Path) -> None:
    """Each byte of a header and of the scales, and files that end anywhere."""
    save_file({NAME: weight()}, path := tmp_path / "m.safetensors")
    contents = path.read_bytes()
    start = contents.index(b"TCWB")
    size = len(header_bytes(memoryview(contents)[start:]))
    refused = 0
    for place in [*range(0, start, 37), *range(start, start + size, 5)]:
        damaged = bytearray(contents)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        refused += same(path)[0] is CodecError
    assert refused > size / 5
    for end in (0, 7, 8, 100, start, start + size, len(contents) - 1):
        path.write_bytes(contents[:end])
        assert same(path)[0] is CodecError


def test_limits(tmp_path: Path) -> None:
    save_file({NAME: weight("h264")}, path := tmp_path / "m.safetensors")
    with allowed_codecs(["ectcq"]):
        kind, message = same(path)
    assert kind is CodecError
    assert "encoded with the codec 'h264', by which files may not be decoded here" in str(message)


def test_a_file_that_is_cut_short_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({NAME: weight()}, path := tmp_path / "m.safetensors")
    original = headers.read_header

    def cut(file: Path) -> object:
        header = original(file)
        with file.open("r+b") as opened:
            opened.truncate(header.size + 20)
        return header

    monkeypatch.setattr(headers, "read_header", cut)
    with pytest.raises(CodecError, match=r"m\.safetensors was cut short while it was read"):
        of_headers(path)


def test_what_headers_leave_to_pytorch(tmp_path: Path) -> None:
    """A dtype that only newer versions name, and a header that only `safetensors` reads."""
    path = tmp_path / "m.safetensors"
    for table in (
        {"x": {"dtype": "F8_E4M3FNUZ", "shape": [2], "data_offsets": [0, 2]}},
        {"__metadata__": None, "x": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}},
    ):
        text = json.dumps(table).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(2))
        assert load_file(path)["x"].nbytes == 2
        assert of_headers(path) is None


def test_it_reads_no_more_than_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({NAME: weight(), "dense": torch.ones(1000)}, path := tmp_path / "m.safetensors")
    read: list[int] = []
    original = headers.StoredPart.read

    def counted(self: headers.StoredPart, count: int | None = None) -> bytes:
        read.append(len(data := original(self, count)))
        return data

    monkeypatch.setattr(headers.StoredPart, "read", counted)
    same(path)
    (coded,) = (value for _, value in iterate_path(path) if isinstance(value, CodecTensor))
    assert sum(read) < len(coded.header.raw) + 96 + 128 + 100
