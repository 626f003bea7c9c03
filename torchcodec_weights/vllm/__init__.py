"""A plug-in of vLLM, which calls `register` by the entry point in the group `vllm.general_plugins`.

vLLM is imported by `register` alone, and only where it is installed.
"""

from importlib.util import find_spec


def register() -> None:
    """Register the quantization method `torchcodec_weights` with vLLM; twice is as good as once.

    Where vLLM is not installed, nothing happens.
    """
    if find_spec("vllm") is not None:
        from torchcodec_weights.vllm import quantization

        quantization.register_method()
