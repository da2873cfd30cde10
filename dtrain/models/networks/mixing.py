"""Training on mixtures of two samples: mixup (Zhang et al., 2018) and cutmix (Yun et al., 2019).

Samples 2i and 2i + 1 of a micro batch are partners. The order of samples is shuffled, so that is a partner by chance,
and one that does not depend on how many workers share the batch; each of the two is mixed by a coefficient of its own.
"""

import torch

from dtrain.errors import TrainingError
from dtrain.models.networks.noise import uniform

TRIES = 32
"""Of each at least half are accepted, so that one coefficient in 2**32 falls back to a half."""
_BETA, _CENTRE, _COIN = 0x3171, 0x3172, 0x3173


def partners(x: torch.Tensor) -> torch.Tensor:
    """For each sample of x [b, ...] the one it is mixed with. Raises `TrainingError` for an odd number of them."""
    if x.shape[0] % 2:
        raise TrainingError(
            f"mixup and cutmix mix pairs of samples, and a worker has {x.shape[0]} at a time; set batch.micro to an"
            " even number, or leave them out"
        )
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def mix(inputs: torch.Tensor, draws: torch.Tensor, mixup: float, cutmix: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Each of `inputs` ([b, c, h, w], or [b, ...] without cutmix) mixed with its partner, and its own share fp32 [b].

    `mixup` and `cutmix` are the parameters of Beta(a, a); where both are above zero a coin falls for each sample.
    """
    others, wide = partners(inputs), (-1, *[1] * (inputs.ndim - 1))
    share = beta(draws, mixup or cutmix)
    own = share.view(wide).to(inputs.dtype)
    if cutmix:
        kept, share_kept = _cut(draws, beta(draws, cutmix), *inputs.shape[-2:])
        is_cut = uniform(draws, stream=_COIN) < (0.5 if mixup else 1.0)
        share = torch.where(is_cut, share_kept, share)
        own = torch.where(is_cut.view(wide), kept.to(inputs.dtype), own)
    return own * inputs + (1 - own) * others, share


def beta(draws: torch.Tensor, a: float) -> torch.Tensor:
    """Numbers distributed as Beta(a, a) for 0 < a <= 1, fp32 [b] (Jöhnk, 1964)."""
    logs = torch.log1p(-uniform(draws, 2, TRIES, stream=_BETA).double()) / a
    accepted = logs.exp().sum(1) <= 1.0
    first = accepted.int().argmax(1, keepdim=True)
    chosen = torch.sigmoid(logs[:, 0] - logs[:, 1]).gather(1, first)
    return torch.where(accepted.any(1, keepdim=True), chosen, 0.5)[:, 0].float()


def _cut(draws: torch.Tensor, share: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What stays of each picture when about 1 - share is cut out of it: bool [b, 1, h, w], and its exact share [b]."""
    centre = uniform(draws, 2, stream=_CENTRE)
    inside = []
    for dim, length in enumerate((height, width)):
        half = (length * (1.0 - share).sqrt() / 2).floor()
        middle = (centre[:, dim] * length).floor()
        place = torch.arange(length, device=draws.device)
        inside.append((place >= (middle - half)[:, None]) & (place < (middle + half)[:, None]))
    kept = ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])
    return kept, kept.float().mean((1, 2, 3))


def weighted(nats: torch.Tensor, nats_of_partner: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """The mean over samples of what a mixture costs: nats [b] against its own label and its partner's."""
    return (share * nats + (1.0 - share) * nats_of_partner).mean()
