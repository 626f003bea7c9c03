"""The texts that evaluation takes by default: those beside the sources."""

from pathlib import Path

_FOLDER = Path(__file__).parents[2] / "benchmarks" / "data"

WIKITEXT2 = "wikitext2-test.txt"
STS_BENCHMARK = "sts-test.csv"


def data_file(name: str) -> Path:
    """The path of a file that comes with the sources.

    Raises:
        FileNotFoundError: this is a package without its sources.
    """
    path = _FOLDER / name
    if not path.exists():
        raise FileNotFoundError(
            f"{name} comes with the sources only, in benchmarks/data; give a file"
        )
    return path
