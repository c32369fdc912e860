"""The head in verl's signature: against plain PyTorch, and put in verl's place, without verl."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from dgg_kernels.integrations.verl_head import linear_cross_entropy, use_linear_cross_entropy


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_log_probs_entropies_and_gradients_are_those_of_plain_logits(reduction):
    torch.manual_seed(0)
    hidden = torch.randn(1, 9, 16, requires_grad=True)
    weight = torch.randn(300, 16, requires_grad=True)
    labels = torch.randint(300, (1, 9))
    log_p = ((hidden @ weight.T)[0] / 0.7).log_softmax(-1)
    logp = log_p.gather(-1, labels[0, :, None])[:, 0]
    logp = logp if reduction == "none" else getattr(logp, reduction)()
    expected = [logp, -(log_p.exp() * log_p).sum(-1)]
    got = linear_cross_entropy(hidden, weight, labels, 0.7, reduction, grad_eps=0.0)
    torch.testing.assert_close(list(got), expected, rtol=1e-5, atol=1e-5)
    upstream = [torch.randn_like(e) for e in expected]
    torch.testing.assert_close(
        torch.autograd.grad(got, (hidden, weight), upstream),
        torch.autograd.grad(expected, (hidden, weight), upstream),
        rtol=1e-4,
        atol=1e-5,
    )


def test_another_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction: expected 'none', 'sum' or 'mean', got 'max'"):
        linear_cross_entropy(torch.randn(2, 4), torch.randn(5, 4), torch.arange(2), 1.0, "max")


def test_it_takes_the_place_of_verls_and_gives_it_back(monkeypatch):
    name = "verl.utils.kernel.linear_cross_entropy"
    theirs = ModuleType(name)
    before = theirs.linear_cross_entropy = object()
    monkeypatch.setitem(sys.modules, name, theirs)
    for parent in ("verl", "verl.utils", "verl.utils.kernel"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    hidden, weight, labels = torch.randn(3, 4), torch.randn(5, 4), torch.arange(3)
    with use_linear_cross_entropy(grad_eps=0.0):
        logp, _ = theirs.linear_cross_entropy(hidden, weight, labels, 1.0, "none")
        assert logp.equal(linear_cross_entropy(hidden, weight, labels, grad_eps=0.0)[0])
    assert theirs.linear_cross_entropy is before
