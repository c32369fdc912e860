"""Run by test_distributed.py in every rank: one gated loop under DDP or FSDP2 (or alone).

DDP's first rank leaves a checkpoint behind, from which another run may go on.
"""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from dgg_kernels import GateConfig, GradientGate, linear_logprob

V, D, ROWS, BATCHES, USES = 37, 8, 12, 10, 3
SAVED = 5  # batches before the checkpoint


class Model(nn.Module):
    """A body and a head; the log-probs are taken inside forward, where FSDP2 has gathered both."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, D)
        self.head = nn.Linear(D, V, bias=False)

    def forward(self, x, y, gate):
        hidden = self.body(x).tanh()
        return linear_logprob(hidden, self.head.weight, y, gate=gate, grad_eps=0.0).logp


def main(kind: str, out: str, checkpoint: str = "") -> None:
    distributed = kind != "alone"
    if distributed:
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    torch.manual_seed(0)
    model = inner = Model()
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif kind == "fsdp2":
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    gate = GradientGate(GateConfig(threshold=0.3, window=4, max_reuse=USES), inner.head.weight)
    gate.attach(optimizer, max_grad_norm=0.2)
    parts = {"model": inner, "optimizer": optimizer, "gate": gate}
    if checkpoint:
        saved = torch.load(checkpoint)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    data = torch.Generator().manual_seed(1)
    log = []
    for batch in range(BATCHES):
        x = torch.randn(ROWS, 5, generator=data)
        y = torch.randint(V, (ROWS,), generator=data)
        if checkpoint and batch < SAVED:
            continue
        if kind == "ddp" and rank == 0 and batch == SAVED:
            torch.save({name: part.state_dict() for name, part in parts.items()}, f"{out}.pt")
        share = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
        gate.new_batch()
        for use in range(USES):
            optimizer.zero_grad(set_to_none=True)
            logp = model(x[share], y[share], gate)
            scale = 1.0 + 0.5 * ((7 * batch + 3 * use) % 5)
            if (batch, use) == (7, 1) and rank == world - 1:
                scale = float("nan")  # one rank alone computes a NaN
            (-logp.mean() * scale).backward()
            gate.decide()
            grad = inner.head.weight.grad
            full = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            norm = float(torch.linalg.vector_norm(full.double()))  # the step clips in place
            optimizer.step()
            metrics = gate.metrics()
            log.append({
                "batch": batch,
                "energy": float(metrics["gate/energy"]).hex(),
                "norm": norm,
                "grad_norm": float(metrics["grad_norm"]).hex(),
                "flag": float(gate.found_inf).hex(),
                "state": gate.state_dict()["state"].nan_to_num(-1.0).numpy().tobytes().hex(),
            })  # fmt: skip
            if gate.is_shut():
                break
    weights = [
        (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().double().flatten()
        for p in model.parameters()
    ]
    result = {"log": log, "weights": torch.cat(weights).tolist()}
    with open(f"{out}.{rank}.json", "w") as file:
        json.dump(result, file)
    if distributed:
        dist.barrier()
        # Tearing gloo and DDP's reducer down in order now and then hangs at interpreter exit.
        os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
