"""Where commands may write."""

from pathlib import Path


def check_output(output: Path, source: Path, *, force: bool) -> None:
    """Reject a place for what is made of `source`, before any work.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """
    what = f"OUT={str(output)!r}"
    path, origin = output.resolve(), source.resolve()
    if path == origin or path in origin.parents or origin in path.parents:
        raise ValueError(f"{what}: allowed: a place that is not, holds or lies in {str(source)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"{what}: allowed: a name in a directory that exists")
    if source.is_file() and path.suffix != ".safetensors":
        raise ValueError(f"{what}: allowed: a name ending in .safetensors, as a file is the input")
    if not path.exists():
        return
    if not force:
        raise ValueError(f"{what} exists: allowed: a new name, or --force to replace it")
    # What --force removes must be what this program writes, not a home directory.
    if path.is_dir() != source.is_dir() or (path.is_dir() and not (path / "config.json").exists()):
        raise ValueError(f"{what}: allowed with --force: a file for a file, a model's directory")
