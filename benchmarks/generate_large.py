"""Tokens per second and memory of a model of a billion weights, compressed and dense in bfloat16.

    python benchmarks/generate_large.py --json benchmarks/results/generate_large.json

Shaped as Llama 3.2 1B with a vocabulary of 32,000; the weights are normal numbers, as speed does
not depend on them. Embeddings, tied to the head, are encoded as `compress` does. Greedy, one
token at a time; the two by turns, in one process each, as what is dense would else count in the
memory of the other. Rates are medians over the turns, the ratio is the median of the turns'
ratios. Memory is that of weights, and the process's after generating (VmRSS) less what it is
before the model is made.
"""

import json
import statistics
import subprocess
import sys
from typing import Any

import torch
from common import fastest_preset, machine, parser, tokens_per_second, write
from torchao.quantization import FqnToConfig
from tqdm.auto import trange
from transformers import LlamaConfig, LlamaForCausalLM

from torchcodec_weights import codec_weight_only, compression_report, quantize_
from torchcodec_weights.convert.plan import Choice
from torchcodec_weights.system.memory import resident

CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=True,
    dtype="bfloat16",
)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--bits", type=float, default=2)
    options.add_argument("--head-bits", type=float, default=6)
    options.add_argument("--tokens", type=int, default=8)
    options.add_argument("--turns", type=int, default=5)
    options.add_argument("--serve", choices=("dense", "encoded"), help="used by the program itself")
    args = options.parse_args()
    if args.serve:
        _serve(args)
        return
    command = [sys.executable, *sys.argv, "--serve"]
    servers = {
        name: subprocess.Popen(
            [*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in ("dense", "encoded")
    }
    rows = {name: _ask(server, "") for name, server in servers.items()}
    rates: dict[str, list[float]] = {name: [] for name in servers}
    for _ in trange(args.turns, desc="turns"):
        for name, server in servers.items():
            answer = _ask(server, "go\n")
            rates[name].append(answer["rate"])
            rows[name]["process_bytes"] = answer["process_bytes"]
    for server in servers.values():
        server.communicate()
    for name, own in rates.items():
        rows[name]["tokens_per_second"] = statistics.median(own)
    ratios = [a / b for a, b in zip(rates["encoded"], rates["dense"], strict=True)]
    results = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "bits": args.bits,
        "head_bits": args.head_bits,
        "rows": rows,
        "of_dense": statistics.median(ratios),
        "of_dense_turns": ratios,
    }
    print(json.dumps(results, indent=1))
    write(args.json, results)


def _ask(server: "subprocess.Popen[str]", line: str) -> dict[str, Any]:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(line)
    server.stdin.flush()
    answer: dict[str, Any] = json.loads(server.stdout.readline())
    return answer


def _serve(args: Any) -> None:
    """Make a model, and generate with it once for each line of input."""
    before = resident()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(CONFIG).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    if args.serve == "encoded":
        preset = fastest_preset("ectcq")
        body, head = (codec_weight_only(bits=b, preset=preset) for b in (args.bits, args.head_bits))
        quantize_(model, FqnToConfig(Choice(body, embeddings=head).configs(model)))
        report = compression_report(model)
        stored = report.stored_bytes + report.resident_bytes + report.other_bytes
    else:
        stored = sum(weight.nbytes for weight in model.parameters())
    count = sum(weight.numel() for weight in model.parameters())
    print(json.dumps({"weights": count, "bytes": stored}), flush=True)
    prompt = torch.arange(8)[None]
    for _ in sys.stdin:
        rate = tokens_per_second(model, prompt, args.tokens)
        print(json.dumps({"rate": rate, "process_bytes": resident() - before}), flush=True)


if __name__ == "__main__":
    main()
