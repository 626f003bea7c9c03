"""`compress`: encodes the weights of a model's directory or of a safetensors file."""

import argparse
import re
from pathlib import Path
from typing import Any

from torchao.quantization import FqnToConfig

from torchcodec_weights.calibration.calibrate import calibrate
from torchcodec_weights.calibration.read_text import inputs_of_text
from torchcodec_weights.cli.output import FILE_MARK, check_output, check_replaceable, new_folder
from torchcodec_weights.codecs.registry import codec_names
from torchcodec_weights.config import CodecWeightOnlyConfig, codec_weight_only
from torchcodec_weights.matrix.geometry import FLOAT_DTYPES
from torchcodec_weights.models.checkpoint import load_file, load_metadata, save_file
from torchcodec_weights.models.huggingface import (
    copy_other_files,
    load_model,
    read_config,
    save_compressed,
    weight_names,
)
from torchcodec_weights.models.quantize import encode_tensors, quantize_
from torchcodec_weights.models.report import Report, compression_report, report_tensors
from torchcodec_weights.system.terminal import printable


def add(commands: Any) -> None:
    """Add the command to the subparsers of argparse."""
    parser = commands.add_parser(
        "compress",
        help="encode the weights of a model",
        description="Encode the weights of a transformers model, so that from_pretrained opens it "
        "again, or all matrices of a safetensors file. Needs torchcodec_weights to be imported "
        "where it is opened.",
    )
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="directory with config.json and safetensors, or a .safetensors file",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="directory or file to write")
    parser.add_argument("--codec", choices=codec_names(), default="ectcq", help="default: ectcq")
    target = parser.add_argument_group("target", "exactly one; none for lossless")
    target.add_argument("--bits", type=float, help="bits per weight, everything counted")
    target.add_argument("--step", type=float, help="quantization step in standard deviations")
    target.add_argument("--snr-db", type=float, help="weights over error, in dB")
    parser.add_argument(
        "--calibrate",
        metavar="self|FILE.txt",
        help="give bits to the layers, rows and columns whose errors the model suffers from, tried "
        "on text that the model writes itself (self; causal language models) or on a text; needs "
        "--bits and a directory",
    )
    parser.add_argument("--preset", help="time against quality, by the codec's names")
    parser.add_argument("--profile", help="one of the codec's profiles")
    parser.add_argument("--bit-depth", type=int, help="bits per sample, for codecs of samples")
    parser.add_argument(
        "--include",
        type=_regex,
        metavar="REGEX",
        help="encode parameters whose names this is found in, instead of all Linear weights",
    )
    parser.add_argument(
        "--exclude",
        type=_regex,
        metavar="REGEX",
        help="leave parameters dense whose names this is found in",
    )
    parser.add_argument(
        "--embeddings", action="store_true", help="encode input and output embeddings too"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if this program wrote it")
    parser.set_defaults(run=_run)


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a regular expression ({error}): allowed: those of Python"
        ) from None
    return text


def _run(args: argparse.Namespace) -> None:
    config = codec_weight_only(
        args.codec,
        args.bits,
        step=args.step,
        snr_db=args.snr_db,
        preset=args.preset,
        profile=args.profile,
        bit_depth=args.bit_depth,
    )
    config.resolve()[0].require(encoder=True)
    source: Path = args.model
    if not source.is_dir() and not (source.is_file() and source.suffix == ".safetensors"):
        raise ValueError(
            f"MODEL={str(source)!r}: allowed: a directory with config.json and safetensors, or a "
            ".safetensors file"
        )
    _check_calibrate(args)
    check_output(args.out, source, force=args.force)
    report = (_folder if source.is_dir() else _file)(args, config)
    print(printable(f"{args.out}: {report.totals}"))


def _folder(args: argparse.Namespace, config: CodecWeightOnlyConfig) -> Report:
    if "quantization_config" in read_config(args.model):
        raise ValueError(f"MODEL={str(args.model)!r} is quantized already: allowed: a dense model")
    model = load_model(args.model)
    names = weight_names(model, args.include, args.exclude, embeddings=args.embeddings)
    _check_choice(args, names)
    configs = dict.fromkeys(names, config)
    if args.calibrate is not None:
        configs.update(_calibrated(model, config, names, args))
    quantize_(model, FqnToConfig(configs))
    report = compression_report(model)
    _check_encoded(report)
    with new_folder(args.out, force=args.force) as folder:
        save_compressed(model, folder, config, embeddings=args.embeddings)
        copy_other_files(args.model, folder)
    return report


def _check_calibrate(args: argparse.Namespace) -> None:
    """Raise ValueError if `--calibrate` is not what it should be, before anything is loaded."""
    text: str | None = args.calibrate
    if text is None:
        return
    if text != "self" and not Path(text).is_file():
        raise ValueError(f"--calibrate={text!r}: allowed: self, or the path of a text file")
    if not args.model.is_dir():
        raise ValueError("--calibrate: allowed for a directory, as a file has no model to try")
    if args.bits is None:
        raise ValueError("--calibrate: allowed with --bits")


def _calibrated(
    model: Any, config: CodecWeightOnlyConfig, names: list[str], args: argparse.Namespace
) -> dict[str, CodecWeightOnlyConfig]:
    """Configurations of parameters by `calibrate`, for those called `weight` of a module."""
    inputs = None
    if args.calibrate != "self":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
        text = Path(args.calibrate).read_text(encoding="utf-8")
        inputs = inputs_of_text(text, tokenizer, model)
    chosen = set(names)
    plan = calibrate(
        model, config, lambda module, name: f"{name}.weight" in chosen, sample_inputs=inputs
    )
    return {f"{name}.weight": found for name, found in plan.fqn_to_config.items()}


def _file(args: argparse.Namespace, config: CodecWeightOnlyConfig) -> Report:
    if args.embeddings:
        raise ValueError("--embeddings: allowed for a directory; of a file all matrices are taken")
    tensors = load_file(args.model)
    chosen = {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.dim() >= 2
        and tensor.dtype in FLOAT_DTYPES
        and (args.include is None or re.search(args.include, name))
        and not (args.exclude and re.search(args.exclude, name))
    }
    _check_choice(args, list(chosen))
    tensors.update(encode_tensors(chosen, config))
    report = report_tensors(tensors.items())
    _check_encoded(report)
    check_replaceable(args.out, force=args.force)
    save_file(tensors, args.out, load_metadata(args.model) | FILE_MARK)
    return report


def _check_choice(args: argparse.Namespace, names: list[str]) -> None:
    if not names:
        raise ValueError(
            f"--include={args.include!r}, --exclude={args.exclude!r}: no weight is left to encode: "
            "allowed: patterns that leave a float weight of two dimensions or more"
        )


def _check_encoded(report: Report) -> None:
    if not report.weights:
        raise ValueError(
            "no weight was encoded: the warnings say why each stays dense. Nothing was written. "
            "Allowed: a target that a weight can reach"
        )
