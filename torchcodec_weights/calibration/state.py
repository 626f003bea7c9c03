"""A model in evaluation mode with random numbers of its own, and as it was afterwards."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed(
    model: nn.Module, seed: int, trainable: Collection[nn.Parameter] = ()
) -> Iterator[None]:
    """Evaluation mode, gradients enabled for `trainable` alone, random numbers of our own.

    Modes, `requires_grad`, `grad` and the random state of the CPU and of the model's CUDA devices
    are restored at the end, after exceptions too.

    Args:
        model: the model.
        seed: of PyTorch's random numbers within the block.
        trainable: parameters that require a gradient within the block; theirs is None at its start.
    """
    kept = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index for p, _, _ in kept if p.device.type == "cuda"})
    try:
        model.eval()
        model.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)
            parameter.grad = None
        # In a caller's inference mode there would be no gradients.
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            # torch.manual_seed would also seed devices whose state is not restored.
            torch.default_generator.manual_seed(seed)
            for index in devices:
                with torch.cuda.device(index):
                    torch.cuda.manual_seed(seed)
            yield
    finally:
        for parameter, required, gradient in kept:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        for module, mode in modes:
            module.training = mode
