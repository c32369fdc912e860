"""One process or several: who is who, what is summed, how the policy is spread.

Started by torchrun, every rank draws and updates on its own share of the prompts; the gradient, and
with it the gate's decision, is that of all of them.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from .config import ConfigError, TrainConfig
from .model import Policy


class Ranks:
    """The processes of this run; on its own, one. The first call joins them.

    Args:
        device: what they train on. Of CUDA devices each takes its own.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if "WORLD_SIZE" in os.environ and not dist.is_initialized():
            on_gpu = torch.device(device).type == "cuda"
            if on_gpu:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            # Not the default, which is that of the machine's GPU.
            dist.init_process_group("nccl" if on_gpu else "gloo")

    @property
    def first(self) -> bool:
        """Is this the rank that writes files?"""
        return self.rank == 0

    @classmethod
    def alone(cls) -> Ranks:
        """This process by itself, whatever others there are."""
        ranks = cls.__new__(cls)
        ranks.world, ranks.rank = 1, 0
        return ranks

    def share(self, items: Any) -> Any:
        """This rank's part of a list or tensor that all ranks hold: neighbours stay together."""
        each = len(items) // self.world
        return items[self.rank * each : (self.rank + 1) * each]

    def gather(self, x: Tensor) -> Tensor:
        """The ranks' tensors one after the other along the first dimension, on every rank."""
        if self.world == 1:
            return x
        lengths = [torch.zeros((), dtype=torch.int64, device=x.device) for _ in range(self.world)]
        dist.all_gather(lengths, torch.tensor(len(x), device=x.device))
        longest = max(int(length) for length in lengths)
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(n)] for part, n in zip(parts, lengths, strict=True)])

    def total(self, x: Tensor) -> Tensor:
        """Sum over the ranks."""
        if self.world > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x


def check_parallel(config: TrainConfig) -> None:
    """Raise ConfigError unless this many processes can train so."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if config.parallel == "fsdp2" and "WORLD_SIZE" not in os.environ:
        raise ConfigError("parallel: expected fsdp2 under torchrun, got a single process")
    parts = world * config.mini_batches
    if config.prompts_per_batch % parts:
        raise ConfigError(
            f"prompts_per_batch: expected a multiple of {world} processes x {config.mini_batches} "
            f"mini-batches ({parts}), got {config.prompts_per_batch}"
        )


def spread(policy: Policy, config: TrainConfig, ranks: Ranks) -> nn.Module:
    """The policy as `config.parallel` wants it: itself, in DDP, or sharded in place by FSDP2."""
    if config.parallel == "fsdp2":
        mesh = init_device_mesh(torch.device(config.device).type, (ranks.world,))
        options: dict[str, Any] = {"mesh": mesh}
        if config.dtype == "bfloat16":
            # Inputs stay as they are: fp32 is the head's estimate of the log-sum-exps alone.
            options["mp_policy"] = MixedPrecisionPolicy(
                torch.bfloat16, torch.float32, cast_forward_inputs=False
            )
        for layer in policy.layers:
            fully_shard(layer, **options)
        root = fully_shard(policy, **options)
        # FSDP2 must see the root's forward before that of a layer, with which sampling begins.
        token = torch.zeros(1, 2, dtype=torch.int64, device=config.device)
        with torch.no_grad():
            policy(token, token + 1, token[:, 1:].bool(), config)
        root.reshard()  # the optimizer and the gate are to have the shards
        return policy
    if ranks.world > 1:
        return nn.parallel.DistributedDataParallel(policy)
    return policy


@contextmanager
def gathered(policy: nn.Module) -> Generator[None]:
    """Whole weights on every rank: sampling must not wait for the others at every token."""
    shards = [m for m in policy.modules() if isinstance(m, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            # The root keeps its own between forward and backward, as FSDP2 would have it.
            module.set_reshard_after_forward(module is not policy, recurse=False)
            module.reshard()


def whole(x: Tensor) -> Tensor:
    """A DTensor's full value; all ranks call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x
