"""`collect_statistics`: how much a model's output suffers from errors in its weights."""

import json
import os
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from torch import Tensor, nn

from torchcodec_weights.calibration.accumulate import Sums, accumulate
from torchcodec_weights.calibration.matrices import MatrixFile, Place
from torchcodec_weights.calibration.score import call_model, score
from torchcodec_weights.calibration.selection import selected_weights
from torchcodec_weights.calibration.text import own_text
from torchcodec_weights.matrix.importance import Importance
from torchcodec_weights.system.files import unfinished
from torchcodec_weights.third_party import is_linear

_TABLE = "importance"
"""Key in a file's table of strings, of JSON: names of modules to the names of the tensors of `rows`
and `moments`, or to null."""


class Statistics(Mapping[str, Importance | None]):
    """The `Importance` of each selected weight, by the name of its module, in the model's order.

    None stands for a layer that no input or no gradient reached. Weights that modules share have
    one `Importance`, and layers that take the same inputs have the same moments, stored once.

    The moments lie in a file: that of `load`, or a temporary one, which is gone when this object
    is, or the process. Each `[name]` maps those of one layer, without a copy.
    """

    def __init__(self, sums: Mapping[str, Sums | None], file: MatrixFile, source: str) -> None:
        """For `collect_statistics` and `load`.

        Args:
            sums: by names of modules.
            file: has the moments.
            source: what messages call it.
        """
        self._sums = dict(sums)
        self._file = file
        self._source = source

    def __len__(self) -> int:
        return len(self._sums)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __getitem__(self, name: str) -> Importance | None:
        """A layer's importance, or None.

        Raises:
            KeyError: there is no such layer.
            ValueError: the file holds moments that are not finite, or negative mean squares.
        """
        sums = self._sums[name]
        if sums is None:
            return None
        importance = Importance(sums.rows, self._file.read(sums.moments))
        if not np.isfinite(importance.moments).all() or importance.columns.min() < 0:
            raise ValueError(
                f"{self._source}: moments of {name!r} that are not finite, or negative on the "
                "diagonal: allowed: a mean of x xᵀ"
            )
        return importance

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Raise ValueError if these are not statistics of a model's weights.

        Args:
            weights: names of modules to their weights; there may be fewer than there are layers
                here.
        """
        for name, weight in weights.items():
            if name not in self._sums:
                raise ValueError(
                    f"{self._source}: nothing about {name!r}: allowed: statistics of this model "
                    "and of all layers that are selected"
                )
            sums = self._sums[name]
            if sums is None:
                continue
            there = len(sums.rows), sums.moments.shape[-1]
            wanted = weight.shape[0], weight.numel() // weight.shape[0]
            if there != wanted:
                raise ValueError(
                    f"{self._source}: {name!r} is a matrix of {there}, and the model's of "
                    f"{wanted}: allowed: statistics of this model"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, under a temporary name that is renamed when it is complete.

        It holds float32 tensors, `NAME.rows` and `NAME.moments`, and in its table of strings under
        `importance` which layer has which, as JSON. Memory: one layer's moments.

        Raises:
            OSError: the file cannot be written.
        """
        arrays: dict[str, Any] = {}
        names: dict[int | Place, str] = {}
        table: dict[str, tuple[str, str] | None] = {}
        for name, sums in self._sums.items():
            table[name] = None
            if sums is not None:
                rows = names.setdefault(id(sums), f"{name}.rows")
                moments = names.setdefault(sums.moments, f"{name}.moments")
                arrays.setdefault(rows, sums.rows)
                arrays.setdefault(moments, sums.moments)
                table[name] = rows, moments
        header: dict[str, Any] = {"__metadata__": {_TABLE: json.dumps(table)}}
        end = 0
        for key, array in arrays.items():
            size = array.size if isinstance(array, Place) else array.nbytes
            header[key] = {
                "dtype": "F32",
                "shape": array.shape,
                "data_offsets": (end, end + size),
            }
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with unfinished(Path(path)) as temporary, temporary.open("wb") as file:
            # Not by safetensors, whose older versions copy all tensors to memory first.
            file.write(len(text).to_bytes(8, "little") + text)
            for array in arrays.values():
                values = self._file.read(array) if isinstance(array, Place) else array
                file.write(np.ascontiguousarray(values, "<f4").data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Statistics":
        """Open a file of `save`. Moments stay in it and are mapped when they are asked for.

        Names, dtypes, shapes and rows are checked here, moments when they are asked for. The file
        must not change as long as it is in use.

        Raises:
            ValueError: it is not such a file; says what is wrong.
            OSError: it cannot be read.
        """
        path = Path(path)
        file = path.open("rb")
        try:
            places, table = _parse(path)
            matrices = MatrixFile(file)
            sums: dict[str, Sums | None] = {}
            known: dict[tuple[str, str], Sums] = {}
            for name, keys in table.items():
                if keys is not None and keys not in known:
                    known[keys] = _load_sums(places, *keys, matrices)
                sums[name] = None if keys is None else known[keys]
            if unused := places.keys() - {key for keys in known for key in keys}:
                raise ValueError(f"the tensor {min(unused)!r} belongs to no layer")
        except ValueError as error:
            file.close()
            raise ValueError(
                f"{path}: {error}; allowed: a file of Statistics.save, unchanged"
            ) from error
        except BaseException:
            file.close()
            raise
        return cls(sums, matrices, str(path))


def _parse(path: Path) -> tuple[dict[str, Place], dict[str, tuple[str, str] | None]]:
    """Places of a file's tensors, and its table of layers.

    Raises:
        ValueError: says what is wrong.
    """
    try:
        # This checks all of the header: that tensors fill the file, and do not overlap.
        with safetensors.safe_open(path, "numpy") as opened:
            text = (opened.metadata() or {}).get(_TABLE)
    except safetensors.SafetensorError as error:
        raise ValueError(f"not a safetensors file ({error})") from None
    if text is None:
        raise ValueError(f"a safetensors file without {_TABLE!r} in its table of strings")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__")
    places = {}
    for key, entry in header.items():
        if entry["dtype"] != "F32":
            raise ValueError(f"the tensor {key!r} is {entry['dtype']}: allowed: F32")
        places[key] = Place(8 + length + entry["data_offsets"][0], tuple(entry["shape"]))
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_TABLE!r} in its table of strings is no JSON ({error})") from None
    if not isinstance(table, dict):
        raise ValueError(f"{_TABLE!r} in its table of strings is no table")
    return places, {name: _keys(name, keys, places) for name, keys in table.items()}


def _keys(name: str, keys: Any, places: Mapping[str, Place]) -> tuple[str, str] | None:
    if keys is None:
        return None
    if not isinstance(keys, list) or len(keys) != 2:
        raise ValueError(f"layer {name!r} has {reprlib.repr(keys)} for names of two tensors")
    for key in keys:
        if not isinstance(key, str) or key not in places:
            raise ValueError(f"layer {name!r} names a tensor {reprlib.repr(key)} that is not there")
    return keys[0], keys[1]


def _load_sums(places: Mapping[str, Place], rows: str, moments: str, file: MatrixFile) -> Sums:
    for key, wanted in ((rows, (1,)), (moments, (1, 2))):
        shape = places[key].shape
        if len(shape) not in wanted or len(set(shape)) != 1 or not shape[0]:
            allowed = "(rows,)" if key == rows else "(cols,) or (cols, cols)"
            raise ValueError(f"the tensor {key!r} has the shape {shape}: allowed: {allowed}")
    values = np.array(file.read(places[rows]), np.float32)
    if not np.isfinite(values).all() or values.min() < 0:
        raise ValueError(f"the tensor {rows!r} holds values that are negative or not finite")
    return Sums(values, places[moments])


def collect_statistics(
    model: nn.Module,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    sample_inputs: Sequence[Any] | None = None,
) -> Statistics:
    """How much a model's output suffers from an error in each weight, to second order.

    Inputs pass through the model one at a time, forward and backward. For a Linear layer with
    inputs x and outputs y, summed up over all tokens, none left out: x xᵀ, whose mean is `moments`,
    and the squared gradient of the score by y, `rows`. The score is the log-probability of
    labels drawn from the model's own prediction, for outputs with `logits`, or else the sum of the
    outputs with random signs. Together they are the Fisher information, or the Gauss-Newton
    matrix, in the approximation of K-FAC (Martens and Grosse, arXiv 1503.05671). Linear modules
    that share a weight add up.

    For other modules (convolutions, embeddings), and subclasses of Linear with a `forward` of their
    own, the gradient of the weight takes its place, a matrix of its first dimension by the others:
    `rows` are its squares summed over columns, `moments` is their sum over rows, as a share of all.
    A weight that such a module shares with a Linear layer counts as the Linear layer's.

    Memory: activations of one input without weight gradients, and one layer's moments. Those of all
    layers are in a temporary file (see `tempfile.gettempdir`), four bytes times the square of a
    layer's inputs, once for layers that take the same tensor: 0.4 GB for a model of 135 million
    weights, 33 GB for one of 8 billion. Each input rewrites the file, so it should not be on
    a slow disk, nor in memory. It is gone with the statistics or the process.

    Time: that of a forward and a backward pass, and of cols² multiplications per token and layer.
    A bar shows what is left. After an interrupt nothing is left behind.

    Args:
        model: with dense weights in float32, float16 or bfloat16; left as it was, like PyTorch's
            random state.
        filter_fn: takes (module, name), says whether the module's weight is to be encoded; all
            Linear layers by default. A weight shared with modules that are not selected is left
            out.
        sample_inputs: inputs to try the model on, best those it is for: tensors, tuples of
            positional or mappings of named arguments. By default text that the model writes
            itself, 16 sequences of 512 tokens, if it is a causal language model of transformers.

    Raises:
        ValueError: an argument is not what it should be; no layer is selected, or one without a
            weight; a weight cannot be encoded; there are no `sample_inputs` and `model` does not
            write text; inputs, gradients or outputs are not finite; or no gradient reaches the
            layers.
        OSError: the temporary file has no room.
    """
    check_arguments(model, filter_fn, sample_inputs)
    selected = selected_weights(model, filter_fn or is_linear)
    if sample_inputs is None:
        sample_inputs = own_text(model).split(1)
    file = MatrixFile.temporary()
    try:
        sums = accumulate(
            model, selected, sample_inputs, file, lambda example: score(call_model(model, example))
        )
        return Statistics(sums, file, "statistics")
    except BaseException:
        file.close()
        raise


def check_arguments(model: Any, filter_fn: Any, sample_inputs: Any) -> None:
    """Raise ValueError for arguments of `collect_statistics` of a wrong type; names them."""
    for name, value, right, allowed in (
        ("model", model, isinstance(model, nn.Module), "a torch.nn.Module"),
        (
            "filter_fn",
            filter_fn,
            filter_fn is None or callable(filter_fn),
            "a function of (module, name), or None",
        ),
        (
            "sample_inputs",
            sample_inputs,
            sample_inputs is None or _is_list(sample_inputs),
            "a list of one input or more, or None",
        ),
    ):
        if not right:
            raise ValueError(f"{name}={reprlib.repr(value)}: allowed: {allowed}")


def _is_list(inputs: Any) -> bool:
    # A tensor or a mapping is one input, although it has a length.
    single = isinstance(inputs, str | Tensor | Mapping)
    return not single and hasattr(inputs, "__len__") and len(inputs) > 0
