"""Imports go down: no circle of modules, and no package imports one that stands above it.

Codecs stay in their folders: other modules do not name one, but for the few listed here.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import torchcodec_weights

ROOT = Path(torchcodec_weights.__file__).parent
# From the bottom to the top. Modules of one line may import each other, without a circle.
LAYERS = (
    {"system", "errors", "third_party"},
    {"pages"},
    {"format"},
    {"codecs"},
    {"policy"},
    {"matrix"},
    {"decoders"},
    {"encoder"},
    {"config"},
    {"pytorch", "tensor"},
    {"calibration"},
    {"models"},
    {"convert", "vllm"},
    {"evaluation"},
    {"cli"},
    {"__init__"},
)
# Of codecs, by name, the folders that may name them.
FOLDERS = {
    "ectcq": ("codecs/ectcq",),
    "lossless": ("codecs/lossless",),
    **dict.fromkeys(("vvc", "hevc", "h264", "av1", "vp9"), ("codecs/video", "codecs/headers")),
    **dict.fromkeys(("jpeg", "jpeg2000", "htj2k", "jpegxl"), ("codecs/image", "codecs/headers")),
}
# What other modules name, and why.
ALLOWED = {
    "codecs/names.py": {*FOLDERS},  # what the command line takes
    "codecs/registry.py": {*FOLDERS},  # the table of codecs
    "codecs/device_decoders.py": {"hevc", "h264", "av1", "vp9", "jpeg2000", "htj2k"},  # sets theirs
    "codecs/image/jpegxl.py": {"lossless"},  # an option of libjxl
    "config.py": {"ectcq", "lossless"},  # the default; a word of messages
    "cli/arguments.py": {"ectcq", "lossless", "jpeg"},  # the default; words of the help
    "cli/codecs.py": {"lossless"},  # the kind of a codec
    "cli/tile_file.py": {*FOLDERS} - {"lossless"},  # suffixes of these files
}


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        yield path.relative_to(ROOT), ast.parse(path.read_text())


def module_name(path: Path) -> str:
    """Name below the package; a package's is that of its directory."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def is_module(parts: list[str]) -> bool:
    return ROOT.joinpath(*parts).with_suffix(".py").exists() or ROOT.joinpath(*parts).is_dir()


def imports() -> dict[str, set[str]]:
    """Modules of the package to those that they import, for types alone included."""
    found: dict[str, set[str]] = {}
    for path, tree in trees():
        modules = found[module_name(path)] = set()
        for node in ast.walk(tree):
            names: list[list[str]] = []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: a relative import"
                names = [[*(node.module or "").split("."), alias.name] for alias in node.names]
            for package, *inner in names:
                if package == ROOT.name and inner:
                    modules.add(".".join(inner if is_module(inner) else inner[:-1]) or "__init__")
    return found


def test_no_circle() -> None:
    graph = imports()
    assert len(graph) > 100
    assert {name for others in graph.values() for name in others} <= graph.keys()
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' → '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_no_arrow_up() -> None:
    height = {package: number for number, layer in enumerate(LAYERS) for package in layer}
    graph = imports()
    assert {name.partition(".")[0] for name in graph} == set(height)
    for name, others in graph.items():
        package = name.partition(".")[0]
        for other in others:
            below = other.partition(".")[0]
            assert height[below] <= height[package], f"{name} imports {other}"


def names_in(tree: ast.Module) -> Iterator[str]:
    """Strings that are not docstrings, identifiers, and names of imported modules."""
    documentation = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in documentation:
                yield node.value
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield " ".join([node.module or "", *(alias.name for alias in node.names)])
        elif isinstance(node, ast.Import):
            yield " ".join(alias.name for alias in node.names)


def test_codecs_stay_in_their_folders() -> None:
    found: dict[str, set[str]] = {}
    for path, tree in trees():
        file = path.as_posix()
        for text in names_in(tree):
            words = set(re.findall(r"[a-z0-9]+", text.lower()))
            for codec in words & FOLDERS.keys():
                if not file.startswith(FOLDERS[codec]):
                    found.setdefault(file, set()).add(codec)
    assert found == ALLOWED
