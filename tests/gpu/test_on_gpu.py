"""What only a GPU can show: real bf16, large shapes, no synchronisation, graph capture.

python -m pytest tests/gpu
"""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_as_good_as_torch, error

from dgg_kernels import GateConfig, GradientGate, linear_logprob, replay
from dgg_kernels.reference import reference_logprob

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def inputs(n, v, d, dtype, scale=3.0):
    torch.manual_seed(0)
    hidden = (scale * torch.randn(n, d, device="cuda")).to(dtype)
    weight = (torch.randn(v, d, device="cuda") / d**0.5).to(dtype)
    target = torch.randint(v, (n,), device="cuda")
    target[::7] = -100
    return hidden, weight, target, torch.randn(n, device="cuda")


def run(function, hidden, weight, target, c, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
    out = function(*leaves, target, **options)
    (out[0] * c.to(out[0]) + 0.1 * out[1]).sum().backward()
    return {"logp": out[0], "entropy": out[1], "lse": out[2], "sum_p2": out[3],
            "d_hidden": leaves[0].grad, "d_weight": leaves[1].grad}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "v", "d"), [(1, 2, 8), (193, 517, 70), (257, 4099, 576)])
def test_exact_values_and_gradients(n, v, d, dtype):
    args = inputs(n, v, d, dtype)
    exact = run(reference_logprob, *(t.double() if t.is_floating_point() else t for t in args))
    theirs = run(reference_logprob, *args)
    mine = run(linear_logprob, *args, grad_eps=0.0)
    for name, value in mine.items():
        assert_as_good_as_torch(value, theirs[name], exact[name], name)


@pytest.mark.parametrize("with_reference", [False, True])
def test_random_tail_is_unbiased_and_reproducible(with_reference):
    args = inputs(256, 32768, 512, torch.bfloat16)
    exact = run(linear_logprob, *args, grad_eps=0.0)
    reference = exact["lse"].detach() + 0.1 if with_reference else None
    options = {"grad_eps": 2**-8, "lse_ref": reference}
    mean, single = 0.0, 0.0
    for seed in range(64):
        torch.manual_seed(seed)
        drawn = run(linear_logprob, *args, **options)["d_hidden"].double()
        mean, single = mean + drawn / 64, single + error(drawn, exact["d_hidden"]) / 64
    assert error(mean, exact["d_hidden"]) < single / 5
    torch.manual_seed(63)
    assert torch.equal(run(linear_logprob, *args, **options)["d_hidden"].double(), drawn)


def test_more_than_2_to_the_31_logits():
    n, v = 16384, 151936
    hidden, weight, target, c = inputs(n, v, 64, torch.bfloat16)
    rows = torch.tensor([0, 1, n // 2, n - 2, n - 1], device="cuda")
    out = run(linear_logprob, hidden, weight, target, c)
    exact = reference_logprob(hidden[rows].double(), weight.double(), target[rows])
    for got, expected in zip((out["logp"], out["entropy"], out["lse"]), exact, strict=False):
        assert error(got[rows], expected) < 1e-3


def test_the_gpu_decides_as_the_cpu_does():
    """Bit for bit, state included, and a checkpoint may change sides."""
    config = GateConfig(window=4, statistic="either", threshold=0.3, max_reuse=3)
    rng = torch.Generator().manual_seed(0)
    energies = torch.rand(40, 4, generator=rng, dtype=torch.float64)
    energies[7, 1], energies[11, 2] = torch.nan, torch.inf
    gates = {d: GradientGate(config, torch.zeros(8, 4, device=d)) for d in ("cpu", "cuda")}
    for batch in energies:
        for gate in gates.values():
            gate.new_batch()
        for energy in batch:
            for device, gate in gates.items():
                gate.decide(energy=energy.to(device))
            assert gates["cpu"].is_shut() == gates["cuda"].is_shut(wait=True)
        states = {d: gate.state_dict() for d, gate in gates.items()}
        assert torch.equal(*(s["state"].view(torch.int64) for s in states.values()))
        gates["cpu"].load_state_dict(states["cuda"])
        gates["cuda"].load_state_dict(states["cpu"])
    decisions = replay(energies.tolist(), config)
    assert gates["cuda"].applied_updates(wait=True) == sum(not d.shut for b in decisions for d in b)


def test_partial_squares_are_summed_in_a_fixed_order_in_fp64():
    squares = torch.rand(151_937, device="cuda") ** 8
    gate = GradientGate(GateConfig(), torch.zeros(151_937, 2, device="cuda"))
    seen = []
    for _ in range(3):
        gate.new_batch()
        torch.ops.dgg.gate_decide(
            gate._state, squares, True, None, 1.0, gate.found_inf, gate.grad_scale, None
        )
        seen.append(gate.metrics()["gate/energy"].item())
    assert len(set(seen)) == 1
    assert abs(seen[0] / squares.double().sum().sqrt().item() - 1) < 1e-14


@pytest.mark.parametrize("screen", ["int8", "fp8"])
def test_screen_on_large_shapes(screen):
    """Within its bound, unbiased, and of the same bits again; one decision more for the gate."""
    hidden, weight, target, c = inputs(1024, 65536, 1024, torch.bfloat16)
    exact = run(linear_logprob, hidden, weight, target, c)
    out = linear_logprob(hidden, weight, target, screen=screen)
    again = linear_logprob(hidden, weight, target, screen=screen, lse_ref=exact["lse"])
    for result in (out, again):
        off = (result.logp - exact["logp"]).abs()
        stats = result.screen_stats
        assert (off <= stats.error_bound + 2e-4).float().mean() > 0.995
        assert off.max() < 1e-2 and off.mean() < 1e-3
        assert stats.missed / len(target) < 0.1
    torch.manual_seed(3)
    first = run(linear_logprob, hidden, weight, target, c, screen=screen)
    torch.manual_seed(3)
    second = run(linear_logprob, hidden, weight, target, c, screen=screen)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("d_hidden", "d_weight"):
        assert error(first[name], exact[name]) < 3e-2


def loop(n=512, v=4096, d=128, **options):
    hidden, _, target, _ = inputs(n, v, d, torch.bfloat16)
    torch.manual_seed(1)
    head = torch.nn.Linear(d, v, bias=False, device="cuda", dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, fused=True, capturable=True)
    gate = GradientGate(GateConfig(window=4), head.weight)
    gate.attach(optimizer, max_grad_norm=1.0)

    def update():
        optimizer.zero_grad(set_to_none=True)
        out = linear_logprob(hidden, head.weight, target, gate=gate, **options)
        out.logp.mean().neg().backward()
        gate.decide()
        optimizer.step()

    update.hidden = hidden
    return head, optimizer, gate, update


def state_of(head, optimizer):
    state = [head.weight.detach().clone()]
    return state + [t.clone() for t in optimizer.state[head.weight].values()]


@pytest.mark.parametrize("grad_eps", [0.0, 2**-8])
def test_the_whole_update_in_one_graph(grad_eps):
    """Captured once, replayed with the gate open and shut; the same bits as without a graph."""
    head, optimizer, gate, update = loop(grad_eps=grad_eps)
    eager_head, _, eager_gate, eager_update = loop(grad_eps=grad_eps)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up: kernels, optimizer state
        for each in (gate, eager_gate):
            each.new_batch()
        for _ in range(2):
            update()
            eager_update()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update()
    good = update.hidden.clone()
    for batch in range(6):
        for each in (gate, eager_gate):
            each.new_batch()
        if batch == 0:  # the graph's stream has its own generator state: compare what is exact
            for mine, theirs in zip(head.parameters(), eager_head.parameters(), strict=True):
                mine.data.copy_(theirs.data)
        for use in range(3):
            broken = (batch, use) == (3, 1)
            for hidden in (update.hidden, eager_update.hidden):
                hidden.copy_(good)
                if broken:
                    hidden[1].fill_(torch.nan)
            before = state_of(head, optimizer)
            graph.replay()
            eager_update()
            if grad_eps == 0.0:
                assert torch.equal(head.weight, eager_head.weight)
            was_shut = gate.is_shut(wait=True)
            torch.cuda.synchronize()
            assert gate.is_shut() == was_shut
            assert was_shut == eager_gate.is_shut(wait=True) or grad_eps > 0
            if batch == 3 and use >= 1:
                assert was_shut
            if was_shut:
                now = state_of(head, optimizer)
                assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    assert gate.applied_updates(wait=True) > 6


def test_a_shut_gate_leaves_nothing_to_do():
    hidden, weight, target, c = inputs(64, 4096, 128, torch.bfloat16)
    weight.requires_grad_()
    gate = GradientGate(GateConfig(), weight)
    gate.new_batch()
    gate.decide(energy=torch.tensor(float("nan"), device="cuda"))
    out = linear_logprob(hidden, weight, target, gate=gate)
    (out.logp * c).sum().backward()
    assert not out.logp.any() and not weight.grad.any()
    gate.new_batch()
    assert linear_logprob(hidden, weight, target, gate=gate).logp.any()


def test_the_loop_never_waits_for_the_device():
    _, _, gate, update = loop()
    gate.new_batch()
    update()  # compiles kernels, creates optimizer state
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            gate.new_batch()
            for _ in range(3):
                update()
                gate.is_shut(wait=False)
        gate.metrics()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_energy_is_the_norm_as_stored_and_a_nan_changes_nothing():
    head, optimizer, gate, update = loop()
    gate.new_batch()
    update()
    gate.detach()
    gate.new_batch()
    update()
    exact = torch.linalg.vector_norm(head.weight.grad.double())
    torch.testing.assert_close(gate.metrics()["gate/energy"], exact, rtol=1e-6, atol=0)
    gate.attach(optimizer)
    gate.new_batch()
    before = head.weight.detach().clone()
    gate.decide(energy=torch.tensor(float("nan"), device="cuda"))
    optimizer.step()
    assert torch.equal(before, head.weight) and gate.is_shut(wait=True)
