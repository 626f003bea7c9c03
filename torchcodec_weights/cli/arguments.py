"""The arguments of all commands.

Nothing that is imported here imports PyTorch, so that `--help` and errors in arguments do not wait
for it.
"""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from torchcodec_weights.codecs.names import codec_names
from torchcodec_weights.evaluation.choices import METRICS, MODELS, TOKENS
from torchcodec_weights.system.byte_count import byte_count
from torchcodec_weights.system.terminal import printable

DENSE = "dense"
"""What `sweep --codecs` calls the model as it is."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of a command; `module` is the one in `cli` that runs it.

    Args:
        argv: by default the process's own.

    Raises:
        SystemExit: with status 2, if they cannot be parsed.
    """
    parser = _Parser(
        prog="torchcodec-weights",
        description="Neural-network weights as codec bitstreams.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_compress, _decompress, _inspect, _verify, _evaluate, _sweep, _codecs):
        add(commands)
    return parser.parse_args(argv)


def _compress(commands: Any) -> None:
    parser = commands.add_parser(
        "compress",
        help="encode the weights of a model",
        description="Encode the weights of a transformers model, so that from_pretrained opens it "
        "again where torchcodec_weights is installed, or all matrices of a safetensors file.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="directory with config.json and safetensors, or a .safetensors file; or a URL of one "
        "of them (https://, s3://, file://, any that fsspec opens)",
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
        "--embeddings",
        type=_embeddings,
        metavar="BITS|dense",
        help="bits per weight of input and output embeddings, in ectcq (default: 6, or those of "
        "--bits where they are more; lossless where the codec is; dense of a file, and with "
        "--include)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace OUT if this program wrote it, and begin anew where an OUT was begun with "
        "other settings",
    )
    parser.add_argument(
        "--max-memory",
        type=_memory,
        metavar="SIZE",
        help="memory of the process, '8 GiB' say (default: twice the largest tensor in float32 and "
        "1 GiB)",
    )
    parser.add_argument(
        "--delete-source",
        action="store_true",
        help="delete each file of weights in MODEL when its output is on the disk",
    )
    parser.add_argument(
        "--worker",
        type=_worker,
        metavar="I/N",
        help="encode the I-th of N shares, I from 0; the same command without --worker, when all "
        "are finished, finishes OUT",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be encoded, sizes, and the time by samples; write nothing",
    )
    parser.set_defaults(module="compress")


def _decompress(commands: Any) -> None:
    parser = commands.add_parser(
        "decompress",
        help="decode the weights of a compressed model",
        description="Decode what compress has encoded, to dense weights of their former dtype.",
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="compressed directory or .safetensors file"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="directory or file to write")
    parser.add_argument("--force", action="store_true", help="replace OUT if this program wrote it")
    _add_allowed_codecs(parser)
    parser.set_defaults(module="decompress")


def _inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="say what a compressed model holds",
        description="List the encoded weights of a compressed model, with totals.",
    )
    _add_source(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--extract-tile",
        nargs=3,
        metavar=("NAME", "INDEX", "OUT"),
        help="write the bitstream of one tile of a weight as the standard file that it is: "
        "H.266, .265, .264, IVF, JPEG, JPEG 2000, JPEG XL; OUT without a suffix gets the usual one",
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="a page to write: charts of the layers, and how their weights are distributed, for "
        "which they are decoded",
    )
    parser.add_argument(
        "--original",
        type=Path,
        metavar="FILE_OR_DIR",
        help="with --html: what was compressed, to show its weights beside the decoded ones",
    )
    _add_allowed_codecs(parser)
    parser.set_defaults(module="inspect")


def _verify(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="check a compressed model for damage",
        description="Check every checksum of every encoded weight, what the file says of it, and "
        "the checksums of other tensors that compress stored. Names what is damaged; the exit "
        "status is 1 if anything is.",
    )
    _add_source(parser)
    parser.add_argument(
        "--decode",
        action="store_true",
        help="decode every weight too, and compare it with the hash that compress stored",
    )
    _add_allowed_codecs(parser)
    parser.set_defaults(module="verify")


def _evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="measure perplexity, or correlation with people's similarity scores",
        description="Measure the perplexity of a causal language model on a text, or Spearman's "
        "rank correlation of an encoder's sentence similarities (mean pooling) with people's.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"directory, dense or compressed, or {' or '.join(MODELS)}",
    )
    parser.add_argument(
        "--task", choices=METRICS, help="default: perplexity if the model generates, else sts"
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="text for perplexity (default: WikiText-2), or for sts pairs in the layout of STS "
        "Benchmark (default: that)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help=f"perplexity: of the text's first N (default: {TOKENS})",
    )
    _add_allowed_codecs(parser)
    parser.set_defaults(module="evaluate")


def _sweep(commands: Any) -> None:
    parser = commands.add_parser(
        "sweep",
        help="measure models in many codecs and rates",
        description="Encode the Linear weights of models with codecs at rates, and measure each: "
        "metric, SNR, stored bits, speed. The file is rewritten after every row; rows that it "
        "holds already are not measured again. --html draws them.",
    )
    parser.add_argument(
        "--models", nargs="+", required=True, help=f"directories, or {', '.join(MODELS)}"
    )
    parser.add_argument(
        "--codecs",
        nargs="+",
        type=_codec,
        metavar="NAME[:PRESET[:PROFILE]]",
        help="default: dense, and every codec that is here in its default preset",
    )
    parser.add_argument(
        "--bits", nargs="+", type=float, default=[2.0, 3.0, 4.0], help="per weight; default: 2 3 4"
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        help="default: perplexity for models that generate, else sts",
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="for perplexity (default: WikiText-2)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        default=TOKENS,
        help=f"perplexity: of the text's first N (default: {TOKENS})",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON to write")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="a page to write: rate against quality as charts"
    )
    parser.set_defaults(module="sweep")


def _codecs(commands: Any) -> None:
    parser = commands.add_parser(
        "codecs",
        help="list the codecs",
        description="List the codecs: encoder, decoders by device, and what is not installed.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(module="codecs")


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        type=Path,
        metavar="FILE_OR_DIR",
        help="directory with safetensors, .safetensors file, or state dict saved by torch.save",
    )


def _add_allowed_codecs(parser: argparse.ArgumentParser) -> None:
    """Add the option `--allow-codecs`, which `cli.run` applies."""
    parser.add_argument(
        "--allow-codecs",
        metavar="NAMES",
        help="codecs that weights may be encoded with, with commas between them; for files from "
        "strangers: ectcq,lossless (default: all)",
    )


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a regular expression ({error}): allowed: those of Python"
        ) from None
    return text


def _worker(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed: I/N, I from 0 to N − 1")
    return int(match[1]), int(match[2])


def _embeddings(text: str) -> float | Literal["dense"]:
    if text == "dense":
        return "dense"
    try:
        bits = float(text)
    except ValueError:
        bits = 0.0
    if not 0 < bits < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text!r}: allowed: 'dense', or a number of bits as --bits takes"
        )
    return bits


def _memory(text: str) -> int:
    try:
        amount = byte_count("--max-memory", text, zero="none")
    except ValueError:
        amount = 0
    if not amount:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed: text like '8 GiB', '500MB'")
    return amount


def _codec(text: str) -> str:
    if text.split(":")[0] not in (DENSE, *codec_names()):
        raise argparse.ArgumentTypeError(
            f"{text!r}: allowed: {DENSE}, {', '.join(codec_names())}, each with :PRESET perhaps"
        )
    return text
