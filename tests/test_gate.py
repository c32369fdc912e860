"""The gate: its transition against an independent model, its skip, its place in the loop."""

from __future__ import annotations

import copy
import functools
import math
import operator
import pickle
import warnings
from collections import deque
from functools import reduce
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from dgg_kernels import GateConfig, GatedScheduler, GradientGate, linear_logprob, replay
from dgg_kernels.gate import Slot
from dgg_kernels.optim import by_kind


def in_order(values):
    """Their sum, rounded after every term: `sum` compensates from Python 3.12 on."""
    return reduce(operator.add, values, 0.0)


class Model:
    """The transition in plain Python, written from the documented rules alone."""

    def __init__(self, config: GateConfig):
        self.c = config
        self.windows = {name: deque(maxlen=config.window) for name in ("increment", "level")}
        self.moments = {name: [0, 0.0, 0.0] for name in ("increment", "level")}

    def score(self, name, x):
        if self.c.average == "ema":
            n, mean, var = self.moments[name]
        else:
            values = list(self.windows[name])
            n = len(values)
            mean = values[0] + in_order(v - values[0] for v in values) / n if n else 0.0
            var = in_order((v - mean) * (v - mean) for v in values) / n if n else 0.0
        if n < self.c.window:
            return None
        std = math.sqrt(var) if not math.isnan(var) else math.nan
        if std == 0:
            return math.copysign(math.inf, x - mean) if x != mean else 0.0
        return (x - mean) / std

    def push(self, name, x):
        self.windows[name].append(x)
        moments = self.moments[name]
        if moments[0] == 0:
            moments[1] = x
        else:
            d, delta = self.c.ema_decay, x - moments[1]
            moments[1] += (1 - d) * delta
            moments[2] = d * (moments[2] + (1 - d) * delta * delta)
        moments[0] += 1

    def run(self, batches):
        used = {"increment": ["increment"], "level": ["level"], "either": ["increment", "level"]}
        out = []
        for batch in batches:
            latch, previous = False, {}
            out.append([])
            for i, energy in enumerate(batch):
                g = energy * energy if self.c.squared else energy
                use, m = i // self.c.mini_batches + 1, i % self.c.mini_batches
                if latch:
                    out[-1].append((True, None))
                    continue
                finite = math.isfinite(g)
                shut, best = (not finite or use > self.c.max_reuse), None
                x = {"level": g}
                if use > 1:
                    x["increment"] = g - previous.get(m, math.nan)
                if finite and use > 1:
                    for name in used[self.c.statistic]:
                        z = self.score(name, x[name])
                        if z is not None:
                            shut = shut or not z <= self.c.threshold
                            best = z if best is None or z > best else best
                if finite:
                    previous[m] = g
                    if not shut or self.c.include_shut:
                        for name in used[self.c.statistic]:
                            if name in x:
                                self.push(name, x[name])
                latch = shut
                out[-1].append((shut, best))
        return out


configs = st.builds(
    GateConfig,
    threshold=st.sampled_from([-0.5, 0.0, 0.1, 0.5, 1.0, math.inf]),
    window=st.integers(2, 6),
    max_reuse=st.integers(1, 4),
    statistic=st.sampled_from(["increment", "level", "either"]),
    average=st.sampled_from(["window", "ema"]),
    ema_decay=st.sampled_from([0.5, 0.97]),
    squared=st.booleans(),
    include_shut=st.booleans(),
    mini_batches=st.integers(1, 3),
)
# Multiples of 1/8 make ties, equal values and empty spreads common; the rest are the edges.
energies = st.one_of(
    st.integers(0, 64).map(lambda i: i / 8),
    st.sampled_from([0.0, 0.1, 5e-324, 1e-310, 1e30, math.inf, math.nan]),
)
traces = st.lists(st.lists(energies, max_size=8), max_size=12)


@settings(max_examples=10_000, deadline=None)
@given(configs, traces)
def test_transition_agrees_with_an_independent_model(config, batches):
    got = replay(batches, config)
    for mine, theirs in zip(got, Model(config).run(batches), strict=True):
        for decision, (shut, z) in zip(mine, theirs, strict=True):
            assert decision.shut == shut
            if z is None:
                assert math.isnan(decision.z)
            else:
                assert decision.z == pytest.approx(z, rel=1e-9, abs=1e-12, nan_ok=True)


def test_shuts_on_a_jump_and_stays_shut_until_the_next_batch():
    config = GateConfig(threshold=0.5, window=4, max_reuse=4)
    calm = [[1.0, 1.1, 1.15, 1.2]] * 3
    jump = replay([*calm, [1.0, 1.06, 9.0, 1.0]], config)[-1]
    assert [d.shut for d in jump] == [False, False, True, True]
    after = replay([*calm, [1.0, 9.0], [1.0]], config)[-1]
    assert not after[0].shut


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_shut_even_on_first_use_and_enter_no_window(bad):
    config = GateConfig(threshold=math.inf, window=2)
    assert replay([[bad]], config)[0][0].shut
    clean = [[1.0, 2.0], [1.0, 2.5], [1.0, 2.25]]
    spoiled = [[1.0, 2.0], [1.0, 2.5], [1.0, bad], [1.0, 2.25]]
    expected, got = replay(clean, config)[-1][1], replay(spoiled, config)[-1][1]
    assert expected == got and math.isfinite(got.z)


@pytest.mark.parametrize("include", [False, True])
def test_keeping_shut_values_out_can_lock_the_gate_and_letting_them_in_frees_it(include):
    """With a small threshold, exclusion lets the window drift down until it always shuts."""
    config = GateConfig(threshold=0.1, window=8, include_shut=include)
    rng = torch.Generator().manual_seed(0)
    increments = torch.randn(400, generator=rng).tolist()
    shut = [
        replay_row[1].shut for replay_row in replay([[5.0, 5.0 + x] for x in increments], config)
    ]
    late = sum(shut[200:]) / 200
    assert late > 0.97 if not include else late < 0.7


def test_a_window_without_spread_scores_0_at_its_own_value():
    for window in range(2, 40):
        for value in (0.1, 0.3, 1 / 3, 1e-7, 1e9 + 0.1):
            config = GateConfig(window=window, statistic="level", max_reuse=2)
            decided = replay([[value, value]] * window, config)[-1][-1]
            assert decided.z == 0 and not decided.shut


def make(seed=0, **config):
    torch.manual_seed(seed)
    body = torch.nn.Linear(12, 8)
    head = torch.nn.Linear(8, 33, bias=False)
    optimizer = torch.optim.AdamW(
        [*body.parameters(), *head.parameters()], lr=0.1, weight_decay=0.1, fused=True
    )
    gate = GradientGate(GateConfig(**config), head.weight)
    gate.attach(optimizer, max_grad_norm=0.05)
    x, y = torch.randn(64, 12), torch.randint(33, (64,))

    def backward(scale=1.0):
        optimizer.zero_grad(set_to_none=True)
        out = linear_logprob(body(x), head.weight, y, gate=gate)
        (-out.logp.mean() * scale).backward()

    return body, head, optimizer, gate, backward


def assert_energy(gate, gradient):
    """That it is the norm of this gradient."""
    exact = torch.linalg.vector_norm(gradient.double())
    torch.testing.assert_close(gate.metrics()["gate/energy"], exact, rtol=1e-6, atol=0)


def everything(body, head, optimizer):
    state = optimizer.state_dict()["state"]
    return copy.deepcopy([body.state_dict(), head.state_dict(), state])


def test_a_foreseen_update_is_scored_by_its_signal_and_shut_before_the_backward():
    _, head, optimizer, gate, backward = make(window=4, threshold=0.1, energy="loss")
    signals, shut, applied = [], [], 0
    for _ in range(12):
        gate.new_batch()
        signals.append([])
        for _ in range(gate.config.max_reuse):
            signals[-1].append(float(torch.rand(())))
            gate.foresee(torch.tensor(signals[-1][-1]))
            shut.append(gate.is_shut())
            assert gate.applied_updates() == applied  # a schedule must not run ahead of decide()
            if gate.is_shut():
                break
            backward()
            gate.decide()
            assert_energy(gate, head.weight.grad)
            before = head.weight.detach().clone()
            optimizer.step()
            assert not torch.equal(before, head.weight)
            applied += 1
    assert shut == [d.shut for batch in replay(signals, gate.config) for d in batch] and any(shut)
    assert gate.applied_updates() == applied
    assert float(gate.metrics()["updates_attempted"]) == len(shut)


def test_after_a_foreseen_shut_update_the_next_one_may_be_foreseen():
    """As by a loop over mini-batches that leaves out the rest of a shut one."""
    *_, gate, backward = make(energy="loss", mini_batches=2)
    gate.new_batch()
    gate.foresee(torch.tensor(math.nan))
    gate.foresee(torch.tensor(1.0))
    assert gate.is_shut() and gate.applied_updates() == 0
    gate.new_batch()
    gate.foresee(torch.tensor(1.0))
    backward()
    gate.decide()
    assert not gate.is_shut() and gate.applied_updates() == 1


@pytest.mark.parametrize("foreseen", [0.0, math.nan])
def test_a_foreseen_update_with_a_broken_gradient_is_not_applied(foreseen):
    """Nor is one that was foreseen as bad and computed all the same, by a host that looks late."""
    body, head, optimizer, gate, backward = make(energy="loss")
    for broken in (False, True):
        gate.new_batch()
        gate.foresee(torch.tensor(foreseen if broken else 0.0))
        backward(math.nan if broken and foreseen == 0.0 else 1.0)
        before = flat(everything(body, head, optimizer))
        gate.decide()
        optimizer.step()
    assert gate.is_shut() and gate.applied_updates() == 1
    after = flat(everything(body, head, optimizer))
    assert all(same_bits(a, b) for a, b in zip(before, after, strict=True))


def test_a_foreseen_update_that_is_shut_may_be_decided_without_its_backward():
    """As a trainer does that calls decide() and step() for every update, whatever became of it."""
    body, head, optimizer, gate, backward = make(energy="loss")
    gate.new_batch()
    gate.foresee(_ONE)
    with pytest.raises(RuntimeError, match="decide: no backward through"):
        gate.decide()  # not shut: it was forgotten
    backward()
    gate.decide()
    optimizer.step()
    gate.foresee(torch.tensor(math.nan))
    before = flat(everything(body, head, optimizer))
    decided = gate.state_dict()["state"]
    gate.decide()
    with pytest.raises(RuntimeError, match=r"foresee: optimizer\.step\(\) was not called"):
        gate.foresee(_ONE)
    optimizer.step()
    after = flat(everything(body, head, optimizer))
    assert all(same_bits(a, b) for a, b in zip(before, after, strict=True))
    assert same_bits(gate.state_dict()["state"], decided)
    assert gate.is_shut() and float(gate.metrics()["updates_attempted"]) == 2
    gate.new_batch()  # and the next batch trains on
    gate.foresee(_ONE)
    backward()
    gate.decide()
    optimizer.step()
    assert gate.applied_updates() == 2


def test_with_a_scaler_a_left_out_backward_is_missed_as_ever():
    """GradScaler wants a gradient at every step: to leave one out is to leave out all of it."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 33, bias=False)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, fused=True)
    gate = GradientGate(GateConfig(energy="loss"), head.weight)
    scaler = torch.amp.GradScaler("cpu")
    gate.attach(optimizer, max_grad_norm=1.0, scaler=scaler)
    for shut in (True, False):
        gate.new_batch()
        optimizer.zero_grad()
        out = linear_logprob(torch.randn(4, 8), head.weight, torch.arange(4), gate=gate)
        gate.foresee(torch.tensor(math.nan) if shut else out.logp.mean())
        before = head.weight.detach().clone()
        if shut:
            with pytest.raises(RuntimeError, match="decide: no backward"):
                gate.decide()
            continue
        scaler.scale(-out.logp.mean()).backward()
        scaler.unscale_(optimizer)
        gate.decide()
        scaler.step(optimizer)
        scaler.update()
        assert not before.equal(head.weight)


def flat(tree):
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        return [t for branch in tree for t in flat(branch)]
    return [tree]


def test_energy_after_accumulation_is_that_of_the_sum():
    _, head, optimizer, gate, _ = make()
    x = torch.randn(2, 16, 8)
    y = torch.randint(33, (2, 16))
    gate.new_batch()
    optimizer.zero_grad(set_to_none=True)
    for i in range(2):
        (-linear_logprob(x[i], head.weight, y[i], gate=gate).logp.mean()).backward()
    gate.decide()
    assert_energy(gate, head.weight.grad)


def test_tied_embedding_head_energy_is_the_head_alone_and_parameter_energy_is_both():
    energies = {}
    for kind in ("head", "parameter"):
        torch.manual_seed(1)
        embedding = torch.nn.Embedding(20, 8)
        gate = GradientGate(GateConfig(energy=kind), embedding.weight)
        gate.new_batch()
        ids = torch.randint(20, (30,))
        out = linear_logprob(embedding(ids).tanh(), embedding.weight, ids, gate=gate, grad_eps=0.0)
        out.logp.mean().neg().backward()
        gate.decide()
        energies[kind] = gate.metrics()["gate/energy"]
    both = torch.linalg.vector_norm(embedding.weight.grad.double())
    w = embedding.weight.detach().clone().requires_grad_()
    linear_logprob(
        embedding(ids).tanh().detach(), w, ids, grad_eps=0.0
    ).logp.mean().neg().backward()
    alone = torch.linalg.vector_norm(w.grad.double())
    torch.testing.assert_close(energies["parameter"], both, rtol=1e-6, atol=0)
    torch.testing.assert_close(energies["head"], alone, rtol=1e-6, atol=0)
    assert not torch.isclose(both, alone, rtol=1e-2)


def test_frozen_weight_still_yields_the_energy():
    _, head, _, gate, _ = make()
    x, y = torch.randn(16, 8, requires_grad=True), torch.randint(33, (16,))
    norms = []
    for frozen in (False, True):
        head.weight.requires_grad_(not frozen)
        head.weight.grad = None
        torch.manual_seed(3)
        gate.detach()
        gate.new_batch()
        linear_logprob(x, head.weight, y, gate=gate).logp.mean().backward()
        gate.decide()
        norms.append(gate.metrics()["gate/energy"])
    assert head.weight.grad is None
    assert norms[0] == norms[1]


def test_a_shut_update_leaves_weights_moments_and_step_bit_identical():
    body, head, optimizer, gate, backward = make()
    for _ in range(3):
        gate.new_batch()
        backward()
        gate.decide()
        optimizer.step()
    before = everything(body, head, optimizer)
    gate.new_batch()
    backward(math.nan)
    gate.decide()
    optimizer.step()
    assert gate.is_shut()
    backward()  # whatever follows in this batch is skipped too
    gate.decide()
    optimizer.step()
    after = everything(body, head, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(flat(before), flat(after), strict=True))
    gate.new_batch()
    backward()
    gate.decide()
    optimizer.step()
    assert not gate.is_shut()
    moved = everything(body, head, optimizer)
    assert not any(torch.equal(a, b) for a, b in zip(flat(before), flat(moved), strict=True))


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_1000_random_skips_equal_a_host_that_does_not_call_step(name):
    """Open or shut in any order, from the first update on: as plain clip + conditional step."""
    make_optimizer = getattr(torch.optim, name)
    options = {"momentum": 0.9} if name == "SGD" else {}
    torch.manual_seed(0)
    mine = torch.nn.Parameter(torch.randn(7, 5))
    theirs = torch.nn.Parameter(mine.detach().clone())
    a = make_optimizer([mine], lr=0.01, fused=True, **options)
    b = make_optimizer([theirs], lr=0.01, fused=True, **options)
    gate = GradientGate(GateConfig(threshold=math.inf), mine)
    gate.attach(a, max_grad_norm=1.0)
    for step in range(1000):
        shut = bool(torch.rand(()) < 0.5) or step == 0
        grad = torch.randn(7, 5)
        mine.grad, theirs.grad = grad.clone(), grad.clone()
        gate.new_batch()
        gate.decide(energy=torch.tensor(math.nan if shut else 1.0))
        a.step()
        if not shut:
            # The divisor is max(1, (norm + 1e-6) / max_norm), as in clip_grad_norm_.
            theirs.grad /= ((grad.norm() + 1e-6).double() / 1.0).clamp(min=1.0).float()
            b.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_momentum_buffers_are_there_after_a_checkpoint_that_has_none():
    """Fused SGD would otherwise read memory that its skipped first step never wrote."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9, fused=True)
    gate = GradientGate(GateConfig(threshold=math.inf), torch.zeros(3, 3))
    gate.attach(optimizer)
    optimizer.load_state_dict(torch.optim.SGD([p], lr=0.1, momentum=0.9, fused=True).state_dict())
    for energy in (math.nan, 1.0):
        gate.new_batch()
        p.grad = torch.ones(3)
        gate.decide(energy=torch.tensor(energy))
        optimizer.step()
    assert torch.equal(optimizer.state[p]["momentum_buffer"], torch.ones(3))
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.9))


def test_clipping_equals_clip_grad_norm():
    results = []
    for gated in (True, False):
        body, head, optimizer, gate, backward = make(seed=5)
        if gated:
            gate.new_batch()
            backward()
            gate.decide()
        else:
            gate.detach()
            torch.manual_seed(5)
            gate.new_batch()
            backward()
            params = [*body.parameters(), *head.parameters()]
            torch.nn.utils.clip_grad_norm_(params, 0.05)
        optimizer.step()
        results.append([*body.parameters(), *head.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_given_grad_norm_is_clipped_by_in_place_of_the_gates_own():
    """With a part of the parameters elsewhere: as clip_grad_norm_ over all of them."""
    torch.manual_seed(0)
    whole = torch.nn.Parameter(torch.randn(10, 3))
    here, there = (torch.nn.Parameter(half.detach().clone()) for half in whole.split(5))
    optimizer = torch.optim.SGD([here], lr=1.0, fused=True)
    gate = GradientGate(GateConfig(threshold=math.inf), here)
    gate.attach(optimizer, max_grad_norm=0.5)
    for scale in (0.01, 1.0, 100.0):
        whole.grad = scale * torch.randn(10, 3)
        here.grad, there.grad = (half.clone() for half in whole.grad.split(5))
        norm = torch.nn.utils.get_total_norm([here.grad, there.grad])
        gate.new_batch()
        gate.decide(energy=torch.tensor(1.0), grad_norm=norm.double())
        optimizer.step()
        exact = torch.nn.utils.clip_grad_norm_([whole], 0.5)
        torch.optim.SGD([whole], lr=1.0).step()
        torch.testing.assert_close(here, whole[:5], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gate.metrics()["grad_norm"].float(), exact, rtol=1e-6, atol=0)
    gate.new_batch()
    gate.decide(energy=torch.tensor(1.0), grad_norm=torch.tensor(math.inf))
    assert gate.is_shut()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("grad_eps", [0.0, 2**-5])
def test_while_shut_a_gated_head_does_nothing(accumulate, grad_eps):
    """A wasted update: zeros forward and backward, and nothing of it stays in the gate."""
    config = {"threshold": math.inf, "statistic": "either", "include_shut": True}
    _, head, optimizer, gate, _ = make(accumulate=accumulate, **config)
    x, y = torch.randn(64, 8, requires_grad=True), torch.randint(33, (64,))

    def update(spoil=1.0, **gated):
        optimizer.zero_grad(set_to_none=True)
        x.grad = None
        torch.manual_seed(7)
        out = linear_logprob(x, head.weight, y, grad_eps=grad_eps, **gated)
        ((out.logp.mean() + 0.1 * out.entropy.mean()) * spoil).backward()
        return [*out[:4], x.grad, head.weight.grad]

    def decide():
        gate.decide()
        optimizer.step()

    gate.new_batch()
    for spoil in (1.0, 1.0, math.nan):  # references and windows hold something
        update(spoil, gate=gate)
        decide()
    assert gate.is_shut()
    ungated = update()
    memory = gate.state_dict()["state"][Slot.HEADER_SIZE :]
    assert memory.count_nonzero() > 3
    for _ in range(2):
        assert not any(t.any() for t in update(gate=gate))
        decide()
        assert gate.is_shut() and gate.metrics()["gate/energy"] == 0
    assert same_bits(memory, gate.state_dict()["state"][Slot.HEADER_SIZE :])
    assert all(map(torch.equal, update(), ungated))
    assert all(t.any() for t in ungated)
    gate.new_batch()
    assert all(map(torch.equal, update(gate=gate), ungated))
    decide()
    assert_energy(gate, ungated[-1])


def test_state_dict_resumes_with_the_same_decisions():
    rng = torch.Generator().manual_seed(1)
    log = (1 + torch.rand(60, 4, generator=rng, dtype=torch.float64)).tolist()
    config = GateConfig(window=5, average="ema", statistic="either", threshold=0.1)
    weight = torch.zeros(3, 2)

    def run(gate, batches):
        seen = []
        for batch in batches:
            gate.new_batch()
            for g in batch:
                gate.decide(energy=torch.tensor(g, dtype=torch.float64))
                metrics = gate.metrics()
                seen.append((float(metrics["gate/shut"]), str(float(metrics["gate/z"]))))
        return seen

    whole = run(GradientGate(config, weight), log)
    first = GradientGate(config, weight)
    half = run(first, log[:30])
    second = GradientGate(config, weight)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert half + run(second, log[30:]) == whole
    assert any(shut for shut, _ in whole) and not all(shut for shut, _ in whole)


def test_resume_in_the_middle_of_a_batch_keeps_the_latch():
    gate = GradientGate(GateConfig(), torch.zeros(3, 2))
    gate.new_batch()
    gate.decide(energy=torch.tensor(math.nan))
    other = GradientGate(GateConfig(), torch.zeros(3, 2))
    other.load_state_dict(gate.state_dict())
    assert other.is_shut() and other.found_inf == 1.0


def test_replay_of_the_logged_energies_is_the_run():
    _, _, optimizer, gate, backward = make(window=4, threshold=0.1)
    log, decisions = [], []
    for _ in range(12):
        gate.new_batch()
        log.append([])
        for _ in range(gate.config.max_reuse):
            backward(float(torch.rand(())) + 0.5)
            gate.decide()
            optimizer.step()
            log[-1].append(float(gate.metrics()["gate/energy"]))
            decisions.append(gate.is_shut())
            if gate.is_shut():
                break
    again = [d.shut for batch in replay(log, gate.config) for d in batch]
    assert again == decisions and any(decisions)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("threshold", math.nan), ("threshold", "0.5"), ("window", 1), ("window", 3.0),
        ("window", 2**20 + 1), ("max_reuse", 0), ("max_reuse", True), ("mini_batches", -1),
        ("ema_decay", 1.0), ("ema_decay", math.nan), ("ema_decay", "0.9"), ("statistic", "jump"),
        ("average", "mean"), ("energy", "body"), ("include_shut", 1), ("accumulate", None),
    ],
)  # fmt: skip
def test_config_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=rf"GateConfig\.{field}: expected .*, got"):
        GateConfig(**{field: value})


def same_bits(a, b):
    """Also where both are NaN."""
    return a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()


def head_with(v, d):
    """A pass through the gated head with a weight [v, d]."""

    def call(gate, backward):
        hidden, weight = (torch.randn(n, d, requires_grad=True) for n in (2, v))
        out = linear_logprob(hidden, weight, torch.zeros(2).long(), gate=gate)
        out.logp.sum().backward()

    return call


def decide_with(**given):
    return lambda gate, backward: gate.decide(**given)


def foresee(signal=None):
    return lambda gate, backward: gate.foresee(torch.tensor(1.0) if signal is None else signal)


def load(**changed):
    return lambda gate, backward: gate.load_state_dict({**gate.state_dict(), **changed})


_CONFIG = vars(GateConfig())
_ONE = torch.tensor(1.0)
_SIZE = len(GradientGate(GateConfig(), torch.zeros(2, 2)).state_dict()["state"])
# What is wrong, when (see below), how, and what the error says.
MISUSE = {
    "weight of another V": ("opened", head_with(34, 8), r"gate: .* built for, \(33, 8\) on cpu, "
                            r"got \(34, 8\) on cpu"),
    "weight of another D": ("opened", head_with(33, 9), r"gate: .*\(33, 8\).*got \(33, 9\)"),
    "weight elsewhere": ("opened", lambda gate, _: gate.check_weight(torch.empty(33, 8).to("meta")),
                         r"gate: .*\(33, 8\) on cpu, got \(33, 8\) on meta"),
    "no new_batch": ("built", decide_with(), r"decide: call new_batch\(\)"),
    "no new_batch, energy given": ("built", decide_with(energy=_ONE), r"call new_batch\(\)"),
    "no backward": ("opened", decide_with(), "decide: no backward through linear_logprob"),
    "decided twice": ("decided", decide_with(), r"decide: optimizer\.step\(\) was not called"),
    "decided twice, energy given": ("decided", decide_with(energy=_ONE), "decide: optimizer"),
    "late backward": ("decided", lambda gate, backward: backward(),
                      r"gate: a backward ran between decide\(\) and optimizer\.step\(\)"),
    "foresee by a gradient's gate": ("ready", foresee(), r"foresee: expected a gate with GateConfig"
                                     r"\(energy='loss'\), .* got energy='head'"),
    "foreseen not at all": ("ready", decide_with(), r"decide: call foresee\(loss\) first"),
    "foreseen not at all, energy given": ("ready", decide_with(energy=_ONE), r"call foresee\(loss"),
    "foreseen before new_batch": ("built", foresee(), r"foresee: call new_batch\(\)"),
    "foreseen twice": ("foreseen", foresee(), r"foresee: called twice without decide\(\)"),
    "foreseen too late": ("decided", foresee(), r"foresee: optimizer\.step\(\) was not called"),
    "foreseen by a vector": ("ready", foresee(torch.ones(2)), r"signal: expected one floating "
                             r"value on cpu, got \(2,\)"),
    "energy of a shape": ("ready", decide_with(energy=torch.ones(2)), r"energy: expected one "
                          r"floating value on cpu, got \(2,\) torch\.float32 on cpu"),
    "energy of integers": ("ready", decide_with(energy=torch.tensor(1)), "energy: .*torch.int64"),
    "energy elsewhere": ("ready", decide_with(energy=_ONE.to("meta")), "on cpu, got .* on meta"),
    "energy of the host": ("ready", decide_with(energy=1.0), r"energy: .*got 1\.0"),
    "grad_norm of a shape": ("ready", decide_with(grad_norm=torch.ones(3)), r"grad_norm: expected "
                             r"one floating value on cpu, got \(3,\)"),
    "grad_norm of ints": ("ready", decide_with(grad_norm=torch.tensor(1)), "grad_norm: .*int64"),
    "grad_norm elsewhere": ("ready", decide_with(grad_norm=_ONE.to("meta")), "grad_norm: .* meta"),
    "another config": ("ready", load(config={**_CONFIG, "window": 9}),
                       r"GateConfig\.window: expected 32, the state_dict has 9"),
    "state of another shape": ("ready", load(state=torch.zeros(_SIZE - 1).double()),
                               rf"state: expected \({_SIZE},\) torch\.float64, got "
                               rf"\({_SIZE - 1},\)"),
    "state of another dtype": ("ready", load(state=torch.zeros(_SIZE)), "state: .*got .*float32"),
    "no state": ("ready", load(state=None), "state_dict: expected .*'state': 'NoneType'"),
}  # fmt: skip


@pytest.mark.parametrize("misuse", MISUSE)
def test_misuse_is_refused_before_any_state_changes(misuse):
    when, call, says = MISUSE[misuse]
    foresees = misuse.startswith("foreseen")
    body, head, optimizer, gate, backward = make(energy="loss" if foresees else "head")
    if when != "built":  # Adam has moments, and the gate a past
        for _ in range(2):
            gate.new_batch()
            if foresees:
                gate.foresee(_ONE)
            backward()
            gate.decide()
            optimizer.step()
        gate.new_batch()
    if when in ("ready", "decided"):
        backward()
    if when == "foreseen" or (foresees and when == "decided"):
        gate.foresee(_ONE)
    if when == "decided":
        gate.decide()

    def now():
        own = [gate.state_dict()["state"], gate.found_inf, gate.grad_scale, gate.row_sq]
        return [t.clone() for t in (*flat(everything(body, head, optimizer)), *own)]

    before = now()
    with pytest.raises((RuntimeError, ValueError), match=says):
        call(gate, backward)
    assert all(same_bits(a, b) for a, b in zip(before, now(), strict=True))
    if when == "ready":  # as if nothing had been tried
        if foresees:
            gate.foresee(_ONE)
        gate.decide()
        assert_energy(gate, head.weight.grad)
    elif when == "decided":
        optimizer.step()


def test_a_gate_on_another_device_or_built_of_other_things_is_refused():
    gate = GradientGate(GateConfig(), torch.zeros(33, 8, device="meta"))
    with pytest.raises(ValueError, match=r"gate: .* on meta, got \(33, 8\) on cpu"):
        head_with(33, 8)(gate, None)
    with pytest.raises(TypeError, match="config: expected a GateConfig, got dict"):
        GradientGate({"window": 9}, torch.zeros(33, 8))
    with pytest.raises(ValueError, match=r"weight: expected .*, got \(3,\) torch.float32 on cpu"):
        GradientGate(GateConfig(), torch.zeros(3))


def test_a_grad_norm_without_a_limit_and_a_limit_of_no_use_are_refused():
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    gate = GradientGate(GateConfig(), weight)
    optimizer = torch.optim.AdamW([weight], fused=True)
    for limit in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="max_grad_norm: expected a positive number, got"):
            gate.attach(optimizer, max_grad_norm=limit)
    gate.attach(optimizer)
    gate.new_batch()
    before = gate.state_dict()["state"]
    with pytest.raises(ValueError, match=r"grad_norm: expected None, .* got \(\) torch.float32"):
        gate.decide(energy=_ONE, grad_norm=_ONE)
    assert same_bits(before, gate.state_dict()["state"])


@pytest.mark.parametrize(
    ("make_optimizer", "says"),
    [
        (lambda p: torch.optim.AdamW(p), r"AdamW was built without fused=True"),
        (lambda p: torch.optim.RMSprop(p), r"RMSprop cannot skip a step on the device; use torch"),
        (lambda p: torch.optim.SGD(p, momentum=0.9, dampening=0.1, fused=True), r"dampening"),
    ],
)
def test_an_optimizer_that_cannot_skip_is_refused_by_name_with_the_remedy(make_optimizer, says):
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    gate = GradientGate(GateConfig(), weight)
    with pytest.raises(TypeError, match=says):
        gate.attach(make_optimizer([weight]))


def test_nothing_reaches_the_host_between_new_batch_and_step(monkeypatch):
    """Conversions of a tensor to host values fail while the loop runs (on any machine)."""
    _body, _, optimizer, gate, backward = make()
    gate.new_batch()
    backward()  # lazily created state is not under test
    gate.decide()
    optimizer.step()

    def refuse(name):
        def stop(*_args, **_kwargs):
            raise AssertionError(f"host synchronisation: Tensor.{name}")

        return stop

    names = ("item", "cpu", "tolist", "nonzero", "__bool__", "__float__", "__int__", "__index__")
    for name in names:
        monkeypatch.setattr(torch.Tensor, name, refuse(name))
    with pytest.raises(AssertionError, match="host synchronisation"):
        float(torch.ones(()))
    for _ in range(3):
        gate.new_batch()
        for _ in range(2):
            backward()
            gate.decide()
            optimizer.step()
            gate.is_shut(wait=False)
    gate.metrics()


@pytest.mark.parametrize("host_gate", [False, True])
def test_grad_scaler_and_gate_skip_independently_and_only_inf_lowers_the_scale(host_gate):
    """An optimizer that is not fused is not even asked to step where the scaler found an Inf."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 33, bias=False)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, fused=not host_gate)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    gate = GradientGate(GateConfig(threshold=math.inf), head.weight)
    gate.attach(optimizer, max_grad_norm=0.01, scaler=scaler, host_gate=host_gate)
    x, y = torch.randn(16, 8), torch.randint(33, (16,))
    seen = []
    for shut, overflow in [(False, False), (True, False), (False, True), (False, False)]:
        before = head.weight.detach().clone()
        gate.new_batch()
        optimizer.zero_grad(set_to_none=True)
        loss = -linear_logprob(x, head.weight, y, gate=gate).logp.mean()
        scaler.scale(loss).backward()
        if overflow:
            head.weight.grad[0, 0] = math.inf
        scaler.unscale_(optimizer)
        gate.decide(energy=torch.tensor(math.nan) if shut else None)
        if not (shut or overflow):
            assert_energy(gate, head.weight.grad)
        scaler.step(optimizer)
        scaler.update()
        seen.append((torch.equal(before, head.weight), scaler.get_scale()))
    assert seen == [(False, 1024.0), (True, 1024.0), (True, 512.0), (False, 512.0)]


def test_an_update_that_the_scaler_skips_is_not_counted():
    """Though the head's own gradient is finite, and nothing is clipped."""
    head, other = (torch.nn.Parameter(torch.randn(33, 8)) for _ in range(2))
    optimizer = torch.optim.AdamW([head, other], fused=True)
    scaler = torch.amp.GradScaler("cpu")
    gate = GradientGate(GateConfig(), head)
    gate.attach(optimizer, scaler=scaler)
    gate.new_batch()
    for overflow in (False, True):
        optimizer.zero_grad()
        out = linear_logprob(torch.randn(4, 8), head, torch.zeros(4).long(), gate=gate)
        scaler.scale(-out.logp.mean()).backward()
        other.grad = torch.full_like(other, math.inf if overflow else 1.0)
        scaler.unscale_(optimizer)
        gate.decide()
        scaler.step(optimizer)
        scaler.update()
    assert gate.applied_updates() == 1 and gate.is_shut()


def test_a_scaled_gradient_is_refused():
    head = torch.nn.Linear(8, 33, bias=False)
    optimizer = torch.optim.AdamW(head.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu")
    gate = GradientGate(GateConfig(), head.weight)
    gate.attach(optimizer, scaler=scaler)
    gate.new_batch()
    out = linear_logprob(torch.randn(4, 8), head.weight, torch.zeros(4).long(), gate=gate)
    scaler.scale(-out.logp.mean()).backward()
    gate.decide()
    with pytest.raises(RuntimeError, match=r"call scaler.unscale_\(optimizer\) before"):
        scaler.step(optimizer)


def test_a_scaled_gradient_is_refused_where_the_host_gates():
    """There the step would see one that the scaler has unscaled itself, clipped by its norm."""
    head = torch.nn.Linear(8, 33, bias=False)
    optimizer = torch.optim.RMSprop(head.parameters())
    scaler = torch.amp.GradScaler("cpu")
    gate = GradientGate(GateConfig(), head.weight)
    gate.attach(optimizer, max_grad_norm=1.0, scaler=scaler, host_gate=True)
    gate.new_batch()
    out = linear_logprob(torch.randn(4, 8), head.weight, torch.zeros(4).long(), gate=gate)
    scaler.scale(-out.logp.mean()).backward()
    before = gate.state_dict()["state"]
    with pytest.raises(RuntimeError, match=r"decide: call scaler.unscale_\(optimizer\) first"):
        gate.decide()
    assert same_bits(gate.state_dict()["state"], before)
    scaler.unscale_(optimizer)
    gate.decide()
    scaler.step(optimizer)
    assert gate.applied_updates() == 1


def test_host_gate_takes_any_optimizer_and_detach_gives_it_back():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, 3))
    twin = torch.nn.Parameter(weight.detach().clone())
    optimizer, plain = (torch.optim.RMSprop([p], lr=0.1) for p in (weight, twin))
    gate = GradientGate(GateConfig(threshold=math.inf), weight)
    gate.attach(optimizer, max_grad_norm=1.0, host_gate=True)
    for shut in (True, False, True, False):
        grad = torch.randn(5, 3)
        weight.grad, twin.grad = grad.clone(), grad.clone()
        gate.new_batch()
        gate.decide(energy=torch.tensor(math.nan if shut else 1.0))
        optimizer.step()
        if not shut:
            torch.nn.utils.clip_grad_norm_([twin], 1.0)
            plain.step()
    torch.testing.assert_close(weight, twin)
    gate.detach()
    before = weight.detach().clone()
    gate.new_batch()
    gate.decide(energy=torch.tensor(math.nan))
    optimizer.step()
    assert not torch.equal(before, weight)


def test_a_schedule_built_after_host_gate_and_kept_after_detach():
    weight = torch.nn.Parameter(torch.ones(5, 3))
    optimizer = torch.optim.RMSprop([weight], lr=0.1)
    gate = GradientGate(GateConfig(), weight)
    gate.attach(optimizer, host_gate=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5**n)
    weight.grad = torch.ones(5, 3)
    gate.new_batch()
    gate.decide(energy=torch.tensor(math.nan))
    optimizer.step()
    assert weight.eq(1.0).all()
    gate.detach()
    optimizer.step()
    schedule.step()
    assert weight.lt(1.0).all() and optimizer.param_groups[0]["lr"] == 0.05


def test_an_optimizer_that_has_loaded_another_kind_is_refused_by_name():
    weight = torch.nn.Parameter(torch.ones(5, 3))
    fused, plain = (torch.optim.Adam([weight], fused=fused) for fused in (True, False))
    gate = GradientGate(GateConfig(), weight)
    gate.attach(fused)
    fused.load_state_dict(plain.state_dict())
    weight.grad = torch.ones(5, 3)
    gate.new_batch()
    gate.decide(energy=torch.tensor(1.0))
    with pytest.raises(TypeError, match="Adam was built without fused=True, or has loaded the st"):
        fused.step()
    assert weight.eq(1.0).all()


@pytest.mark.parametrize("host_gate", [False, True])
def test_an_optimizer_that_updates_in_the_backward_is_refused(host_gate):
    dummy = pytest.importorskip("transformers.trainer_pt_utils").LayerWiseDummyOptimizer()
    gate = GradientGate(GateConfig(), torch.ones(5, 3))
    with pytest.raises(TypeError, match="LayerWiseDummyOptimizer, which updates the weights in th"):
        gate.attach(dummy, host_gate=host_gate)


def test_a_gate_is_not_copied():
    gate = GradientGate(GateConfig(), torch.ones(5, 3))
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="GradientGate: expected not to be copied or pickled"):
            copied(gate)


def test_several_optimizers_and_groups_share_one_norm_and_one_flag():
    torch.manual_seed(0)
    a, b, c = (torch.nn.Parameter(torch.randn(4, 3)) for _ in range(3))
    first = torch.optim.AdamW([{"params": [a]}, {"params": [b], "lr": 0.5}], fused=True)
    second = torch.optim.SGD([c], lr=0.1, momentum=0.9, fused=True)
    gate = GradientGate(GateConfig(threshold=math.inf), a)
    gate.attach(first, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"max_grad_norm: expected 1\.0, as at the first"):
        gate.attach(second, max_grad_norm=2.0)
    gate.attach(second, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="attached to a gate already"):
        gate.attach(second, max_grad_norm=1.0)
    for p in (a, b, c):
        p.grad = torch.randn(4, 3)
    grads = torch.cat([p.grad.flatten() for p in (a, b, c)])
    before = [p.detach().clone() for p in (a, b, c)]
    gate.new_batch()
    gate.decide(energy=torch.tensor(math.nan))
    first.step(), second.step()
    assert all(torch.equal(p, q) for p, q in zip((a, b, c), before, strict=True))
    torch.testing.assert_close(gate.metrics()["grad_norm"].float(), grads.norm())


def test_accelerate_wrapper_is_looked_through():
    accelerate = pytest.importorskip("accelerate")
    weight = torch.nn.Parameter(torch.randn(4, 3))
    inner = torch.optim.AdamW([weight], fused=True)
    wrapped = accelerate.Accelerator(cpu=True).prepare(inner)
    gate = GradientGate(GateConfig(), weight)
    gate.attach(wrapped)
    weight.grad = torch.randn(4, 3)
    before = weight.detach().clone()
    gate.new_batch()
    gate.decide(energy=torch.tensor(math.nan))
    wrapped.step()
    assert torch.equal(before, weight)


def test_a_wrapper_that_would_step_past_the_gate_is_refused():
    """Accelerate's with a loss scaler, which calls the step that it found, and those of others."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True)  # whose state the wrapper asks for
    weight = torch.nn.Parameter(torch.randn(4, 3))
    inner = torch.optim.AdamW([weight], fused=True)
    scaled = accelerate.optimizer.AcceleratedOptimizer(inner, scaler=torch.amp.GradScaler("cpu"))
    gate = GradientGate(GateConfig(), weight)
    with pytest.raises(ValueError, match=r"without a loss scaler \(fp16\) with host_gate=True"):
        gate.attach(scaled, host_gate=True)

    class Lookahead(torch.optim.Optimizer):
        def __init__(self, optimizer):
            super().__init__(optimizer.param_groups, {})
            self.optimizer = optimizer

        def step(self, closure=None):
            weight.data += 1.0

    with pytest.raises(TypeError, match="Lookahead cannot skip a step on the device"):
        gate.attach(Lookahead(inner))
    gate.attach(outer := Lookahead(inner), host_gate=True)
    before = weight.detach().clone()
    gate.new_batch()
    gate.decide(energy=torch.tensor(math.nan))
    outer.step()
    assert torch.equal(before, weight)


@pytest.mark.parametrize("frozen", [False, True])
def test_accumulated_head_energy_of_a_tied_or_frozen_weight(frozen):
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(30, 8)
    ids = torch.randint(30, (3, 10))
    w = embedding.weight.detach().clone().requires_grad_()
    for row in ids:  # the head alone, by plain autograd
        hidden = embedding(row).tanh().detach()
        linear_logprob(hidden, w, row, grad_eps=0.0).logp.mean().neg().backward()
    gate = GradientGate(GateConfig(accumulate=True), embedding.weight)
    embedding.weight.requires_grad_(not frozen)
    for _ in range(2):  # the sum starts anew after every decision
        embedding.weight.grad = None
        gate.new_batch()
        for row in ids:
            hidden = embedding(row).tanh().detach().requires_grad_()
            out = linear_logprob(hidden, embedding.weight, row, gate=gate, grad_eps=0.0)
            out.logp.mean().neg().backward()
        gate.decide()
        assert_energy(gate, w.grad)


def test_the_energy_of_a_large_gradient_is_exact_however_many_passes_made_it():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(30_000, 256))
    weight.grad = torch.randn(30_000, 256)
    gate = GradientGate(GateConfig(energy="parameter"), weight)
    gate.new_batch()
    linear_logprob(
        torch.ones(2, 256), weight, torch.zeros(2).long(), gate=gate
    ).logp.sum().backward()
    gate.decide()
    assert_energy(gate, weight.grad)


def test_a_frozen_weight_over_several_passes_asks_for_accumulate():
    weight = torch.randn(30, 8)
    gate = GradientGate(GateConfig(), weight)
    gate.new_batch()
    for _ in range(2):
        hidden = torch.randn(4, 8, requires_grad=True)
        out = linear_logprob(hidden, weight, torch.zeros(4).long(), gate=gate)
        out.logp.sum().backward()
    with pytest.raises(RuntimeError, match=r"frozen and 2 backward passes.*accumulate=True"):
        gate.decide()


def test_two_heads_in_one_graph_and_a_graph_used_twice():
    body, head, _, gate, _ = make()
    gate.detach()  # no optimizer's turn comes here
    x, y = torch.randn(64, 12), torch.randint(33, (64,))
    for retain in (False, True):
        gate.new_batch()
        head.weight.grad = None
        halves = [linear_logprob(body(x), head.weight, y, gate=gate).logp.mean() for _ in range(2)]
        if retain:
            halves[0].backward(retain_graph=True)
            halves[0].backward()
        else:
            sum(halves).backward()
        gate.decide()
        assert_energy(gate, head.weight.grad)


def test_hooks_that_copy_what_is_saved_do_not_hide_the_energy():
    """As activations that are offloaded to the host."""
    _, head, _, gate, backward = make()
    gate.new_batch()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        backward()
    gate.decide()
    assert_energy(gate, head.weight.grad)


@pytest.mark.parametrize("host_gate", [False, True])
def test_a_compiled_step_is_skipped_and_clipped(host_gate):
    _, head, optimizer, gate, backward = make()
    gate.detach()
    gate.attach(optimizer, max_grad_norm=0.05, host_gate=host_gate)
    step = torch.compile(optimizer.step, backend="eager")
    gate.new_batch()
    for broken in (False, False, True):
        backward(math.nan if broken else 1.0)
        gate.decide()
        before = head.weight.detach().clone()
        step()
        assert torch.equal(before, head.weight) is broken
        if not broken:  # the fused kernel leaves the clipped gradient behind
            torch.testing.assert_close(
                gate.total_grad_norm(), torch.tensor(0.05), rtol=1e-4, atol=0
            )


@pytest.mark.parametrize("host_gate", [False, True])
def test_a_decision_is_for_one_step_of_each_optimizer(host_gate):
    """Flag and clip scale of one update are not another's, which may hold a NaN or be ungated."""
    body, head, optimizer, gate, backward = make()
    gate.detach()
    gate.attach(optimizer, max_grad_norm=0.05, host_gate=host_gate)

    def refused():
        before = flat(everything(body, head, optimizer))
        with pytest.raises(
            RuntimeError, match=r"step\(\) came without a gate.decide\(\) of its own"
        ):
            optimizer.step()
        after = flat(everything(body, head, optimizer))
        assert all(same_bits(a, b) for a, b in zip(before, after, strict=True))

    gate.new_batch()
    backward(math.nan)
    gate.decide()
    gate.new_batch()  # opens the gate, which had shut
    refused()
    backward()
    gate.decide()
    optimizer.step()
    refused()
    gate.detach()
    optimizer.step()


@pytest.mark.parametrize("kind", ["fused", "host", "SGD"])
def test_torchs_checkpoints_make_an_optimizers_state_behind_the_gate(kind):
    """By a step of zeros at a rate of zero, which no decision comes before."""
    model = torch.nn.Linear(4, 3)
    kinds = {"SGD": torch.optim.SGD, "fused": torch.optim.AdamW, "host": torch.optim.AdamW}
    optimizer = kinds[kind](model.parameters(), lr=0.1, fused=kind != "host")
    gate = GradientGate(GateConfig(), model.weight)
    gate.attach(optimizer, max_grad_norm=1.0, host_gate=kind == "host")
    before = flat(everything(model, model, torch.optim.SGD(model.parameters())))
    gate.new_batch()
    gate.decide(energy=torch.tensor(math.nan))  # a first update that is shut
    optimizer.step()
    if kind == "fused":  # and as where a later micro-batch was foreseen to be shut
        hidden, target = torch.ones(2, 4), torch.tensor([0, 1])
        linear_logprob(hidden, model.weight, target, gate=gate).logp.sum().backward()
        optimizer.zero_grad()
    saved = get_optimizer_state_dict(model, optimizer)
    set_optimizer_state_dict(model, optimizer, saved)
    after = flat(everything(model, model, torch.optim.SGD(model.parameters())))
    assert all(same_bits(a, b) for a, b in zip(before, after, strict=True))
    assert all(group["lr"] == 0.1 for group in optimizer.param_groups)
    assert gate.applied_updates() == 0
    gate.new_batch()
    model(torch.ones(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match=r"step\(\) came without a gate.decide\(\) of its own"):
        optimizer.step()


def test_a_closure_may_decide():
    """As where a library hands forward and backward to the optimizer's step."""
    _, head, optimizer, gate, backward = make()
    gate.new_batch()

    def closure(scale):
        backward(scale)
        gate.decide()
        return torch.tensor(scale)

    for scale in (1.0, 1.0, math.nan):
        before = head.weight.detach().clone()
        optimizer.step(lambda scale=scale: closure(scale))
        assert torch.equal(before, head.weight) is math.isnan(scale)
    assert gate.applied_updates() == 2
    assert gate.metrics()["grad_norm"].isnan()  # of the refused one
    with pytest.raises(RuntimeError, match=r"step\(\) came without a gate.decide\(\)"):
        optimizer.step(lambda: torch.tensor(0.0))


@pytest.mark.parametrize("host_gate", [False, True])
@pytest.mark.parametrize("case", ["gradients", "a rate", "a state"])
def test_not_every_step_without_a_decision_makes_a_state(case, host_gate):
    """torch's does nothing: no gradient, no rate, no state yet."""
    weight = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = torch.optim.AdamW([weight], lr=0.1 if case == "a rate" else 0.0, fused=True)
    weight.grad = torch.ones_like(weight)
    if case == "a state":
        optimizer.step()
    if case != "gradients":
        weight.grad.zero_()
    gate = GradientGate(GateConfig(), weight)
    gate.attach(optimizer, host_gate=host_gate)
    with pytest.raises(RuntimeError, match=r"step\(\) came without a gate.decide\(\)"):
        optimizer.step()
    assert weight.eq(1).all() and len(optimizer.state) == (case == "a state")


def test_a_host_gated_step_takes_no_closure():
    """Its gradient would be applied unscored and unclipped."""
    _, head, optimizer, gate, backward = make()
    gate.detach()
    gate.attach(optimizer, max_grad_norm=0.05, host_gate=True)
    gate.new_batch()
    backward()
    gate.decide()
    before = head.weight.detach().clone()
    for step in (lambda: optimizer.step(backward), lambda: optimizer.step(closure=backward)):
        with pytest.raises(TypeError, match="closure: expected None with host_gate=True"):
            step()
    assert torch.equal(before, head.weight)
    optimizer.step(None)
    assert not torch.equal(before, head.weight)


def test_a_subclass_is_known_by_its_step():
    class Same(torch.optim.AdamW):
        pass

    class Own(torch.optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    class Wrapped(torch.optim.AdamW):
        @functools.wraps(torch.optim.AdamW.step)
        def step(self, closure=None):
            return None

    weight = torch.nn.Parameter(torch.ones(4, 3))
    gate = GradientGate(GateConfig(), weight)
    for _ in range(2):  # torch wraps the step of the class that is built first
        gate.attach(Same([weight], lr=0.1, fused=True))
        torch.optim.AdamW([weight])
    gate.detach()
    own = Own([weight], lr=0.1, fused=True)
    wrapped = Wrapped([weight], lr=0.1, fused=True)
    for other in (own, wrapped):
        with pytest.raises(TypeError, match=r"cannot skip a step on the device; .*host_gate=True"):
            gate.attach(other)
    gate.attach(own, host_gate=True)
    gate.new_batch()
    weight.grad = torch.ones_like(weight)
    gate.decide(energy=torch.tensor(math.nan))
    own.step()
    assert weight.eq(1).all()


@pytest.mark.parametrize("accumulate", [False, True])
def test_what_lies_on_several_devices_is_brought_to_the_gates(accumulate):
    """A head on another GPU than the loss, whose scale a GradScaler keeps there; gradients."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = torch.nn.Parameter(torch.empty(20, 8, device="cuda:1"))
        gate = GradientGate(GateConfig(accumulate=accumulate), torch.empty(20, 8, device="meta"))
        gate.weight, gate._backwards, gate._grad_was_empty = weight, 1, True
        gate._state, gate.row_sq = (torch.empty(20, device="cuda:1") for _ in range(2))
        gate._head_grad = torch.empty(20, 8, device="cuda:1") if accumulate else None
        scale = torch.empty((), device="cuda:0")
        gate._scaler = SimpleNamespace(_get_scale_async=lambda: scale)
        assert gate._own_signal()[0].device == weight.device
        grads = [torch.empty(2, device=f"cuda:{n}") for n in (0, 1, 0)]
        assert [len(part) for part in by_kind([*grads, None])] == [2, 1]


def test_graphs_that_torch_compile_captures_leave_the_gates_record_out():
    assert torch.Tag.cudagraph_unsafe in torch.ops.dgg.gate_record.default.tags


def test_a_step_that_raised_may_be_repeated():
    """For lack of memory, say."""
    _, head, optimizer, gate, backward = make()
    gate.new_batch()
    backward()
    gate.decide()

    def fails(*_):
        raise MemoryError

    failing = optimizer.register_step_pre_hook(fails)
    with pytest.raises(MemoryError):
        optimizer.step()
    failing.remove()
    before = head.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, head.weight)


def test_a_parameter_of_two_optimizers_counts_once():
    weight = torch.nn.Parameter(torch.ones(4, 3))
    gate = GradientGate(GateConfig(), weight)
    for _ in range(2):  # the second as if built anew in mid-run
        gate.attach(torch.optim.SGD([weight], lr=0.1, fused=True), max_grad_norm=1.0)
    weight.grad = torch.randn(4, 3)
    torch.testing.assert_close(gate.total_grad_norm(), weight.grad.norm())


def test_a_scaler_that_is_switched_off_is_none():
    *_, gate, backward = make(energy="loss")
    optimizer = gate._optimizers[0].optimizer
    gate.detach()
    gate.attach(optimizer, scaler=torch.amp.GradScaler("cpu", enabled=False))
    gate.new_batch()
    gate.foresee(torch.tensor(math.nan))
    gate.decide()  # its backward was left out
    optimizer.step()
    gate.new_batch()
    gate.foresee(torch.tensor(1.0))
    backward()
    gate.decide()
    with pytest.raises(RuntimeError, match=r"step\(\) was not called since the last decide"):
        gate.foresee(torch.tensor(1.0))


def test_a_host_gated_optimizer_may_have_nothing_to_do():
    weight, idle = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    gate = GradientGate(GateConfig(), weight)
    optimizers = [torch.optim.RMSprop([p]) for p in (weight, idle)]
    for optimizer in optimizers:
        gate.attach(optimizer, max_grad_norm=1.0, host_gate=True)
    weight.grad = torch.ones(4, 3)
    gate.new_batch()
    gate.decide(energy=_ONE)
    for optimizer in optimizers:
        optimizer.step()
    assert weight.ne(1.0).all() and idle.eq(1.0).all()


@pytest.mark.parametrize("host_gate", [False, True])
def test_a_step_without_a_decision_is_refused_and_moves_nothing(host_gate):
    body, head, optimizer, gate, backward = make()
    gate.detach()
    gate.attach(optimizer, max_grad_norm=0.05, host_gate=host_gate)
    gate.new_batch()
    backward()
    before = flat(everything(body, head, optimizer))
    with pytest.raises(RuntimeError, match=r"step\(\) came after .* without gate.decide\(\)"):
        optimizer.step()
    after = flat(everything(body, head, optimizer))
    assert all(same_bits(a, b) for a, b in zip(before, after, strict=True))
    gate.decide()
    optimizer.step()
    assert not torch.equal(before[0], flat(everything(body, head, optimizer))[0])


def test_a_gate_that_is_gone_is_named():
    weight = torch.randn(30, 8, requires_grad=True)
    gate = GradientGate(GateConfig(), weight)
    out = linear_logprob(torch.randn(4, 8), weight, torch.zeros(4).long(), gate=gate)
    del gate
    with pytest.raises(RuntimeError, match="gate: it was gone when the backward"):
        out.logp.sum().backward()


def test_host_gate_and_a_schedule_leave_each_other_alone():
    weight = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = torch.optim.RMSprop([weight], lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
    scheduled = optimizer.step
    gate = GradientGate(GateConfig(), weight)
    gate.attach(optimizer, host_gate=True)
    weight.grad = torch.ones(4, 3)
    gate.new_batch()
    gate.decide(energy=torch.tensor(1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a schedule that steps before its optimizer
        optimizer.step()
        schedule.step()
    gate.detach()
    assert optimizer.step is scheduled


def test_a_schedule_that_is_built_before_its_checkpoint_is_loaded_counts_on():
    weight = torch.nn.Parameter(torch.randn(4, 3))

    def build():
        optimizer = torch.optim.AdamW([weight], lr=1.0, fused=True)
        gate = GradientGate(GateConfig(threshold=math.inf), weight)
        gate.attach(optimizer)
        inner = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        return gate, inner, GatedScheduler(inner, gate.applied_updates)

    def update(gate, schedule):
        gate.new_batch()
        gate.decide(energy=torch.tensor(1.0))
        schedule.scheduler.optimizer.step()
        schedule.step()

    gate, inner, schedule = build()
    for _ in range(5):
        update(gate, schedule)
    resumed, its_inner, its_schedule = build()
    resumed.load_state_dict(gate.state_dict())
    its_inner.load_state_dict(inner.state_dict())
    update(resumed, its_schedule)
    assert its_inner.last_epoch == 6
    with pytest.raises(TypeError, match="scheduler: expected one that counts its steps"):
        GatedScheduler(torch.optim.lr_scheduler.ChainedScheduler([inner]), gate.applied_updates)


def test_a_schedule_that_waits_for_a_metric_is_refused():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(TypeError, match=r"expected one that counts its steps .* ReduceLROnPlateau"):
        GatedScheduler(schedule, lambda: 0)


def test_the_schedule_counts_applied_updates():
    weight = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = torch.optim.AdamW([weight], lr=1.0, fused=True)
    gate = GradientGate(GateConfig(threshold=math.inf), weight)
    gate.attach(optimizer)
    inner = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    schedule = GatedScheduler(inner, gate.applied_updates)
    rates = []
    for shut in (False, True, True, False):
        weight.grad = torch.randn(4, 3)
        gate.new_batch()
        gate.decide(energy=torch.tensor(math.nan if shut else 1.0))
        optimizer.step()
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.5, 0.5, 0.5, 0.25]
