"""The default texts of evaluation, in the source tree."""

from pathlib import Path

_FOLDER = Path(__file__).parents[2] / "benchmarks" / "data"

WIKITEXT2 = "wikitext2-test.txt"
STS_BENCHMARK = "sts-test.csv"


def data_file(name: str) -> Path:
    """The path of a file that comes with the sources.

    Raises:
        FileNotFoundError: the package was installed without its source tree.
    """
    path = _FOLDER / name
    if not path.exists():
        raise FileNotFoundError(
            f"{name} comes with the sources only, in benchmarks/data; give a file"
        )
    return path
