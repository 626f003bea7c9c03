"""What evaluation is made of: rows in files, SNR, weights encoded with other random signs."""

import json
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import snr_db as reference_snr_db
from torch import nn

from torchcodec_weights import CodecTensor, codec_weight_only
from torchcodec_weights.evaluation.models import encoded_weights, load_minilm
from torchcodec_weights.evaluation.recoding import recode
from torchcodec_weights.evaluation.rows import Rows
from torchcodec_weights.evaluation.snr import snr_db
from torchcodec_weights.matrix.normalize import SIGN_SEED, normalize


def test_rows_are_written_one_by_one_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = Rows(path)
    assert not path.exists()
    rows.add({"codec": "ectcq", "bits": 2.0, "value": 1.5})
    assert json.loads(path.read_text()) == [{"codec": "ectcq", "bits": 2.0, "value": 1.5}]
    rows.add({"codec": "ectcq", "bits": 3.0, "value": 0.5})
    again = Rows(path)
    assert again.find({"codec": "ectcq", "bits": 3.0}) == {
        "codec": "ectcq",
        "bits": 3.0,
        "value": 0.5,
    }
    assert again.find({"codec": "ectcq", "bits": 4.0}) is None
    assert again.find({"codec": "ectcq", "preset": None}) is None, "the row says nothing of it"


def test_rows_without_a_file_are_kept() -> None:
    rows = Rows(None)
    rows.add({"bits": 2.0})
    assert rows.find({"bits": 2.0}) == {"bits": 2.0}


@pytest.mark.parametrize("content", ["{}", "[1]", "no JSON", "[{}"])
def test_a_file_of_something_else_is_refused_and_kept(content: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"--out=.*other.json.*allowed: a new name"):
        Rows(path, "--out")
    assert path.read_text() == content


def test_rows_in_no_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--json=.*allowed: a name in a directory that exists"):
        Rows(tmp_path / "nowhere" / "rows.json")


def test_snr_is_that_of_all_weights_together() -> None:
    one, other = torch.randn(30, 40), 100 * torch.randn(7, 5)
    decoded = one + 0.1 * torch.randn(30, 40), other + torch.randn(7, 5)
    joined = torch.cat([one.flatten(), other.flatten()])
    joined_decoded = torch.cat([decoded[0].flatten(), decoded[1].flatten()])
    expected = reference_snr_db(joined, joined_decoded)
    assert snr_db(zip((one, other), decoded, strict=True)) == pytest.approx(expected, abs=1e-9)
    arrays = [(one.numpy(), decoded[0].numpy()), (other.numpy(), decoded[1].numpy())]
    assert snr_db(arrays) == pytest.approx(expected, abs=1e-9)
    assert snr_db([(np.full(4, 10.0), np.full(4, 11.0))]) == pytest.approx(20)


def test_snr_at_its_ends() -> None:
    ones, zeros = torch.ones(2, 3), torch.zeros(2, 3)
    assert snr_db([(ones, ones)]) == inf
    assert snr_db([(zeros, ones)]) == -inf
    with pytest.raises(ValueError, match=r"shape \(3,\): allowed: \(2, 3\)"):
        snr_db([(ones, torch.ones(3))])


def test_signs_follow_the_seed() -> None:
    w = np.random.default_rng(0).standard_normal((64, 96), np.float32)
    default, same, other = normalize(w, 5.0), normalize(w, 5.0, SIGN_SEED), normalize(w, 5.0, 1)
    np.testing.assert_array_equal(default.z, same.z)
    np.testing.assert_array_equal(np.abs(default.z), np.abs(other.z))
    assert (default.z != other.z).any()


def test_recoded_weights_are_those_of_from_hp() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(256, 512, generator=generator) for name in ("a", "b")}
    configs = {name: codec_weight_only("ectcq", bits=b) for name, b in (("a", 2), ("b", 3))}
    coded = {name: CodecTensor.from_hp(weights[name], configs[name]) for name in weights}
    bits, decoded = recode(weights, configs)
    assert list(decoded) == list(weights)
    for name, tensor in coded.items():
        assert torch.equal(decoded[name], tensor.dequantize())
    stored = sum(tensor.stored_bytes for tensor in coded.values())
    assert bits == 8 * stored / sum(weight.numel() for weight in weights.values())
    other_bits, other = recode(weights, configs, seed=1)
    assert not torch.equal(other["a"], decoded["a"])
    assert other_bits == pytest.approx(bits, abs=0.03)
    for name, weight in weights.items():
        expected = reference_snr_db(weight, decoded[name])
        assert snr_db([(weight, other[name])]) == pytest.approx(expected, abs=0.2)


def test_encoded_weights_are_those_of_linear_layers() -> None:
    model, _ = load_minilm()
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert set(encoded_weights(model)) == linear
    assert "embeddings.word_embeddings.weight" not in linear
