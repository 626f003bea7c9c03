"""What `gpu.py` measures of an NVIDIA GPU.

Rows that the JSON file holds already of the same GPU are not measured again. Three parts:

- decode: a weight to bfloat16, in weights and GB of bfloat16 per second. The floor is what copying
  the same number of bytes takes, bitstream read and weight written.
- product: F.linear of a compressed weight, a dense bfloat16 one and torchao's int4 one.
- model: tokens per second at batch 1 and memory of a model of Llama 7B's shape with random weights.

Weights are Gaussian. Each measurement goes through as many copies of a weight as do not fit the
GPU's L2 cache together; a model's layers are copies too. Kernels are timed by CUDA events around
the replay of a CUDA graph where the codec can be captured in one, else around the calls themselves.
The median of several turns is kept.
"""

import json
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import fastest_preset, gaussian
from torch import Tensor, nn
from tqdm.auto import tqdm

from torchcodec_weights import CodecTensor, available_codecs, codec_weight_only
from torchcodec_weights.evaluation.models import encoded_weights
from torchcodec_weights.evaluation.rows import Row, Rows

SHAPES = ((4096, 4096), (14336, 4096))
BITS = (2, 3, 4)
TOKENS = (1, 2, 4, 8, 16, 256)
TURNS = 7


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama, the context that its cache starts with, and the tokens that are timed."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int
    context: int = 64
    new_tokens: int = 64


LLAMA_2_7B = LlamaShape(32, 4096, 11008, 32, 32000)


def measure(path: Path | None, parts: list[str], codecs: list[str] | None) -> None:
    """Measure some parts and write them down.

    Args:
        codecs: of decode; None for all that have a decoder of the GPU's.
    """
    if not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no CUDA device")
    rows = Rows(path)
    decoders = {info.name: info.decoders.get("cuda") for info in available_codecs()}
    codecs = codecs or [name for name, decoder in decoders.items() if decoder]
    jobs: dict[str, dict[str, Callable[[], Row]]] = {
        "machine": {"": partial(machine, decoders)},
        "decode": {
            f"{codec} {shape[0]}x{shape[1]} {bits}": partial(decode, codec, shape, bits)
            for shape in SHAPES
            for bits in BITS
            for codec in codecs
        },
        "product": {
            f"{method} {shape[0]}x{shape[1]}": partial(product, method, shape)
            for shape in SHAPES
            for method in ("dense", "int4", *(f"ectcq:{bits}" for bits in BITS))
        },
        "model": {
            method: partial(model, method)
            for method in ("dense", *(f"ectcq:{bits}" for bits in BITS))
        },
    }
    gpu = torch.cuda.get_device_name()
    chosen = [(part, what, job) for part in ["machine", *parts] for what, job in jobs[part].items()]
    for part, what, job in tqdm(chosen):
        key = {"gpu": gpu, "part": part, "what": what}
        if rows.find(key) is None:
            try:
                found = job()
            except Exception as error:  # a peer that is not here is no reason to lose the rest
                found = {"error": f"{type(error).__name__}: {error}"[:300]}
            torch.cuda.empty_cache()
            rows.add(key | found)
            tqdm.write(f"{part} {what}: {json.dumps(found)}")


def machine(decoders: dict[str, str | None]) -> Row:
    """The GPU's driver, versions, and what decodes each codec there."""
    packages = {}
    for name in (
        "torch",
        "torchao",
        "nvidia-cuda-nvrtc",
        "pynvvideocodec",
        "nvidia-nvimgcodec-cu13",
    ):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "absent"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return {
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "driver": driver,
        "packages": packages,
        "copy_bytes_per_second": bandwidth(),
        "decoders": decoders,
    }


@cache
def bandwidth() -> float:
    """Bytes read and written per second by a copy within the GPU's memory."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds([lambda: target.copy_(source)], capture=True)


def seconds(calls: list[Callable[[], Any]], *, capture: bool) -> float:
    """Median over turns of the time that a call takes on the GPU, when all follow each other."""
    for call in calls:
        call()

    def run() -> None:
        # All results live until the last call: each call writes to memory of its own.
        _results = [call() for call in calls]

    replay: Callable[[], None] = run
    if capture:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        replay = graph.replay
    times = []
    for _ in range(TURNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000 / len(calls))
    return statistics.median(times)


def encoded(codec: str, shape: tuple[int, int], bits: float) -> CodecTensor:
    """A Gaussian weight in the codec's fastest preset."""
    config = codec_weight_only(codec, bits=bits, preset=fastest_preset(codec))
    return CodecTensor.from_hp(gaussian(*shape).bfloat16(), config)


def copies(weight: Any, nbytes: int) -> list[Any]:
    """So many that they exceed the L2 cache, the weight itself among them."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [weight, *(weight.clone() for _ in range(2 * cache // nbytes))]


def decode(codec: str, shape: tuple[int, int], bits: float) -> Row:
    weight = encoded(codec, shape, bits).cuda()
    count, stored = weight.numel(), weight.bits_per_weight * weight.numel() / 8
    resident = codec == "ectcq"  # others read the bitstream on the host
    weights = copies(weight, int(stored) + 2 * count) if resident else [weight]
    time_each = seconds([w.dequantize for w in weights], capture=resident)
    return {
        "bits_per_weight": weight.bits_per_weight,
        "microseconds": 1e6 * time_each,
        "weights_per_second": count / time_each,
        "gigabytes_per_second": 2 * count / time_each / 1e9,
        "floor_microseconds": 1e6 * (stored + 2 * count) / bandwidth(),
    }


def product(method: str, shape: tuple[int, int]) -> Row:
    dense = gaussian(*shape).bfloat16()
    if method == "dense":
        weight, nbytes = dense.cuda(), dense.nbytes
    elif method == "int4":
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        layer = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16, device="cuda")
        layer.weight.data.copy_(dense)
        quantize_(
            layer, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
        )
        weight, nbytes = layer.weight, dense.numel() // 2
    else:
        weight = encoded("ectcq", shape, float(method.partition(":")[2])).cuda()
        nbytes = int(weight.bits_per_weight * weight.numel() / 8)
    weights = copies(weight, nbytes)
    row: Row = {"floor_microseconds": 1e6 * nbytes / bandwidth()}
    for tokens in TOKENS:
        x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.bfloat16)
        each = seconds([partial(F.linear, x, w) for w in weights], capture=True)
        row[f"microseconds_{tokens}"] = 1e6 * each
        row[f"weights_per_second_{tokens}"] = dense.numel() / each
    return row


@dataclass(frozen=True)
class Stepper:
    """A model that makes a token from the last one.

    Attributes:
        step: the next token (1, 1), from `token` at `position`.
        weights_bytes: memory of the device that the weights take.
    """

    step: Callable[[], Tensor]
    token: Tensor
    position: Tensor
    weights_bytes: int


def stepper(method: str, shape: LlamaShape, device: str) -> Stepper:
    """A Llama with random weights.

    Args:
        method: "dense" or "ectcq:2", with the bits. Each distinct shape is encoded once.
        device: "cuda" or "cpu".
    """
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.context + shape.new_tokens,
    )
    with torch.device("meta"):
        llama = LlamaForCausalLM(config).bfloat16()
    bits = float(method.partition(":")[2] or 16)
    known: dict[tuple[int, int], CodecTensor] = {}
    chosen = {} if method == "dense" else encoded_weights(llama)
    for name, parameter in tqdm(chosen.items(), desc=method, leave=False):
        own = parameter.shape[0], parameter.shape[1]
        if own not in known:
            known[own] = encoded("ectcq", own, bits).to(device)
        layer = llama.get_submodule(name.removesuffix(".weight"))
        layer.weight = nn.Parameter(known[own].clone(), requires_grad=False)
    for module in llama.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                values = torch.randn(parameter.shape, device=device, dtype=torch.bfloat16) * 0.02
                module._parameters[key] = nn.Parameter(values, requires_grad=False)
    llama.model.rotary_emb = type(llama.model.rotary_emb)(config).to(device)
    known.clear()
    weights_bytes = 0
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        weights_bytes = torch.cuda.memory_allocated()
    cache = StaticCache(config=config, max_cache_len=shape.context + shape.new_tokens)
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    position = torch.zeros(1, dtype=torch.int64, device=device)

    def step() -> Tensor:
        logits = llama(
            token, past_key_values=cache, cache_position=position, position_ids=position[None]
        ).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    return Stepper(step, token, position, weights_bytes)


def model(method: str, shape: LlamaShape = LLAMA_2_7B) -> Row:
    """Tokens per second of a Llama, one token a step, as a CUDA graph."""
    start = time.perf_counter()
    own = stepper(method, shape, "cuda")
    made = time.perf_counter() - start
    with torch.no_grad():
        for _ in range(3):
            own.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            following = own.step()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for number in range(shape.new_tokens):
            own.position.fill_(shape.context + number)
            graph.replay()
            own.token.copy_(following)
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
    return {
        "made_seconds": made,
        "tokens_per_second": shape.new_tokens / elapsed,
        "weights_gigabytes": own.weights_bytes / 1e9,
        "with_index_gigabytes": torch.cuda.memory_allocated() / 1e9,
        "peak_gigabytes": torch.cuda.max_memory_allocated() / 1e9,
    }
