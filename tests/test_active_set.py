"""The active set and its random tail: what is kept, without bias, within the stated bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tolerance import error

from dgg_kernels import GateConfig, GradientGate, linear_logprob


def draw(rows: int, vocabulary: int, seed: int) -> np.ndarray:
    """u(row, column, seed) in [0, 1), as docs/lm_head.md defines it, [rows, vocabulary]."""
    with np.errstate(over="ignore"):
        row = np.arange(rows, dtype=np.uint32)[:, None] * np.uint32(0x9E3779B1) ^ np.uint32(seed)
        x = row + np.arange(vocabulary, dtype=np.uint32)[None] * np.uint32(0x85EBCA77)
        x = (x ^ x >> 16) * np.uint32(0x7FEB352D)
        x = (x ^ x >> 15) * np.uint32(0x846CA68B)
        return ((x ^ x >> 16) >> 8) / 2.0**24


def kept(active: torch.Tensor, n: int, vocabulary: int) -> np.ndarray:
    """The CPU op's packed set as a boolean matrix."""
    packed = active.numpy()
    start = packed[: 2 * (n + 1)].view(np.int64)
    columns = packed[2 * (n + 1) : 2 * (n + 1) + start[-1]]
    mask = np.zeros((n, vocabulary), bool)
    for i in range(n):
        mask[i, columns[start[i] : start[i + 1]]] = True
    return mask


def logit_gradient(logits, target, seed, loss, **options):
    """dL/dz [N, V]: with hidden = I and weight = logits^T, d_weight is its transpose."""
    weight = logits.T.contiguous().requires_grad_()
    torch.manual_seed(seed)
    loss(linear_logprob(torch.eye(len(logits)), weight, target, **options)).backward()
    return weight.grad.T


def some_logits(n=24, vocabulary=6000, scale=2.0):
    torch.manual_seed(0)
    logits = scale * torch.randn(n, vocabulary)
    target = torch.multinomial(logits.softmax(1), 1)[:, 0]
    return logits, target


@pytest.mark.parametrize("order", ["rising", "falling", "shuffled"])
def test_the_set_is_the_one_that_a_single_exact_pass_would_draw(order):
    """Whatever the order in which the mass of a row is met while its lse is still unknown."""
    logits, target = some_logits()
    if order != "shuffled":
        logits = logits.sort(1, descending=order == "falling").values
    n, vocabulary = logits.shape
    eps, seed = 2**-10, 12345
    eye = torch.eye(n)
    outputs = torch.ops.dgg.lm_head_forward(
        eye, logits.T.contiguous(), target, None, 1.0, 0.0, eps, None, torch.tensor([seed]), []
    )
    p = torch.softmax(logits.double(), 1).numpy()
    u = draw(n, vocabulary, seed)
    expected = u < p / eps
    expected[np.arange(n), target] = True
    got = kept(outputs[4], n, vocabulary)
    unsure = np.abs(u - p / eps) < 1e-5 * u  # decided by the last bit of an exponential
    assert (got == expected)[~unsure].all() and unsure.sum() < 20
    assert got[p >= eps * 1.0001].all()


def test_gradient_is_unbiased_and_within_the_documented_variance():
    """Of sum_i c_i logp_i + h_i entropy_i: mean over 64 seeds 8x closer; variance as derived."""
    logits, target = some_logits()
    n, eps = len(logits), 2**-8
    c, h = torch.randn(2, n)

    def loss(out):
        return (c * out.logp + h * out.entropy).sum()

    exact = logit_gradient(logits, target, 0, loss, grad_eps=0.0)
    draws = torch.stack(
        [logit_gradient(logits, target, seed, loss, grad_eps=eps) for seed in range(64)]
    )
    single = sum(error(d, exact) for d in draws) / 64
    assert 1 / 10 < error(draws.mean(0), exact) / single < 1 / 6.5
    # Var of one entry: factor^2 p (eps - p) below eps, 0 above, factor = c + h (log p + H).
    logp = torch.log_softmax(logits, 1)
    p, entropy = logp.exp(), -(logp.exp() * logp).sum(1)
    factor = c[:, None] + h[:, None] * (logp + entropy[:, None])
    variance = (factor.square() * p * (eps - p).clamp_min(0)).sum(1)
    seen = (draws - exact).square().sum(2).mean(0)
    assert (seen / variance).mean().sub(1).abs() < 0.05
    bound = factor.square().mul(p * (p < eps)).sum(1) * eps
    assert (variance <= bound * 1.0001).all()


def test_backward_gives_the_same_bits_on_any_number_of_threads():
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 33), torch.randn(5000, 33)
    target, seed = torch.randint(5000, (300,)), torch.tensor([7])
    args = (hidden, weight, target, None, 1.0, 0.0, 2**-10, None, seed, [])
    _, entropy, lse, _, active, _ = torch.ops.dgg.lm_head_forward(*args)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            torch.ops.dgg.lm_head_backward(
                torch.linspace(-1, 1, 300), None, None, hidden, weight, target, None, lse, entropy,
                active, seed, 1.0, 0.0, 2**-10, False, True, True, False, True,
            )
        )  # fmt: skip
    torch.set_num_threads(2)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_flat_rows_keep_thousands_of_entries_and_lose_none():
    """No capacity to overflow: a uniform row keeps about 1 / eps entries."""
    vocabulary, eps = 49152, 2**-12
    target = torch.zeros(2, dtype=torch.int64)
    args = (torch.zeros(2, 4), torch.zeros(vocabulary, 4), target, None, 1.0, 0.0, eps, None)
    active = torch.ops.dgg.lm_head_forward(*args, torch.tensor([1]), [])[4]
    count = kept(active, 2, vocabulary).sum(1)
    assert (abs(count - 4096) < 5 * 4096**0.5).all()


def test_lse_ref_steers_nothing_but_the_draw():
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 8), torch.randn(400, 8)
    target = torch.randint(400, (20,))
    for reference in (torch.zeros(20), torch.full((20,), float("nan")), torch.full((20,), 1e30)):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_logprob(*leaves, target, lse_ref=reference, grad_eps=2**-6)
        out.logp.sum().backward()
        assert torch.equal(out.logp, linear_logprob(hidden, weight, target).logp)
        assert leaves[0].grad.isfinite().all()


@pytest.mark.parametrize("op", ["lm_head_forward", "lm_head_backward", "linear_logprob"])
@pytest.mark.parametrize("exact", [False, True])
def test_opcheck(op, exact):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(5, 8), torch.randn(8, 40).T, torch.randn(40)
    target, seed = torch.tensor([0, 3, -1, 39, 7]), None if exact else torch.tensor([3])
    scalars = (0.9, 5.0, 2**-6)
    args = (hidden, weight, target, bias, *scalars, None, seed, [])
    if op == "lm_head_backward":
        _, entropy, lse, _, active, _ = torch.ops.dgg.lm_head_forward(*args)
        c = torch.randn(3, 5)
        args = (*c, hidden, weight, target, bias, lse, entropy, active, seed, *scalars)
        args += (False, True, True, True, True)
    elif op == "linear_logprob":
        leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
        args = (*leaves, target, *scalars, None, seed, [], None, -1, False)
        if not exact:  # the gradient is random only through its seed, which the test fixes
            args = (*leaves, target, *scalars, torch.zeros(5), seed, [], None, -1, False)
    torch.library.opcheck(getattr(torch.ops.dgg, op).default, args)


def test_a_gated_loss_compiles_to_one_graph():
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 16), torch.randn(300, 16)
    target = torch.randint(300, (20,))
    results = []
    for compiled in (False, True):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        gate = GradientGate(GateConfig(), leaves[1])

        def loss(h, w, gate=gate):
            out = linear_logprob(h, w, target, gate=gate, grad_eps=0.0)
            return (0.01 * out.entropy - out.logp).mean()

        function = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
        gate.new_batch()
        function(*leaves).backward()
        gate.decide()
        energy = gate.metrics()["gate/energy"]
        exact = torch.linalg.vector_norm(leaves[1].grad.double())
        torch.testing.assert_close(energy, exact, rtol=1e-6, atol=0)
        results.append((leaves[0].grad, leaves[1].grad))
    for a, b in zip(*results, strict=True):
        assert error(b, a) < 1e-6
