"""Decoded weights kept and decoded ahead."""

import copy
import gc
import threading
from collections.abc import Iterator
from concurrent.futures import wait

import pytest
import torch
from torch import Tensor, nn

from torchcodec_weights import (
    CodecError,
    codec_weight_only,
    decoded_cache,
    decompress_,
    quantize_,
)
from torchcodec_weights.decoders import cache
from torchcodec_weights.decoders.cache import CACHE

BYTES = 128 * 128 * 4
X = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(*[nn.Linear(128, 128) for _ in range(6)])
    quantize_(layers, codec_weight_only(bits=5, preset="fast"))
    return layers.requires_grad_(False)


def dense_product(model: nn.Sequential) -> Tensor:
    """What the decoded weights give."""
    dense = copy.deepcopy(model)
    decompress_(dense)
    return dense(X)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the threads that decode, in order; an event would be needed to see more."""
    names: list[str] = []
    original = cache.decode_complete

    def watched(*args: object) -> Tensor:
        names.append(threading.current_thread().name)
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "decode_complete", watched)
    yield names
    CACHE.resize(0)


def ahead(names: list[str]) -> int:
    return sum(name.startswith("torchcodec_weights-ahead") for name in names)


@pytest.mark.feature("Memory", "the next layer is decoded while one is used", "`decoded_cache`")
@pytest.mark.parametrize("capacity", [2, 3, 4, 5])
def test_the_next_weight_is_decoded_ahead(
    model: nn.Sequential, threads: list[str], capacity: int
) -> None:
    expected = dense_product(model)
    with decoded_cache(capacity * BYTES):
        assert torch.equal(model(X), expected)
        assert ahead(threads) == 0, "the order is not known yet"
        for _ in range(3):
            wait(list(CACHE._ahead.values()))
            threads.clear()
            assert torch.equal(model(X), expected)
            assert CACHE.bytes <= capacity * BYTES
            wait(list(CACHE._ahead.values()))
        assert len(threads) == ahead(threads), "all that was decoded was decoded ahead"
        # A budget of three weights is used for decoding ahead; weights beyond that stay cached.
        assert len(threads) <= 6 - max(0, capacity - 3)
    assert CACHE.bytes == 0


def test_a_budget_of_one_weight_decodes_none_ahead(
    model: nn.Sequential, threads: list[str]
) -> None:
    expected = dense_product(model)
    with decoded_cache(2 * BYTES - 1):
        for _ in range(3):
            assert torch.equal(model(X), expected)
    assert len(threads) == 18
    assert ahead(threads) == 0


def test_too_large_to_be_kept_is_multiplied_as_without_a_cache(
    model: nn.Sequential, threads: list[str]
) -> None:
    expected = dense_product(model)
    with decoded_cache(BYTES - 1):
        torch.testing.assert_close(model(X), expected)
    assert threads == []


def test_damage_shows_where_the_weight_is_used(model: nn.Sequential) -> None:
    with decoded_cache(3 * BYTES):
        model(X)
        model(X)
        weight = model[3].weight
        weight.qdata[-10] ^= 255
        for _ in range(2):
            with pytest.raises(CodecError, match="corrupt"):
                model(X)
        weight.qdata[-10] ^= 255
        model(X)


def test_what_dies_leaves_the_cache(model: nn.Sequential) -> None:
    with decoded_cache(100 * BYTES):
        model(X)
        assert CACHE.bytes == 6 * BYTES
        del model[2:]
        gc.collect()
        assert CACHE.bytes == 2 * BYTES
        changed = model[0].weight.qdata
        other = nn.Linear(128, 128)
        quantize_(other, codec_weight_only(bits=4, preset="fast"), lambda module, name: True)
        model[0].weight = other.weight
        del changed
        expected = nn.functional.linear(X, other.weight.dequantize(), model[0].bias)
        assert torch.equal(model[0](X), expected)
        assert CACHE.bytes == 2 * BYTES


def test_many_threads(model: nn.Sequential) -> None:
    expected = dense_product(model)
    wrong: list[int] = []

    def use(number: int) -> None:
        wrong.extend(number for _ in range(30) if not torch.equal(model(X), expected))

    with decoded_cache(3 * BYTES):
        users = [threading.Thread(target=use, args=(i,)) for i in range(4)]
        for user in users:
            user.start()
        for user in users:
            user.join()
        assert CACHE.bytes <= 3 * BYTES
    assert wrong == []
    assert CACHE.bytes == 0
