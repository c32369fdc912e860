"""Gated re-use in a loop of one's own, sharded by FSDP2; no trainer, no other library.

    torchrun --nproc-per-node 2 examples/fsdp2.py

A tiny GRU policy learns to write even numbers. Runs on CPUs (gloo); written for GPUs (NCCL), too,
one a process by its LOCAL_RANK, but not tested on them.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from dgg_kernels import GateConfig, GradientGate, linear_logprob

VOCABULARY, GROUPS, GROUP, LENGTH = 256, 8, 8, 12  # groups of samples of one prompt, per rank


class Policy(nn.Module):
    """The head lies inside `forward`, where FSDP2 has gathered its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(VOCABULARY, 64), nn.GRU(64, 64, batch_first=True)
        self.head = nn.Linear(64, VOCABULARY, bias=False)

    def forward(self, tokens, gate=None):
        hidden, _ = self.body(self.embedding(tokens[:, :-1]))
        target = tokens[:, 1:].flatten()
        return linear_logprob(hidden.flatten(0, 1), self.head.weight, target, gate=gate).logp

    @torch.no_grad()
    def sample(self, tokens):
        state = None
        for _ in range(LENGTH):
            hidden, state = self.body(self.embedding(tokens[:, -1:]), state)
            new = torch.multinomial(self.head(hidden[:, 0]).softmax(-1), 1)
            tokens = torch.cat([tokens, new], dim=1)
        return tokens


def main():
    dist.init_process_group()
    device = "cpu"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)  # for collectives without a tensor
    torch.manual_seed(0)
    policy = fully_shard(Policy().to(device))
    torch.manual_seed(1 + dist.get_rank())  # ranks sample different rollouts
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, fused=True)
    gate = GradientGate(GateConfig(threshold=0.5, window=8, max_reuse=4), policy.head.weight)
    gate.attach(optimizer, max_grad_norm=1.0)
    for batch in range(30):
        policy.unshard()  # sampling does not go through `forward`
        prompts = torch.randint(VOCABULARY, (GROUPS, 1), device=device)
        tokens = policy.sample(prompts.repeat_interleave(GROUP, dim=0))
        policy.reshard()
        reward = (tokens[:, 1:] % 2 == 0).float().mean(1)
        advantage = reward - reward.view(GROUPS, GROUP).mean(1).repeat_interleave(GROUP)
        advantage = advantage.repeat_interleave(LENGTH)
        with torch.no_grad():
            old = policy(tokens)
        gate.new_batch()
        for _ in range(gate.config.max_reuse):
            optimizer.zero_grad(set_to_none=True)
            ratio = (policy(tokens, gate) - old).exp()
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            (-surrogate.mean()).backward()
            gate.decide()  # the same decision on every rank
            optimizer.step()
            if gate.is_shut():
                break
        dist.all_reduce(reward := reward.mean() / dist.get_world_size())
        if dist.get_rank() == 0 and batch % 5 == 4:
            uses = gate.applied_updates() / (batch + 1)
            print(f"batch {batch + 1}: even {reward:.0%}, {uses:.2f} uses a batch", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
