"""Neural-network weights as codec bitstreams, decoded when they are used."""

import torch.distributed

from torchcodec_weights.calibration.calibrate import calibrate
from torchcodec_weights.calibration.statistics import Statistics, collect_statistics
from torchcodec_weights.codecs.base import Codec
from torchcodec_weights.codecs.isolation import isolated_decoders
from torchcodec_weights.codecs.records import CodecInfo
from torchcodec_weights.config import CodecWeightOnlyConfig, codec_weight_only
from torchcodec_weights.decoders.cache import decoded_cache
from torchcodec_weights.decoders.choice import available_codecs, use_decoder
from torchcodec_weights.errors import CodecError, CodecUnavailableError, RateError
from torchcodec_weights.models import huggingface  # noqa: F401 - registers what transformers calls
from torchcodec_weights.models.checkpoint import load_file, save_file
from torchcodec_weights.models.quantize import quantize_
from torchcodec_weights.models.report import Report, compression_report, decompress_
from torchcodec_weights.models.resident import resident
from torchcodec_weights.policy import allowed_codecs, max_expansion
from torchcodec_weights.pytorch import dispatch, joining  # noqa: F401 - register what PyTorch calls
from torchcodec_weights.tensor import CodecTensor

if torch.distributed.is_available():
    from torchcodec_weights.pytorch import distributed  # noqa: F401 - as dispatch

__version__ = "0.1.0"

__all__ = [
    "Codec",
    "CodecError",
    "CodecInfo",
    "CodecTensor",
    "CodecUnavailableError",
    "CodecWeightOnlyConfig",
    "RateError",
    "Report",
    "Statistics",
    "allowed_codecs",
    "available_codecs",
    "calibrate",
    "codec_weight_only",
    "collect_statistics",
    "compression_report",
    "decoded_cache",
    "decompress_",
    "isolated_decoders",
    "load_file",
    "max_expansion",
    "quantize_",
    "resident",
    "save_file",
    "use_decoder",
]
