"""Calls that a user gets wrong: each error names the argument, its value and what is allowed."""

import io
import json
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import VIDEO
from torch import Tensor, nn
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import FqnToConfig

from torchcodec_weights import (
    CodecTensor,
    CodecWeightOnlyConfig,
    allowed_codecs,
    available_codecs,
    calibrate,
    codec_weight_only,
    compression_report,
    decoded_cache,
    decompress_,
    load_file,
    max_expansion,
    quantize_,
    resident,
    save_file,
    use_decoder,
)
from torchcodec_weights.codecs.records import EncoderSettings
from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.codecs.video import base as video
from torchcodec_weights.decoders.cache import CACHE

CONFIG = codec_weight_only("ectcq", bits=3, preset="fast")
WEIGHT = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
CODED = CodecTensor.from_hp(WEIGHT, CONFIG)
TOKENS = torch.tensor([1, 2])


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU())


def _is_relu(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.ReLU)


def _none(module: nn.Module, name: str) -> bool:
    return False


def _case(error: type[Exception], match: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    names = [*map(_short, args), *(f"{name}={_short(value)}" for name, value in kwargs.items())]
    label = f"{getattr(function, '__qualname__', function)}({', '.join(names)})"
    return pytest.param(error, match, function, args, kwargs, id=label)


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) < 30 else type(value).__name__


BITS = [
    _case(ValueError, rf"bits={shown}: allowed: ", codec_weight_only, "h264", value)
    for value, shown in (
        (True, "True"),
        (np.bool_(True), r"(np\.True_|True)"),  # the second in NumPy 1
        ("2", "'2'"),
        (2j, "2j"),
        (np.complex64(2), r"(np\.complex64)?\(2\+0j\)"),
        (torch.tensor(2j), r"tensor\(0\.\+2\.j\)"),
        (torch.tensor(True), r"tensor\(True\)"),
        (torch.tensor([2.0]), r"tensor\(\[2\.\]\)"),
        (torch.tensor(2.0, device="meta"), r"tensor\(.*meta.*"),
        ([2], r"\[2\]"),
        (0, "0"),
        (-1, "-1"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (torch.tensor(float("-inf")), r"tensor\(-inf\)"),
    )
]
CONFIGURATION = [
    *BITS,
    _case(ValueError, "bits: allowed: numbers up to", codec_weight_only, "h264", 10**400),
    _case(ValueError, "step='1': allowed: a number", codec_weight_only, "h264", step="1"),
    _case(ValueError, "snr_db=True: allowed: a number", codec_weight_only, "h264", snr_db=True),
    _case(ValueError, "exactly one must be given, got none", codec_weight_only, "h264"),
    _case(ValueError, "exactly one must be given, got", codec_weight_only, "h264", 2, step=1),
    _case(ValueError, "none may be given with codec 'lossless'", codec_weight_only, "lossless", 2),
    *[
        _case(ValueError, "codec=.* is not a known codec; known: 'ectcq'", codec_weight_only, c, 2)
        for c in (None, 5, [], "H264", "")
    ],
    *[
        _case(ValueError, r"tile_shape=.*: allowed: two integers above 0", codec_weight_only,
              "ectcq", 2, tile_shape=shape)
        for shape in (64, np.int64(64), "64", "ab", [64], [64, 64, 64], [0, 64], [-1, 64],
                      [64.0, 64], [True, 64], {64: 1, 32: 1}, [None, 64], ["6", "4"])
    ],
    _case(ValueError, r"tile_shape=\(64, 64\) with codec 'lossless': allowed: None",
          codec_weight_only, "lossless", tile_shape=[64, 64]),
    *[
        _case(ValueError, "bit_depth=.*: allowed: ", codec_weight_only, "h264", 2, bit_depth=depth)
        for depth in (8.0, True, "8", 9, torch.tensor(8))
    ],
    *[
        _case(ValueError, "tile_steps=.*: allowed: 'uniform', 'adaptive'", codec_weight_only,
              "h264", 2, tile_steps=steps)
        for steps in (None, 5, [], "Uniform")
    ],
    *[
        _case(ValueError, f"{name}=.* with codec 'h264': allowed: '", codec_weight_only, "h264", 2,
              **{name: value})
        for name in ("preset", "profile")
        for value in (5, [], "x")
    ],
    *[
        _case(ValueError, "encoder_params=.*: allowed: ", codec_weight_only, "h264", 2,
              encoder_params=params)
        for params in ("trellis=1", 5, [("a", "b")], {"trellis": True}, {1: "2"}, {"trellis": None})
    ],
]  # fmt: skip
PARAMETERS = [
    *[
        _case(ValueError, r"encoder_params=\{'x': '1'\} with codec .*: allowed: no",
              codec_weight_only, codec,
              None if codec == "lossless" else 2, encoder_params={"x": "1"})
        for codec in ("ectcq", "lossless", "jpeg", "jpeg2000", "htj2k", "jpegxl")
    ],
    *[
        _case(ValueError, rf"encoder_params=\{{'no-such': '1'\}} with codec '{codec}': allowed: "
              "what lib.* takes; it says: ", codec_weight_only, codec, 2,
              encoder_params={good: "1", "no-such": "1"})
        for codec, good in (("vvc", "depquant"), ("hevc", "signhide"), ("h264", "cabac"),
                            ("av1", "sharpness"), ("vp9", "sharpness"))
    ],
    *[
        _case(ValueError, rf"encoder_params=\{{'{name}': 'banana'\}} with codec '{codec}'",
              codec_weight_only, codec, 2, encoder_params={name: "banana"})
        for codec, name in (("vvc", "gopsize"), ("hevc", "signhide"), ("h264", "trellis"),
                            ("av1", "sharpness"), ("vp9", "aq-mode"))
    ],
    *[
        _case(ValueError, rf"encoder_params=\{{'{name}': '3'\}} with codec '{codec}': allowed: "
              "other parameters", codec_weight_only, codec, 2, encoder_params={name: "3"})
        for codec, name in (("vvc", "qp"), ("hevc", "qp"), ("h264", "qp"), ("av1", "qp"),
                            ("vp9", "crf"))
    ],
    *[
        _case(ValueError, "encoder_params=.*: allowed: one name and one value in each entry",
              codec_weight_only, "h264", 2, encoder_params=params)
        for params in ({"trellis": "1:no-such=1"}, {"trellis=1:no-such": "1"}, {"a=b": "1"})
    ],
]  # fmt: skip
MODELS = [
    *[
        _case(ValueError, "config=.*: allowed: codec_weight_only", quantize_, _model(), config)
        for config in ("ectcq", None, {"bits": 2}, CodecWeightOnlyConfig, [CONFIG], 5)
    ],
    *[
        _case(ValueError, r"(?s)model=.*: allowed: a torch\.nn\.Module", function, model, *rest)
        for function, rest in ((quantize_, [CONFIG]), (compression_report, []), (decompress_, []),
                               (calibrate, [CONFIG]), (resident, ["int8"]))
        for model in (None, "model", {}, WEIGHT, nn.Linear)
    ],
    _case(ValueError, "filter_fn='0': allowed: a function", quantize_, _model(), CONFIG, "0"),
    _case(ValueError, r"1 is selected, a ReLU without a parameter 'weight': allowed", quantize_,
          _model(), CONFIG, _is_relu),
    _case(ValueError, "1 is selected, a ReLU without a parameter 'weight'", quantize_, _model(),
          FqnToConfig({"1": CONFIG})),
    _case(ValueError, "config has '0': 'ectcq': allowed: codec_weight_only", quantize_, _model(),
          FqnToConfig({"0": "ectcq"})),
    _case(ValueError, r"config has 're:\(', which is no regular expression", quantize_, _model(),
          FqnToConfig({"re:(": CONFIG})),
    _case(ValueError, "config has 1 as a name: allowed: strings", quantize_, _model(),
          FqnToConfig({1: CONFIG})),
    _case(ValueError, "weight is on the meta device", quantize_, nn.Linear(64, 64, device="meta"),
          CONFIG),
    *[
        _case(ValueError, "config.*: allowed: codec_weight_only", calibrate, _model(), config)
        for config in (None, "ectcq", codec_weight_only("ectcq", step=1),
                       codec_weight_only("lossless"))
    ],
    _case(ValueError, "filter_fn='x': allowed: a function", calibrate, _model(), CONFIG, "x"),
    _case(ValueError, "1 is selected, a ReLU without", calibrate, _model(), CONFIG, _is_relu),
    _case(ValueError, "filter_fn selects no layer", calibrate, _model(), CONFIG, _none),
    _case(ValueError, "sample_inputs=None with Sequential: allowed", calibrate, _model(), CONFIG),
    *[
        _case(ValueError, r"(?s)sample_inputs=.*: allowed: a list of one input or more", calibrate,
              _model(), CONFIG, sample_inputs=inputs)
        for inputs in ([], 5, "x", WEIGHT, {"input": WEIGHT})
    ],
]  # fmt: skip
WEIGHTS = [
    *[
        _case(ValueError, match, CodecTensor.from_hp, weight, CONFIG)
        for weight, match in (
            (None, r"weight=None: allowed: a torch\.Tensor"),
            (np.ones((64, 64), np.float32), r"weight=array.*: allowed: a torch\.Tensor"),
            ([[1.0]], r"weight=\[\[1\.0\]\]: allowed: a torch\.Tensor"),
            (WEIGHT.int(), r"weight\.dtype=torch\.int32: allowed: torch\.float32"),
            (WEIGHT + 0j, r"weight\.dtype=torch\.complex64: allowed"),
            (WEIGHT.double(), r"weight\.dtype=torch\.float64: allowed"),
            (WEIGHT > 0, r"weight\.dtype=torch\.bool: allowed"),
            (WEIGHT.to(torch.float8_e4m3fn), r"weight\.dtype=torch\.float8_e4m3fn: allowed"),
            (WEIGHT[0], r"weight\.shape=\(64,\): allowed: 2 dimensions or more"),
            (WEIGHT[0, 0], r"weight\.shape=\(\): allowed: 2 dimensions or more"),
            (WEIGHT[:0], r"weight\.shape=\(0, 64\): allowed: at least one weight"),
            (WEIGHT.to("meta"), "weight is on the meta device"),
            (WEIGHT * float("nan"), "weight holds NaN or infinity: allowed: finite"),
            (WEIGHT / 0, "weight holds NaN or infinity"),
            (WEIGHT.to_sparse(), r"weight\.layout=torch\.sparse_coo: allowed: torch\.strided"),
            (torch.nested.nested_tensor([WEIGHT, WEIGHT]), r"weight\.layout=nested: allowed"),
            (CODED, "weight is a CodecTensor already"),
            (nn.Parameter(CODED, requires_grad=False), "weight is a CodecTensor already"),
        )
    ],
    *[
        _case(ValueError, "config=.*: allowed: codec_weight_only", CodecTensor.from_hp, WEIGHT, c)
        for c in ("ectcq", None, {"bits": 2}, CodecWeightOnlyConfig)
    ],
    *[
        _case(ValueError, r"output_dtype=.*: allowed: torch\.float32, torch\.float16",
              CODED.dequantize, dtype)
        for dtype in (torch.float64, torch.int8, torch.complex64, "float32", np.float32, float, 0)
    ],
    *[
        _case(RuntimeError, "Expected tensor for argument #1 'indices' to have one of the "
              "following scalar types: Long, Int; but got", F.embedding, indices, weight)
        for weight in (CODED, CODED.dequantize())
        for indices in (TOKENS.float(), TOKENS.bool(), TOKENS.short(), TOKENS.byte(), TOKENS + 0j)
    ],
    *[
        _case(TypeError, "Tensor", F.embedding, indices, weight)
        for weight in (CODED, WEIGHT)
        for indices in (None, [1], 1)
    ],
    _case(IndexError, "64 rows", F.embedding, torch.tensor([64]), CODED),
    _case(ValueError, r"input\.dtype=torch\.float64 with a weight of torch\.float32", F.linear,
          WEIGHT.double(), CODED),
    _case(ValueError, r"bias\.dtype=torch\.float64 with a weight of torch\.float32", F.linear,
          WEIGHT, CODED, torch.ones(64).double()),
    _case(ValueError, r"input\.shape=\(2, 65\): the last dimension must be 64", F.linear,
          torch.ones(2, 65), CODED),
]  # fmt: skip
SETTINGS = [
    *[
        _case(ValueError, "form=.*: allowed: 'bits', 'int8', 'dense'", resident, _model(), form)
        for form in ("int4", "", 5, True, [])
    ],
    _case(ValueError, "form=None, budget=None: allowed: one of the two", resident, _model()),
    _case(ValueError, "form='int8', budget=5: allowed: one", resident, _model(), "int8", budget=5),
    *[
        _case(ValueError, r"budget=.*: allowed: 0 \(bits for all\)", resident, _model(),
              budget=amount)
        for amount in (-1, float("inf"), "1", True, [])
    ],
    *[
        _case(ValueError, r"max_bytes=.*: allowed: 0 \(keep nothing\)", decoded_cache, amount)
        for amount in (-1, -0.5, float("nan"), float("inf"), None, True, [1], "1", "GB", "1XB",
                       "-1GB", "1,5 GB", "1e3MB", "1 GB 2", "", 2j, "1kiiB", "¹GB")
    ],
    *[
        _case(ValueError, "decoder=.* with codec 'ectcq': allowed: 'cpu', 'cuda', None",
              use_decoder, "ectcq", decoder)
        for decoder in ("gpu", 5, [], torch.device("cpu"))
    ],
    *[
        _case(ValueError, "codec=.* is not a known codec", use_decoder, codec, "cpu")
        for codec in (None, "x")
    ],
    *[
        _case(ValueError, "weights_per_byte=.*: allowed: an integer above 0", max_expansion, value)
        for value in (None, "x", 0, -1, float("nan"), float("inf"), True, [1])
    ],
    *[
        _case(ValueError, "allowed_codecs=.*: allowed: a list of names", allowed_codecs, names)
        for names in ("ectcq", 5)
    ],
    *[
        _case(ValueError, "codec=.* is not a known codec", allowed_codecs, names)
        for names in (["x"], [None], [5])
    ],
    _case(TypeError, "takes 0 positional arguments", available_codecs, "ectcq"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "match", "function", "args", "kwargs"),
    [*CONFIGURATION, *PARAMETERS, *MODELS, *WEIGHTS, *SETTINGS],
)
def test_misuse(
    error: type[Exception],
    match: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    budget = CACHE.max_bytes
    with pytest.raises(error, match=match):
        function(*args, **kwargs)
    assert CACHE.max_bytes == budget


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (_model(), r"tensors is a module, Sequential: allowed: .*state_dict\(\)"),
        ({"a": 1}, "tensors has 'a': 1: allowed: names as strings, with tensors"),
        ({"a": None}, "tensors has 'a': None: allowed"),
        ({"a": np.ones(2)}, r"tensors has 'a': array.*: allowed"),
        ({1: WEIGHT}, r"(?s)tensors has 1: tensor.*: allowed"),
        ({"a": WEIGHT.to("meta")}, "tensors: 'a' is on the meta device: allowed"),
        ({"a": WEIGHT.to_sparse()}, r"tensors: 'a' is torch\.sparse_coo: allowed"),
        (None, "tensors=None: allowed: a dictionary of tensors"),
        ([WEIGHT], r"(?s)tensors=\[tensor.*: allowed: a dictionary of tensors"),
        (CODED, "tensors=CodecTensor.*: allowed: a dictionary of tensors"),
    ],
)
def test_only_tensors_are_saved(tensors: Any, match: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=match):
        save_file(tensors, path)
    assert not path.exists()


@pytest.mark.parametrize("metadata", ["x", 5, {"a": 1}, {1: "a"}, [("a", "b")]])
def test_only_strings_are_metadata(metadata: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metadata.*: allowed: "):
        save_file({"a": WEIGHT}, tmp_path / "model.safetensors", metadata)


@pytest.mark.parametrize("filename", [None, 5])
def test_files_have_names(filename: Any) -> None:
    with pytest.raises(TypeError, match="PathLike"):
        save_file({"a": WEIGHT}, filename)
    with pytest.raises(TypeError, match="PathLike"):
        load_file(filename)


# What a user means is taken.


@pytest.mark.parametrize("name", ["bits", "step", "snr_db"])
@pytest.mark.parametrize(
    "value",
    [
        np.float32(2.5),
        np.float64(2.5),
        np.float16(2.5),
        np.int64(3),
        np.uint8(3),
        np.array(2.5),
        torch.tensor(2.5),
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.tensor(3),
    ],
    ids=repr,
)
def test_numbers_of_numpy_and_torch_are_taken(name: str, value: Any) -> None:
    config = codec_weight_only("h264", **{name: value})
    plain = codec_weight_only("h264", **{name: value.item()})
    assert type(getattr(config, name)) in (int, float)
    assert config == plain
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == plain
    file = io.BytesIO()
    torch.save(config, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == plain


def test_fractions_are_no_numbers_here() -> None:
    with pytest.raises(ValueError, match=r"bits=Fraction\(5, 2\): allowed: a number"):
        codec_weight_only("h264", Fraction(5, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "shape",
    [[32, 64], (32, 64), (np.int64(32), np.int32(64)), np.array([32, 64]), torch.Size([32, 64])],
    ids=repr,
)
def test_tile_shapes_are_taken(shape: Any) -> None:
    config = codec_weight_only("ectcq", 4, tile_shape=shape, preset="fast")
    assert config.tile_shape == [32, 64]
    assert all(type(side) is int for side in config.tile_shape)
    assert len(CodecTensor.from_hp(WEIGHT, config).header.tiles) == 2


def test_a_tile_larger_than_the_matrix_is_the_matrix() -> None:
    config = codec_weight_only("ectcq", 4, tile_shape=[10**30, 10**30], preset="fast")
    assert len(CodecTensor.from_hp(WEIGHT, config).header.tiles) == 1


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        (0, 0),
        (1000, 1000),
        (1.5e9, 1_500_000_000),
        (np.int64(7), 7),
        (np.float32(8), 8),
        ("100B", 100),
        ("1KB", 1000),
        ("2 MB", 2_000_000),
        ("1.5GB", 1_500_000_000),
        ("1KiB", 1024),
        ("0.5 MiB", 2**19),
        (" 3gib ", 3 * 2**30),
        ("1TiB", 2**40),
        ("0.1GB", 100_000_000),
    ],
)
def test_amounts_of_memory(amount: Any, expected: int) -> None:
    with decoded_cache(amount):
        assert expected == CACHE.max_bytes


@pytest.mark.parametrize(
    "weight",
    [
        WEIGHT.t(),
        WEIGHT[::2],
        WEIGHT[:1].expand(64, 64),
        WEIGHT.clone().requires_grad_(),
        torch._neg_view(WEIGHT),
        nn.Parameter(WEIGHT),
        WEIGHT.half(),
    ],
    ids=["transposed", "strided", "expanded", "with gradient", "negated", "parameter", "float16"],
)
def test_weights_that_are_taken(weight: Tensor) -> None:
    coded = CodecTensor.from_hp(weight, codec_weight_only("lossless"))
    assert torch.equal(coded.dequantize(), weight)
    assert not coded.requires_grad


def test_dense_tensors_of_any_dtype_are_copied_into() -> None:
    expected = CODED.dequantize()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert torch.equal(torch.zeros(64, 64, dtype=dtype).copy_(CODED), expected.to(dtype))


@pytest.mark.parametrize("indices", [TOKENS, TOKENS.int(), TOKENS[0], TOKENS[:0]], ids=repr)
@pytest.mark.parametrize("budget", ["0B", "1MB"])
def test_indices_that_are_taken(indices: Tensor, budget: str) -> None:
    dense = CODED.dequantize()
    with decoded_cache(budget):
        F.linear(WEIGHT, CODED)
        assert torch.equal(F.embedding(indices, CODED), F.embedding(indices, dense))
        with pytest.raises(RuntimeError, match="Long, Int; but got"):
            F.embedding(indices.float(), CODED)


def test_compiled_lookups_refuse_the_same_indices() -> None:
    with pytest.raises(RuntimeError, match="Long, Int; but got"):
        torch.compile(lambda i: F.embedding(i, CODED), backend="eager")(TOKENS.float())


# Encoders' parameters


@pytest.mark.parametrize("codec", [c for c in VIDEO if c != "vvc"])
def test_encoders_take_our_own_options(codec: str) -> None:
    kind = get_codec(codec)
    assert isinstance(kind, video.LibraryCodec)
    for preset in kind.presets:
        for depth in kind.bit_depths:
            for qp in kind.quantizer_steps(depth):
                options = kind.encoder_options(qp, EncoderSettings(preset, bit_depth=depth))
                assert not video._complaints(kind.encoder, options, depth)


def test_a_refused_parameter_is_refused_again() -> None:
    """The library leaves out what it logged before."""
    for _ in range(3):
        with pytest.raises(ValueError, match="'no-such'"):
            codec_weight_only("h264", 2, encoder_params={"no-such": "1"})


def test_numbers_are_values_of_parameters() -> None:
    config = codec_weight_only("hevc", 2, encoder_params={"rd": 3, "psy-rd": 0.5})
    assert config.encoder_params == {"rd": "3", "psy-rd": "0.5"}


def test_a_stored_configuration_loads_whatever_its_parameters() -> None:
    """Models were saved with parameters that no encoder took: they load, and encode no more."""
    config = CodecWeightOnlyConfig("ectcq", bits=2, encoder_params={"x": "1"})
    assert config_from_dict(config_to_dict(config)) == config
    with pytest.raises(ValueError, match="encoder_params="):
        CodecTensor.from_hp(WEIGHT, config)
    model = _model()
    with pytest.raises(ValueError, match="encoder_params="):
        quantize_(model, config)
    assert not compression_report(model).weights


# Configurations that concern nothing


@pytest.mark.parametrize(
    ("config", "filter_fn", "expected"),
    [
        (CONFIG, _none, ["no weight of Sequential was selected"]),
        (FqnToConfig({}), None, ["no weight of Sequential was selected"]),
        (FqnToConfig({"0": CONFIG}), None, []),
        (FqnToConfig({"0.weight": CONFIG}), None, []),
        (FqnToConfig({"re:[01]": None, "0": CONFIG}), None, []),
        (FqnToConfig({"0": CONFIG, "q_proj": CONFIG}), None, ["of the name 'q_proj'"]),
        (FqnToConfig({"0": CONFIG, "q_proj": None}), None, ["of the name 'q_proj'"]),
        (FqnToConfig({"0": CONFIG, "re:q.*": None}), None, ["of the name 're:q.*'"]),
        (
            FqnToConfig({"q": CONFIG, "k": CONFIG}),
            None,
            ["of the name 'q', 'k'", "no weight of Sequential was selected"],
        ),
    ],
)
def test_what_concerns_nothing_is_warned_of(
    config: Any, filter_fn: Any, expected: list[str]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantize_(_model(), config, filter_fn)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == len(expected)
    for message, part in zip(messages, expected, strict=True):
        assert part in message
    assert all(warning.filename == __file__ for warning in caught)


def test_a_model_without_linear_layers_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="no weight of Conv2d was selected, so none is encoded"):
        quantize_(nn.Conv2d(3, 8, 3), CONFIG)


def test_a_weight_used_twice_is_encoded_once() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    model[1].weight = model[0].weight
    quantize_(model, CONFIG)
    assert model[0].weight is model[1].weight
    assert len(compression_report(model).weights) == 1
