"""Compress a model of transformers to 3 bits per weight, save it, and open it as any other.

    python examples/compress_hf.py --model smollm2
    python examples/compress_hf.py --model FOLDER

It leaves `compressed/` in the current folder.
"""

import argparse
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

from torchcodec_weights import codec_weight_only, compression_report
from torchcodec_weights.evaluation.models import load_smollm2, load_tiny

PACKAGED = {"smollm2": load_smollm2, "tiny": load_tiny}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, tiny, or a model's folder")
    parser.add_argument("--bits", type=float, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as dense:
        folder = args.model
        if args.model in PACKAGED:  # a folder, as a model hub gives it
            for part in PACKAGED[args.model]():
                part.save_pretrained(dense)
            folder = dense
        config = codec_weight_only(bits=args.bits, preset="fast")
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=TorchAoConfig(config)
        )
        model.save_pretrained("compressed")
        AutoTokenizer.from_pretrained(folder).save_pretrained("compressed")
        print(f"before: {size(Path(folder)):6.1f} MB of safetensors")
    print(f"after:  {size(Path('compressed')):6.1f} MB")

    # What follows needs no import of torchcodec_weights, and works in any program.
    model = AutoModelForCausalLM.from_pretrained("compressed")
    tokenizer = AutoTokenizer.from_pretrained("compressed")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]))
    print(compression_report(model).totals)


def size(folder: Path) -> float:
    """Megabytes of a folder's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6


if __name__ == "__main__":
    main()
