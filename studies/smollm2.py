"""SmolLM2-135M with weights that studies exchange, and its perplexity."""

from collections.abc import Mapping

from torch import Tensor, nn

from torchcodec_weights.evaluation.metrics import measure
from torchcodec_weights.evaluation.models import encoded_weights, load_smollm2


class SmolLM2:
    """The model.

    Args:
        tokens: of WikiText-2 that perplexity is measured on.

    Attributes:
        dense: the weights that are encoded, as they were loaded, by the names of parameters.
    """

    def __init__(self, tokens: int) -> None:
        self._model, self._tokenizer = load_smollm2()
        self._tokens = tokens
        self.dense: dict[str, Tensor] = {
            name: weight.data for name, weight in encoded_weights(self._model).items()
        }

    def perplexity(self, weights: Mapping[str, Tensor]) -> float:
        """Perplexity with these weights in place of the dense ones."""
        for name, weight in weights.items():
            module, _, parameter = name.rpartition(".")
            replaced = nn.Parameter(weight, requires_grad=False)
            setattr(self._model.get_submodule(module), parameter, replaced)
        return measure("perplexity", self._model, self._tokenizer, tokens=self._tokens)
