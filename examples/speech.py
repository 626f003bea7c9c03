"""Speech: a model of Whisper's architecture, encoded, transcribes what it hears.

    python examples/speech.py

No weights of Whisper come as a Python package, so these are random, in a small configuration: what
it says is noise, and random weights say nothing about quality. That encoder, decoder and `generate`
work encoded is what this shows. With a Whisper of yours: --model FOLDER.
"""

import argparse
import copy

import numpy as np
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from torchcodec_weights import codec_weight_only, compression_report, quantize_

RATE = 16_000  # samples per second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder; random weights by default")
    args = parser.parse_args()

    if args.model:
        model = WhisperForConditionalGeneration.from_pretrained(args.model)
        extractor = WhisperFeatureExtractor.from_pretrained(args.model)
    else:
        model, extractor = random_whisper(), WhisperFeatureExtractor()
    seconds = np.arange(RATE) / RATE
    sound = np.sin(2 * np.pi * 220 * seconds * (1 + seconds))  # a rising tone
    features = extractor(sound, sampling_rate=RATE, return_tensors="pt").input_features

    encoded = copy.deepcopy(model.eval())
    # The output layer, `proj_out`, is tied to the embedding and stays dense.
    quantize_(
        encoded,
        codec_weight_only(bits=3, preset="fast"),
        lambda module, name: isinstance(module, torch.nn.Linear) and name != "proj_out",
    )
    print(compression_report(encoded).totals)
    for name, one in {"dense": model, "encoded": encoded}.items():
        tokens = one.generate(features, max_new_tokens=8, do_sample=False)
        print(f"{name:8} tokens: {tokens[0].tolist()}")


def random_whisper() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    layers = {"encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 256, "encoder_ffn_dim": 1024, "decoder_ffn_dim": 1024}
    return WhisperForConditionalGeneration(WhisperConfig(**layers, **heads, **sizes))


if __name__ == "__main__":
    main()
