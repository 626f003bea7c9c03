"""A weight as a picture: take a tile of a weight in HEVC or VVC, and let FFmpeg decode it.

    python examples/ffplay.py --codec hevc
    ffplay tile.265

It leaves the bitstream and `tile.png`, as FFmpeg decodes it, in the current folder.
"""

import argparse
import subprocess
from pathlib import Path

import imageio_ffmpeg

from torchcodec_weights import CodecTensor, codec_weight_only
from torchcodec_weights.cli.tile_file import suffix, tile_file
from torchcodec_weights.evaluation.models import minilm_weights
from torchcodec_weights.format.container import read_tile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codec", default="hevc", choices=("vvc", "hevc", "h264", "av1", "vp9"))
    parser.add_argument("--bits", type=float, default=3)
    parser.add_argument("--weight", default="encoder.layer.3.attention.self.query.weight")
    args = parser.parse_args()

    config = codec_weight_only(args.codec, bits=args.bits)
    coded = CodecTensor.from_hp(minilm_weights()[args.weight], config)
    # Of a saved model: torchcodec-weights inspect FOLDER --extract-tile NAME 0 tile
    payload, _ = read_tile(memoryview(coded.qdata.numpy()), coded.header, 0)
    block = coded.header.blocks[0]
    path = Path(f"tile{suffix(args.codec)}")
    path.write_bytes(tile_file(args.codec, payload, (block.rows, block.cols)))
    print(
        f"{path}: {block.rows} x {block.cols} weights in {len(payload):,} bytes, "
        f"{8 * len(payload) / block.rows / block.cols:.3f} bits each"
    )
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", "-i", str(path)]
    subprocess.run([*command, "-pix_fmt", "gray", "tile.png"], check=True)
    print(f"tile.png: {Path('tile.png').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
