"""Private parts of other packages: a test fails where one changes.

`third_party.py` and `torchcodec_weights_autoload.py` name them.
"""

import ctypes
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload
from conftest import tiny_llama
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torchao.utils import TorchAOBaseTensor

import torchcodec_weights_autoload
from torchcodec_weights import CodecTensor, codec_weight_only, quantize_, third_party
from torchcodec_weights.codecs.common import compiled
from torchcodec_weights.models.huggingface import decompress_model


def test_tracers() -> None:
    with FakeTensorMode():
        assert third_party.is_tracer(torch.zeros(3))
    assert not third_party.is_tracer(torch.zeros(3))


def test_attributes_without_torch_function() -> None:
    class Watched(Tensor):
        calls = 0

        @classmethod
        def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
            cls.calls += 1
            return super().__torch_function__(*args, **kwargs)

    tensor = torch.zeros(3).as_subclass(Watched)
    Watched.calls = 0
    with third_party.without_torch_function():
        assert tensor.shape == (3,)
    assert Watched.calls == 0
    assert tensor.shape == (3,)
    assert Watched.calls == 1


def test_a_function_sees_the_calls_of_an_operator() -> None:
    torch.library.define("torchcodec_weights_test::routed", "(Tensor x) -> Tensor")
    torch.library.impl("torchcodec_weights_test::routed", "CPU")(lambda x: x + 1)
    operator = torch.ops.torchcodec_weights_test.routed.default
    seen = []

    def function(call: Any, *args: Any) -> Any:
        seen.append(args)
        return call(*args)

    third_party.route_calls(operator, function)
    x = torch.zeros(1)
    assert operator(x) == 1
    assert torch.ops.torchcodec_weights_test.routed(x) == 1
    assert seen == [(x,)]


def test_what_watches_calls() -> None:
    assert not third_party.calls_are_watched()
    with FakeTensorMode():
        assert third_party.calls_are_watched()
    with torch.profiler.profile():
        assert third_party.calls_are_watched()
    with torch.autograd.forward_ad.dual_level():
        assert third_party.calls_are_watched()
    seen = []

    def watch(x: Tensor) -> Tensor:
        seen.append(third_party.calls_are_watched())
        return x

    torch.func.vmap(watch)(torch.zeros(2))
    torch.jit.trace(watch, torch.zeros(2), check_trace=False)
    assert seen
    assert all(seen)
    assert not third_party.calls_are_watched()


def test_versions() -> None:
    tensor = torch.zeros(3)
    before = third_party.version_of(tensor)
    tensor.add_(1)
    assert third_party.version_of(tensor) == before + 1
    with third_party.keeping_version(tensor):
        tensor.add_(1)
    assert third_party.version_of(tensor) == before + 1


def test_parameters_that_are_subclasses(weight: CodecTensor) -> None:
    assert not isinstance(weight, nn.Parameter)
    assert isinstance(CodecTensor(weight, requires_grad=False), nn.Parameter)


def test_sizes_that_vary() -> None:
    patterns = torch.compiler.config.dynamic_sources.split(",")
    assert r".*\.codec_qdata:0" in patterns
    third_party.vary_lengths("x")
    try:
        assert torch.compiler.config.dynamic_sources.split(",") == [*patterns, "x"]
    finally:
        torch.compiler.config.dynamic_sources = ",".join(patterns)


def test_keys_of_the_compiler_s_cache_tell_local_tensors_apart(weight: CodecTensor) -> None:
    """Ranks share the cache, and the rows of a rank's part are constants of a graph."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        parts = [DTensor.from_local(part, mesh, [Shard(0)]) for part in weight.chunk(2)]
        again = DTensor.from_local(weight[:32], mesh, [Shard(0)])
        keys = [part._stable_hash_for_caching() for part in (*parts, again)]
        assert keys[0] == keys[2] != keys[1]
        dense = DTensor.from_local(torch.zeros(3), mesh, [Shard(0)])
        assert dense._stable_hash_for_caching()
    finally:
        dist.destroy_process_group()


def test_tables_of_what_a_subclass_implements() -> None:
    assert torch.nn.functional.linear in third_party.implemented_functions(CodecTensor)
    assert torch.ops.aten.detach.default in third_party.implemented_operators(CodecTensor)
    assert torch.ops.aten.mul.Tensor not in third_party.implemented_operators(CodecTensor)
    for name in ("_apply_fn_to_data", "_get_to_kwargs", "implements", "implements_torch_function"):
        assert hasattr(TorchAOBaseTensor, name), name


def test_modules_that_torchao_quantizes() -> None:
    assert third_party.is_linear(nn.Linear(2, 2), "x")
    assert not third_party.is_linear(nn.Conv1d(2, 2, 1), "x")
    coded = nn.Linear(64, 64)
    quantize_(coded, codec_weight_only(bits=6, preset="fast"), lambda module, name: True)
    assert isinstance(coded.weight, CodecTensor)


@pytest.fixture(scope="module")
def weight() -> CodecTensor:
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    return CodecTensor.from_hp(values, codec_weight_only(bits=6, preset="fast"))


def test_layout_of_safetensors_files(weight: CodecTensor) -> None:
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    described = json.loads(json.dumps(weight, cls=third_party.attributes_encoder()))
    assert described["_type"] == "CodecTensor"
    assert described["_data"]["logical_shape"] == [64, 64]
    assert set(described["_tensor_data_names"]) == {"qdata", "scale", "act_pre_scale"}
    tensors, strings = third_party.flatten_state_dict({"a.weight": weight})
    assert set(tensors) == {"a._weight_qdata", "a._weight_scale", "a._weight_act_pre_scale"}
    again, rest = unflatten_tensor_state_dict(tensors, strings)
    assert not rest
    assert torch.equal(again["a.weight"].qdata, weight.qdata)


def test_configurations_in_json() -> None:
    from torchao.core.config import config_from_dict, config_to_dict

    config = codec_weight_only("h264", bits=3)
    assert config_from_dict(config_to_dict(config)) == config


def test_classes_that_torch_load_looks_up() -> None:
    """`torchcodec_weights_autoload` wraps this function, and its stand-ins lie in this list."""
    from torch import _weights_only_unpickler as unpickler

    torchcodec_weights_autoload.register()
    lookup = unpickler._get_user_allowed_globals
    assert lookup.__module__ == torchcodec_weights_autoload.__name__
    kept = torch.serialization.get_safe_globals()
    path = "torchcodec_weights.tensor.CodecTensor"
    stand_in: Any = torchcodec_weights_autoload._classes["CodecTensor"]
    try:
        torch.serialization.clear_safe_globals()
        assert lookup() == {}
        torch.serialization.add_safe_globals([(stand_in, path)])
        assert lookup()[path] is CodecTensor
        assert list(lookup().values()) == [CodecTensor]
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(kept)


def test_lists_of_torchao_that_files_name_classes_of() -> None:
    import torchao.core.config
    from torchao.prototype.safetensors import safetensors_support, safetensors_utils

    torchcodec_weights_autoload.register()
    modules = torchao.core.config.ALLOWED_AO_MODULES
    assert f"{torchcodec_weights_autoload.__name__}.configurations" in modules
    assert safetensors_utils.ALLOWED_CLASSES["CodecTensor"] is CodecTensor
    names = safetensors_utils.ALLOWED_TENSORS_SUBCLASSES
    assert names.count("CodecTensor") == 1
    assert safetensors_support.ALLOWED_TENSORS_SUBCLASSES is names
    for name in (torchao.core.config.__name__, safetensors_utils.__name__):
        assert name in torchcodec_weights_autoload._ACTIONS


def test_models_of_transformers(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM, LlamaModel, TorchAoConfig
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    model = tiny_llama()
    assert third_party.tied_weights(model) == {"lm_head.weight": "model.embed_tokens.weight"}
    quantize_(
        model, codec_weight_only(bits=6, preset="fast"), lambda module, name: "q_proj" in name
    )
    model.config.quantization_config = TorchAoConfig(codec_weight_only(bits=6))
    model.hf_quantizer = third_party.torchao_quantizer(model.config.quantization_config)
    tensors, _ = TorchAoHfQuantizer.get_state_dict_and_metadata(model.hf_quantizer, model)
    assert "lm_head.weight" not in tensors, "our function, which leaves out what is tied"
    model.save_pretrained(tmp_path / "encoded")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "encoded")
    operations = [c.operations for c in loaded._weight_conversions if hasattr(c, "operations")]
    assert [type(o).__name__ for (o,) in operations] == ["TorchAoDeserialize"]
    loaded.save_pretrained(tmp_path / "again")
    assert not any(hasattr(c, "operations") for c in loaded._weight_conversions)
    inner = LlamaModel.from_pretrained(tmp_path / "encoded")
    assert isinstance(inner.layers[0].self_attn.q_proj.weight, CodecTensor)
    cpu_offload(loaded, execution_device=torch.device("cpu"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert loaded.get_parameter(name).device.type == "meta"
    assert torch.equal(third_party.offloaded_parameter(loaded, name), model.get_parameter(name))
    dense = decompress_model(LlamaForCausalLM.from_pretrained(tmp_path / "encoded"))
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())


def test_the_openmp_runtime_of_pytorch() -> None:
    """Without it, compiled code takes threads of its own, which is slower and no error."""
    lib = Path(torch.__file__).parent / "lib"
    if not list(lib.glob("libgomp*")):
        pytest.skip("this PyTorch has another OpenMP runtime")
    assert isinstance(compiled._openmp(), ctypes.c_void_p)


def test_buffers_that_no_file_holds() -> None:
    from transformers import AutoModelForCausalLM

    expected = tiny_llama()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(expected.config)
    assert third_party.fill_buffers(model) == []
    found = dict(model.named_buffers())
    assert {name for name, _ in expected.named_buffers()} == found.keys()
    for name, buffer in expected.named_buffers():
        assert torch.equal(found[name], buffer)
    assert next(model.parameters()).is_meta
    model.register_buffer("unknown", torch.empty(3, device="meta"), persistent=False)
    assert third_party.fill_buffers(model) == ["unknown"]
