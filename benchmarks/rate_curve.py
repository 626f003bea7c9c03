"""Rate and distortion of Gaussian tiles against the step: the curves that rate control starts from.

    python benchmarks/rate_curve.py vvc faster fast

Prints, for each preset, the `RateCurve` to put into the codec's table, and below it the SNR.
"""

import argparse
import time

import numpy as np

from torchcodec_weights.codecs.base import Codec
from torchcodec_weights.codecs.names import codec_names
from torchcodec_weights.codecs.records import EncoderSettings
from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.evaluation.snr import snr_db

LOG2_STEPS = (-4.5, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("codec", choices=codec_names())
    parser.add_argument("presets", nargs="*", help="default: all of the codec's")
    parser.add_argument("--points", type=int, default=len(LOG2_STEPS))
    parser.add_argument("--bit-depth", type=int)
    args = parser.parse_args()
    codec = get_codec(args.codec)
    if not isinstance(codec, Codec):
        raise SystemExit(f"{args.codec} has no step")
    tile = np.random.default_rng(0).standard_normal((512, 512), np.float32)
    peak = float(np.abs(tile).max())
    for preset in args.presets or codec.presets or (None,):
        settings = EncoderSettings(preset, bit_depth=args.bit_depth)
        steps, rates, snrs, seconds = [], [], [], 0.0
        for log2_step in LOG2_STEPS[:: max(1, len(LOG2_STEPS) // args.points)]:
            finest, coarsest = codec.step_range(peak, settings)
            if not finest <= 2**log2_step <= coarsest:
                continue
            start = time.perf_counter()
            private = codec.prepare([tile], 2**log2_step, settings)
            coded = codec.encode(tile, 2**log2_step, peak, private, settings)
            seconds += time.perf_counter() - start
            out = np.empty_like(tile)
            codec.decode(coded.payload, coded.unit, private, tile.shape, out)
            steps.append(log2_step)
            rates.append(round(8 * len(coded.payload) / tile.size, 3))
            snrs.append(round(snr_db([(tile, out)]), 2))
        speed = len(steps) * tile.size / seconds / 1e6
        print(f"{args.codec} {preset or ''}: {speed:.2f} Mweight/s")
        print(f"RateCurve({tuple(steps)}, {tuple(rates)})")
        print(f"  SNR dB {snrs}", flush=True)


if __name__ == "__main__":
    main()
