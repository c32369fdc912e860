"""The Triton kernels on a GPU, or in Triton's interpreter, against a dense fp64 reference.

Without a GPU, in a process of its own: `TRITON_INTERPRET=1 pytest tests/test_triton_kernels.py`.
The interpreter's time follows the number of programs and block operations: N + V, not N V D.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from tolerance import FLOOR, assert_as_good_as_torch, error
from triton_tools import interpreting, poisoned, repair_interpreter

if interpreting():
    repair_interpreter()
elif not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 in the environment", allow_module_level=True)

from dgg_kernels import configs, lm_head_backward, lm_head_forward, lm_head_screen
from dgg_kernels.configs import GatherConfig, TileConfig
from dgg_kernels.lm_head_forward import Entries, Head, fair_share, scan_vocabulary

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DEVICE = torch.device("cpu" if interpreting() else "cuda")
EVERY_ENTRY = 1e-30  # a grad_eps that keeps all: the sparse path without its randomness


@pytest.fixture(autouse=True)
def default_device():
    with DEVICE:
        yield


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: poisoned(empty(*args, **options)))


@pytest.fixture
def use_config(monkeypatch):
    """Replaces fields of this device's configuration."""

    def use(**fields):
        name = lm_head_forward.architecture(DEVICE)
        changed = replace(configs.config_for(name), **fields)
        monkeypatch.setitem(configs.CONFIGS, name, changed)

    return use


@dataclass
class Case:
    """Inputs of one head and coefficients of a loss."""

    hidden: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor
    bias: torch.Tensor | None
    temperature: float
    softcap: float
    c: torch.Tensor
    c_entropy: torch.Tensor | None
    c_lse: torch.Tensor | None

    @classmethod
    def random(cls, N, V, D, dtype=FP32, bias=False, temperature=1.0, softcap=0.0,
               entropy=False, lse=False, scale=2.0, seed=0):  # fmt: skip
        """Logits of standard deviation `scale`; every 5th row ignored, every 4th without c."""
        g = torch.Generator(DEVICE).manual_seed(seed)
        hidden = torch.randn(N, D, generator=g)
        weight = torch.randn(V, D, generator=g) * (scale / math.sqrt(D))
        target = torch.randint(V, (N,), generator=g)
        target[4::5] = -1
        c, c_entropy, c_lse = torch.randn(3, N, generator=g)
        c[3::4] = c_entropy[3::4] = c_lse[3::4] = 0.0
        b = torch.randn(V, generator=g).to(dtype) if bias else None
        return cls(hidden.to(dtype), weight.to(dtype), target, b, temperature, softcap,
                   c, c_entropy if entropy else None, c_lse if lse else None)  # fmt: skip

    def dense(self, dtype):
        """Plain PyTorch in a dtype: (logp, entropy, lse, sum_p2), (d_hidden, d_weight, d_bias)."""
        leaves = [
            None if t is None else t.to(dtype, copy=True).requires_grad_()
            for t in (self.hidden, self.weight, self.bias)
        ]
        hidden, weight, bias = leaves
        z = hidden @ weight.T
        if bias is not None:
            z = z + bias
        if self.softcap:
            z = self.softcap * torch.tanh(z / self.softcap)
        z = z / self.temperature
        logp_all = z.log_softmax(1)
        p = logp_all.exp()
        kept = self.target >= 0
        logp = logp_all.gather(1, self.target.clamp(min=0)[:, None])[:, 0]
        entropy = -(p * logp_all).sum(1)
        loss = (logp * self.c * kept).sum()
        if self.c_entropy is not None:
            loss = loss + (entropy * self.c_entropy * kept).sum()
        lse = z.logsumexp(1)
        if self.c_lse is not None:
            loss = loss + (lse * self.c_lse * kept).sum()
        loss.backward()
        outputs = (logp, entropy, lse, p.square().sum(1))
        return [torch.where(kept, o, 0.0).detach() for o in outputs], [
            t.grad for t in leaves if t is not None
        ]

    def head(self, grad_eps, seed=1):
        return Head(self.hidden, self.weight, self.target, self.bias, self.temperature,
                    self.softcap, grad_eps, torch.tensor([seed]))  # fmt: skip

    def forward(self, grad_eps=0.0, lse_ref=None, seed=1, screen=()):
        return lm_head_forward.lm_head_forward(
            self.hidden, self.weight, self.target, self.bias, self.temperature, self.softcap,
            grad_eps, lse_ref, torch.tensor([seed]) if grad_eps else None, screen,
        )  # fmt: skip

    def backward(self, forward, grad_eps=0.0, seed=1, hidden=True, weight=True, row_sq=True):
        _, entropy, lse, _, active, report = forward
        return lm_head_backward.lm_head_backward(
            self.c, self.c_entropy, self.c_lse, self.hidden, self.weight, self.target, self.bias,
            lse, entropy, active, torch.tensor([seed]) if grad_eps else None, self.temperature,
            self.softcap, grad_eps, len(report) > 0, hidden, weight,
            self.bias is not None and weight, row_sq,
        )  # fmt: skip


def check(case, grad_eps=0.0, lse_ref=None, magnitude=0.0):
    """Forward and backward obey the tolerance rule; row_sq is that of dW as stored."""
    exact, exact_gradients = case.dense(torch.float64)
    theirs, their_gradients = case.dense(case.hidden.dtype)
    results = case.forward(grad_eps, lse_ref)
    for name, *three in zip(
        ("logp", "entropy", "lse", "sum_p2"), results, theirs, exact, strict=False
    ):
        assert_as_good_as_torch(*three, name, magnitude)
    gradients = case.backward(results, grad_eps)
    names = ("d_hidden", "d_weight", "d_bias")
    for name, *three in zip(names, gradients, their_gradients, exact_gradients, strict=False):
        assert three[0].dtype == case.hidden.dtype
        assert_as_good_as_torch(*three, name, magnitude)
    squares = gradients[1].double().square().sum(1)
    assert error(gradients[3], squares) <= FLOOR[FP32]


FEATURES = {"bias": True, "temperature": 0.7, "softcap": 15.0, "entropy": True, "lse": True}


@pytest.mark.parametrize(
    ("N", "V", "D", "dtype", "features"),
    [
        (1, 2, 8, FP32, {}),
        (17, 517, 70, FP32, FEATURES),
        (17, 517, 70, FP16, FEATURES),
        (17, 517, 70, BF16, FEATURES),
        (193, 517, 8, FP32, {"entropy": True}),
        (193, 517, 576, BF16, {"bias": True}),
        (5, 4099, 8, FP16, {"temperature": 0.5}),
        (193, 2, 70, BF16, {"softcap": 5.0, "lse": True}),
    ],
)
@pytest.mark.parametrize("mode", ["exact", "sparse"])
def test_against_dense(N, V, D, dtype, features, mode):
    case = Case.random(N, V, D, dtype, **features)
    check(case, EVERY_ENTRY if mode == "sparse" else 0.0)


def test_selection_in_the_forward():
    case = Case.random(17, 517, 70, BF16, **FEATURES)
    lse = case.dense(torch.float64)[0][2].float()
    check(case, EVERY_ENTRY, lse_ref=lse + 0.3)


@pytest.mark.parametrize("mode", ["exact", "sparse"])
def test_blocks_of_rows_and_chunks_of_vocabulary(mode, monkeypatch):
    monkeypatch.setattr(lm_head_forward, "WORKSPACE_BYTES", 0)  # the least: 128 rows
    monkeypatch.setattr(lm_head_backward, "EXACT_ROW_BYTES", 0)
    monkeypatch.setattr(lm_head_backward, "EXACT_CHUNK_BYTES", 0)  # 256 vocabulary entries
    check(Case.random(193, 517, 8, FP32, **FEATURES), EVERY_ENTRY if mode == "sparse" else 0.0)


def test_rows_longer_than_the_registers(use_config):
    use_config(row=GatherConfig(block_d=32, group=1024, warp_d=32))  # pieces of 64, then
    check(Case.random(17, 517, 70, FP32, **FEATURES), EVERY_ENTRY)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("tma", [False, True])
def test_tiles(parts, tma, use_config):
    tile = TileConfig(32, 128, 32, num_warps=4, num_stages=1, parts=parts, group=2, tma=tma)
    use_config(tile=tile)
    case = Case.random(70, 517, 72, FP16, entropy=True)
    tma_used = case.head(0.0).operands(case.hidden, case.weight)[1]["TMA"]
    assert tma_used == tma
    check(case)


@pytest.mark.parametrize(
    "features", [{"scale": 100.0}, {"scale": 0.0}, {"scale": 1000.0, "entropy": True}]
)
def test_extreme_distributions(features):
    """Logits of magnitude 100, uniform, one-hot."""
    case = Case.random(17, 130, 8, FP32, **features)
    largest = float((case.hidden @ case.weight.T).abs().max())
    for grad_eps in (0.0, EVERY_ENTRY):
        check(case, grad_eps, magnitude=2 * largest)  # of a logit, and of the log-sum-exp


def test_banned_tokens():
    case = Case.random(17, 300, 8, FP32, bias=True, entropy=True)
    plain = Case.random(17, 300, 8, FP32, bias=True, entropy=True)
    case.bias[:260], plain.bias[:260] = -torch.inf, -1e4  # a whole tile, and more
    case.target.clamp_(max=39).add_((case.target >= 0) * 260)
    plain.target = case.target
    exact, gradients = plain.dense(torch.float64)
    for grad_eps in (0.0, 2**-40):
        results = case.forward(grad_eps)
        for got, want in zip(results, exact, strict=False):
            assert error(got, want) <= 2 * FLOOR[FP32]
        for got, want in zip(case.backward(results, grad_eps), gradients, strict=False):
            assert error(got, want) <= 2 * FLOOR[FP32]


@pytest.mark.parametrize("grad_eps", [0.0, 2**-8])
@pytest.mark.parametrize("nothing", ["rows", "targets", "coefficients"])
def test_nothing_to_do(nothing, grad_eps):
    case = Case.random(0 if nothing == "rows" else 17, 130, 8, BF16, bias=True)
    if nothing == "targets":
        case.target.fill_(-1)
    if nothing == "coefficients":
        case.c.zero_()
    results = case.forward(grad_eps)
    if nothing != "coefficients":
        assert all(not r.any() for r in results[:4])
    gradients = case.backward(results, grad_eps)
    assert all(torch.isfinite(g).all() and not g.any() for g in gradients)


@pytest.mark.parametrize("grad_eps", [0.0, 2**-8])
def test_nan_is_passed_on_only_from_rows_with_work(grad_eps):
    case = Case.random(17, 130, 8, FP32)
    case.hidden[4] = torch.nan  # ignored
    results = case.forward(grad_eps)
    assert all(torch.isfinite(r).all() for r in results[:4])
    case.hidden[3] = torch.nan  # no coefficient
    gradients = case.backward(results, grad_eps)
    assert all(torch.isfinite(g).all() for g in gradients)
    case.hidden[0] = torch.nan
    results = case.forward(grad_eps)
    assert results[0].isnan().nonzero().flatten().tolist() == [0, 3]
    row_sq = case.backward(results, grad_eps)[3]
    assert row_sq.sum().isnan()  # shuts the gate


def test_tiny_coefficients_in_fp16():
    """A mean over a million tokens: the products' inputs would round to zero in fp16."""
    case = Case.random(17, 130, 8, FP16)
    case.c *= 1e-7
    case.hidden *= 1000
    case.weight /= 1000
    gradient = case.dense(torch.float64)[1][1]
    assert error(case.backward(case.forward())[1], gradient) <= 2e-3


@pytest.mark.parametrize("grad_eps", [0.0, 2**-8])
def test_frozen_parameters(grad_eps):
    case = Case.random(17, 130, 8, BF16)
    results = case.forward(grad_eps)
    everything = case.backward(results, grad_eps)
    frozen_weight = case.backward(results, grad_eps, weight=False)
    assert frozen_weight[1].numel() == 0
    assert torch.equal(frozen_weight[0], everything[0])
    assert torch.equal(frozen_weight[3], everything[3])
    frozen_hidden = case.backward(results, grad_eps, hidden=False, row_sq=False)
    assert frozen_hidden[0].numel() == frozen_hidden[3].numel() == 0
    assert torch.equal(frozen_hidden[1], everything[1])


def test_strided_inputs():
    case = Case.random(17, 130, 8, FP32, bias=True, entropy=True)
    case.c, case.c_entropy = torch.ones(17), torch.ones(17)
    want = case.backward(case.forward(2**-6), 2**-6)
    case.c = case.c_entropy = torch.ones(1).expand(17)  # what the backward of a sum sends
    case.bias = torch.stack((case.bias, case.bias), 1)[:, 0]
    case.hidden = torch.nn.functional.pad(case.hidden, (0, 5))[:, :8]
    case.weight = torch.nn.functional.pad(case.weight, (0, 3))[:, :8]
    got = case.backward(case.forward(2**-6), 2**-6)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("grad_eps", [0.0, 2**-6])
def test_inputs_that_lie_in_another_order(grad_eps):
    """Columns side by side, every second column, or one row for all."""
    case = Case.random(17, 130, 8, FP32)
    case.hidden[:] = case.hidden[:1]
    codes = lm_head_screen.quantize_rows(case.weight, torch.int8)
    want = [*case.forward(grad_eps), *case.backward(case.forward(grad_eps), grad_eps), *codes]
    weight = case.weight
    for hidden, w in (
        (case.hidden.T.contiguous().T, weight.T.contiguous().T),
        (case.hidden.repeat_interleave(2, 1)[:, ::2], weight.repeat_interleave(2, 1)[:, ::2]),
        (case.hidden[:1].expand(17, 8), weight),
    ):
        case.hidden, case.weight = hidden, w
        codes = lm_head_screen.quantize_rows(w, torch.int8)
        got = [*case.forward(grad_eps), *case.backward(case.forward(grad_eps), grad_eps), *codes]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_default_dtype_is_not_taken_over(monkeypatch):
    case = Case.random(17, 130, 8, BF16)
    want = [*case.backward(case.forward()), *lm_head_screen.quantize_rows(case.weight, torch.int8)]
    torch.set_default_dtype(BF16)
    try:
        got = case.backward(case.forward())
        got += tuple(lm_head_screen.quantize_rows(case.weight, torch.int8))
    finally:
        torch.set_default_dtype(FP32)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True))


# -- random tail ----------------------------------------------------------------------------------


def kept(case, grad_eps, reference, seed=1):
    """(mask [N, V] of kept entries, threshold [N]) of rows with a target."""
    rows = case.target >= 0
    packed = scan_vocabulary(case.head(grad_eps, seed), rows, reference, None)
    entries = Entries(packed, len(rows), weighted=False)
    mask = torch.zeros(len(rows), case.weight.shape[0], dtype=torch.bool)
    for i in range(len(rows)):
        columns = entries.columns[entries.start[i] :][: entries.count[i]]
        assert (columns.diff() > 0).all()
        mask[i, columns] = True
    return mask, entries.threshold


def uniform(rows, columns, seed):
    """The hash of `lm_head_forward.uniform` in int64."""
    m = 2**32 - 1
    x = (((rows * 0x9E3779B1) & m) ^ (seed & m))[:, None] + columns[None, :] * 0x85EBCA77
    x = ((x & m) ^ ((x & m) >> 16)) * 0x7FEB352D & m
    x = (x ^ (x >> 15)) * 0x846CA68B & m
    return ((x ^ (x >> 16)) >> 8) * 2.0**-24


def repeated(distinct, copies, V=130, D=8):
    """Every row `copies` times: one run draws as often for the same probabilities."""
    case = Case.random(distinct, V, D, FP32, bias=True, entropy=True, scale=1.5)
    case.target.clamp_(min=0)
    case.hidden, case.target = case.hidden.repeat(copies, 1), case.target.repeat(copies)
    case.c = torch.linspace(0.5, 1.5, distinct).repeat(copies)
    case.c_entropy = case.c.flip(0).clone()
    return case


@pytest.mark.parametrize("block_v", [64, 256])
def test_the_same_entries_whatever_the_tiles(block_v, use_config):
    use_config(tile_fp32=TileConfig(32, block_v, 32, num_warps=4, num_stages=1, parts=2))
    case = Case.random(193, 517, 70, FP32)
    seed, eps = 2**40 + 12345, 2**-8
    z = case.hidden.double() @ case.weight.double().T
    lse = z.logsumexp(1)
    mask, _ = kept(case, eps, lse.float(), seed)
    u = uniform(torch.arange(193), torch.arange(517), seed)
    want = u < (z - lse[:, None]).exp() / eps
    rows = case.target >= 0
    want[rows, case.target[rows]] = True
    want[~rows] = False
    assert torch.equal(mask, want)


def test_gradients_are_unbiased_and_reproducible():
    distinct, copies, eps = 5, 64, 2**-4
    case = repeated(distinct, copies)
    exact = case.dense(torch.float64)[1]
    results = case.forward(eps)
    d_hidden, d_weight, d_bias, _ = gradients = case.backward(results, eps)
    again = case.backward(case.forward(eps), eps)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    other = case.backward(case.forward(eps, seed=2), eps, seed=2)
    assert not torch.equal(other[1], d_weight)
    # The mean over 64 draws is 8 times closer, and has the same distance from a single draw.
    d_hidden = d_hidden.double().view(copies, distinct, -1)
    want = exact[0].view(copies, distinct, -1)[0]
    single = (d_hidden - want).square().sum((1, 2)).mean().sqrt()
    assert (d_hidden.mean(0) - want).norm() <= 1.4 / 8 * single
    assert single > 0.02 * want.norm()
    # dW and d_bias are such sums over rows themselves.
    assert error(d_weight, exact[1]) < 0.04
    assert error(d_bias, exact[2]) < 0.04


@pytest.mark.parametrize("reference", ["exact", "2 nats too low", "9 nats too low", "unknown"])
def test_rows_that_do_not_fit_are_thinned_without_bias(reference, monkeypatch):
    distinct, copies, eps, slots = 3, 500, 2**-10, 24
    case = repeated(distinct, copies)
    N, V = distinct * copies, 130
    monkeypatch.setattr(lm_head_forward, "MAX_ENTRIES", slots * N)
    lse = case.dense(torch.float64)[0][2].float()
    error_of_reference = {"exact": 0.0, "2 nats too low": -2.0, "9 nats too low": -9.0,
                          "unknown": torch.nan}[reference]  # fmt: skip
    results = case.forward(eps, lse_ref=lse + error_of_reference)
    entries = Entries(results[4], N, weighted=False)
    assert entries.columns.numel() == slots * N
    assert entries.count.sum() <= slots * N
    assert (entries.count < 2).float().mean() < 0.02  # hardly ever down to the target alone
    # The estimate of every p, from 500 draws of each row.
    z = case.hidden.double() @ case.weight.double().T + case.bias
    p = (z - lse[:, None]).exp()
    weight = 1 / (z - entries.threshold[:, None]).exp().clamp(max=1.0)
    estimate = torch.zeros(N, V, dtype=torch.float64)
    for i in range(N):
        v = entries.columns[entries.start[i] :][: entries.count[i]]
        estimate[i, v] = (p * weight)[i, v]
        estimate[i, case.target[i]] = p[i, case.target[i]]
    off = (estimate - p).view(copies, distinct, V)
    single = off.square().sum((1, 2)).mean().sqrt()
    assert off.mean(0).norm() <= 1.3 / math.sqrt(copies) * single
    assert abs(off.sum(2).mean()) <= 4 * off.sum(2).std() / math.sqrt(N)  # of the whole mass


def test_fair_share():
    for kept_per_row, room in (([1, 2, 30, 40], 43), ([5, 5, 5], 10), ([7, 0, 3], 100)):
        counts = torch.tensor(kept_per_row, dtype=torch.int32)
        limit = int(fair_share(counts, room))
        assert counts.clamp(max=limit).sum() <= room
        assert counts.clamp(max=limit + 1).sum() > room or limit >= counts.max()


def test_an_unhelpful_reference_only_steers():
    case = Case.random(17, 130, 8, FP32, entropy=True)
    lse = case.dense(torch.float64)[0][2].float()
    bad = lse.clone()
    bad[:8] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 30.0, 0.0, -50.0])
    results = case.forward(2**-20, lse_ref=bad)
    gradients = case.backward(results, 2**-20)
    assert all(torch.isfinite(g).all() for g in gradients)
    exact = case.dense(torch.float64)[1][0]
    good = [0, 1, 2, 4, 6, 7, *range(8, 17)]  # not those a reference far too high made sparse
    assert error(gradients[0][good], exact[good]) <= 1e-2


# -- screen ---------------------------------------------------------------------------------------

KINDS = ["int8", "fp8", "bf16"]


def screened(case, kind, grad_eps, lse_ref=None, seed=1):
    """Forward with a screen; its results, and the report [N, 4]."""
    dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}[kind]
    codes = lm_head_screen.quantize_rows(case.weight, dtype)
    return case.forward(grad_eps, lse_ref, seed, codes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("features", [{}, FEATURES])
def test_screened_values_are_within_their_bound(kind, with_reference, features):
    case = Case.random(48, 4099, 70, FP32, **{**features, "scale": 3.0})
    exact = case.dense(torch.float64)[0]
    reference = exact[2].float() + 0.05 if with_reference else None
    *results, active, report = screened(case, kind, 2**-8, reference)
    rows = case.target >= 0
    off = (results[0].double() - exact[0]).abs()
    assert (off <= report[:, 0].clamp(min=1e-4)).all()
    assert report[rows, 0].max() > 0 or kind == "fp8"
    assert report[rows, 0].max() <= lm_head_screen.LIMIT
    assert (report[~rows] == 0).all()
    for got, want, tolerance in zip(results[1:], exact[1:], (0.05, 0.01, 0.01), strict=True):
        assert (got - want).abs().max() <= tolerance
    entries = Entries(active, len(rows), weighted=True)
    assert (entries.count[rows] == report[rows, 1]).all() or (report[rows, 0] < 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_screens_sums_and_gradients_are_unbiased(kind):
    distinct, copies, eps = 5, 64, 2**-4
    case = repeated(distinct, copies, V=256)
    outputs, gradients = case.dense(torch.float64)
    *results, _, report = forward = screened(case, kind, eps)
    assert (report[:, 0] >= 0).all() or kind != "bf16"
    off = (results[2] - outputs[2]).view(copies, distinct)
    assert off.std(0).max() > 0 or (report[:, 0] < 0).all()
    assert (off.mean(0).abs() <= 4 * off.std(0) / math.sqrt(copies) + 2e-6).all()
    got = case.backward(forward, eps)
    d_hidden = got[0].double().view(copies, distinct, -1)
    want = gradients[0].view(copies, distinct, -1)[0]
    single = (d_hidden - want).square().sum((1, 2)).mean().sqrt()
    assert (d_hidden.mean(0) - want).norm() <= 1.5 / 8 * single
    again = case.backward(screened(case, kind, eps), eps)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_in_the_bias_is_in_every_rows_distribution(kind):
    case = Case.random(9, 700, 64, FP32, bias=True)
    case.bias[5] = torch.nan
    logp, entropy, lse, *_ = screened(case, kind, 2**-6)
    kept = case.target >= 0
    assert all(out[kept].isnan().all() for out in (logp, entropy, lse))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_the_screen_does_not_suit_are_exact(kind):
    case = Case.random(17, 1024, 64, FP32, entropy=True, scale=2.0)
    case.hidden[0] *= 300.0  # logits of magnitude 600: a screen off by whole nats
    case.hidden[1, 3] = 3e4  # an outlier that leaves the other features no codes
    case.hidden[2] = torch.nan
    reference = case.dense(torch.float64)[0][2].float()
    reference[5], reference[6], reference[7] = 40.0, -40.0, torch.nan
    exact = case.dense(torch.float64)[0]
    *results, _, report = forward = screened(case, kind, 2**-6, reference)
    unsuited = [0, 1, 2, 5, 6, 7] if kind != "bf16" else [2, 5, 6, 7]
    assert (report[unsuited, 0] == -1).all()
    sound = [i for i in range(17) if i not in (2, 4, 9, 14)]
    off = (results[0] - exact[0]).abs()[sound]
    assert (off <= report[sound, 0].clamp(min=0) + 2e-5 * exact[2].abs()[sound]).all()
    assert results[0][2].isnan()
    d_hidden = case.backward(forward, 2**-6)[0]
    assert d_hidden[sound].isfinite().all()
