"""linear_logprob against the fp64 reference: values, gradients, energy, edges, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tolerance import FLOOR, assert_as_good_as_torch, error

from dgg_kernels import GateConfig, GradientGate, linear_logprob
from dgg_kernels import lm_head_chunked as chunked
from dgg_kernels.lm_head import logprob_with_lse
from dgg_kernels.reference import reference_logprob

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def nan_filled_empty():
    """Whatever an implementation allocates and does not write shows up as NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["op", "chunked"])
def implementation(request, monkeypatch):
    """The registered op of this device, and the plain-PyTorch one every other device gets."""
    if request.param == "chunked":
        monkeypatch.setattr(torch.ops.dgg, "lm_head_forward", chunked.lm_head_forward)
        monkeypatch.setattr(torch.ops.dgg, "lm_head_backward", chunked.lm_head_backward)
        monkeypatch.setattr(chunked, "CHUNK_BYTES", 2**14)  # several chunks even when small
    return request.param


def inputs(n, v, d, dtype=torch.float32, scale=1.0, seed=0, ignored=0.2):
    rng = torch.Generator().manual_seed(seed)
    hidden = (scale * torch.randn(n, d, generator=rng)).to(dtype).requires_grad_()
    weight = (torch.randn(v, d, generator=rng) / d**0.5).to(dtype).requires_grad_()
    target = torch.randint(v, (n,), generator=rng)
    target[torch.rand(n, generator=rng) < ignored] = -100
    c, c_entropy = torch.randn(2, n, generator=rng)
    c[torch.rand(n, generator=rng) < 0.3] = 0.0
    return hidden, weight, target, c, c_entropy


def run(function, hidden, weight, target, c, c_entropy, dtype=None, bias=None, **options):
    """Outputs and gradients of sum(c logp + c_entropy entropy), from leaf copies of the inputs."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()
              for t in (hidden, weight, bias)]  # fmt: skip
    out = function(leaves[0], leaves[1], target, bias=leaves[2], **options)
    logp, entropy, lse, sum_p2 = out[:4]
    (c.to(logp) * logp + c_entropy.to(entropy) * entropy).sum().backward()
    grads = [None if t is None else t.grad for t in leaves]
    return {"logp": logp, "entropy": entropy, "lse": lse, "sum_p2": sum_p2,
            "d_hidden": grads[0], "d_weight": grads[1], "d_bias": grads[2]}  # fmt: skip


def check(args, bias=None, magnitude=0.0, **options):
    exact = run(reference_logprob, *args, dtype=torch.float64, bias=bias, **options)
    torch_own = run(reference_logprob, *args, bias=bias, **options)
    mine = run(linear_logprob, *args, bias=bias, grad_eps=0.0, **options)
    for name, value in mine.items():
        if value is not None and value.numel():
            assert_as_good_as_torch(value, torch_own[name], exact[name], name, magnitude)
    for name in ("logp", "entropy", "lse", "sum_p2"):
        assert mine[name].dtype == torch.float32
        assert not mine[name][args[2] == -100].any()
    return mine


@pytest.mark.parametrize("option", ["bias", "temperature", "softcap", "all"])
def test_reference_gradients_by_finite_differences(option):
    hidden, weight, target, _, _ = inputs(5, 7, 3, ignored=0.3, seed=1)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    chosen = {"bias": {}, "temperature": {"temperature": 0.7}, "softcap": {"softcap": 3.0},
              "all": {"temperature": 1.3, "softcap": 2.0}}[option]  # fmt: skip
    with_bias = option in ("bias", "all")

    def function(h, w, b):
        return reference_logprob(h, w, target, bias=b if with_bias else None, **chosen)[:2]

    leaves = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    assert torch.autograd.gradcheck(function, (*leaves, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "v", "d"),
    [(1, 2, 8), (17, 517, 70), (193, 4099, 8), (193, 517, 576), (64, 4099, 1000), (2048, 517, 70)],
)
def test_values_and_gradients(implementation, n, v, d, dtype):
    check(inputs(n, v, d, dtype))


@pytest.mark.parametrize(("n", "v", "d"), [(17, 49152, 70), (3, 151936, 8)])
def test_large_vocabularies(implementation, n, v, d):
    check(inputs(n, v, d))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.6}, {"softcap": 5.0}, {"temperature": 1.7, "softcap": 3.0}, {"bias": True}],
    ids=str,
)
def test_options(implementation, options, dtype):
    options = dict(options)
    bias = None
    if options.pop("bias", False):
        bias = torch.randn(517, generator=torch.Generator().manual_seed(2)).to(dtype)
    check(inputs(50, 517, 70, dtype, scale=3.0), bias=bias, **options)


@pytest.mark.parametrize("scale", [0.0, 100.0], ids=["uniform", "near one-hot"])
def test_extreme_distributions(implementation, scale):
    check(inputs(40, 517, 70, scale=scale))


def test_logits_of_magnitude_100(implementation):
    hidden, weight, target, c, c_entropy = inputs(40, 517, 70)
    bias = 100 * torch.randn(517, generator=torch.Generator().manual_seed(0))
    check((hidden, weight, target, c, c_entropy), bias=bias, magnitude=400.0)


def test_banned_tokens_have_no_probability_and_no_gradient(implementation):
    bias = torch.zeros(517)
    bias[100:400] = -float("inf")
    args = inputs(40, 517, 70)
    args[2].fill_(3)
    out = run(linear_logprob, *args, bias=bias, grad_eps=0.0)
    exact = run(reference_logprob, *args, bias=bias, dtype=torch.float64)
    for name in ("logp", "entropy", "lse", "sum_p2", "d_hidden", "d_weight"):
        assert error(out[name], exact[name]) < 1e-5, name
    assert not out["d_weight"][100:400].any()


# The same ones every time: where torch's own error is small by luck, ours may be above the rule.
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 40), v=st.integers(1, 300), d=st.integers(1, 70), seed=st.integers(0, 99),
    scale_softcap=st.sampled_from(
        [(0.1, None), (1.0, None), (10.0, None), (0.1, 4.0), (1.0, 4.0), (10.0, 30.0)]
    ),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    leading=st.booleans(), strided=st.booleans(),
)  # fmt: skip
@example(1, 246, 1, 0, (10.0, None), 1.0, False, False)  # logits of 40, one row, one dimension
def test_any_shape(n, v, d, seed, scale_softcap, temperature, leading, strided):
    scale, softcap = scale_softcap
    hidden, weight, target, c, c_entropy = inputs(n, v, d, scale=scale, seed=seed)
    options = {"temperature": temperature, "softcap": softcap}
    magnitude = 0.0
    if n and scale > 1.0:  # of a logit, and of the log-sum-exp
        largest = float((hidden @ weight.T).detach().abs().max())
        magnitude = 2 * min(largest, softcap or largest) / temperature
    mine = check((hidden, weight, target, c, c_entropy), magnitude=magnitude, **options)
    if leading:
        out = linear_logprob(hidden[None], weight, target[None], grad_eps=0.0, **options)
        assert out.logp.shape == (1, n)
        assert torch.equal(out.logp[0], mine["logp"])
    if strided:
        hidden = torch.stack([hidden.detach()] * 2, -1)[..., 0].requires_grad_()
        weight = weight.detach().T.contiguous().T.requires_grad_()
        check((hidden, weight, target, c, c_entropy), magnitude=magnitude, **options)


def test_a_saturated_softcap_costs_its_slope_digits(implementation):
    """1 - tanh² near 0 is known to a few roundings of 1, not of itself; so is the gradient."""
    hidden, weight, target, c, _ = inputs(1, 246, 62, scale=10.0, ignored=0.0)
    args = hidden, weight, target, torch.ones_like(c), torch.zeros_like(c)
    bias = torch.zeros(246)
    exact = run(reference_logprob, *args, dtype=torch.float64, bias=bias, softcap=4.0)
    mine = run(linear_logprob, *args, bias=bias, grad_eps=0.0, softcap=4.0)
    assert (hidden @ weight.T).detach().abs().max() > 20  # tanh of 5: 1 - tanh² is 2e-4
    assert (mine["d_bias"] - exact["d_bias"]).abs().max() < 8 * 2**-24


@pytest.mark.parametrize("grad_eps", [0.0, 2**-8])
def test_all_rows_ignored_and_no_rows(implementation, grad_eps):
    for n in (0, 9):
        hidden, weight, target, _, _ = inputs(n, 517, 70)
        hidden.data.fill_(float("nan"))  # padding may hold anything
        out = linear_logprob(hidden, weight, target.fill_(-100), grad_eps=grad_eps)
        (out.logp.sum() + out.entropy.sum()).backward()
        assert out.logp.shape == (n,)
        for t in (*out[:4], hidden.grad, weight.grad):
            assert not t.any()


@pytest.mark.parametrize("grad_eps", [0.0, 2**-8])
def test_rows_without_a_coefficient_give_no_gradient(implementation, grad_eps):
    hidden, weight, target, _, _ = inputs(9, 517, 70)
    out = linear_logprob(hidden, weight, target, grad_eps=grad_eps)
    (0.0 * out.logp).sum().backward()
    assert not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("grad_eps", [0.0, 2**-8])
def test_a_nan_row_is_nan_and_shuts_the_gate(implementation, grad_eps):
    hidden, weight, target, _, _ = inputs(9, 517, 70, ignored=0.0)
    hidden.data[4, 3] = float("nan")
    gate = GradientGate(GateConfig(), weight)
    gate.new_batch()
    out = linear_logprob(hidden, weight, target, grad_eps=grad_eps, gate=gate)
    assert out.logp.isnan().nonzero().tolist() == [[4]]
    out.logp.sum().backward()
    gate.decide()
    assert gate.is_shut()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_frozen_inputs_get_no_gradient_and_the_others_the_same(implementation, frozen):
    gradients = {}
    for freeze in (False, True):
        hidden, weight, target, c, _ = inputs(30, 517, 70)
        if freeze and frozen in ("hidden", "both"):
            hidden.requires_grad_(False)
        if freeze and frozen in ("weight", "both"):
            weight.requires_grad_(False)
        torch.manual_seed(0)
        loss = (linear_logprob(hidden, weight, target, grad_eps=2**-8).logp * c).sum()
        if loss.requires_grad:
            loss.backward()
        gradients[freeze] = hidden.grad, weight.grad
    for a, b in zip(gradients[False], gradients[True], strict=True):
        assert b is None or torch.equal(a, b)
    assert sum(g is None for g in gradients[True]) == (2 if frozen == "both" else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_eps", [0.0, 2**-8])
def test_row_sq_is_the_norm_of_the_gradient_as_stored(implementation, dtype, grad_eps):
    seen = []
    for _ in range(2):
        hidden, weight, target, c, _ = inputs(193, 517, 70, dtype, scale=4.0)
        gate = GradientGate(GateConfig(), weight)
        gate.new_batch()
        torch.manual_seed(0)
        out = linear_logprob(hidden, weight, target, grad_eps=grad_eps, gate=gate)
        (out.logp * c).sum().backward()
        gate.decide()
        seen.append((gate.metrics()["gate/energy"], weight.grad))
    exact = torch.linalg.vector_norm(weight.grad.double())
    torch.testing.assert_close(seen[0][0], exact, rtol=1e-6, atol=0)
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])


def test_autocast_runs_in_its_dtype_and_gradients_come_back_in_fp32():
    hidden, weight, target, c, _ = inputs(30, 517, 70)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_logprob(hidden, weight, target, grad_eps=0.0)
    (out.logp * c).sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    exact = reference_logprob(hidden.double(), weight.double(), target)[0]
    assert error(out.logp, exact) < 2e-2


@pytest.mark.parametrize("grad_eps", [0.0, 1e-30])
def test_gradient_of_the_log_sum_exp(implementation, grad_eps):
    """Beside those of log-prob and entropy, and where both make up the target's logit alone."""
    hidden, weight, target, c, c_entropy = inputs(50, 517, 70)
    c_lse = torch.randn(50, generator=torch.Generator().manual_seed(3))
    exact = []
    for x, w in ((hidden, weight), (hidden.double(), weight.double())):
        z = (x @ w.T) / 0.7
        logp_all, kept = z.log_softmax(1), target != -100
        logp = logp_all.gather(1, target.clamp(min=0)[:, None])[:, 0]
        entropy = -(logp_all.exp() * logp_all).sum(1)
        loss = (kept * (c * logp + c_entropy * entropy + c_lse * z.logsumexp(1))).sum()
        exact.append(torch.autograd.grad(loss, (hidden, weight)))
    out = logprob_with_lse(hidden, weight, target, temperature=0.7, grad_eps=grad_eps)
    loss = (c * out.logp + c_entropy * out.entropy + c_lse * out.lse).sum()
    for got, *others in zip(torch.autograd.grad(loss, (hidden, weight)), *exact, strict=True):
        assert_as_good_as_torch(got, *others, "gradient")
    out = logprob_with_lse(hidden, weight, target, grad_eps=grad_eps)
    (d_weight,) = torch.autograd.grad((c * (out.logp + out.lse)).sum(), weight)
    assert not d_weight[[v for v in range(517) if v not in target]].any()
    assert not linear_logprob(hidden, weight, target).lse.requires_grad


def test_a_second_derivative_is_refused():
    hidden, weight, target, _, _ = inputs(9, 517, 70)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(linear_logprob(hidden, weight, target).logp.sum(), hidden,
                            create_graph=True)  # fmt: skip


def test_compiled_a_target_out_of_range_is_nan_in_all_outputs_and_gradients():
    hidden, weight, target, _, _ = inputs(9, 517, 70, ignored=0.0)
    target[4] = 517
    out = torch.compile(linear_logprob, backend="aot_eager", fullgraph=True)(hidden, weight, target)
    for t in out[:4]:
        assert t.isnan().nonzero().tolist() == [[4]]
    out.entropy.sum().backward()
    assert hidden.grad[4].isnan().all() and not hidden.grad[5].isnan().any()


def test_the_chunked_ops_do_not_run_in_autocasts_dtype():
    hidden, weight, target, c, _ = inputs(30, 517, 70, ignored=0.0)
    args = (hidden.detach(), weight.detach(), target, None, 1.0, 0.0, 0.0, None, None, [])
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logp, entropy, lse, *_ = chunked.lm_head_forward(*args)
            grads = chunked.lm_head_backward(
                c, None, None, *args[:4], lse, entropy, *torch.zeros(2, 0), 1.0, 0.0, 0.0, False,
                True, True, False, False,
            )  # fmt: skip
        results.append((logp, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_grad_needs_no_seed():
    hidden, weight, target, _, _ = inputs(9, 517, 70)
    before = torch.get_rng_state()
    with torch.no_grad():
        out = linear_logprob(hidden, weight, target)
    assert torch.equal(before, torch.get_rng_state())
    assert not out.logp.requires_grad
    tracked = linear_logprob(hidden, weight, target)
    assert torch.equal(out.logp, tracked.logp)


def test_one_weight_used_twice_and_checkpointing():
    hidden, weight, target, c, _ = inputs(30, 517, 70)

    def loss(h):
        return (linear_logprob(h, weight, target, grad_eps=2**-8).logp * c).sum()

    torch.manual_seed(0)
    (loss(hidden) + loss(hidden)).backward()
    plain = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    torch.manual_seed(0)
    both = [torch.utils.checkpoint.checkpoint(loss, hidden, use_reentrant=False) for _ in range(2)]
    sum(both).backward()
    assert error(hidden.grad, plain[0]) < FLOOR[torch.float32]
    assert error(weight.grad, plain[1]) < FLOOR[torch.float32]


def sharded(*shape):
    """What stands for a DTensor, which would need a process group."""
    weight = torch.zeros(*shape)
    weight.full_tensor = lambda: weight
    return weight


BAD = [
    (dict(hidden=torch.zeros(3, 9)), ValueError, r"hidden: expected \[\.\.\., D\] with D = 8 as"),
    (dict(hidden=torch.zeros(3, 8).double()), TypeError, "hidden: expected bfloat16, float16 or"),
    (dict(weight=torch.zeros(5, 8).half()), TypeError, "weight: expected torch.float32 like hid"),
    (dict(weight=torch.zeros(8)), ValueError, r"weight: expected \[V, D\]"),
    (dict(weight=torch.zeros(0, 8)), ValueError, r"weight: expected \[V, D\] with V > 0"),
    (dict(target=torch.zeros(4).long()), ValueError, r"target: expected \[3\] like hidden, got"),
    (dict(target=torch.zeros(3)), TypeError, "target: expected int64, got torch.float32"),
    (dict(target=torch.tensor([0, 5, 1])), ValueError, r"target: expected values in \[0, 5\) .* 5"),
    (dict(target=torch.tensor([0, -1, 1])), ValueError, r"target: expected values in .* got -1"),
    (dict(target=[0, 1, 2]), TypeError, "target: expected a Tensor, got list"),
    (dict(bias=torch.zeros(4)), ValueError, r"bias: expected \[5\]"),
    (dict(bias=torch.zeros(5).double()), TypeError, "bias: expected bfloat16, float16 or float32"),
    (dict(lse_ref=torch.zeros(2)), ValueError, r"lse_ref: expected \[3\]"),
    (dict(temperature=0.0), ValueError, "temperature: expected a positive number, got 0.0"),
    (dict(temperature=float("nan")), ValueError, "temperature: expected a positive number"),
    (dict(softcap=-1.0), ValueError, "softcap: expected a positive number or None, got -1.0"),
    (dict(grad_eps=1.0), ValueError, r"grad_eps: expected a number in \[0, 1\), got 1.0"),
    (dict(screen="fp4"), ValueError, "screen: expected"),
    (dict(weight=sharded(5, 8)), TypeError, "weight: expected a plain Tensor, got a DTensor"),
    (dict(weight=torch.zeros(5, 8, device="meta")), ValueError, "weight: expected device cpu like"),
]


@pytest.mark.parametrize(("wrong", "kind", "says"), BAD, ids=[says for *_, says in BAD])
def test_bad_input_is_named(wrong, kind, says):
    good = dict(hidden=torch.zeros(3, 8), weight=torch.zeros(5, 8), target=torch.zeros(3).long())
    arguments = good | wrong
    positional = [arguments.pop(name) for name in ("hidden", "weight", "target")]
    with pytest.raises(kind, match=says):
        linear_logprob(*positional, **arguments)
