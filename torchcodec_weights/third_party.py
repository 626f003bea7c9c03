"""Private parts of other packages that this one needs, each with its reason.

PyTorch, torchao and transformers do not promise to keep these. tests/test_third_party_parts.py has
a test for each, which fails with the name of what changed. Nothing is imported before it is used.

Those that must be there before this package is imported are in `torchcodec_weights_autoload.py`.
libgomp's GOMP_parallel, which compiled code calls, is found in `codecs/common/compiled.py`.
"""

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial, wraps
from operator import attrgetter, methodcaller
from types import ModuleType
from typing import Any

from torchcodec_weights_autoload import after_import


def is_tracer(value: object) -> bool:
    """Whether a tensor is one of PyTorch's tracers, which have no data.

    PyTorch has no public name for these. Without it, tensors of `torch.export` and `FakeTensorMode`
    would be read as bitstreams.
    """
    from torch._subclasses import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(value, FakeTensor | FunctionalTensor)


def without_torch_function() -> AbstractContextManager[Any]:
    """Reads attributes of a tensor subclass without `__torch_function__`.

    PyTorch documents the class for authors of subclasses, under a private module. Without it, the
    shape of each weight that is loaded costs ten microseconds.
    """
    import torch

    return torch._C.DisableTorchFunctionSubclass()


def keeping_version(tensor: Any) -> AbstractContextManager[Any]:
    """Writes to a tensor without a new version.

    FSDP2 uses it for the same purpose: memory that it frees is filled again with the same contents,
    and the backward pass may have saved the tensor. Without it, that pass would raise an error.
    """
    from torch.autograd.grad_mode import _unsafe_preserve_version_counter

    return _unsafe_preserve_version_counter(tensor)


is_zeros_without_memory: Callable[[Any], bool] = methodcaller("_is_zerotensor")
"""Whether a tensor is one of the zeros without memory that autograd makes.

The dispatcher gives them memory. Without it, products that leave the dispatcher out would read it.
"""

version_of: Callable[[Any], int] = attrgetter("_version")
"""How often a tensor was written to.

Without it, each use of a weight would have to read its header again.
"""


def mark_parameter(tensor: Any) -> None:
    """Make an instance of a tensor subclass an `nn.Parameter`, as `nn.Parameter(tensor)` does.

    accelerate calls the subclass for that. Without it, a module with an offloaded weight would say
    that the weight is no parameter, and transformers could not save it.
    """
    tensor._is_param = True


def calls_are_watched() -> bool:
    """Whether something beside the kernel is to see the calls of operators.

    That is a mode such as `FakeTensorMode`, a transformation of `torch.func`, a level of forward
    differentiation, `torch.jit.trace` or the profiler. Without it, every product would pass
    PyTorch's dispatcher, which calls Python functions of autograd and takes 20 microseconds.
    """
    import torch

    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


def route_calls(operator: Any, function: Callable[..., Any]) -> None:
    """Have a function called where Python calls an operator, with the operator's own call first.

    Kernels in C++ can raise no exception of Python but RuntimeError. Without it, compiled graphs
    would raise that where a bitstream is corrupt, with the message of CodecError.
    """
    operator._op = partial(function, operator._op)


def vary_lengths(source: str) -> None:
    """Let the compiler treat sizes as variable for tensors whose source matches a pattern.

    The setting is public, but is one string for the whole process, so other patterns are kept.
    Without it, the compiler would compile the same code again for every layer, as bitstreams differ
    in length.
    """
    import torch

    others = torch.compiler.config.dynamic_sources
    torch.compiler.config.dynamic_sources = ",".join(filter(None, (others, source)))


def hash_local_tensors() -> None:
    """Let the compiler's cache on disk tell DTensors apart by their local tensors too.

    DTensor's key is that of its placement alone, which is equal on all ranks. Without it, a rank
    would run the graph that another one compiled, with the rows and columns of that one's part of a
    weight. Local tensors without a key of their own keep DTensor's.
    """
    from torch.distributed.tensor import DTensor

    name = "_stable_hash_for_caching"
    of_placement = getattr(DTensor, name, None)
    if of_placement is None:  # PyTorch hashes local tensors itself
        return

    def of_both(self: Any) -> str:
        of_local = getattr(self._local_tensor, name, None)
        key: str = of_placement(self)
        return key if of_local is None else key + of_local()

    setattr(DTensor, name, of_both)


def implemented_functions(kind: Any) -> dict[Any, Any]:
    """PyTorch's functions that a subclass of `TorchAOBaseTensor` implements.

    Without it, the arguments of every function would have to be searched for unchecked weights.
    """
    table: dict[Any, Any] = kind._TORCH_FN_TABLE[kind]
    return table


def implemented_operators(kind: Any) -> dict[Any, Any]:
    """ATen's operators that a subclass of `TorchAOBaseTensor` implements.

    Without it, torchao's message for other operators would not say what to do instead.
    """
    table: dict[Any, Any] = kind._ATEN_OP_TABLE[kind]
    return table


def is_linear(module: Any, name: str) -> bool:
    """Whether `torchao.quantization.quantize_` selects a module if no filter is given.

    Without it, this package's `quantize_` might select other modules than torchao's.
    """
    from torchao.quantization.quant_api import _is_linear

    return bool(_is_linear(module, name))


def attributes_encoder() -> Any:
    """torchao's JSON encoder for the attributes of tensor subclasses in safetensors files.

    transformers reads its output.
    """
    from torchao.prototype.safetensors.safetensors_utils import TensorSubclassAttributeJSONEncoder

    return TensorSubclassAttributeJSONEncoder


def register_subclass(kind: type) -> None:
    """Register a tensor subclass with torchao, and so transformers, for safetensors files.

    torchao's lists contain only its own subclasses. Without it, `save_pretrained` and
    `from_pretrained` fail for encoded models.
    """
    from torchao.prototype.safetensors import safetensors_utils

    safetensors_utils.ALLOWED_CLASSES[kind.__name__] = kind
    if kind.__name__ not in safetensors_utils.ALLOWED_TENSORS_SUBCLASSES:
        safetensors_utils.ALLOWED_TENSORS_SUBCLASSES.append(kind.__name__)


def register_config(kind: type) -> None:
    """Let torchao read configurations of a class from JSON, as in a model's `config.json`.

    torchao calls whatever one of its listed modules has under the name that stands there, so the
    module that it is given contains the class alone. Without it, `from_pretrained` of an encoded
    model fails.
    """
    import torchao.core.config

    module = ModuleType(f"{kind.__module__}.in_json")
    setattr(module, kind.__name__, kind)
    sys.modules[module.__name__] = module
    torchao.core.config.ALLOWED_AO_MODULES.add(module.__name__)


def flatten_state_dict(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Plain tensors and strings of a state dict, in torchao's layout of safetensors files."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    tensors, strings = flatten_tensor_state_dict(state)
    return tensors, strings


def adapt_quantizer(
    kind: type,
    state_of: Callable[[Any], tuple[dict[str, Any], dict[str, str]]],
) -> None:
    """Replace two methods of transformers' quantizer for torchao, for encoded weights alone.

    As it is, it stores tied weights twice, as torchao clones tensors when it flattens them.
    `save_pretrained` then tries to reverse how a loaded model's weights were put together, which
    fails for all weights of torchao. And it opens a file only as the class that was saved, without
    the prefix that another class, such as `AutoModel`, adds or takes away. docs/upstream.md reports
    these.

    Args:
        kind: the class of encoded weights.
        state_of: takes a model, returns the plain tensors and strings to save.
    """

    def adapt(module: Any) -> None:
        quantizer = module.TorchAoHfQuantizer
        saved, prepared = (
            quantizer.get_state_dict_and_metadata,
            quantizer._process_model_before_weight_loading,
        )

        @wraps(saved)
        def get_state_dict_and_metadata(self: Any, model: Any) -> Any:
            if not any(isinstance(parameter, kind) for parameter in model.parameters()):
                return saved(self, model)
            _forget_conversions(model)
            return state_of(model)

        @wraps(prepared)
        def _process_model_before_weight_loading(self: Any, model: Any, **others: Any) -> Any:
            result = prepared(self, model, **others)
            if getattr(self, "metadata", None) is not None:
                self.metadata = _as_named_by(model, self.metadata, kind)
            return result

        quantizer.get_state_dict_and_metadata = get_state_dict_and_metadata
        quantizer._process_model_before_weight_loading = _process_model_before_weight_loading

    after_import("transformers.quantizers.quantizer_torchao", adapt)


def _as_named_by(model: Any, table: dict[str, str], kind: type) -> dict[str, str]:
    """A file's table of strings, with the names that transformers gives weights in a model."""
    names = json.loads(table.get("tensor_names", "[]"))
    own = model.state_dict().keys()
    prefix = f"{model.base_model_prefix}."
    renamed = {}
    for name in names:
        if name not in own and json.loads(table.get(name, "{}")).get("_type") == kind.__name__:
            if (shorter := name.removeprefix(prefix)) in own:
                renamed[name] = shorter
            elif prefix + name in own:
                renamed[name] = prefix + name
    if not renamed:
        return table
    table = {renamed.get(key, key): text for key, text in table.items()}
    return table | {"tensor_names": json.dumps([renamed.get(name, name) for name in names])}


def _forget_conversions(model: Any) -> None:
    """Forget how transformers put a model's quantized weights together; others are kept."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        model._weight_conversions = [
            conversion
            for conversion in conversions
            if not any(
                type(operation).__name__ == "TorchAoDeserialize"
                for operation in getattr(conversion, "operations", ())
            )
        ]


def torchao_quantizer(quantization: Any) -> Any:
    """transformers' quantizer for torchao, which makes `save_pretrained` save encoded weights.

    Args:
        quantization: a `TorchAoConfig`.
    """
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    return TorchAoHfQuantizer(quantization, pre_quantized=False)


def offloaded_parameter(model: Any, name: str) -> Any:
    """A parameter of a transformers model that is on the meta device, as accelerate has it.

    Without it, a model could not be saved whose encoded weights are offloaded: transformers looks
    for their inner tensors, which accelerate does not know.
    """
    from transformers.integrations.accelerate import load_offloaded_parameter

    return load_offloaded_parameter(model, name)


def tied_weights(model: Any) -> dict[str, str]:
    """Names of tied parameters of a transformers model, to the names that they are tied to."""
    tied: dict[str, str] = model.all_tied_weights_keys
    return tied


def forget_quantization(model: Any) -> None:
    """Remove a model's quantization from transformers' attributes.

    Without it, `save_pretrained` of a decompressed model would write the configuration of a
    quantized one, and would try to reverse the conversion that loaded CodecTensors, which fails.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
        model.__dict__.pop("_weight_conversions", None)


def fill_buffers(model: Any) -> list[str]:
    """Give values to the buffers of a transformers model on the meta device that no file holds.

    Those are what a model computes when it is built: frequencies of positions, say. transformers
    builds models on the meta device itself when it loads them, and then has `_init_weights` compute
    these. Without it, a model larger than memory could not be run.

    Returns:
        Names of buffers that stay without values.
    """
    import torch

    signed = {torch.int8, torch.int16, torch.int32, torch.int64}
    made = {}
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            buffer = getattr(module, name)
            if isinstance(buffer, torch.Tensor) and buffer.is_meta:
                # By these values a buffer is found that is not written to.
                value = torch.iinfo(buffer.dtype).min if buffer.dtype in signed else 0
                filled = torch.full_like(buffer, value, device="cpu")
                if buffer.is_floating_point():
                    filled.fill_(float("nan"))
                setattr(module, name, filled)
                made[f"{path}.{name}".lstrip(".")] = filled
                module._is_hf_initialized = False
    model.initialize_weights()
    return [
        name
        for name, buffer in made.items()
        if (buffer.is_floating_point() and buffer.isnan().any())
        or (buffer.dtype in signed and (buffer == torch.iinfo(buffer.dtype).min).any())
    ]
