"""Which weights of a model a filter selects."""

from collections.abc import Callable

from torch import nn

from torchcodec_weights.tensor import check_weight


def selected_weights(
    model: nn.Module, filter_fn: Callable[[nn.Module, str], bool]
) -> dict[str, nn.Parameter]:
    """As `selected_parameters`, of a model whose weights have values.

    Raises:
        ValueError: a weight cannot be encoded, or there is none.
    """
    chosen = selected_parameters(model, filter_fn)
    for name, weight in chosen.items():
        try:
            check_weight(weight)
        except ValueError as error:
            raise ValueError(f"{name}.weight: {error}") from None
    return chosen


def selected_parameters(
    model: nn.Module, filter_fn: Callable[[nn.Module, str], bool]
) -> dict[str, nn.Parameter]:
    """Weights to encode by the names of their modules, without what is shared with dense ones.

    Args:
        model: the model; it may be on the meta device.
        filter_fn: takes (module, name), says whether the module's weight is to be encoded.

    Raises:
        ValueError: a module has no weight, or none is selected.
    """
    chosen: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if not filter_fn(module, name):
            continue
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter):
            raise ValueError(
                f"{name or 'model'} is selected, a {type(module).__name__} without a parameter "
                "'weight': allowed: modules that have one"
            )
        chosen[name] = weight
    wanted = {f"{name}.weight".lstrip(".") for name in chosen}
    dense = {
        parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name not in wanted
    }
    chosen = {name: weight for name, weight in chosen.items() if weight not in dense}
    if not chosen:
        raise ValueError(
            "filter_fn selects no layer of the model: allowed: one or more, whose weight is not "
            "shared with a layer that is not selected"
        )
    return chosen
