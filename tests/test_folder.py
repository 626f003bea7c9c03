"""What of a model's directory may be read: links out of it and devices are refused."""

import os
import shutil
import socket
from pathlib import Path

import pytest

from torchcodec_weights.models.folder import check_folder
from torchcodec_weights.models.huggingface import copy_other_files, load_model, read_config

HASH = "0123456789abcdef" * 4


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """As a stranger may publish it; beside it lies a private file."""
    (tmp_path / "private").write_text("key")
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    (folder / "inner" / "file").touch()
    return folder


def cached(folder: Path, tmp_path: Path) -> Path:
    """The same in the layout of the Hugging Face cache."""
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "main"
    (repository / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        blob = repository / "blobs" / (HASH[:-1] + str(number))
        shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("notes.txt", "../private"),
        ("notes.txt", "/etc/passwd"),
        ("inner/notes.txt", "../../private"),
        ("config.json", "../private"),
        ("model.safetensors", "../private"),
        ("other", ".."),
        ("notes.txt", "../not there"),
        ("notes.txt", ".hidden"),
    ],
)
def test_link_out_of_the_model(model: Path, tmp_path: Path, name: str, target: str) -> None:
    (model / ".hidden").symlink_to("../private")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(target)
    message = rf"{model / name}' is a link to '.*': allowed: links to places in"
    with pytest.raises(ValueError, match=message):
        read_config(model)
    with pytest.raises(ValueError, match=message):
        copy_other_files(model, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_links_within_the_model(model: Path, tmp_path: Path) -> None:
    (model / "a").symlink_to("b")
    (model / "b").symlink_to("inner/file")
    (model / "inner" / "again").symlink_to("..")
    (model / "loop").symlink_to("loop")
    (model / "nowhere").symlink_to("not there")
    check_folder(model)
    (tmp_path / "elsewhere").symlink_to(model)
    check_folder(tmp_path / "elsewhere")
    copy_other_files(model, tmp_path / "copy")
    copied = sorted(p.relative_to(tmp_path / "copy") for p in (tmp_path / "copy").rglob("*"))
    assert list(map(str, copied)) == ["a", "b", "config.json", "inner", "inner/file"]
    assert not (tmp_path / "copy" / "a").is_symlink()


def test_cache_of_hugging_face(model: Path, tmp_path: Path) -> None:
    snapshot = cached(model, tmp_path)
    assert read_config(snapshot) == {}
    check_folder(snapshot / "inner")
    copy_other_files(snapshot, tmp_path / "copy")
    assert (tmp_path / "copy" / "config.json").read_text() == "{}"


def test_layout_of_the_cache_does_not_open_other_places(model: Path, tmp_path: Path) -> None:
    snapshot = cached(model, tmp_path)
    blobs = snapshot.parents[1] / "blobs"
    # Names that are no hashes, and blobs of another repository.
    (blobs / "notes").touch()
    (snapshot / "notes").symlink_to("../../blobs/notes")
    with pytest.raises(ValueError, match="notes' is a link"):
        check_folder(snapshot)
    (snapshot / "notes").unlink()
    shutil.copytree(blobs, tmp_path / "models--c--d" / "blobs")
    (snapshot / "notes").symlink_to(tmp_path / "models--c--d" / "blobs" / f"{HASH[:-1]}0")
    with pytest.raises(ValueError, match="notes' is a link"):
        check_folder(snapshot)
    (snapshot / "notes").unlink()
    # A link in the place of blobs.
    blobs.rename(tmp_path / "moved")
    blobs.symlink_to(tmp_path / "moved")
    with pytest.raises(ValueError, match="is a link"):
        check_folder(snapshot)


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", ["fifo", "socket"])
def test_nothing_but_files_is_opened(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, linked: bool
) -> None:
    monkeypatch.chdir(model)  # a socket's path must be short
    name = ".hidden" if linked else "other.safetensors"
    if kind == "fifo":
        os.mkfifo(name)
    else:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(name)
    if linked:
        check_folder(model)  # nothing reads what is hidden
        (model / "other.safetensors").symlink_to(name)
    with pytest.raises(ValueError, match=r"other\.safetensors' is a FIFO, a socket or a device"):
        read_config(model)
    with pytest.raises(ValueError, match="is a FIFO"):
        copy_other_files(model, tmp_path / "copy")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is no JSON that can be read"),
        (b"\xff\xfe{", "is no JSON that can be read"),
        (b'{"a": "\xff"}', "is no JSON that can be read"),
        (b"[" * 100_000, "is no JSON that can be read"),
        (b"[]", "holds list: allowed: a JSON object"),
        (b"null", "holds NoneType: allowed: a JSON object"),
        (b'{"quantization_config": [1]}', "quantization_config: allowed: a JSON object"),
        (b'{"architectures": {"0": "x"}}', "architectures: allowed: a list of names"),
        (b'{"architectures": "Llama"}', "architectures: allowed: a list of names"),
        (b'{"architectures": [1]}', "architectures: allowed: a list of names"),
    ],
)
def test_config_that_is_none(model: Path, text: bytes, message: str) -> None:
    (model / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"config\.json.* ?{message}"):
        read_config(model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON that can be read"),
        ("{}", "weight_map: allowed"),
        ('{"weight_map": ["x"]}', "weight_map: allowed"),
        ('{"weight_map": {"x": 1}}', "weight_map: allowed"),
        ('{"weight_map": {"x": "../private"}}', r"names the file '\.\./private': allowed"),
        ('{"weight_map": {"x": "inner/../../private"}}', "names the file"),
        ('{"weight_map": {"x": "/etc/passwd"}}', "names the file '/etc/passwd': allowed"),
        ('{"weight_map": {"x": ".hidden"}}', "names the file"),
        ('{"weight_map": {"x": ""}}', "names the file"),
    ],
)
def test_index_that_leads_elsewhere(model: Path, text: str, message: str) -> None:
    (model / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=rf"index\.json.* ?{message}"):
        read_config(model)


def test_index_of_files_that_are_there(model: Path) -> None:
    text = '{"weight_map": {"x": "model.safetensors", "y": "inner/file"}}'
    (model / "model.safetensors.index.json").write_text(text)
    assert read_config(model) == {}


def test_an_adapter_is_not_loaded(model: Path, tmp_path: Path) -> None:
    """transformers would follow it, where peft is installed."""
    text = f'{{"peft_type": "LORA", "base_model_name_or_path": "{tmp_path / "private"}"}}'
    (model / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json is of an adapter: allowed"):
        read_config(model)
    with pytest.raises(ValueError, match="is of an adapter"):
        load_model(model)
    (model / "config.json").unlink()
    with pytest.raises(ValueError, match="is of an adapter"):
        load_model(model)
