"""Imports go down: no circle of modules, and no package imports one that stands above it."""

import ast
from pathlib import Path

import torchcodec_weights

ROOT = Path(torchcodec_weights.__file__).parent
# From the bottom to the top; packages of one line do not import each other.
LAYERS = (
    {"system"},
    {"format"},
    {"codecs"},
    {"matrix"},
    {"decoders"},
    {"encoder", "pytorch"},
    {"models"},
    {"evaluation"},
    {"cli"},
)


def imports() -> dict[str, set[str]]:
    """Modules of the package to those that they import, for types alone included."""
    found: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            package, *parts = node.module.split(".")
            if package != "torchcodec_weights":
                continue
            for alias in node.names:
                inner = [*parts, alias.name]
                module = inner if ROOT.joinpath(*inner).with_suffix(".py").exists() else parts
                found[name].add(".".join(module))
    return found


def test_no_circle() -> None:
    graph = imports()
    assert len(graph) > 100
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' → '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_no_arrow_up() -> None:
    height = {package: number for number, layer in enumerate(LAYERS) for package in layer}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == set(height)
    for name, others in imports().items():
        package = name.partition(".")[0]
        for other in others:
            below = other.partition(".")[0]
            if package in height and below in height and package != below:
                assert height[below] < height[package], f"{name} imports {other}"
