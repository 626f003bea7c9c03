"""Tokens a second of llama.cpp with a GGUF file, greedy, in a process of its own.

    python benchmarks/llama_rate.py FILE --threads 2 --tokens 32

Its threads poll for work after they had some: in the process of another model they would take that
model's time.
"""

import argparse

import xllamacpp

PROMPT = "The history of the city begins"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    args = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = args.file
    params.n_ctx, params.warmup = 512, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    answer = xllamacpp.Server(params).handle_completions(
        {"prompt": PROMPT, "n_predict": args.tokens, "ignore_eos": True, "temperature": 0}
    )
    print("tokens a second:", answer["timings"]["predicted_per_second"])


if __name__ == "__main__":
    main()
