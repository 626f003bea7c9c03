"""Weights encoded and decoded again, optionally with other random signs."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor
from tqdm.auto import tqdm

from torchcodec_weights.config import CodecWeightOnlyConfig
from torchcodec_weights.encoder.encode import Normalizer, encode_matrix
from torchcodec_weights.matrix.normalize import SIGN_SEED, normalize
from torchcodec_weights.system.workers import core_count
from torchcodec_weights.tensor import CodecTensor


def recode(
    weights: Mapping[str, Tensor],
    configs: Mapping[str, CodecWeightOnlyConfig],
    seed: int = SIGN_SEED,
    normalizer: Normalizer = normalize,
) -> tuple[float, dict[str, Tensor]]:
    """Encode matrices as `quantize_` does, several at once, and decode them.

    Perplexity at 2 bits varies with the random signs of normalization, so it has to be measured
    with several seeds; `quantize_` has no option for the seed.

    Args:
        weights: names to float32, float16 or bfloat16 matrices (rows, cols), finite.
        configs: configuration for each weight, by the same names.
        seed: of the random signs of `normalize`.
        normalizer: as in `encode_matrix`.

    Returns:
        Bits per weight with everything counted, and the decoded weights by their names.

    Raises:
        RateError: a target cannot be reached, whatever the size of the matrix.
        CodecError: a codec is not available, or its encoder failed.
    """

    def coded(name: str) -> CodecTensor:
        weight = weights[name].detach()
        config = configs[name]
        codec, target, settings = config.resolve()
        codec.require(encoder=True)
        matrix = encode_matrix(
            weight, codec, target, settings, tiles, seed, config.importance, normalizer
        )
        return CodecTensor(
            matrix.qdata,
            matrix.scale,
            matrix.act_pre_scale,
            list(weight.shape),
            weight.dtype,
            matrix.zero_point,
        )

    stored, decoded = 0, {}
    # Tiles have threads of their own: layers that wait for their tiles must not hold them.
    with ThreadPoolExecutor(core_count()) as layers, ThreadPoolExecutor(core_count()) as tiles:
        found = layers.map(coded, weights)
        for name, tensor in zip(weights, tqdm(found, total=len(weights), leave=False), strict=True):
            stored += 8 * tensor.stored_bytes
            decoded[name] = tensor.dequantize()
    return stored / sum(weight.numel() for weight in weights.values()), decoded
