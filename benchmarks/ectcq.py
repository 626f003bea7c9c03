"""ECTCQ by itself: where its bits go, and the speed of its kernels on one core and two.

    python benchmarks/ectcq.py --json benchmarks/results/ectcq.json

Gaussian weights. Payload is the ideal code length of the levels under the stored model; everything
else that is stored is overhead. Speeds are in million weights per second: of single kernels the
best of many turns, as other users of the machine can only slow them; of matrices the medians, one
thread and two timed in turns.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from common import gaussian, machine, one_and_two_threads, parser, seconds, write
from numpy.typing import NDArray
from tqdm.auto import tqdm

from torchcodec_weights import CodecTensor, codec_weight_only
from torchcodec_weights.codecs.common import compiled
from torchcodec_weights.codecs.ectcq import ECTCQ, kernels
from torchcodec_weights.codecs.ectcq.model import EntropyModel, tables_of
from torchcodec_weights.codecs.records import EncoderSettings
from torchcodec_weights.decoders.cpu import decode_matrix, multiply_matrix
from torchcodec_weights.format.container import header_size, read_tile
from torchcodec_weights.format.tiling import Window
from torchcodec_weights.matrix.opened import open_matrix


def main() -> None:
    args = parser(__doc__).parse_args()
    results = {"overhead": _overheads(), "kernels": _kernels(), "matrix": _matrix()}
    write(args.json, {"machine": machine(), **results})


def _varied(rows: int, cols: int) -> torch.Tensor:
    """A weight whose rows and columns need scales of their own."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator)
    weight *= torch.exp(0.3 * torch.randn(rows, 1, generator=generator))
    weight *= torch.exp(0.3 * torch.randn(cols, generator=generator))
    return weight


def _overheads() -> list[dict[str, Any]]:
    print("bits per weight: total, payload, overhead; of it headers, model, first states, scales")
    rows = []
    for shape in tqdm([(4096, 4096), (2048, 2048), (576, 576), (1536, 576)]):
        coded = CodecTensor.from_hp(
            _varied(*shape), codec_weight_only("ectcq", bits=2, preset="medium")
        )
        header = coded.header
        data = coded.qdata.numpy().data
        frequency, _ = EntropyModel.from_bytes(header.private).by_symbol()
        slots = _slot_tables(frequency)
        ideal = outliers = 0.0
        for index, (first, end, _, _) in enumerate(header.blocks):
            payload, _ = read_tile(data, header, index)
            ideal += _ideal_bits(payload, slots, header, (end - first) * header.cols)
            outliers += 8 * int(header.tiles["outliers_size"][index])
        count = coded.numel()
        model = len(header.private)
        size = header_size("ectcq", header.private, len(header.tiles), header.across, header.order)
        row = {
            "shape": shape,
            "total": coded.bits_per_weight,
            "payload": ideal / count,
            "overhead": coded.bits_per_weight - ideal / count - outliers / count,
            "headers": 8 * (size - model) / count,
            "model": 8 * model / count,
            "first_states": 8 * 132 * len(header.tiles) / count,
            "scales": 8 * (coded.scale.numel() + coded.act_pre_scale.numel()) / count,
            "outliers": outliers / count,
        }
        rows.append(row)
        tqdm.write(
            f"{shape[0]:5} x {shape[1]:5}   {row['total']:.4f}  {row['payload']:.4f}  "
            f"{row['overhead']:13.4f}  {row['headers']:7.4f}  {row['model']:.4f}  "
            f"{row['first_states']:12.4f}  {row['scales']:.4f}  {row['outliers']:.4f}"
        )
    return rows


def _slot_tables(frequency: NDArray[Any]) -> NDArray[np.float64]:
    """−log2 of the probability by quantizer and symbol."""
    with np.errstate(divide="ignore"):
        return np.where(frequency > 0, 12 - np.log2(frequency), 0.0)


def _ideal_bits(payload: bytes, bits: NDArray[np.float64], header: Any, count: int) -> float:
    """Code length of a tile's levels, found by decoding with numbers in place of values."""
    private, unit = header.private, float(header.tiles["unit"][0])
    tables = kernels.Tables.from_buffer_copy(bytes(tables_of(private, unit)))
    np.frombuffer(tables.values, np.float32)[:] = bits.reshape(-1)
    out = np.empty((1, count), np.float32)
    kernels.decode(tables, payload, out)
    return float(out.sum(dtype=np.float64))


def _kernels() -> list[dict[str, Any]]:
    print(
        "one core, one tile of 65,536 weights, 2 bits: encode by preset, decode by instruction set"
    )
    tile = gaussian(64, 1024).numpy()
    codec, rows, step = ECTCQ(), [], 0.55
    for preset in codec.presets:
        settings = EncoderSettings(preset)
        private = codec.prepare([tile], step, settings)
        least = _least(partial(codec.encode, tile, step, 6.0, private, settings))
        rows.append({"encode": preset, "rate": tile.size / least / 1e6})
        print(f"  encode {preset:8} {rows[-1]['rate']:8.1f}")
    coded = codec.encode(tile, step, 6.0, private, settings)
    tables, out = tables_of(private, coded.unit), np.empty_like(tile)
    for level, name in enumerate(compiled.LEVELS[: compiled.best_level() + 1]):
        least = _least(partial(kernels.decode, tables, coded.payload, out, level), 200)
        rows.append({"decode": name, "rate": tile.size / least / 1e6})
        print(f"  decode {name:8} {rows[-1]['rate']:8.1f}")
    return rows


def _matrix() -> list[dict[str, Any]]:
    print("2048 x 2048, container and checksums included: one thread, two, ratio")
    rows = []
    whole = Window(0, 2048, 0, 2048)
    for bits in (2, 3, 4):
        coded = CodecTensor.from_hp(
            gaussian(2048, 2048), codec_weight_only("ectcq", bits=bits, preset="fast")
        )
        matrix = open_matrix(*coded.coded)
        calls: dict[str, Callable[[], Any]] = {
            "decode to float32": partial(decode_matrix, matrix, whole, torch.float32),
            "decode to bfloat16": partial(decode_matrix, matrix, whole, torch.bfloat16),
        }
        for tokens in (1, 4, 16):
            x = torch.randn(tokens, 2048)
            calls[f"multiply, {tokens} tokens"] = partial(multiply_matrix, matrix, whole, x)
        for name, call in calls.items():
            times = one_and_two_threads(call, 15)
            one, two = (coded.numel() / taken / 1e6 for taken in (times.one, times.two))
            rows.append({"bits": bits, "what": name, "one": one, "two": two, "ratio": times.ratio})
            print(f"  {bits} bits  {name:20} {one:8.1f} {two:8.1f} {times.ratio:6.2f}")
    return rows


def _least(call: Callable[[], Any], turns: int = 25) -> float:
    call()
    return min(seconds(call, turns)[1])


if __name__ == "__main__":
    main()
