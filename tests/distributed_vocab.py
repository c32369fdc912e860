"""Run by test_distributed.py in every rank: a vocabulary-parallel head against the whole one."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from tolerance import error

from dgg_kernels import GateConfig, GradientGate, linear_logprob
from dgg_kernels.distributed import sharded_norm, vocab_parallel_logprob

V, D, N = 301, 16, 40


def many_rows_in_bf16(rank: int, world: int) -> None:
    """Rows whose targets lie elsewhere add up to nothing but their share of the probability."""
    torch.manual_seed(1)
    n = 2048
    hidden, weight = torch.randn(n, D).bfloat16(), (torch.randn(V, D) / 4).bfloat16()
    target, c = torch.full((n,), V - 1), torch.rand(n)  # of one sign
    shard = slice(rank * V // world, (rank + 1) * V // world)
    exact = weight.double().requires_grad_()
    logp = (hidden.double() @ exact.T).log_softmax(1)[:, -1]
    (c * logp).sum().backward()
    w = torch.nn.Parameter(weight[shard].clone())
    mine = vocab_parallel_logprob(hidden, w, target, shard.start, grad_eps=0.0)
    (c * mine.logp).sum().backward()
    assert error(w.grad, exact.grad[shard]) < 4e-3


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D), torch.randn(V, D)
    target = torch.randint(V, (N,))
    target[::5] = -100
    c, h = torch.randn(2, N)
    many_rows_in_bf16(rank, world)
    shard = slice(rank * V // world, (rank + 1) * V // world)
    # An ignored token may be one of the vocabulary, and have a rank of its own.
    for options in ({}, {"temperature": 0.7, "softcap": 5.0}, {"ignore_index": 0}):
        target[::5] = options.get("ignore_index", -100)
        whole_x, whole_w = (t.clone().requires_grad_() for t in (hidden, weight))
        whole = linear_logprob(whole_x, whole_w, target, grad_eps=0.0, **options)
        (c * whole.logp + h * whole.entropy).sum().backward()
        x = hidden.clone().requires_grad_()
        w = torch.nn.Parameter(weight[shard].clone())
        mine = vocab_parallel_logprob(x, w, target, shard.start, grad_eps=0.0, **options)
        (c * mine.logp + h * mine.entropy).sum().backward()
        for name in mine._fields[:4]:
            assert error(getattr(mine, name), getattr(whole, name)) < 1e-5, name
        assert error(x.grad, whole_x.grad) < 1e-5
        assert error(w.grad, whole_w.grad[shard]) < 1e-5
        # x stands for a body that every rank has whole: its norm counts once, the shards' sum up.
        optimizer = torch.optim.SGD([x, w], lr=1.0, fused=True)
        gate = GradientGate(GateConfig(), w)
        gate.attach(optimizer, max_grad_norm=0.1)
        gate.new_batch()
        head = sharded_norm(w.grad)
        gate.decide(energy=head, grad_norm=torch.hypot(head, x.grad.norm()))
        optimizer.step()
        energy = gate.metrics()["gate/energy"]
        torch.testing.assert_close(energy.float(), whole_w.grad.norm(), rtol=1e-5, atol=0)
        everywhere = [torch.zeros_like(energy) for _ in range(world)]
        dist.all_gather(everywhere, energy)
        assert all(torch.equal(e, energy) for e in everywhere)
        norm = torch.nn.utils.clip_grad_norm_([whole_x, whole_w], 0.1)
        assert norm > 0.1
        torch.testing.assert_close(gate.metrics()["grad_norm"].float(), norm, rtol=1e-5, atol=0)
        torch.optim.SGD([whole_x, whole_w], lr=1.0).step()
        # What has moved, since the parameters themselves hardly differ from what they were.
        assert error(x.detach() - hidden, whole_x.detach() - hidden) < 1e-4
        assert error(w.detach() - weight[shard], (whole_w.detach() - weight)[shard]) < 1e-4
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
