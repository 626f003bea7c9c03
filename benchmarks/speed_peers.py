"""SmolLM2-135M beside its peers on the CPU: tokens a second, memory, perplexity, in one run.

    pip install xllamacpp
    python benchmarks/speed_peers.py --json benchmarks/results/speed_peers.json

Peers are dense weights, torchao's int8 and int4 (which is a prototype on CPUs) and llama.cpp with
its own files, Q4_1 as the model came and Q8_0 made of it. Greedy, one token at a time, all on the
same threads and by turns, so that all see the same machine; rates are medians over the turns,
ratios are medians of the turns' ratios. PyTorch's models run as transformers calls them, eager, and
with `--compiled` some by torch.compile too, with a cache of keys and values of a fixed size.
Bytes are those of all weights; perplexities are those of WikiText-2's first tokens. The weights
of all came from Q4_1, so that llama.cpp's Q4_1 has those of the dense model.
"""

import copy
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import xllamacpp
from common import machine, parser, tokens_per_second, write
from generate import encoded_models
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

PROMPT = "The history of the city begins"
_COMPILED = ("dense float32", "bits", "bits, head int8", "int8, head too")
_BESIDE = ("dense float32", "dense bfloat16", "dense float32, compiled", "llama.cpp Q4_1")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--bits", type=float, default=3)
    options.add_argument("--head-bits", type=float, default=6)
    options.add_argument("--tokens", type=int, default=32, help="generated in each turn")
    options.add_argument("--turns", type=int, default=5)
    options.add_argument("--text-tokens", type=int, default=4092, help="of the perplexity")
    options.add_argument("--calibrate", action="store_true", help="add weights by calibrate")
    options.add_argument(
        "--compiled", action="store_true", help="add compiled models: minutes each"
    )
    args = options.parse_args()
    dense, tokenizer = load_smollm2()
    models = _models(dense, args)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    text = torch.tensor(
        tokenizer(
            data_file(WIKITEXT2).read_text(), add_special_tokens=False, verbose=False
        ).input_ids
    )[: args.text_tokens]
    runs: dict[str, Callable[[], float]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, model in tqdm(models.items(), desc="perplexity"):
        runs[name] = partial(tokens_per_second, model, prompt, args.tokens)
        rows[name] = {
            "bytes": _bytes_of(model),
            "perplexity": perplexity(model, text, tokenizer.bos_token_id, args.text_tokens),
        }
    for name in _COMPILED if args.compiled else ():
        model = models[name]
        forward = torch.compile(model.forward)
        runs[f"{name}, compiled"] = partial(_compiled_rate, model, forward, prompt, args.tokens)
        rows[f"{name}, compiled"] = {"bytes": rows[name]["bytes"]}
    with tempfile.TemporaryDirectory() as folder:
        q8 = Path(folder) / "q8_0.gguf"
        requantize(smollm2_file(), q8)
        for name, path in (("llama.cpp Q4_1", smollm2_file()), ("llama.cpp Q8_0", q8)):
            server = _llama(path)
            runs[name] = partial(_llama_rate, server, args.tokens)
            rows[name] = {"bytes": path.stat().st_size}
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for turn in trange(args.turns + 1, desc="turns"):
            for name, run in runs.items():
                rate = run()
                if turn:  # the first compiles
                    rates[name].append(rate)
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


def _models(dense: Any, args: Any) -> dict[str, Any]:
    """PyTorch's models by name."""
    bfloat16 = copy.deepcopy(dense).bfloat16()
    models = {"dense float32": dense, "dense bfloat16": bfloat16}
    for name, theirs in (
        ("torchao int8", Int8WeightOnlyConfig()),
        ("torchao int4", PrototypeInt4WeightOnlyConfig(group_size=64)),
    ):
        models[name] = copy.deepcopy(bfloat16)
        quantize_by_torchao(models[name], theirs, _is_layer)
    models |= encoded_models(dense, "ectcq", args.bits, args.head_bits)
    if args.calibrate:
        best = models["bits by calibrate"] = copy.deepcopy(dense)
        quantize_(best, calibrate(best, codec_weight_only("ectcq", bits=args.bits)))
    return models


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


def _compiled_rate(model: Any, forward: Any, prompt: torch.Tensor, tokens: int) -> float:
    model.forward = forward
    try:
        return tokens_per_second(model, prompt, tokens, cache_implementation="static")
    finally:
        del model.forward


def _llama(path: Path) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.warmup = 512, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    return xllamacpp.Server(params)


def _llama_rate(server: Any, tokens: int) -> float:
    answer = server.handle_completions(
        {"prompt": PROMPT, "n_predict": tokens, "ignore_eos": True, "temperature": 0}
    )
    return float(answer["timings"]["predicted_per_second"])


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
