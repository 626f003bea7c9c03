"""SmolLM2-135M beside its peers on the CPU: tokens a second, memory, perplexity, in one run.

    pip install xllamacpp
    python benchmarks/speed_peers.py --json benchmarks/results/speed_peers.json

Peers are dense weights, torchao's int8 and int4 (which is a prototype on CPUs) and llama.cpp with
its own files, Q4_1 as the model came and Q8_0 made of it. Greedy, one token at a time, on as many
threads, each in a process of its own and by turns, so that all see the same machine; rates are
medians over the turns, ratios are medians of the turns' ratios. PyTorch's models run as
transformers calls them, eager, and with `--compiled` some by torch.compile too, with a cache of
keys and values of a fixed size.
Bytes are those of all weights; perplexities are those of WikiText-2's first tokens. The weights
of all came from Q4_1, so that llama.cpp's Q4_1 has those of the dense model.
"""

import argparse
import contextlib
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from common import machine, parser, tokens_per_second, write
from generate import FORMS, encoded_model
from llama_rate import PROMPT
from torch import nn
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8WeightOnlyConfig
from torchao.quantization import quantize_ as quantize_by_torchao
from tqdm.auto import tqdm, trange

from torchcodec_weights import (
    calibrate,
    codec_weight_only,
    compression_report,
    quantize_,
)
from torchcodec_weights.evaluation.data import WIKITEXT2, data_file
from torchcodec_weights.evaluation.models import load_smollm2, smollm2_file
from torchcodec_weights.evaluation.perplexity import perplexity
from torchcodec_weights.system.memory import release_freed

_THEIRS = {
    "torchao int8": Int8WeightOnlyConfig(),
    "torchao int4": PrototypeInt4WeightOnlyConfig(group_size=64),
}
_MODELS = ("dense float32", "dense bfloat16", *_THEIRS, *FORMS)
_CALIBRATED = "bits by calibrate"
_COMPILED = ("dense float32", "bits, head int8", "int8, head too")
_BY_COMPILE = ", compiled"
_BESIDE = ("dense float32", "dense bfloat16", "dense float32, compiled", "llama.cpp Q4_1")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--bits", type=float, default=3)
    options.add_argument("--head-bits", type=float, default=6)
    options.add_argument("--tokens", type=int, default=32, help="generated in each turn")
    options.add_argument("--turns", type=int, default=5)
    options.add_argument("--text-tokens", type=int, default=4092, help="of the perplexity")
    options.add_argument("--calibrate", action="store_true", help="add weights by calibrate")
    options.add_argument("--compiled", action="store_true", help="add compiled models, minutes")
    args = options.parse_args()
    names = [*_MODELS, *([_CALIBRATED] if args.calibrate else [])]
    names += [f"{name}{_BY_COMPILE}" for name in (_COMPILED if args.compiled else ())]
    runs: dict[str, Callable[[], float]] = {}
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for name in tqdm(names, desc="models"):
            model = stack.enter_context(contextlib.closing(Remote(name, args)))
            rows[name], runs[name] = model.row, model.rate
        q8 = Path(folder) / "q8_0.gguf"
        requantize(smollm2_file(), q8)
        for name, path in (("llama.cpp Q4_1", smollm2_file()), ("llama.cpp Q8_0", q8)):
            runs[name] = partial(_llama_rate, path, args.tokens)
            rows[name] = {"bytes": path.stat().st_size}
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for _ in trange(args.turns, desc="turns"):
            for name, run in runs.items():
                rates[name].append(run())
    for name, own in rates.items():
        rows[name]["tokens_per_second"] = statistics.median(own)
        for other in _BESIDE:
            if other not in rates:
                continue
            ratios = [a / b for a, b in zip(own, rates[other], strict=True)]
            rows[name][f"of {other}"] = statistics.median(ratios)
        tqdm.write(f"{name}: {rows[name]}")
    results = {"machine": machine(), "threads": torch.get_num_threads(), "rows": rows}
    write(args.json, results | {"options": {k: v for k, v in vars(args).items() if k != "json"}})


class Remote:
    """A model of PyTorch in a process of its own, where it is as fast as where it is alone.

    Attributes:
        row: its bytes and, but for compiled models, its perplexity.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        """Load the model, and generate with it once."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, args, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.row: dict[str, Any] = self._connection.recv()

    def rate(self) -> float:
        """Tokens a second of one turn."""
        self._connection.send(None)
        rate: float = self._connection.recv()
        return rate

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join()


def _serve(name: str, args: argparse.Namespace, connection: Any) -> None:
    compiled = name.endswith(_BY_COMPILE)
    dense, tokenizer = load_smollm2()
    model = _model(name.removesuffix(_BY_COMPILE), dense, args)
    del dense
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    row: dict[str, Any] = {"bytes": _bytes_of(model)}
    options = {}
    if compiled:
        model.forward = torch.compile(model.forward)
        options["cache_implementation"] = "static"
    else:
        text = tokenizer(data_file(WIKITEXT2).read_text(), add_special_tokens=False, verbose=False)
        ids = torch.tensor(text.input_ids)[: args.text_tokens]
        row["perplexity"] = perplexity(model, ids, tokenizer.bos_token_id, args.text_tokens)
    tokens_per_second(model, prompt, args.tokens, **options)
    release_freed()  # as the processes of all models are there at the same time
    connection.send(row)
    with contextlib.suppress(EOFError):
        while True:
            connection.recv()
            connection.send(tokens_per_second(model, prompt, args.tokens, **options))


def _model(name: str, dense: Any, args: argparse.Namespace) -> Any:
    """PyTorch's model of a name."""
    if name == "dense float32":
        return dense
    if name == _CALIBRATED:
        quantize_(dense, calibrate(dense, codec_weight_only("ectcq", bits=args.bits)))
        return dense
    if name not in ("dense bfloat16", *_THEIRS):
        return encoded_model(dense, name, "ectcq", args.bits, args.head_bits)
    model = dense.bfloat16()
    if name in _THEIRS:
        quantize_by_torchao(model, _THEIRS[name], _is_layer)
    return model


def _is_layer(module: nn.Module, path: str) -> bool:
    return isinstance(module, nn.Linear) and path != "lm_head"


def _bytes_of(model: nn.Module) -> int:
    """Bytes of all weights in memory, those of resident forms too."""
    tensors: dict[int, torch.Tensor] = {}

    def add(tensor: torch.Tensor) -> None:
        if hasattr(tensor, "__tensor_flatten__"):
            for name in tensor.__tensor_flatten__()[0]:
                add(getattr(tensor, name))
        else:
            tensors[tensor.data_ptr()] = tensor

    for parameter in model.parameters():
        add(parameter.data)
    resident_bytes = compression_report(model).resident_bytes
    return sum(t.untyped_storage().nbytes() for t in tensors.values()) + resident_bytes


def _llama_rate(path: Path, tokens: int) -> float:
    program = Path(__file__).with_name("llama_rate.py")
    command = [sys.executable, str(program), str(path), f"--tokens={tokens}"]
    command.append(f"--threads={torch.get_num_threads()}")
    run = subprocess.run(command, capture_output=True, check=True, text=True)
    return float(run.stdout.split("tokens a second:")[1].split()[0])


def requantize(source: Path, target: Path) -> None:
    """Write a GGUF file's matrices as Q8_0, with all that is beside them."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        value = field.contents()
        if field.name == "general.file_type":
            value = int(gguf.LlamaFileType.MOSTLY_Q8_0)
        writer.add_key_value(field.name, value, kind, inner)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim == 2:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor.name, gguf.quantize(values, q8), raw_dtype=q8)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
