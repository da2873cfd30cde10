"""How networks of linear and convolutional layers begin: every number a function of the seed alone."""

import math

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


def on_cpu(network: nn.Module) -> nn.Module:
    """`network`, made on the meta device, with memory of its own that is yet to be filled; tied weights stay tied."""
    names: dict[nn.Parameter, str] = {}
    ties = [
        (name, names.setdefault(parameter, name))
        for name, parameter in network.named_parameters(remove_duplicate=False)
    ]
    network.to_empty(device="cpu")  # which gives every module its own, even of a parameter that two of them share
    for name, first in ties:
        if name != first:
            path, _, key = name.rpartition(".")
            setattr(network.get_submodule(path), key, network.get_parameter(first))
    return network


@torch.no_grad()
def he(network: nn.Module, seed: int, gain: float = math.sqrt(2.0), linear_std: float | None = None) -> None:
    """Fill all weights: normal with standard deviation gain / sqrt(fan), zero biases, norms that change nothing.

    The fan is that of the backward pass in convolutions (channels made x taps), of the forward pass elsewhere (He et
    al., "Delving deep into rectifiers", 2015); sqrt(2) is the gain of a rectifier. `linear_std` takes the place of
    gain / sqrt(fan) in linear layers.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            std = gain / math.sqrt(module.in_features) if linear_std is None else linear_std
            module.weight.normal_(0.0, std, generator=generator)
        elif isinstance(module, _ConvNd):
            taps = math.prod(module.kernel_size)
            # A transposed convolution makes each number from one in `stride` taps in each direction.
            is_transposed = isinstance(module, _ConvTransposeNd)
            fan = (module.in_channels / math.prod(module.stride) if is_transposed else module.out_channels) * taps
            module.weight.normal_(0.0, gain / math.sqrt(fan), generator=generator)
        elif isinstance(module, _BatchNorm):
            module.reset_running_stats()
            module.weight.fill_(1.0)
        else:
            continue
        if module.bias is not None:
            module.bias.zero_()
