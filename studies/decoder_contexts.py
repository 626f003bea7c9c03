"""What decoding a tile of video costs more because its decoder's context is made anew.

    python studies/decoder_contexts.py

Milliseconds of one core for a tile of 512 × 512 weights at 3 bits, medians: a new context for each
tile, as the package does it; one context that is flushed between tiles; and making and opening one.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import av
import torch

from torchcodec_weights import CodecTensor, codec_weight_only
from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.codecs.video.base import VideoCodec
from torchcodec_weights.matrix.opened import open_matrix

TURNS = 25


def main() -> None:
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    print(f"{'codec':6}{'new':>8}{'kept':>8}{'ratio':>8}{'opening':>9}")
    for name in ("vvc", "hevc", "av1", "h264", "vp9"):
        codec = get_codec(name)
        assert isinstance(codec, VideoCodec)
        matrix = open_matrix(*CodecTensor.from_hp(weight, codec_weight_only(name, bits=3)).coded)
        stored = matrix.stored()
        start = int(stored.offsets[0])
        payload = bytes(stored.data[start : start + int(stored.payload_sizes[0])])
        kept = _context(codec.decoder)
        calls: tuple[Callable[[], Any], ...] = (
            lambda: _decode(_context(codec.decoder), payload),  # noqa: B023
            lambda: _decode(kept, payload),  # noqa: B023
            lambda: _context(codec.decoder).open(),  # noqa: B023
        )
        times: list[list[float]] = [[], [], []]
        for _ in range(TURNS):
            for call, taken in zip(calls, times, strict=True):
                begin = time.process_time()
                call()
                taken.append(1e3 * (time.process_time() - begin))
        new, again, opening = map(statistics.median, times)
        print(f"{name:6}{new:8.2f}{again:8.2f}{new / again:8.2f}{opening:9.3f}")


def _context(decoder: str) -> Any:
    context = av.codec.CodecContext.create(decoder, "r")
    context.thread_count = 1
    return context


def _decode(context: Any, payload: bytes) -> None:
    frames = [*context.decode(av.Packet(payload)), *context.decode(None)]
    context.flush_buffers()
    assert len(frames) == 1


if __name__ == "__main__":
    main()
