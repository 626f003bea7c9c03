"""The compiled part: its structs are where Python's mirrors have them, or it is not used."""

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import pytest

from torchcodec_weights import CodecUnavailableError
from torchcodec_weights.codecs.common import compiled, int8
from torchcodec_weights.codecs.ectcq import column_kernels, kernels

MIRRORS = (
    compiled.MatrixView,
    int8.Int8Matrix,
    kernels.Tables,
    kernels.Model,
    column_kernels.ColumnClass,
)


def changed(
    mirror: type[ctypes.Structure], fields: list[tuple[str, Any]]
) -> type[ctypes.Structure]:
    return type(mirror.__name__, (ctypes.Structure,), {"_fields_": fields})


def library() -> ctypes.CDLL:
    lib = compiled.library()
    assert lib is not None
    return lib


@pytest.mark.parametrize("mirror", MIRRORS)
def test_mirrors_are_those_of_the_library(mirror: type[ctypes.Structure]) -> None:
    assert compiled.layout_difference(library(), mirror) is None


@pytest.mark.parametrize("mirror", MIRRORS)
def test_every_change_of_a_mirror_is_seen(mirror: type[ctypes.Structure]) -> None:
    fields = list(mirror._fields_)
    others = [
        [
            (f"{name}_", *kind) if i == at else (name, *kind)
            for i, (name, *kind) in enumerate(fields)
        ]
        for at in range(len(fields))
    ]
    swaps = range(min(2, len(fields) - 1))
    others += [[*fields[:at], fields[at + 1], fields[at], *fields[at + 2 :]] for at in swaps]
    others += [fields[:-1], [*fields, ("more", ctypes.c_uint64)]]
    others += [[("more", ctypes.c_uint8), *fields]]
    for other in others:
        told = compiled.layout_difference(library(), changed(mirror, other))
        assert told is not None
        assert f"a field of {mirror.__name__} (name, offset, bytes) is (" in told


def test_a_size_that_differs_is_seen() -> None:
    fields = [(name, kind) for name, kind in compiled.MatrixView._fields_]
    other = changed(compiled.MatrixView, [*fields[:-1], ("end", ctypes.c_uint32)])
    told = compiled.layout_difference(library(), other)
    assert told is not None
    assert "('end', 136, 8) there and ('end', 136, 4) here" in told


def test_a_library_of_another_version_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One from before the structs were compared, which has no function to ask."""
    source, old = tmp_path / "old.c", tmp_path / "libcodecs.so"
    source.write_text(
        "int codecs_best_level(void) { return 0; }\nvoid codecs_use_openmp(void *p) {}"
    )
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(old)], check=True)
    monkeypatch.setattr(compiled, "library", lambda: ctypes.CDLL(str(old)))
    told = "libcodecs.so is not of this version of torchcodec_weights"
    with pytest.raises(CodecUnavailableError, match=f"codec 'ectcq': {told}"):
        compiled.require("ectcq")
    info = compiled.info("ectcq", lossy=True)
    assert told in str(info.missing)
    assert info.encoder is None
    assert not info.decoders
