"""What the processes of a DDP job share, so that they train as a single process with the same batches does."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, without gradient."""
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


def _all_reduce(values: Tensor) -> Tensor:
    """The sum over all processes, with its gradient."""
    total: Tensor = all_reduce(values)  # type: ignore[no-untyped-call]
    return total


class GlobalBatchNorm1d(nn.BatchNorm1d):
    """Batch normalization over the nuclei of all processes. torch's SyncBatchNorm is only for GPUs.

    Parameters
    ----------
    *args, **kwargs
        As for `torch.nn.BatchNorm1d`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (b, d), by the batch of all processes in training and by the running statistics otherwise."""
        if not self.training or not dist.is_initialized() or self.momentum is None or self.running_mean is None:
            return super().forward(input)
        wide = input.float()
        ones = wide.new_ones((len(wide), 1))
        sums = _all_reduce(torch.cat([wide, ones], dim=1).sum(0))
        n = sums[-1].detach()
        mean = sums[:-1] / n
        centered = wide - mean
        variance = _all_reduce(centered.square().sum(0)) / n
        with torch.no_grad():
            assert self.running_var is not None and self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (n / (n - 1)), self.momentum)
        normal: Tensor = centered * torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            normal = normal * self.weight + self.bias
        return normal.to(input.dtype)


def synchronize(net: nn.Module) -> None:
    """Replace each batch normalization of a network by one over all processes, with the same parameters and names."""
    for name, child in net.named_children():
        if type(child) is nn.BatchNorm1d:
            replaced = GlobalBatchNorm1d(child.num_features, child.eps, child.momentum, child.affine)
            replaced.load_state_dict(child.state_dict())
            replaced.train(child.training)
            setattr(net, name, replaced.to(next(child.parameters(), torch.zeros(())).device))
        else:
            synchronize(child)
