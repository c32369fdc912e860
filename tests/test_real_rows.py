"""The default grad_eps on rows of a real policy: SmolLM2-135M on text that it sampled itself."""

from __future__ import annotations

import pytest
import torch
from tolerance import error

from benchmarks.common import exact_gradients
from benchmarks.rows import real_rows
from dgg_kernels import linear_logprob


@pytest.fixture(scope="module")
def rows():
    try:
        return real_rows(1024)
    except SystemExit as missing:
        pytest.skip(str(missing))


def gradients(rows, c, seed, **options):
    hidden, weight = (t.clone().requires_grad_() for t in (rows.hidden, rows.weight))
    torch.manual_seed(seed)
    out = linear_logprob(hidden, weight, rows.target, **options)
    (out.logp * c).sum().backward()
    return hidden.grad, weight.grad, out.logp


def first(rows, n):
    return rows._replace(hidden=rows.hidden[:n], target=rows.target[:n], lse=rows.lse[:n])


def test_errors_beside_those_of_16_bit_logits(rows):
    """d_hidden, d_weight within 5e-3, the norm within 2e-4: far closer than bf16 logits get."""
    c = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    logp, d_hidden, d_weight = exact_gradients(rows.hidden, rows.weight, rows.target, c)
    mine = gradients(rows, c, seed=0)
    assert error(mine[0], d_hidden) < 5e-3
    assert error(mine[1], d_weight) < 5e-3
    assert abs(mine[1].double().norm() / d_weight.norm() - 1) < 2e-4
    assert error(mine[2], logp) < 2e-6  # fp32: torch's own product is off by as much
    exact = gradients(rows, c, seed=0, grad_eps=0.0)
    # Of rows that each machine samples anew: 1.8e-6 to 2.3e-6 seen, and 1e-5 to 2e-5 of torch.
    assert error(exact[0], d_hidden) < 3e-6 and error(exact[1], d_weight) < 3e-6
    # What most trainers do today, on the same rows.
    half = [t.bfloat16().requires_grad_() for t in (rows.hidden, rows.weight)]
    logits = half[0] @ half[1].T
    (
        torch.log_softmax(logits.float(), -1).gather(1, rows.target[:, None])[:, 0] * c
    ).sum().backward()
    assert error(half[1].grad, d_weight) > 2 * error(mine[1], d_weight)


def test_unbiased(rows):
    """The mean over 64 seeds is about 8 times closer than one."""
    few = first(rows, 192)
    c = torch.randn(192, generator=torch.Generator().manual_seed(1))
    _, d_hidden, d_weight = exact_gradients(few.hidden, few.weight, few.target, c)
    sums = [torch.zeros_like(d_hidden), torch.zeros_like(d_weight)]
    singles = [0.0, 0.0]
    for seed in range(64):
        drawn = gradients(few, c, seed)
        for k, exact in enumerate((d_hidden, d_weight)):
            sums[k] += drawn[k]
            singles[k] += error(drawn[k], exact) / 64
    for total, single, exact in zip(sums, singles, (d_hidden, d_weight), strict=True):
        assert 6.5 < single / error(total / 64, exact) < 9.5


def test_the_drive_on_entropy_is_kept(rows):
    """<G, dH/dz> with all-positive c, where dropping small p is always off to the same side."""
    few = first(rows, 192)
    logits = (few.hidden @ few.weight.T).contiguous()
    weight = logits.T.contiguous().requires_grad_()
    torch.manual_seed(0)
    linear_logprob(torch.eye(192), weight, few.target).logp.sum().backward()
    logp = torch.log_softmax(logits.double(), 1)
    p = logp.exp()
    d_entropy = -p * (logp - (p * logp).sum(1, keepdim=True))
    target = torch.zeros_like(p).scatter_(1, few.target[:, None], 1.0)
    drive, expected = ((g * d_entropy).sum() for g in (weight.grad.T.double(), target - p))
    assert abs(drive / expected - 1) < 1e-3
    # The p-terms apart from the sampled targets, whose contributions are mostly noise.
    expected = -(p * d_entropy).sum()
    dropped = -(p.masked_fill(p < 2**-12, 0) * d_entropy).sum()
    mine = ((weight.grad.T.double() - target) * d_entropy).sum()
    assert abs(mine - expected) < 0.1 * abs(dropped - expected)
