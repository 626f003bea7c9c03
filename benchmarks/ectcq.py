"""ECTCQ by itself: where its bits go, and the speed of its kernels on one core and two.

    python benchmarks/ectcq.py --json benchmarks/results/ectcq.json

Gaussian weights. Payload is the ideal code length of the levels under the stored model; everything
else that is stored is overhead. Speeds are in million weights per second: of single kernels the
best of many turns, as other users of the machine can only slow them; of matrices the medians, one
thread and two timed in turns.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchcodec_weights.decoding import Window, decode_matrix, multiply_matrix, open_matrix
from tqdm.auto import tqdm

from torchcodec_weights import CodecTensor, codec_weight_only
from torchcodec_weights.codecs import compiled
from torchcodec_weights.codecs.base import EncoderSettings
from torchcodec_weights.codecs.ectcq import ECTCQ, kernels
from torchcodec_weights.codecs.ectcq.model import EntropyModel, tables_of
from torchcodec_weights.container import header_size, read_tile


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {"overhead": _overheads(), "kernels": _kernels(), "matrix": _matrix()}
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def _gaussian(rows: int, cols: int, varied: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator)
    if varied:  # so that rows and columns need scales of their own
        weight *= torch.exp(0.3 * torch.randn(rows, 1, generator=generator))
        weight *= torch.exp(0.3 * torch.randn(cols, generator=generator))
    return weight


def _overheads() -> list[dict[str, Any]]:
    print("bits per weight: total, payload, overhead; of it headers, model, first states, scales")
    rows = []
    for shape in tqdm([(4096, 4096), (2048, 2048), (576, 576), (1536, 576)]):
        coded = CodecTensor.from_hp(
            _gaussian(*shape, varied=True), codec_weight_only("ectcq", bits=2, preset="medium")
        )
        header = coded.header
        data = memoryview(coded.qdata.numpy())
        frequency, _ = EntropyModel.from_bytes(header.private).by_symbol()
        slots = _slot_tables(frequency)
        ideal = outliers = 0.0
        for index, (first, end, _, _) in enumerate(header.blocks):
            payload, _ = read_tile(data, header, index)
            ideal += _ideal_bits(payload, slots, header, (end - first) * header.cols)
            outliers += 8 * int(header.tiles["outliers_size"][index])
        count = coded.numel()
        model = len(header.private)
        row = {
            "shape": shape,
            "total": coded.bits_per_weight,
            "payload": ideal / count,
            "overhead": coded.bits_per_weight - ideal / count - outliers / count,
            "headers": 8
            * (header_size("ectcq", header.private, len(header.tiles)) - model)
            / count,
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


def _slot_tables(frequency: np.ndarray) -> np.ndarray:
    """−log2 of the probability by quantizer and symbol."""
    with np.errstate(divide="ignore"):
        return np.where(frequency > 0, 12 - np.log2(frequency), 0)


def _ideal_bits(payload: bytes, bits: np.ndarray, header: Any, count: int) -> float:
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
    tile = _gaussian(64, 1024).numpy()
    codec, rows, step = ECTCQ(), [], 0.55
    for preset in codec.presets:
        settings = EncoderSettings(preset)
        private = codec.prepare([tile], step, settings)
        seconds = _least(lambda p=private, s=settings: codec.encode(tile, step, 6.0, p, s))
        rows.append({"encode": preset, "rate": tile.size / seconds / 1e6})
        print(f"  encode {preset:8} {rows[-1]['rate']:8.1f}")
    coded = codec.encode(tile, step, 6.0, private, settings)
    tables, out = tables_of(private, coded.unit), np.empty_like(tile)
    for level, name in enumerate(compiled.LEVELS):
        has_avx512 = "avx512" in torch.backends.cpu.get_cpu_capability().lower()
        if level > compiled.best_level() and not has_avx512:
            continue
        seconds = _least(lambda n=level: kernels.decode(tables, coded.payload, out, n), 200)
        rows.append({"decode": name, "rate": tile.size / seconds / 1e6})
        print(f"  decode {name:8} {rows[-1]['rate']:8.1f}")
    return rows


def _matrix() -> list[dict[str, Any]]:
    print("2048 x 2048, container and checksums included: one thread, two, ratio")
    rows = []
    whole = Window(0, 2048, 0, 2048)
    for bits in (2, 3, 4):
        coded = CodecTensor.from_hp(
            _gaussian(2048, 2048), codec_weight_only("ectcq", bits=bits, preset="fast")
        )
        matrix = open_matrix(*coded.coded)
        calls: dict[str, Callable[[], Any]] = {
            "decode to float32": lambda m=matrix: decode_matrix(m, whole, torch.float32),
            "decode to bfloat16": lambda m=matrix: decode_matrix(m, whole, torch.bfloat16),
        }
        for tokens in (1, 4, 16):
            x = torch.randn(tokens, 2048)
            calls[f"multiply, {tokens} tokens"] = lambda m=matrix, x=x: multiply_matrix(m, whole, x)
        for name, call in calls.items():
            times: dict[int, list[float]] = {1: [], 2: []}
            for _ in range(15):
                for threads in times:
                    torch.set_num_threads(threads)
                    start = time.perf_counter()
                    call()
                    times[threads].append(time.perf_counter() - start)
            one, two = (coded.numel() / statistics.median(times[n]) / 1e6 for n in (1, 2))
            ratio = statistics.median(a / b for a, b in zip(times[1], times[2], strict=True))
            rows.append({"bits": bits, "what": name, "one": one, "two": two, "ratio": ratio})
            print(f"  {bits} bits  {name:20} {one:8.1f} {two:8.1f} {ratio:6.2f}")
    return rows


def _least(call: Callable[[], Any], turns: int = 25) -> float:
    call()
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
