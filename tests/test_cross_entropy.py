"""linear_cross_entropy against torch's cross_entropy over plain logits."""

from __future__ import annotations

import math

import pytest
import torch
from tolerance import error

from dgg_kernels import linear_cross_entropy


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("with_bias", [False, True])
def test_agrees_with_torch(reduction, smoothing, with_bias):
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 9, 16), torch.randn(300, 16)
    bias = torch.randn(300) if with_bias else None
    target = torch.randint(300, (4, 9))
    target[torch.rand(4, 9) < 0.3] = -7
    results = []
    for mine in (True, False):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (hidden, weight, bias)]
        x, w, b = leaves
        options = {"reduction": reduction, "ignore_index": -7, "label_smoothing": smoothing}
        if mine:
            loss = linear_cross_entropy(x, w, target, linear_bias=b, grad_eps=0.0, **options)
        else:
            logits = torch.nn.functional.linear(x, w, b).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, target.flatten(), **options)
            loss = loss.reshape(4, 9) if reduction == "none" else loss
        (loss * torch.linspace(0.5, 1, loss.numel()).reshape(loss.shape)).sum().backward()
        results.append([loss.detach(), *(t.grad for t in leaves if t is not None)])
    for got, expected in zip(*results, strict=True):
        assert error(got, expected) < 1e-5


def test_smoothing_of_a_frequent_target_in_bf16():
    """Its gradient is a sum over thousands of rows, which is not rounded row by row."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2048, 16).bfloat16(), (torch.randn(300, 16) / 4).bfloat16()
    target = torch.full((2048,), 7)
    exact, mine = weight.double().requires_grad_(), weight.clone().requires_grad_()
    logits = (hidden.double() + 1) @ exact.T
    torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.5).backward()
    linear_cross_entropy(hidden + 1, mine, target, label_smoothing=0.5, grad_eps=0.0).backward()
    assert error(mine.grad, exact.grad) < 1e-2


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_what_an_ignored_row_holds_reaches_no_gradient(smoothing):
    torch.manual_seed(0)
    grads = []
    for poison in (0.0, math.nan, math.inf):
        hidden = torch.ones(3, 4)
        hidden[1] = poison
        weight = torch.linspace(-1, 1, 20).reshape(5, 4).requires_grad_()
        target = torch.tensor([2, -100, 4])
        linear_cross_entropy(hidden, weight, target, label_smoothing=smoothing).backward()
        grads.append(weight.grad)
    assert grads[0].any() and all(grad.equal(grads[0]) for grad in grads)


def test_the_mean_of_nothing_is_nan_as_in_torch():
    target = torch.full((3,), -100)
    assert linear_cross_entropy(torch.zeros(3, 4), torch.zeros(5, 4), target).isnan()


def test_bad_options_are_named():
    args = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3).long()
    with pytest.raises(ValueError, match="reduction: expected 'mean', 'sum' or 'none', got 'avg'"):
        linear_cross_entropy(*args, reduction="avg")
    with pytest.raises(ValueError, match="label_smoothing: expected a number in"):
        linear_cross_entropy(*args, label_smoothing=2)
