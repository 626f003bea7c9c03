"""`sweep`: measures models × codecs × bits into a JSON file that a later run continues."""

import argparse
import copy
import time
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from torch import nn
from torchao.quantization import FqnToConfig
from tqdm.auto import tqdm

from torchcodec_weights.cli.arguments import DENSE
from torchcodec_weights.cli.page import check_page
from torchcodec_weights.codecs.base import LosslessCodec
from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.config import CodecWeightOnlyConfig, codec_weight_only
from torchcodec_weights.decoders.choice import available_codecs
from torchcodec_weights.errors import RateError
from torchcodec_weights.evaluation.choices import TITLES
from torchcodec_weights.evaluation.data import STS_BENCHMARK, WIKITEXT2
from torchcodec_weights.evaluation.metrics import check_metric, default_metric, measure
from torchcodec_weights.evaluation.models import check_name, encoded_weights, load_by_name
from torchcodec_weights.evaluation.rows import Row, Rows
from torchcodec_weights.evaluation.snr import snr_db
from torchcodec_weights.models.quantize import quantize_
from torchcodec_weights.models.report import compression_report
from torchcodec_weights.pages.document import write_page
from torchcodec_weights.pages.sweep import Point, sweep_page
from torchcodec_weights.system.terminal import printable


@dataclass(frozen=True)
class _Setting:
    """A codec and its settings, with defaults filled in; the codec "dense" encodes nothing."""

    codec: str
    preset: str | None
    profile: str | None
    asked_bits: float | None

    @property
    def config(self) -> CodecWeightOnlyConfig:
        return codec_weight_only(
            self.codec, self.asked_bits, preset=self.preset, profile=self.profile
        )

    def __str__(self) -> str:
        name = self.codec if self.preset is None else f"{self.codec}:{self.preset}"
        return name if self.asked_bits is None else f"{name} {self.asked_bits:g}"


def run(args: argparse.Namespace) -> None:
    """Run the command with the arguments of `cli.arguments`."""
    codecs = args.codecs or [DENSE, *(info.name for info in available_codecs() if info.encoder)]
    settings = _settings(codecs, args.bits)
    if args.text is not None and not args.text.is_file():
        raise ValueError(f"--text={str(args.text)!r}: allowed: a file")
    for name in args.models:
        check_name(name)
    if args.html is not None:
        check_page(args.html)
    rows = Rows(args.out, "--out")
    found: list[tuple[_Setting, Row]] = []
    total = len(args.models) * len(settings)
    with tqdm(total=total, desc="sweep", unit="point") as bar:
        for name in args.models:
            model, tokenizer = load_by_name(name)
            metrics = args.metrics or [default_metric(model)]
            for metric in metrics:
                check_metric(metric, model)
            for setting in settings:
                bar.set_postfix_str(printable(f"{name} {setting}"))
                wanted = [_point(name, setting, metric, args) for metric in metrics]
                missing = [point for point in wanted if rows.find(point) is None]
                if missing:
                    decoded, coding = _code(model, setting)
                    for point in missing:
                        row = point | coding
                        if decoded is not None:
                            row["value"] = _measure(point, decoded, tokenizer, args.text)
                        rows.add(row)
                for point in wanted:
                    row = rows.find(point) or {}
                    found.append((setting, row))
                    tqdm.write(printable(_line(setting, row)))
                bar.update()
    if args.html is not None:
        write_page(args.html, _page(found))


def _settings(codecs: list[str], bits: list[float]) -> list[_Setting]:
    """The settings to measure, checked before any work."""
    settings = []
    for text in codecs:
        name, *rest = text.split(":")
        if name == DENSE:
            if rest:
                raise ValueError(f"--codecs {text!r}: allowed: {DENSE} alone")
            settings.append(_Setting(DENSE, None, None, None))
            continue
        codec = get_codec(name)
        codec.require(encoder=True)
        if len(rest) > 2:
            raise ValueError(f"--codecs {text!r}: allowed: NAME[:PRESET[:PROFILE]]")
        preset = rest[0] if rest and rest[0] else codec.default_preset
        profile = rest[1] if len(rest) > 1 else next(iter(codec.profiles), None)
        rates = [None] if isinstance(codec, LosslessCodec) else bits
        settings += [_Setting(name, preset, profile, rate) for rate in rates]
    for setting in settings:
        if setting.codec != DENSE:
            setting.config  # noqa: B018 - raises where a value is not allowed
    return settings


def _point(model: str, setting: _Setting, metric: str, args: argparse.Namespace) -> Row:
    """The columns that identify a row."""
    if metric == "perplexity":
        data = {"text": args.text.name if args.text else WIKITEXT2, "tokens": args.tokens}
    else:
        data = {"text": STS_BENCHMARK, "tokens": None}
    return {"model": model, **asdict(setting), "metric": metric, **data}


def _code(model: Any, setting: _Setting) -> tuple[Any, Row]:
    """A model after encoding and decoding, and measurements of both.

    If the rate cannot be reached, the model is None and the row has an error.
    """
    if setting.codec == DENSE:
        return model, {"bits": 8.0 * next(model.parameters()).element_size()}
    coded = copy.deepcopy(model)
    names = list(encoded_weights(coded))
    start = time.perf_counter()
    try:
        quantize_(coded, FqnToConfig(dict.fromkeys(names, setting.config)))
    except RateError as error:
        return None, {"error": str(error)}
    encoded = time.perf_counter() - start
    report = compression_report(coded)
    if not report.weights:
        return None, {"error": "no weight was encoded: all stay dense"}
    weights = sum(row.shape[0] * row.shape[1] for row in report.weights)
    decoded = 0.0
    for row in report.weights:
        module_name, _, name = row.name.rpartition(".")
        module = coded.get_submodule(module_name)
        start = time.perf_counter()
        weight = module.get_parameter(name).data.dequantize()
        decoded += time.perf_counter() - start
        setattr(module, name, nn.Parameter(weight, requires_grad=False))
    snr = snr_db(
        (model.get_parameter(row.name), coded.get_parameter(row.name)) for row in report.weights
    )
    return coded, {
        "bits": report.bits_per_weight,
        "snr_db": snr if isfinite(snr) else None,
        "weights": weights,
        "encode_mweights_per_s": weights / encoded / 1e6,
        "decode_mweights_per_s": weights / decoded / 1e6,
    }


def _measure(point: Row, model: Any, tokenizer: Any, text: Path | None) -> float:
    if point["metric"] == "sts":
        return measure("sts", model, tokenizer)
    return measure("perplexity", model, tokenizer, text, point["tokens"])


def _page(rows: list[tuple[_Setting, Row]]) -> str:
    points, errors = [], []
    for setting, row in rows:
        if "error" in row:
            errors.append((f"{row['model']} {setting}", row["error"]))
            continue
        speeds = [
            f"{direction} {row[key]:,.1f} Mweights/s"
            for direction in ("encode", "decode")
            if (key := f"{direction}_mweights_per_s") in row
        ]
        points.append(
            Point(
                model=Path(row["model"]).name,
                curve=setting.codec + (f" ({setting.preset})" if setting.preset else ""),
                metric=TITLES[row["metric"]],
                bits=row["bits"],
                value=row["value"],
                snr_db=row.get("snr_db"),
                reference=setting.asked_bits is None,
                lower_is_better=row["metric"] == "perplexity",
                remarks=tuple(speeds),
            )
        )
    return sweep_page(points, errors)


def _line(setting: _Setting, row: Row) -> str:
    start = f"{row['model']:12} {setting!s:20}"
    if "error" in row:
        return f"{start} {row['error']}"
    line = f"{start} {row['bits']:7.4f} bits  {TITLES[row['metric']]} {row['value']:.2f}"
    if row.get("snr_db") is not None:
        line += f"  SNR {row['snr_db']:.2f} dB"
    if "weights" in row:
        line += (
            f"  encode {row['encode_mweights_per_s']:.2f}, "
            f"decode {row['decode_mweights_per_s']:.1f} Mweights/s"
        )
    return line
