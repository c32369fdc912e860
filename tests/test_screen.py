"""Screen and refine on the CPU: errors within their bound, no bias, the codes' cache."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from tolerance import error
from torch import Tensor

from benchmarks.common import exact_gradients
from benchmarks.rows import real_rows
from dgg_kernels import LogprobOutput, linear_logprob
from dgg_kernels import screen as screen_module
from dgg_kernels.reference import reference_logprob

EPS = 2**-9
FLOOR = 1e-4  # what fp32 itself may be off by, where logits are large
LIMIT = 1e-2  # in csrc/cpu/screen.cpp: rows with a larger bound are computed exactly


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    target: Tensor
    options: dict


def make(n=64, vocabulary=6007, d=100, scale=2.0, seed=0):
    """Logits of standard deviation `scale`; targets as likely as the policy makes them."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=rng)
    weight = torch.randn(vocabulary, d, generator=rng) * (scale / d**0.5)
    target = torch.multinomial((hidden @ weight.T).softmax(1), 1, generator=rng)[:, 0]
    return Case(hidden, weight, target, {})


def outlier_feature():
    case = make()
    case.hidden[:, 7] *= 1000.0
    case.weight[:, 7] /= 1000.0
    return case


def outlier_in_hidden():
    case = make()
    case.hidden[::2, 7] += 1000.0
    return case


def huge_rows():
    case = make()
    case.hidden[::3] *= 300.0
    case.weight[::5] *= 3.0
    return case


def one_hot():
    case = make(d=64)
    case.hidden[:] = 30 * torch.eye(64)
    case.weight[:64] = torch.eye(64)
    case.target[::2] = torch.arange(64)[::2]
    return case


def flat():
    case = make()
    return case._replace(hidden=case.hidden * 1e-3)


def near_ties():
    case = make(scale=4.0)
    case.weight[1::2] = case.weight[::2][: len(case.weight) // 2] * (1 + 1e-4)
    return case


def zeros():
    case = make()
    case.hidden[::4] = 0.0
    case.weight[::7] = 0.0
    return case


def banned():
    case = make()
    bias = torch.randn(len(case.weight))
    bias[::3] = -torch.inf
    target = torch.where(case.target % 3 == 0, case.target + 1, case.target)
    return case._replace(target=target, options={"bias": bias})


def softcap():
    return make(scale=6.0)._replace(options={"softcap": 10.0})


def temperature():
    return make()._replace(options={"temperature": 0.3})


CASES = [make, outlier_feature, outlier_in_hidden, huge_rows, one_hot, flat, near_ties, zeros,
         banned, softcap, temperature]  # fmt: skip


def exact(case: Case):
    """fp64 results of the inputs as they are in their dtype."""
    doubles = [t.double() for t in case[:2]]
    options = dict(case.options)
    if "bias" in options:
        options["bias"] = options["bias"].double()
    return LogprobOutput(*reference_logprob(*doubles, case.target, **options))


def screened(case: Case, kind="int8", seed=0, **options):
    torch.manual_seed(seed)
    return linear_logprob(*case[:3], screen=kind, **({"grad_eps": EPS} | case.options | options))


@pytest.mark.parametrize("kind, dtype", [
    ("int8", torch.float32), ("int8", torch.bfloat16), ("int8", torch.float16),
    ("bf16", torch.float32),
])  # fmt: skip
@pytest.mark.parametrize("inputs", CASES)
def test_values_are_within_their_bound(inputs, kind, dtype):
    case = inputs()
    case = case._replace(hidden=case.hidden.to(dtype), weight=case.weight.to(dtype))
    expected = exact(case)
    for seed in range(2):
        out = screened(case, kind, seed)
        bound = out.screen_stats.error_bound
        assert bound.min() >= 0 and bound.max() <= LIMIT
        # Logits of this magnitude are known to so much in fp32, with a screen or without.
        floor = FLOOR + (expected.lse.abs() + expected.logp.abs()) * 2**-20
        assert ((out.logp - expected.logp).abs() <= bound + floor).all()
        assert ((out.lse - expected.lse).abs() <= bound + floor).all()
        # An entropy's error is that of lse, by entries that are a few more nats off.
        off = (out.entropy - expected.entropy).abs()
        assert (off <= 20 * (bound + floor)).all()
        # Of the drawn entries alone: where all are, their number's variation remains.
        assert error(out.sum_p2, expected.sum_p2) < 0.06
        assert out.screen_stats.missed <= 0.02 * out.screen_stats.refined + 1
        for tensor in out[:4]:
            assert tensor.isfinite().all()


def gradients(case: Case, seed: int, kind: str | None = "int8", entropy: float = 0.0):
    leaves = [t.clone().requires_grad_() for t in case[:2]]
    torch.manual_seed(seed)
    options = {"grad_eps": EPS} | case.options
    out = linear_logprob(*leaves, case.target, screen=kind, **options)
    rng = torch.Generator().manual_seed(5)
    c = torch.randn(len(case.target), generator=rng)
    (out.logp * c + entropy * out.entropy).sum().backward()
    return out, *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_sums_and_gradients_are_unbiased(kind):
    """Over 64 seeds the mean is about 8 times closer than one; per row no further than chance."""
    case = make(n=48, vocabulary=3000, d=64)
    expected = exact(case)
    leaves = [t.clone().requires_grad_() for t in case[:2]]
    dense = linear_logprob(*leaves, case.target, grad_eps=0.0)
    c = torch.randn(48, generator=torch.Generator().manual_seed(5))
    (dense.logp * c + 0.1 * dense.entropy).sum().backward()
    draws = [gradients(case, seed, kind, entropy=0.1) for seed in range(64)]
    assert all(out.screen_stats.exact_rows == 0 for out, *_ in draws)
    for k, leaf in enumerate(leaves):
        all_of_them = torch.stack([draw[k + 1] for draw in draws])
        single = sum(error(one, leaf.grad) for one in all_of_them) / 64
        assert 1 / 10 < error(all_of_them.mean(0), leaf.grad) / single < 1 / 6
    for name in ("lse", "entropy", "sum_p2"):
        seen = torch.stack([getattr(out, name).detach().double() for out, *_ in draws])
        sigmas = (seen.mean(0) - getattr(expected, name)) / (seen.std(0) / 8 + 1e-6)
        assert sigmas.abs().max() < 5, name
        assert abs(sigmas.mean()) < 4 / 48**0.5, name


def test_missed_entries_are_few_and_estimated_without_bias():
    """With a margin of three deviations: about one in a thousand entries with p > eps is drawn."""
    case = make(n=48, vocabulary=3000, d=64)
    logits = case.hidden.double() @ case.weight.double().T
    p = logits.softmax(1)
    important = (p > EPS).sum()
    missed = torch.stack([screened(case, seed=seed).screen_stats.missed for seed in range(16)])
    assert missed.mean() < 0.005 * important


@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_gradient_is_as_good_as_without_a_screen(kind):
    case = make(n=48, vocabulary=6000, d=64)
    leaves = [t.clone().requires_grad_() for t in case[:2]]
    c = torch.randn(48, generator=torch.Generator().manual_seed(5))
    (linear_logprob(*leaves, case.target, grad_eps=0.0).logp * c).sum().backward()
    for k, leaf in enumerate(leaves):
        mine, plain = (
            sum(error(gradients(case, seed, name)[k + 1], leaf.grad) for seed in range(8))
            for name in (kind, None)
        )
        assert mine < 1.05 * plain


@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_same_bits_on_any_number_of_threads(kind):
    case = make(n=1100, vocabulary=2500, d=33)
    case.hidden[::50] *= 100.0  # some rows are exact
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out, *grads = gradients(case, 3, kind, entropy=0.1)
        results.append([*out[:4], *out.screen_stats, *grads])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    assert results[0][5] > 0
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_rows_that_it_does_not_suit_are_exact_and_reported():
    case = make()
    case.hidden[:5] *= 300.0
    case.hidden[6, 3] = torch.nan
    case.hidden[7, 3] = torch.inf
    plain = linear_logprob(*case[:3], grad_eps=EPS)
    out = screened(case)
    rows = out.screen_stats.error_bound == 0
    assert rows[:5].all() and rows[6:8].all() and out.screen_stats.exact_rows == rows.sum() < 10
    torch.testing.assert_close(out.logp[:5], plain.logp[:5], rtol=1e-6, atol=0.0)
    assert not out.logp[6:8].isfinite().any()
    others = [i for i in range(len(rows)) if not rows[i]]
    assert out.logp[others].isfinite().all()


def test_a_weight_that_is_not_finite_is_not_screened():
    case = make(n=8)
    case.weight[5, 5] = torch.nan
    out = screened(case)
    assert out.screen_stats.exact_rows == 8 and out.logp.isnan().all()


def test_a_cpu_whose_int8_products_saturate_does_without():
    """oneDNN without VNNI adds pairs of products in 16 bits: wrong, not just inexact."""
    code = """
import torch
from dgg_kernels import LogprobOutput, linear_logprob
torch.manual_seed(0)
x, w = torch.randn(8, 64), torch.randn(3000, 64) / 8
y = torch.arange(8)
out = linear_logprob(x, w, y, screen="int8", grad_eps=2**-9)
torch.testing.assert_close(out.logp, linear_logprob(x, w, y).logp, rtol=0, atol=1e-2)
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_ignored_rows_frozen_weights_and_no_grad():
    case = make()
    target = case.target.clone()
    target[::4] = -100
    hidden = case.hidden.clone().requires_grad_()
    out = screened(case._replace(hidden=hidden, target=target))
    out.logp.sum().backward()
    for tensor in (*out[:4], out.screen_stats.error_bound, hidden.grad):
        assert (tensor[::4] == 0).all()
    assert hidden.grad.isfinite().all() and (hidden.grad[1::4] != 0).any()
    assert out.screen_stats.exact_rows == 0
    with torch.no_grad():
        again = screened(case._replace(target=target))
    assert torch.equal(again.logp, out.logp) and not again.logp.requires_grad
    nothing = screened(case._replace(target=torch.full_like(target, -100)))
    assert (nothing.logp == 0).all() and nothing.screen_stats.refined == 0
    empty = screened(case._replace(hidden=hidden[:0], target=target[:0]))
    assert empty.logp.shape == (0,) and empty.screen_stats.error_bound.shape == (0,)


@pytest.mark.parametrize("n, vocabulary, d", [(1, 1025, 1), (2, 2049, 15), (3, 4100, 17)])
def test_odd_shapes(n, vocabulary, d):
    case = make(n, vocabulary, d)
    out, *grads = gradients(case, 0)
    expected = exact(case)
    assert ((out.logp - expected.logp).abs() <= out.screen_stats.error_bound + FLOOR).all()
    assert all(grad.isfinite().all() for grad in grads)


def test_shapes_of_batches_and_the_gradient_of_a_bias():
    case = make()
    bias = torch.zeros(len(case.weight), requires_grad=True)
    flat_out = screened(case, bias=bias)
    shaped = case._replace(hidden=case.hidden.view(8, 8, -1), target=case.target.view(8, 8))
    out = screened(shaped, bias=bias)
    assert out.screen_stats.error_bound.shape == (8, 8)
    assert torch.equal(out.logp.flatten(), flat_out.logp)
    out.logp.sum().backward()
    # Each row's gradient of the logits sums up to zero, in expectation.
    assert abs(bias.grad.sum()) < 1 and bias.grad.abs().sum() > 50


def test_without_effect_on_a_small_vocabulary():
    case = make(vocabulary=int(0.5 / EPS))
    out = screened(case)
    assert out.screen_stats is None
    assert torch.equal(out.logp, linear_logprob(*case[:3]).logp)


def test_codes_are_made_once_per_update_and_go_with_the_weight(monkeypatch):
    made, vocabulary = [], 6007
    quantize = screen_module._quantized

    def count(weight, kind):
        if len(weight) == vocabulary:  # not a spot check
            made.append(kind)
        return quantize(weight, kind)

    monkeypatch.setattr(screen_module, "_quantized", count)
    case = make(n=4, vocabulary=vocabulary)
    gc.collect()
    before = len(screen_module._copies)
    for _ in range(3):
        screened(case)
    assert made == ["int8"] and len(screen_module._copies) == before + 1
    screened(case, "bf16")
    screened(case)
    assert made == ["int8", "bf16"]
    case.weight.mul_(2.0)
    twice = screened(case)
    assert made == ["int8", "bf16", "int8"]
    assert (twice.logp - exact(case).logp).abs().max() < LIMIT
    case.weight.data = case.weight.data.clone()  # another memory under the same tensor
    screened(case)
    assert len(made) == 4
    equal = case._replace(weight=case.weight.clone())
    screened(equal)
    assert len(made) == 5 and len(screen_module._copies) == before + 2
    del case, equal, twice
    gc.collect()
    assert len(screen_module._copies) == before


def step_fused(weight, skips=(None,), foreach=False):
    """Steps of AdamW that skip where `found_inf` says so; only the first rows have a gradient."""
    how = {"foreach": True} if foreach else {"fused": True}
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0, **how)
    for skip in skips:
        weight.grad = torch.zeros_like(weight)
        weight.grad[1:3] = 1.0
        if skip is not None:
            optimizer.found_inf = torch.tensor(float(skip))
        optimizer.step()


def load(weight, _):
    weight.data.copy_(weight.flip(0))


@pytest.mark.parametrize("write, skips", [
    (step_fused, [None]), (step_fused, [0]), (step_fused, [1, 0]), (step_fused, [0, 1]),
    (lambda weight, skips: step_fused(weight, skips, foreach=True), [None]),
    (load, None), (lambda weight, _: weight.detach()[1].zero_(), None),
])  # fmt: skip
def test_codes_are_made_anew_after_a_write_that_the_version_counter_does_not_tell(write, skips):
    weight = torch.nn.Parameter(make(n=1).weight)
    before = [code.clone() for code in screen_module.codes_of(weight, "int8", weight)]
    write(weight, skips)
    codes = screen_module.codes_of(weight, "int8", weight)
    fresh = screen_module._quantized(weight.detach(), "int8")
    assert all(torch.equal(a, b) for a, b in zip(codes, fresh, strict=True))
    assert not torch.equal(codes[0], before[0])


def test_codes_are_kept_under_autocast_and_in_inference_mode(monkeypatch):
    """Where the head's weight is a new tensor at every call."""
    case, made = make(n=4), []
    weight = torch.nn.Parameter(case.weight)
    quantize = screen_module._quantized
    monkeypatch.setattr(screen_module, "_quantized", lambda w, kind: made.append(len(w))
                        or quantize(w, kind))  # fmt: skip
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode(), torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                out = linear_logprob(case.hidden, weight, case.target, screen="int8")
    assert made.count(len(weight)) == 1
    of_16_bits = [t.to(torch.bfloat16) for t in (case.hidden, weight)]
    exact = linear_logprob(*of_16_bits, case.target)
    assert (out.logp - exact.logp).abs().max() < LIMIT
    with torch.inference_mode():
        of_no_version = weight.clone()
        linear_logprob(case.hidden, of_no_version, case.target, screen="int8")
    assert made.count(len(weight)) == 2


@pytest.mark.parametrize("skips", [[1], [1, 1, 1]])
def test_a_step_that_the_gate_skips_costs_no_new_codes(skips):
    weight = torch.nn.Parameter(make(n=1).weight)
    codes = screen_module.codes_of(weight, "int8", weight)[0]
    codes[0, 0] = mark = codes[0, 0] ^ 1  # is lost when they are made anew
    step_fused(weight, skips)
    again = screen_module.codes_of(weight, "int8", weight)[0]
    assert again is codes and codes[0, 0] == mark
    step_fused(weight, [0])
    assert screen_module.codes_of(weight, "int8", weight)[0][0, 0] != mark


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_the_nearest_ones(dtype):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(70, 37, generator=rng).to(dtype)
    x[3] = 0.0
    for kind in ("int8", "bf16"):
        codes, scale, norm_sq, residual_sq = screen_module._quantized(x, kind)
        rounded = codes.double() * scale.double()[:, None]
        torch.testing.assert_close(norm_sq.double(), x.double().square().sum(1))
        off = x.double() - rounded
        torch.testing.assert_close(residual_sq.double(), off.square().sum(1), rtol=1e-3, atol=1e-9)
        if kind == "int8":
            assert (off.abs() <= 0.5001 * scale[:, None]).all()
            assert (codes.abs().amax(1)[x.abs().amax(1) > 0] == 127).all()
        else:
            assert torch.equal(codes, x.bfloat16())


def test_opcheck():
    case = make(n=5, vocabulary=300, d=8)
    codes = screen_module._quantized(case.weight, "int8")
    leaves = [t.clone().requires_grad_() for t in case[:2]]
    args = (*leaves, None, case.target, 0.9, 5.0, 2**-6, None, torch.tensor([3]), [*codes])
    torch.library.opcheck(torch.ops.dgg.linear_logprob.default, (*args, None, -1, False),
                          test_utils=("test_schema", "test_faketensor"))  # fmt: skip
    args = (case.weight, *codes, torch.tensor(0.0))
    torch.library.opcheck(torch.ops.dgg.quantize_rows.default, args)


@pytest.mark.parametrize("options, message", [
    ({"screen": "int4"}, "screen: expected one of"),
    ({"screen": "fp8"}, "screen: 'fp8' needs a GPU"),
    ({"screen": "int8", "grad_eps": 0.0}, "screen: needs grad_eps > 0"),
    ({"screen": "bf16", "dtype": torch.bfloat16}, "screen: 'bf16' screens float32 weights"),
])  # fmt: skip
def test_errors(options, message):
    options = {**options}
    dtype = options.pop("dtype", torch.float32)
    case = make(n=4)
    with pytest.raises(ValueError, match=message):
        linear_logprob(case.hidden.to(dtype), case.weight.to(dtype), case.target, **options)


@pytest.mark.parametrize("sampled_at", [1.0, 0.6, 0.4])
def test_real_rows(sampled_at):
    """The stated bars: log-probs, their bias, and gradients no worse than without a screen."""
    try:
        rows = real_rows(512, sampled_at)
    except SystemExit as missing:
        pytest.skip(str(missing))
    case = Case(*rows[:3], {"grad_eps": 2**-12})
    c = torch.randn(512, generator=torch.Generator().manual_seed(5))
    logp, *exact_grads = exact_gradients(*rows[:3], c)
    out, *mine = gradients(case, 0)
    _, *plain = gradients(case, 0, None)
    off = out.logp.detach().double() - logp
    assert off.abs().mean() <= 2e-4 and off.abs().max() <= 1e-2
    assert abs(off.mean()) <= max(1e-5, 4 * float(off.std()) / 512**0.5)
    assert (off.abs() <= out.screen_stats.error_bound + FLOOR).all()
    assert out.screen_stats.missed <= 5
    for a, b, truth in zip(mine, plain, exact_grads, strict=True):
        assert error(a, truth) <= 1.05 * error(b, truth)
    norm = exact_grads[1].double().norm()
    assert abs(mine[1].double().norm() / norm - 1) < 2e-4
