"""What profiles, tools, bit depths and frame layouts of the video codecs do to weights.

    python studies/profiles.py --json studies/results/profiles.json

Rows that the JSON file holds already are not measured again. The parts:

- `tools`: encoders with one tool changed at a time, by raw parameters, from a preset of ours. The
  preset `slow` of `vvc` and `hevc` is libvvenc's and x265's `medium` with all its block sizes.
- `depth`: 8 against 10 bits per sample.
- `layout`: tiles of whole rows, square tiles, weights in another order.
- `inter`: matrices as pictures of one sequence, coded by the ffmpeg program with one QP: all intra,
  low delay (each predicted from those before), random access (B pictures in a hierarchy).

Weights: `attention.output` of layer 3 of all-MiniLM-L6-v2, and Gaussian ones of the same shape,
384 × 384. The sequences are of pictures of that size as well: `layer`, all twelve of layer 3,
`depth`, the same matrix of the six layers in their order, and `gaussian`, six of noise, at the QP
that comes nearest to the bits asked. The gap is to Shannon's limit for Gaussian weights, 6.02 dB
per bit, so it compares rows whose bits are not quite the same.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from torchcodec_weights import CodecError, CodecTensor, RateError, codec_weight_only
from torchcodec_weights.codecs.video import ffmpeg
from torchcodec_weights.encoder.rate import DB_PER_BIT
from torchcodec_weights.evaluation.models import minilm_weights
from torchcodec_weights.evaluation.rows import Row, Rows
from torchcodec_weights.evaluation.snr import snr_db
from torchcodec_weights.matrix.normalize import normalize

SIDE = 384
LAYER = "encoder.layer.3."
MATRIX = "attention.output.dense.weight"

TOOLS: dict[str, dict[str, dict[str, str]]] = {
    "vvc/slow": {
        "as it is": {},
        "without dependent quantization (sign hiding instead)": {
            "depquant": "0",
            "signhideflag": "1",
        },
        "without dependent quantization, sign hiding, RDOQ": {
            "depquant": "0",
            "signhideflag": "0",
            "rdoq": "0",
            "rdoqts": "0",
        },
        "without transform skip": {"transformskip": "0", "bdpcm": "0"},
        "without MTS": {"mts": "0"},
        "without LFNST": {"lfnst": "0"},
        "without MIP": {"mip": "0"},
        "without ISP": {"isp": "0"},
        "without MRL": {"mrl": "0"},
        "without ALF": {"alf": "0", "ccalf": "0"},
        "without SAO": {"sao": "0"},
        "without deblocking": {"loopfilterdisable": "1", "encdbopt": "0"},
        "CTU of 64": {"ctusize": "64"},
        "no multi-type tree": {"maxmttdepthi": "0"},
        "blocks of 32 alone": {"maxmttdepthi": "0", "minqtislice": "32"},
        "blocks of 16 alone": {"maxmttdepthi": "0", "minqtislice": "16", "ctusize": "32"},
    },
    "vvc/medium": {
        "as it is": {},
        "with transform skip": {"transformskip": "1"},
        "with MTS": {"mts": "1"},
        "with LFNST": {"lfnst": "1"},
        "with MIP": {"mip": "1"},
        "with ISP": {"isp": "1"},
        "without ALF": {"alf": "0"},
        "without deblocking": {"loopfilterdisable": "1", "encdbopt": "0"},
        "without dependent quantization (sign hiding instead)": {
            "depquant": "0",
            "signhideflag": "1",
        },
    },
    "hevc/slow": {
        "as it is": {},
        "RDOQ level 1": {"rdoq-level": "1"},
        "without RDOQ": {"rdoq-level": "0"},
        "without sign hiding": {"no-signhide": "1"},
        "with transform skip": {"tskip": "1"},
        "with deblocking": {"no-deblock": "0", "deblock": "0,0"},
        "with SAO": {"no-sao": "0", "sao": "1"},
        "with psychovisual RDOQ": {"psy-rd": "2", "psy-rdoq": "1"},
        "CTU of 16": {"ctu": "16", "min-cu-size": "8"},
        "blocks of 32 alone": {"ctu": "32", "min-cu-size": "32"},
    },
    "h264/medium": {
        "as it is": {},
        "without trellis": {"trellis": "0"},
        "without CABAC": {"cabac": "0", "trellis": "0"},
        "with deblocking": {"no-deblock": "0", "deblock": "0,0"},
    },
    "av1/medium": {
        "as it is": {},
        "with deblocking": {"enable-dlf": "1"},
        "with CDEF": {"enable-cdef": "1"},
        "with restoration": {"enable-restoration": "1"},
    },
}
DEPTHS = ("hevc/medium", "h264/medium", "av1/medium")
LAYOUTS = ("vvc/faster", "hevc/medium", "h264/medium", "av1/medium", "jpegxl/medium")
ORDERS = ("whole rows", "192", "96", "columns in another order", "transposed")
INTER = {
    "vvc": {
        "all-intra": "intraperiod=1:gopsize=1",
        "low-delay": "intraperiod=-1:gopsize=8:picreordering=0:decodingrefreshtype=none",
        "random-access": "intraperiod=32:gopsize=16",
    },
    "hevc": {
        "all-intra": "keyint=1:bframes=0",
        "low-delay": "keyint=250:bframes=0:ref=4",
        "random-access": "keyint=250:bframes=4:b-adapt=0:b-pyramid=1:ref=4",
    },
    "h264": {
        "all-intra": "keyint=1:bframes=0",
        "low-delay": "keyint=250:bframes=0:ref=4",
        "random-access": "keyint=250:bframes=3:b-adapt=0:b-pyramid=normal:ref=4",
    },
}
_EVEN = "ipratio=1:pbratio=1:aq-mode=0:scenecut=0:rc-lookahead=8"
_COMMON = {
    "vvc": (
        "libvvenc",
        "faster",
        10,
        "intraqpoffset=0:perceptqpa=0:mctf=0:bim=0:depquant=1:signhideflag=0:verbosity=0",
    ),
    "hevc": (
        "libx265",
        "medium",
        10,
        f"{_EVEN}:psy-rd=0:psy-rdoq=0:cutree=0:sao=0:no-deblock=1:rd=6:rdoq-level=2:log-level=0",
    ),
    "h264": ("libx264", "medium", 8, f"{_EVEN}:psy=0:mbtree=0:no-deblock=1:weightp=0:trellis=2"),
}
_DEVIATION = 2**4.5  # of samples, at 8 bits
_QP = {2.0: 31, 3.0: 25}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=["tools", "depth", "layout", "inter"])
    parser.add_argument("--bits", nargs="+", type=float, default=[2.0, 3.0])
    parser.add_argument("--codecs", nargs="+", help="of these alone")
    parser.add_argument("--json", type=Path, help="rows are read from there and written to it")
    args = parser.parse_args()
    rows = Rows(args.json)
    cases = [
        (case, bits)
        for part in args.parts
        for case in _cases(part)
        for bits in args.bits
        if not args.codecs or case["codec"].partition("/")[0] in args.codecs
    ]
    for case, bits in tqdm(cases, desc="cases"):
        key = {**case, "asked": bits}
        row = rows.find(key)
        if row is None:
            measure = _sequence if case["part"] == "inter" else _matrix
            row = key | measure(case, bits)
            rows.add(row)
        found = row.get("error") or (
            f"{row['bits']:.3f} bits, {row['snr_db']:.2f} dB, gap {row['gap_db']:.2f} dB"
        )
        tqdm.write(f"{' | '.join(str(value) for value in key.values())}: {found}")


def _cases(part: str) -> Iterator[dict[str, str]]:
    if part == "inter":
        for sequence in ("layer", "depth", "gaussian"):
            for codec, profiles in INTER.items():
                for profile in profiles:
                    yield {"part": part, "codec": codec, "what": profile, "weights": sequence}
        return
    parts: dict[str, Mapping[str, Iterable[str]]] = {
        "tools": TOOLS,
        "depth": dict.fromkeys(DEPTHS, ("8", "10")),
        "layout": dict.fromkeys(LAYOUTS, ORDERS),
    }
    for weights in ("minilm",) if part == "layout" else ("gaussian", "minilm"):
        for codec, variants in parts[part].items():
            for what in variants:
                yield {"part": part, "codec": codec, "what": what, "weights": weights}


@cache
def _weight(name: str) -> Tensor:
    if name == "gaussian":
        return torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    weight: Tensor = minilm_weights()[LAYER + MATRIX]
    return weight


def _matrix(case: dict[str, str], bits: float) -> Row:
    codec, _, preset = case["codec"].partition("/")
    what, weight = case["what"], _weight(case["weights"])
    side = [int(what)] * 2 if case["part"] == "layout" and what.isdecimal() else None
    if what == "columns in another order":
        weight = weight[:, torch.randperm(SIDE, generator=torch.Generator().manual_seed(0))]
    elif what == "transposed":
        weight = weight.T
    weight = weight.contiguous()
    try:
        config = codec_weight_only(
            codec,
            bits=bits,
            preset=preset,
            bit_depth=int(what) if case["part"] == "depth" else None,
            encoder_params=TOOLS[case["codec"]][what] or None if case["part"] == "tools" else None,
            tile_shape=side,
        )
        coded = CodecTensor.from_hp(weight, config)
    except (CodecError, RateError, ValueError) as failure:
        return {"error": str(failure)[-300:]}
    return _found(coded.bits_per_weight, snr_db([(weight, coded.dequantize())]))


def _found(bits: float, snr: float) -> Row:
    return {"bits": bits, "snr_db": snr, "gap_db": DB_PER_BIT * bits - snr}


@cache
def _pictures(sequence: str) -> NDArray[np.float32]:
    """(pictures, 384, 384), normalized weights."""
    if sequence == "gaussian":
        return torch.randn(6, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).numpy()
    wanted = LAYER if sequence == "layer" else MATRIX
    found = []
    for name, weight in minilm_weights().items():
        if wanted in name and weight.dim() == 2:
            z = normalize(weight.numpy(), None).z
            found += [part for band in z.reshape(-1, SIDE, z.shape[1]) for part in _squares(band)]
    return np.stack(found)


def _squares(band: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    return np.split(band, band.shape[1] // SIDE, axis=1)


def _sequence(case: dict[str, str], bits: float) -> Row:
    qp, tried = _QP[bits], dict[int, Row]()
    while qp not in tried and len(tried) < 4:
        found = _coded_sequence(case, qp)
        if "error" in found:
            return found
        tried[qp] = found
        qp = max(1, qp + round(6 * (found["bits"] - bits)))  # six steps double the quantizer's
    best = min(tried, key=lambda qp: abs(tried[qp]["bits"] - bits))
    return {"qp": best, **tried[best]}


def _coded_sequence(case: dict[str, str], qp: int) -> Row:
    z = _pictures(case["weights"])
    encoder, preset, depth, common = _COMMON[case["codec"]]
    unit = _DEVIATION * 2 ** (depth - 8)
    samples = np.clip(np.rint(z * unit) + 2 ** (depth - 1), 0, 2**depth - 1).astype(np.uint16)
    raw = b"".join(ffmpeg.planar_bytes(picture, depth) for picture in samples)
    pixels = ["-pix_fmt", ffmpeg.PIX_FMT[depth]]
    option = {"vvc": "-vvenc-params", "hevc": "-x265-params", "h264": "-x264-params"}
    source = ["-f", "rawvideo", *pixels, "-s", f"{SIDE}x{SIDE}", "-r", "25", "-i", "pipe:0"]
    options = ["-c:v", encoder, "-threads", "1", "-preset", preset, "-qp", str(qp)]
    if case["codec"] == "vvc":
        options += ["-qpa", "0"]
    options += [option[case["codec"]], f"{INTER[case['codec']][case['what']]}:{common}"]
    with tempfile.TemporaryDirectory() as folder:
        stream = Path(folder) / "stream"
        try:
            _program([*source, *options, "-f", case["codec"], str(stream)], raw)
            decoded = _program(
                ["-f", case["codec"], "-i", str(stream), "-f", "rawvideo", *pixels, "pipe:1"]
            )
        except subprocess.CalledProcessError as failure:
            return {"error": failure.stderr.decode(errors="replace")[-300:]}
        stored = 8 * stream.stat().st_size
    planes = np.frombuffer(decoded, "<u2" if depth > 8 else "u1").reshape(-1, 3 * SIDE**2 // 2)
    if len(planes) != len(z):
        return {"error": f"{len(planes)} pictures decoded of {len(z)}"}
    luma = planes[:, : SIDE**2].reshape(z.shape).astype(np.float64)
    return _found(stored / z.size, snr_db([(z, (luma - 2 ** (depth - 1)) / unit)]))


def _program(arguments: list[str], data: bytes = b"") -> bytes:
    path = ffmpeg.program()
    if path is None:
        raise SystemExit(ffmpeg.INSTALL_PROGRAM)
    command = [path, "-hide_banner", "-loglevel", "error", *arguments]
    return subprocess.run(command, input=data, check=True, capture_output=True).stdout


if __name__ == "__main__":
    main()
