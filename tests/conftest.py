"""Real weights, a small model, and the codecs that this machine can encode with."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchcodec_weights import CodecTensor, codec_weight_only
from torchcodec_weights.codecs.registry import get_codec
from torchcodec_weights.decoders import choice, pictures
from torchcodec_weights.evaluation.models import minilm_weights

pytest_plugins = ["compatibility"]

VIDEO = ("vvc", "hevc", "h264", "av1", "vp9")
IMAGE = ("jpeg", "jpeg2000", "htj2k", "jpegxl")
ALL = ("ectcq", *VIDEO, *IMAGE)


# Marked `slow`: files, and single tests of others. The rest takes less than a minute on two cores.
SLOW = (
    "test_autoload.py",
    "test_checkpoint.py",
    "test_cli.py",
    "test_compile.py",
    "test_decode_threads.py",
    "test_diffusers.py",
    "test_distributed.py",
    "test_distributed_files.py",
    "test_distributed_launch.py",
    "test_examples.py",
    "test_files.py",
    "test_formats.py",
    "test_fuzz.py",
    "test_gpu_kernels.py",
    "test_hostile.py",
    "test_hostile_memory.py",
    "test_hostile_pictures.py",
    "test_isolation.py",
    "test_moves.py",
    "test_neon.py",
    "test_calibrate.py",
    "test_rate_control.py",
    "test_resident.py",
    "test_sanitizer.py",
    "test_sentence_transformers.py",
    "test_stream.py",
    "test_torchao_cases.py",
    "test_timm.py",
    "test_training.py",
    "test_transformers.py",
    "test_upstream.py",
    "test_wheel.py",
    "test_compiled_operators.py::test_without_the_package",
    "test_block_calibration.py::test_statistics_are_those_of_the_whole_model",
    "test_block_calibration.py::test_the_same_bytes_as_in_memory",
    "test_block_calibration.py::test_a_killed_run_goes_on_with_the_next_block",
    "test_block_calibration.py::test_sigkill_at_any_stage",
    "test_block_calibration.py::test_a_lost_tensor_is_encoded_again",
    "test_block_calibration.py::test_workers_share_blocks",
    "test_block_calibration.py::test_torchrun",
    "test_block_calibration.py::test_workers_need_blocks",
    "test_block_calibration.py::test_other_models_go_on_without",
    "test_block_calibration.py::test_a_source_that_was_written_to_is_tried_again",
    "test_block_calibration.py::test_refused_before_any_work",
    "test_docs.py",
    "test_dispatch.py::test_products",
    "test_dispatch.py::test_slices",
    "test_image.py::test_damaged_streams_crash_nothing",
    "test_on_device.py::test_arithmetic_is_that_of_the_cpu",
    "test_on_device.py::test_works_alone_and_says_what_is_missing_when_asked",
    "test_pages.py::test_a_hostile_name_is_text_in_a_browser",
    "test_pages.py::test_a_layer_is_clicked",
    "test_pages.py::test_hover_shows_a_point",
    "test_pages.py::test_readable_on_a_phone",
    "test_quantize.py::test_every_linear_weight_is_encoded",
    "test_resident_weights.py::test_compiled",
    "test_third_party.py::test_the_program_lists_its_weights",
    "test_tensor.py::test_any_shape_dtype_and_rate",
    "test_tensor.py::test_odd_weights",
    "test_quantize.py::test_an_interrupt_ends_the_encoders_of_its_own_call_only",
)
# Marked `gpu`.
GPU = ("test_gpu_decoders.py", "test_gpu_driver.py", "test_gpu_ectcq.py")


def _check_marked() -> None:
    """Raise where a file or a test that is to be marked is no longer there."""
    for name in (*SLOW, *GPU):
        file, _, test = name.partition("::")
        path = Path(__file__).with_name(file)
        if not path.is_file() or (test and f"def {test}(" not in path.read_text()):
            raise pytest.UsageError(f"conftest.py marks {name}, which is not there")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _check_marked()
    for item in items:
        names = {item.path.name, f"{item.path.name}::{item.name.partition('[')[0]}"}
        for mark, marked in (("slow", SLOW), ("gpu", GPU)):
            if names.intersection(marked):
                item.add_marker(mark)


def fastest(codec: str) -> str | None:
    """The first preset of a codec, None where it has none."""
    return next(iter(get_codec(codec).presets), None)


def coded(weight: Tensor, codec: str, depth: int | None = None, **options: Any) -> CodecTensor:
    """A weight at 4 bits in a codec's fastest preset; `depth` where a codec has a choice."""
    depth = depth if len(get_codec(codec).bit_depths) > 1 else None
    config = codec_weight_only(codec, bits=4, preset=fastest(codec), bit_depth=depth, **options)
    return CodecTensor.from_hp(weight, config)


@pytest.fixture
def forgotten_choices() -> Iterator[None]:
    """No decoder forced, given up or warned of; and none afterwards."""
    for state in (choice._choices, choice._failures, choice._warned, pictures._verified):
        state.clear()
    yield
    choice._choices.clear()
    choice._failures.clear()


def tiny_llama(**changes: object) -> Any:
    """A Llama of two layers with tied embeddings, random weights, the same at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM  # takes seconds; few tests need it

    torch.manual_seed(0)
    options: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**options | changes))


def word_tokenizer(words: Sequence[str]) -> Any:
    """A tokenizer for `tiny_llama` of words between spaces, with tokens from 3 on."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    special = ("<pad>", "<s>", "</s>")
    tokens = {word: token for token, word in enumerate((*special, *words))}
    tokenizer = Tokenizer(WordLevel(tokens, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="session")
def minilm() -> dict[str, Tensor]:
    """All weights of all-MiniLM-L6-v2."""
    return minilm_weights()


@pytest.fixture(scope="session")
def query(minilm: dict[str, Tensor]) -> Tensor:
    """A real weight of 384 x 384."""
    return minilm["encoder.layer.3.attention.self.query.weight"]


@pytest.fixture(scope="session")
def spiky(minilm: dict[str, Tensor]) -> Tensor:
    """A real weight of 384 x 1536 with values at more than 100 standard deviations."""
    return minilm["encoder.layer.0.output.dense.weight"]


@pytest.fixture(scope="session")
def coded_query(query: Tensor) -> CodecTensor:
    """`query` in a fast codec. Tests must not change it."""
    return CodecTensor.from_hp(query, codec_weight_only("h264", bits=3))


def snr_db(weight: Tensor, decoded: Tensor) -> float:
    """Energy of a weight over the energy of its error, in dB."""
    error = (weight.double() - decoded.double()).square().sum()
    return float(10 * torch.log10(weight.double().square().sum() / error).detach())
