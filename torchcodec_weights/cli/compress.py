"""`compress`: encodes the weights of a model's directory or of a safetensors file."""

import argparse
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torchao.quantization import FqnToConfig

from torchcodec_weights.calibration.blocks import NotByBlocksError
from torchcodec_weights.calibration.calibrate import calibrate
from torchcodec_weights.calibration.read_text import inputs_of_text
from torchcodec_weights.cli.weights import iterate_path
from torchcodec_weights.codecs.base import LosslessCodec
from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.config import CodecWeightOnlyConfig, codec_weight_only
from torchcodec_weights.convert.calibration import fits_in_memory
from torchcodec_weights.convert.distributed import compress_distributed, is_first, is_shared
from torchcodec_weights.convert.forecast import forecast
from torchcodec_weights.convert.output import new_folder
from torchcodec_weights.convert.plan import Choice, NamesDifferError
from torchcodec_weights.convert.run import Limits, NothingEncodedError
from torchcodec_weights.convert.source import Source, open_source
from torchcodec_weights.errors import CodecError
from torchcodec_weights.models.huggingface import (
    copy_other_files,
    load_model,
    read_config,
    save_compressed,
)
from torchcodec_weights.models.quantize import check_encoder, quantize_
from torchcodec_weights.models.report import Report, compression_report, report_tensors
from torchcodec_weights.system.terminal import printable

_EMBEDDING_BITS = 6.0


def run(args: argparse.Namespace) -> None:
    """Run the command with the arguments of `cli.arguments`."""
    config = codec_weight_only(
        args.codec,
        args.bits,
        step=args.step,
        snr_db=args.snr_db,
        preset=args.preset,
        profile=args.profile,
        bit_depth=args.bit_depth,
    )
    check_encoder(config)
    source = open_source(args.model)
    here = source.place
    _check_options(args, source)
    embeddings = _of_embeddings(args, source, config)
    choice = Choice(config, args.include, args.exclude, embeddings, args.calibrate)
    if args.dry_run:
        if is_first():
            print(printable(str(forecast(source, choice))))
        return
    limits = Limits(args.max_memory, args.delete_source, args.force, args.worker)
    reason = None
    alone = args.worker is None and not is_shared()
    try:
        whole = compress_distributed(source, args.out, choice, limits)
    except NamesDifferError as error:
        if here is None or not alone or args.delete_source:
            raise
        reason = str(error)
    except NotByBlocksError as error:
        reason = f"the model cannot be run block by block: {error}"
        if not alone:
            raise ValueError(
                f"--calibrate: {reason}: allowed for this model: one process, without --worker and "
                "torchrun"
            ) from None
        if not fits_in_memory(source, args.max_memory):
            warnings.warn(f"{reason}; so it is encoded without calibration", stacklevel=1)
            choice, reason = replace(choice, data_free=True), None
            whole = compress_distributed(source, args.out, choice, limits)
    if reason is not None:
        assert here is not None
        warnings.warn(f"{reason}; so all of it is loaded now", stacklevel=1)
        print(printable(f"{args.out}: {_in_memory(here, args, choice).totals}"))
        return
    if whole is None:
        return  # a process other than the first
    if whole:
        print(printable(f"{args.out}: {report_tensors(_plain(iterate_path(args.out))).totals}"))
    else:
        number, count = args.worker
        print(
            printable(
                f"{args.out}: the share of worker {number}/{count} is finished; when all are, the "
                "same command without --worker finishes the output"
            )
        )


def _plain(tensors: Iterator[tuple[str, Tensor | CodecError]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        if isinstance(tensor, CodecError):
            raise tensor
        yield name, tensor


def _of_embeddings(
    args: argparse.Namespace, source: Source, config: CodecWeightOnlyConfig
) -> CodecWeightOnlyConfig | None:
    """What embeddings are encoded with, None for nothing of their own.

    6 bits cost SmolLM2, half of which is its embedding, 1 to 2 percent of perplexity
    (benchmarks/embedding.py); 5 bits 4 to 6. Not in a codec of pictures: rows are looked up one by
    one, and the head is decoded at each token.
    """
    if args.embeddings == "dense":
        return None
    if args.embeddings is None:
        if source.is_file or args.include is not None:
            return None
        if isinstance(get_codec(config.codec), LosslessCodec):
            return config
    bits = args.embeddings or max(_EMBEDDING_BITS, args.bits or 0)
    default = codec_weight_only(bits=bits)
    return replace(default, preset=config.preset) if config.codec == default.codec else default


def _in_memory(source: Path, args: argparse.Namespace, choice: Choice) -> Report:
    """Load the model, encode its weights, and save it."""
    if "quantization_config" in read_config(source):
        raise ValueError(f"MODEL={str(source)!r} is quantized already: allowed: a dense model")
    model = load_model(source)
    configs = choice.configs(model)
    if not configs:
        raise ValueError(
            f"--include={args.include!r}, --exclude={args.exclude!r}: no weight is left to encode: "
            "allowed: patterns that leave a float weight of two dimensions or more"
        )
    if args.calibrate is not None:
        names = choice.calibrated(model)
        configs.update(_calibrated(model, choice.config, names, source, args.calibrate))
    quantize_(model, FqnToConfig(configs))
    report = compression_report(model)
    if not report.weights:
        raise NothingEncodedError
    with new_folder(args.out, force=args.force) as folder:
        save_compressed(model, folder, choice.config, embeddings=choice.has_embeddings(model))
        copy_other_files(source, folder)
    return report


def _check_options(args: argparse.Namespace, source: Source) -> None:
    """Raise ValueError for options that do not go together, before anything is read."""
    _check_calibrate(args, source)
    if source.is_file and args.embeddings not in (None, "dense"):
        raise ValueError("--embeddings: allowed for a directory; of a file all matrices are taken")
    if args.delete_source and source.place is None:
        raise ValueError("--delete-source: allowed where MODEL is a directory or file here")
    if args.worker is not None and args.force:
        raise ValueError("--force: allowed without --worker, as workers go on with one another")


def _check_calibrate(args: argparse.Namespace, source: Source) -> None:
    text: str | None = args.calibrate
    if text is None:
        return
    if text != "self" and not Path(text).is_file():
        raise ValueError(f"--calibrate={text!r}: allowed: self, or the path of a text file")
    if source.is_file or source.place is None:
        raise ValueError(
            "--calibrate: allowed for a directory here: a file has no model to try, and a URL "
            "would be read three times"
        )
    if args.bits is None:
        raise ValueError("--calibrate: allowed with --bits")
    if args.delete_source:
        raise ValueError(
            "--delete-source: allowed without --calibrate, which reads all of MODEL three times"
        )


def _calibrated(
    model: Any, config: CodecWeightOnlyConfig, names: set[str], source: Path, text: str
) -> dict[str, CodecWeightOnlyConfig]:
    """Configurations of parameters by `calibrate`, for those called `weight` of a module."""
    inputs = None
    if text != "self":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
        inputs = inputs_of_text(Path(text).read_text(encoding="utf-8"), tokenizer, model)
    plan = calibrate(
        model, config, lambda module, name: f"{name}.weight" in names, sample_inputs=inputs
    )
    return {f"{name}.weight": found for name, found in plan.fqn_to_config.items()}
