"""Whatever comes in: a clear error before anything changed, or a right result. Never a crash.

In the suite each target gets a few cases; `make fuzz` multiplies them (FUZZ=100) and writes how
many there were, and how they ended, to the file that FUZZ_RECORD names. A target returns how its
case ended; what must not happen fails the test, and hypothesis shrinks it.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import struct
import time
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_gate import configs
from tolerance import FLOOR

from benchmarks import common
from dgg_kernels import GateConfig, GradientGate, linear_cross_entropy, linear_logprob, replay
from dgg_kernels.reference import reference_logprob
from dgg_kernels.replay_log import read_energies
from python_trainer import checkpoint
from python_trainer.__main__ import config_of, parser, plan_of, read_toml
from python_trainer.config import CheckpointError, ConfigError, TaskError, TrainConfig
from python_trainer.files import MetricsLog, read_metrics
from python_trainer.tasks import make_task, play
from python_trainer.tasks.problems import LONGEST

TIMES = int(os.environ.get("FUZZ", "1"))
SLOWEST = 20.0  # seconds a case; a verifier may take its CPU bound twice
OUTCOMES: dict[str, Counter[str]] = {}


def target(cases: int, **strategies: Any):
    """A fuzz target of so many cases (times FUZZ); its doc string says what is varied."""

    def wrap(function: Any) -> Any:
        name = function.__name__.removeprefix("test_")
        OUTCOMES[name] = Counter()

        def test(**drawn: Any) -> None:
            began = time.perf_counter()
            OUTCOMES[name][function(**drawn)] += 1
            assert time.perf_counter() - began < SLOWEST

        test.__doc__ = function.__doc__
        checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
        chosen = settings(
            max_examples=cases * TIMES, deadline=None, suppress_health_check=checks,
            database=None, derandomize=TIMES == 1, print_blob=True,
        )  # fmt: skip
        test = chosen(given(**strategies)(test))
        test.__name__ = function.__name__
        return test

    return wrap


@pytest.fixture(scope="module", autouse=True)
def record():
    """What was tried, how often, and how it ended, to the file that FUZZ_RECORD names."""
    began = time.perf_counter()
    yield
    if "FUZZ_RECORD" in os.environ:
        targets = {name: dict(of.most_common()) for name, of in OUTCOMES.items() if of}
        row = {
            "stamp": common.stamp(torch.device("cpu")),
            "seconds": round(time.perf_counter() - began),
            "cases": sum(of.total() for of in OUTCOMES.values()),
            "targets": targets,
        }
        Path(os.environ["FUZZ_RECORD"]).write_text(json.dumps(row, indent=2) + "\n")


# Values that arithmetic stumbles over, in fp32 and, rounded, in the half types.
EDGES = [0.0, -0.0, 1.0, -1.0, 1e-45, 1e-38, 6e-8, 65504.0, 1e5, 1e30, -1e30, 3e38, math.inf,
         -math.inf, math.nan]  # fmt: skip
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
anything = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.integers(), st.floats(), st.text(max_size=8),
    st.binary(max_size=3), st.lists(st.integers(-1, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(0, 2), max_size=2),
)  # fmt: skip


def bits(*tensors: torch.Tensor) -> bytes:
    """Their values, NaN told from NaN."""
    return b"".join(
        t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for t in tensors
        if t.numel()
    )


def laid_out(t: torch.Tensor, how: str) -> torch.Tensor:
    """The same values in other strides."""
    if how == "transposed":
        return t.T.contiguous().T
    if how == "every second":
        return torch.stack([t, torch.full_like(t, math.nan)], -1)[..., 0]
    if how == "offset":
        return torch.cat([t.new_full((1, *t.shape[1:]), math.nan), t])[1:]
    return t


layouts = st.sampled_from(["plain", "transposed", "every second", "offset"])
shapes = st.tuples(st.integers(0, 9), st.integers(1, 70), st.integers(1, 40))


# -- the head -------------------------------------------------------------------------------------


@target(
    60, shape=shapes, dtype=dtypes, layout=st.tuples(layouts, layouts), seed=st.integers(0, 2**31),
    edges=st.lists(st.tuples(st.integers(0, 8), st.sampled_from(EDGES)), max_size=4),
    weight_edge=st.sampled_from([None] * 6 + EDGES), with_bias=st.booleans(),
    bias_edge=st.sampled_from([None, None, -math.inf, 1e30, math.nan]),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 30.0, 1e4]),
    temperature=st.sampled_from([1e-30, 0.3, 1.0, 7.0, 1e30]),
    softcap=st.sampled_from([None, None, 1e-20, 5.0, 1e30]),
    grad_eps=st.sampled_from([0.0, 2**-12, 0.5]),
)  # fmt: skip
def test_head_values(shape, dtype, layout, seed, edges, weight_edge, with_bias, bias_edge, scale,
                     temperature, softcap, grad_eps):  # fmt: skip
    """Shapes, strides, dtypes, and NaN, Inf, denormals, 1e30 in `linear_logprob`.

    A row is right, or not finite where plain PyTorch in the same dtype is not finite either; a
    spoilt row spoils no other row, forward or backward.
    """
    n, v, d = shape
    rng = torch.Generator().manual_seed(seed)
    hidden = (scale * torch.randn(n, d, generator=rng)).to(dtype)
    weight = (torch.randn(v, d, generator=rng) / d**0.5).to(dtype)
    target = torch.randint(v, (n,), generator=rng)
    target[torch.rand(n, generator=rng) < 0.2] = -100
    bias = torch.randn(v, generator=rng) if with_bias else None
    clean = hidden.clone()
    for row, value in edges:
        if row < n:
            hidden[row, int(torch.randint(d, (1,), generator=rng))] = value
    if weight_edge is not None:
        weight[int(torch.randint(v, (1,), generator=rng)), 0] = weight_edge
    if bias is not None and bias_edge is not None:
        bias[int(torch.randint(v, (1,), generator=rng))] = bias_edge
    options: dict[str, Any] = {"temperature": temperature, "softcap": softcap}

    def run(of: torch.Tensor):
        leaf, w = laid_out(of, layout[0]).requires_grad_(), laid_out(weight, layout[1])
        out = linear_logprob(
            leaf, w.requires_grad_(), target, bias=bias, grad_eps=grad_eps, **options
        )
        (out.logp.sum() + 0.5 * out.entropy.sum()).backward()
        return out, leaf.grad

    before = bits(hidden, weight)
    out, d_hidden = run(hidden)
    assert bits(hidden, weight) == before
    assert all(t.shape == (n,) and t.dtype == torch.float32 for t in out[:4])
    assert d_hidden.shape == hidden.shape

    fp32 = [t if t is None else t.float() for t in (hidden, weight, bias)]
    fp64 = [t if t is None else t.double() for t in (hidden, weight, bias)]
    own = reference_logprob(fp32[0], fp32[1], target, bias=fp32[2], **options)
    exact = reference_logprob(fp64[0], fp64[1], target, bias=fp64[2], **options)
    for name, mine, theirs, true in zip(out._fields, out[:4], own, exact, strict=False):
        finite = mine.isfinite()
        # Finite, then right: as right as the logits' own rounding lets it be.
        size = 1.0 + exact[2].abs().nan_to_num(posinf=0.0)
        if name == "logp":  # of the target's logit, too
            size = size + true.abs().nan_to_num(posinf=0.0)
        wrong = (mine.double() - true).abs() > 2 * (theirs.double() - true).abs() + 1e-4 * size
        lost = finite & (wrong | true.isnan())
        assert not lost.any(), f"{name}: {mine}, torch {theirs}, exact {true}"
        # Not finite, then torch's own is not, or lies at the end of fp32's range.
        near_the_end = theirs.abs() > 1e30
        assert not (~finite & theirs.isfinite() & ~near_the_end).any(), f"{name}: {mine}, {theirs}"

    good = (hidden == clean).all(-1) if n else torch.ones(0, dtype=torch.bool)
    if good.all() or weight_edge is not None:
        return "compared"
    alone, d_alone = run(clean)
    for mine, theirs in ((out.logp, alone.logp), (d_hidden.float(), d_alone.float())):
        a, b = mine[good], theirs[good]
        tolerance = 4 * FLOOR[dtype] * b.abs().nan_to_num(posinf=0.0).max() if b.numel() else 0.0
        assert (
            ((a - b).abs() <= tolerance).logical_or(a.isnan() & b.isnan()).logical_or(a == b).all()
        ), "a spoilt row reached another one" if grad_eps == 0 else assume(grad_eps == 0)
    return "compared, rows apart"


GARBAGE = [
    None, 1.5, "x", [], torch.zeros(()), torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64),
    torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, device="meta"),
    torch.zeros(2, 3, dtype=torch.complex64), torch.zeros(2, 3, 4), torch.zeros(0, 3),
    torch.full((2,), 5), torch.full((2,), -7), torch.full((2,), 2**62), math.nan, -1.0, math.inf,
    -math.inf, 0, True, 2**80, b"", float, torch.zeros(2, 3).to_sparse(),
]  # fmt: skip


HEADS = {
    linear_logprob: ["hidden", "weight", "target", "bias", "temperature", "softcap", "grad_eps",
                     "lse_ref", "screen", "gate", "ignore_index"],
    linear_cross_entropy: ["input", "linear_weight", "target", "linear_bias", "reduction",
                           "label_smoothing", "grad_eps", "ignore_index"],
}  # fmt: skip


@target(
    100, head=st.sampled_from([(head, name) for head, names in HEADS.items() for name in names]),
    swaps=st.lists(st.tuples(st.integers(0, 10), st.integers(0, len(GARBAGE) - 1)), max_size=2),
    what=st.integers(0, len(GARBAGE) - 1),
)  # fmt: skip
def test_head_refusals(head, what, swaps):
    """Arguments of `linear_logprob` or `linear_cross_entropy` replaced by something else."""
    function, name = head
    others = {HEADS[function][i % len(HEADS[function])]: GARBAGE[other] for i, other in swaps}
    tensors = (torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 3]))
    kept = dict(zip(HEADS[function], tensors, strict=False))
    before = bits(*kept.values())
    try:
        out = function(**(kept | others | {name: GARBAGE[what]}))
    except (TypeError, ValueError) as error:
        # Of two that do not fit together, the message may name the other one.
        assert any(f"{argument}: expected" in str(error) for argument in HEADS[function]), error
        ended = "refused"
    else:
        results = out if function is linear_logprob else (out,)
        assert all(t.shape in ((2,), ()) for t in results if isinstance(t, torch.Tensor))
        ended = "taken"
    assert bits(*kept.values()) == before
    return ended


@target(
    60, op=st.sampled_from(["lm_head_forward", "lm_head_backward", "quantize_rows_cpu",
                            "gate_new_batch", "gate_decide"]),
    swaps=st.lists(st.tuples(st.integers(0, 18), st.integers(0, len(GARBAGE) - 1)), min_size=1,
                   max_size=3),
)  # fmt: skip
def test_ops_called_directly(op, swaps):
    """The raw ops, which the public functions check for, with arguments replaced."""
    h, w, y, row = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 3]), torch.ones(2)
    gate = GradientGate(GateConfig(), w)
    none = torch.zeros(0, dtype=torch.int32)
    arguments = {
        "lm_head_forward": [h, w, y, None, 1.0, 0.0, 0.0, None, None, []],
        "lm_head_backward": [row, row, row, h, w, y, None, row, row, none, None, 1.0, 0.0, 0.0,
                             False, True, True, False, True],
        "quantize_rows_cpu": [w, torch.zeros(4, 3, dtype=torch.int8), *torch.zeros(3, 4), None],
        "gate_new_batch": [gate._state, gate.found_inf],
        "gate_decide": [gate._state, torch.ones(4), True, None, 1.0, gate.found_inf,
                        gate.grad_scale, None, 0],
    }[op]  # fmt: skip
    for position, what in swaps:
        arguments[position % len(arguments)] = GARBAGE[what]
    try:
        getattr(torch.ops.dgg, op)(*arguments)
    except RuntimeError:  # NotImplementedError is one
        return "refused"
    return "taken"


# -- the gate -------------------------------------------------------------------------------------


CALLS = ["new_batch", "backward", "nan_backward", "decide", "decide_nan", "foresee", "step",
         "state_dict", "load", "detach", "attach", "metrics", "zero_grad", "is_shut"]  # fmt: skip


@target(60, config=configs, energy=st.sampled_from(["head", "loss"]), clips=st.booleans(),
        calls=st.lists(st.sampled_from(CALLS), max_size=25))  # fmt: skip
def test_gate_call_order(config, energy, calls, clips):
    """Any order of the gate's methods, NaN gradients in between: weights stay finite.

    A call out of turn raises RuntimeError and moves nothing; a shut gate moves no weight.
    """
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(4, 3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    gate = GradientGate(replace(config, energy=energy), weight)
    limit = 1.0 if clips else None
    gate.attach(optimizer, limit)
    attached, refused, saved, spoilt = True, 0, gate.state_dict(), False
    for call in calls:
        before, shut = bits(weight), bool(gate.found_inf)
        try:
            if call.endswith("backward"):
                hidden = torch.ones(2, 3)
                if call == "nan_backward":
                    hidden[0, 0] = math.nan
                    spoilt = True
                out = linear_logprob(hidden, weight, torch.tensor([0, 3]), gate=gate, grad_eps=0.0)
                out.logp.sum().backward()
            elif call.startswith("decide"):
                gate.decide(torch.tensor(math.nan) if call == "decide_nan" else None)
                bad = gate.row_sq.isnan().any() and call == "decide"
                assert not (bad or call == "decide_nan") or gate.is_shut()
            elif call == "foresee":
                gate.foresee(torch.tensor(0.5))
            elif call == "step":
                if spoilt and not attached:
                    continue
                optimizer.step()
                if shut and attached:
                    assert bits(weight) == before
            elif call == "load":
                gate.load_state_dict(saved)
            elif call == "state_dict":
                saved = gate.state_dict()
            elif call == "attach" and not attached:
                gate.attach(optimizer, limit)
                attached = True
            elif call == "detach":
                gate.detach()
                attached = False
            elif call == "zero_grad":
                optimizer.zero_grad()
                spoilt = False
            elif call == "metrics":
                assert all(value.dim() == 0 for value in gate.metrics().values())
            elif call == "is_shut":
                assert gate.is_shut() == gate.is_shut(wait=True)
            elif call == "new_batch":
                gate.new_batch()
                assert not gate.is_shut()
        except RuntimeError as error:
            named = {"nan_backward": "gate", "backward": "gate", "step": "optimizer",
                     "decide_nan": "decide", "decide": "decide", "foresee": "foresee"}  # fmt: skip
            assert f"{named[call]}:" in str(error)
            assert bits(weight) == before
            refused += 1
        assert weight.isfinite().all()
        assert float(gate.found_inf) in (0.0, 1.0)
    return "refused a call" if refused else "all calls taken"


def gate_with_history(config: GateConfig) -> GradientGate:
    gate = GradientGate(config, torch.zeros(4, 3))
    for energy in range(20):
        if energy % 4 == 0:
            gate.new_batch()
        gate.decide(torch.tensor(float(energy % 7)))
    return gate


@target(
    100, config=configs,
    changes=st.lists(st.tuples(st.integers(0, 60), st.one_of(st.floats(), st.integers(-2, 2**40))),
                     min_size=1, max_size=4),
    shape=st.sampled_from(["as saved"] * 8 + ["longer", "shorter", "float32", "2-D", "meta"]),
    other=st.sampled_from([{}] * 8 + [{"window": 7}, {"statistic": "x"}, {"new": 1}]),
)  # fmt: skip
def test_gate_states(config, changes, shape, other):
    """State dicts that were damaged: refused with nothing changed, or gone on with soundly."""
    gate = gate_with_history(config)
    saved = gate.state_dict()
    state = saved["state"]
    for place, value in changes:
        if place < state.numel():
            state[place] = float(value)
    saved["config"] |= other
    if shape != "as saved":
        saved["state"] = {
            "longer": lambda: torch.cat([state, state]), "shorter": lambda: state[:-1],
            "float32": state.float, "2-D": lambda: state[None], "meta": lambda: state.to("meta"),
        }[shape]()  # fmt: skip
    before = bits(gate._state, gate.found_inf)
    try:
        gate.load_state_dict(saved)
    except ValueError as error:
        assert "expected" in str(error)
        assert bits(gate._state, gate.found_inf) == before
        ended = "refused"
    else:
        ended = "taken"
    # Either way it works on, within its memory, and NaN still shuts it.
    if gate._batches == 0:
        gate.new_batch()
    for energy in (1.0, 2.0, 5.0):
        gate.decide(torch.tensor(energy))
    gate.new_batch()
    gate.decide(torch.tensor(math.nan))
    assert gate.is_shut() and float(gate.found_inf) == 1.0
    for value in gate.metrics().values():
        float(value)
    return ended


@target(100, name=st.sampled_from([f.name for f in fields(GateConfig)]), value=anything)
def test_gate_configs(name, value):
    """Any value in any field of `GateConfig`: ValueError that names it, or a gate that works."""
    try:
        config = replace(GateConfig(), **{name: value})
    except ValueError as error:
        assert f"GateConfig.{name}" in str(error)
        return "refused"
    replay([[1.0, 2.0, math.nan], [1.0]], replace(config, window=min(config.window, 99)))
    return "taken"


# -- files ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints in a folder, and what they hold."""
    folder = tmp_path_factory.mktemp("saved")
    states = []
    for number in (1, 2):
        states.append({
            "weights": torch.arange(12.0).reshape(3, 4) + number, "gate": torch.ones(5),
            "progress": {"rollouts": number, "seconds": 1.5, "text": "é", "none": None},
        })  # fmt: skip
        checkpoint.save(folder, number, states[-1])
    SAVED.update(folder=folder, states=states, scratch=tmp_path_factory.mktemp("scratch"))
    return SAVED


SAVED: dict[str, Any] = {}  # a fixture's value, where `given` allows no fixture
pytestmark = pytest.mark.usefixtures("saved")

damages = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 2**20), st.integers(0, 7)),
    st.tuples(st.just("cut"), st.integers(0, 2**20), st.just(0)),
    st.tuples(st.just("insert"), st.integers(0, 2**20), st.integers(0, 255)),
    st.tuples(st.just("zero"), st.integers(0, 2**20), st.integers(1, 64)),
    st.tuples(st.just("remove"), st.just(0), st.just(0)),
    st.tuples(st.just("folder"), st.just(0), st.just(0)),
    st.tuples(st.just("swap"), st.just(0), st.just(0)),
)


def damage(path: Path, how: tuple[str, int, int], other: Path) -> None:
    kind, place, value = how
    data = bytearray(path.read_bytes()) if path.is_file() else bytearray(b"x")
    place %= len(data) or 1
    if kind == "flip" and data:
        data[place] ^= 1 << value
    elif kind == "cut":
        del data[place:]
    elif kind == "insert":
        data.insert(place, value)
    elif kind == "zero":
        data[place : place + value] = bytes(len(data[place : place + value]))
    if kind in ("remove", "folder"):
        if path.is_file():
            path.unlink()
        if kind == "folder":
            path.mkdir(exist_ok=True)
    elif kind == "swap" and path.is_file():
        shutil.copy(other, path)
    elif path.parent.is_dir() and not path.is_dir():
        path.write_bytes(data)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


@target(
    60, harm=st.lists(st.tuples(st.sampled_from(["1/tensors.safetensors", "1/state.json",
                                                 "2/tensors.safetensors", "2/state.json"]),
                                damages), min_size=1, max_size=3),
)  # fmt: skip
def test_checkpoints(harm):
    """Checkpoints with flipped bits, cut, emptied, swapped: the newest whole one, or an error.

    What is loaded is always exactly what was saved.
    """
    folder = SAVED["scratch"] / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(SAVED["folder"], folder)
    for name, how in harm:
        number, file = name.split("/")
        of = {n: folder / f"{int(n):08d}" / file for n in "12"}
        other = Path(SAVED["folder"]) / of["21"["12".index(number)]].relative_to(folder)
        damage(of[number], how, other)
    try:
        state, complaints = checkpoint.load(folder)
    except CheckpointError as error:
        assert "\n" not in str(error) and "checkpoints" in str(error)
        return "refused"
    assert state is not None
    which = [i for i, whole in enumerate(SAVED["states"]) if same(state, whole)]
    assert which, f"loaded what was never saved: {state}"
    both_swapped = sum(how[0] == "swap" for _, how in harm) > 1
    assert which == [1] or complaints or both_swapped
    return "the newest" if which == [1] else "the one before it"


rows = st.lists(
    st.dictionaries(
        st.text(max_size=6),
        st.one_of(st.floats(), st.integers(), st.text(max_size=6), st.booleans(),
                  st.lists(st.floats(), max_size=3)),
        max_size=4,
    ),
    max_size=6,
)  # fmt: skip


@target(60, written=rows, cut=st.integers(0, 2**20))
def test_metrics_logs(written, cut):
    """Rows of any values, then cut anywhere: what is read is a beginning of what was written."""
    # Of texts, those that stand for infinities are taken for them.
    path = SAVED["scratch"] / "metrics.jsonl"
    path.unlink(missing_ok=True)
    log = MetricsLog(path)
    for row in written:
        log.write(row)
    log.close()
    data = path.read_bytes()
    path.write_bytes(data[: cut % (len(data) + 1)])
    read = read_metrics(path)
    assert len(read) <= len(written)
    for mine, theirs in zip(read, written, strict=False):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            if isinstance(value, float):
                assert struct.pack("d", mine[name]) == struct.pack("d", value) or value != value
            elif isinstance(value, int | bool):
                assert mine[name] == value
    return "whole" if len(read) == len(written) else "a beginning"


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
PROBLEM = {"problem": "1+1?", "answer": "2", "solution": "It is 2."}
QUESTION = {
    "question": "Who?", "answer": "She", "context": [["A", ["She did."]], ["B", ["No."]]],
    "supporting_facts": [["A", 0]],
}  # fmt: skip
PRODUCT = {
    "asin": "B01", "name": "red shoe", "query": "shoe", "product_category": "a › b",
    "pricing": "$10", "small_description": ["x"], "full_description": "y", "attributes": ["soft"],
    "customization_options": {"size": [{"value": "9"}]},
    "instruction": "find a soft shoe", "instruction_attributes": ["soft"],
}  # fmt: skip
UPDATE = {"gate/energy": 1.0, "gate/reuse": 1}


def changed_record(record: dict[str, Any], changes: list[tuple[int, Any]]) -> dict[str, Any]:
    record = dict(record)
    for place, value in changes:
        record[list(record)[place % len(record)]] = value
    return record


@target(
    200, kind=st.sampled_from(["problems", "search_qa", "webshop", "energies"]),
    changes=st.lists(st.tuples(st.integers(0, 20), json_values), max_size=3),
    lines=st.integers(1, 3), raw=st.one_of(st.none(), st.none(), st.binary(max_size=40),
                                           json_values),
    how=st.one_of(st.none(), st.none(), damages), bom=st.booleans(),
    code=st.sampled_from(["utf-8"] * 6 + ["utf-16", "latin-1"]),
)  # fmt: skip
def test_task_files(kind, changes, lines, raw, how, bom, code):
    """JSON with fields of other types, broken, in other encodings: one line of error, or a task."""
    record = {"problems": PROBLEM, "search_qa": QUESTION, "webshop": PRODUCT, "energies": UPDATE}
    broken = changed_record(record[kind], changes)
    records = [record[kind]] * (lines - 1) + [broken]
    text = json.dumps(records) if kind == "webshop" else "\n".join(map(json.dumps, records))
    data = text.encode(code, errors="replace")
    if raw is not None:
        data = raw if isinstance(raw, bytes) else json.dumps(raw).encode()
    path = SAVED["scratch"] / "task.json"
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    path.write_bytes(b"\xef\xbb\xbf" * bom + data)
    if how is not None and how[0] != "swap":
        damage(path, how, path)
    try:
        if kind == "energies":
            read_energies(path)
            return "taken"
        family, options = {
            "problems": ("math", {"data": str(path)}), "search_qa": ("search_qa",
            {"data": str(path)}), "webshop": ("webshop", {"catalogue": str(path)}),
        }[kind]  # fmt: skip
        task = make_task(family, options)
        for example in task.sample(1, "0"):
            assert isinstance(example.prompt, str)
            reward, _ = play(task, example, ["click[x]", "answer She"]) if kind != "problems" else (
                0.0, None)  # fmt: skip
            assert 0 <= reward <= 1
    except (TaskError, ConfigError, ValueError, OSError) as error:
        own = isinstance(error, TaskError | ConfigError)
        assert own or kind == "energies", repr(error)
        assert "\n" not in str(error), error
        return "refused"
    return "taken"


@target(
    200, changes=st.lists(st.tuples(st.sampled_from([f.name for f in fields(TrainConfig)]),
                                    anything), min_size=1, max_size=3),
)  # fmt: skip
def test_trainer_configs(changes):
    """Any values in any fields of `TrainConfig`: ConfigError of one line, or a usable one."""
    try:
        config = replace(TrainConfig(), **dict(changes))
    except ConfigError as error:
        assert "\n" not in str(error)
        assert "expected" in str(error) or "needs" in str(error)
        return "refused"
    assert config.score.window >= 2
    low, high = config.clip_range
    assert 0 <= low <= high and math.isfinite(config.learning_rate_factor(5))
    json.dumps(changes, default=str)
    return "taken"


NAMES = ["arms", "grid", "seeds", "gate", "task", "task_options", "learning_rate", "use_counts",
         "arms.dgg", "arms.new", "grid.learning_rate", "x", "model"]  # fmt: skip
toml_values = st.one_of(
    st.integers(-2, 9).map(str), st.floats().map(repr), st.sampled_from(
        ['"dgg"', '"x"', "[]", "[1, 2]", '["a"]', "{}", "{a = 1}", "true", "1979-05-27", "[[1]]",
         "{gate = 'off'}", "{gate = 1}", "{match = 'dgg'}", "{match = 3}", "'\\u0000'"]),
)  # fmt: skip


@target(
    60, lines=st.lists(st.tuples(st.sampled_from(NAMES), toml_values), max_size=4),
    noise=st.one_of(st.just(b""), st.just(b""), st.binary(max_size=20)),
)  # fmt: skip
def test_toml_files(lines, noise):
    """TOML of a comparison: ConfigError of one line, or a plan."""
    path = SAVED["scratch"] / "plan.toml"
    text = "\n".join(f"{name} = {value}" for name, value in lines)
    path.write_bytes(text.encode() + b"\n" + noise)
    args = parser().parse_args(["compare", "--config", str(path), "--out", "x"])
    try:
        file = read_toml(str(path))
        plan = plan_of(args, file, config_of(args, file))
    except ConfigError as error:
        assert "\n" not in str(error)
        return "refused"
    assert plan.arms and plan.seeds
    return "taken"


# -- what a model writes --------------------------------------------------------------------------

pieces = st.one_of(
    st.text(max_size=20),
    st.sampled_from([
        "9" * 100_000, "(" * 5_000, "[" * 100_000, "\\frac{" * 500, "{" * 9_000, "\\boxed{", "}",
        "10^10^10", "10**10**10", "__import__('os').abort()", "exit()", "open('x', 'w')", "nan",
        "inf", "-0", "1e999", "\x00", "\ud800", "\u202e", "٣", "½", "answer:", "####", "search[",
        "click[Buy Now]", "click[", "]", "answer ", "search ", "\n" * 50, "1/0", "\\sqrt{" * 100,
        "'] * 10**9 + ['", "lambda: 0", "0x" + "f" * 3000, "1_000", "go to ", "<script>",
    ]),
)  # fmt: skip
turns = st.lists(st.lists(pieces, max_size=5).map("".join), min_size=1, max_size=4)
TASKS: dict[str, Any] = {}


def task_and_example(name: str) -> Any:
    if name not in TASKS:
        family, options = {
            "sorting": ("math", {"dataset": "number_sorting"}),
            "sums, partial": ("math", {"dataset": "chain_sum", "partial_credit": True}),
            "webshop": ("webshop", {}),
            "search_qa": ("search_qa", {}),
            "countdown": ("math", {"dataset": "countdown", "rendering": "plain", "size": 20}),
            "polynomials": ("math", {"dataset": "polynomial_equations", "rendering": "plain",
                                     "size": 20}),
        }.get(name, ("math", {}))  # fmt: skip
        if name == "problems":
            path = SAVED["scratch"] / "problems.jsonl"
            path.write_text("\n".join(json.dumps(PROBLEM | {"problem": f"{i}?"})
                                      for i in range(40)))  # fmt: skip
            family, options = "math", {"data": str(path)}
        task = make_task(family, options)
        TASKS[name] = task, task.sample(1, "fuzz")[0]
    return TASKS[name]


def hostile(name: str, said: list[str]) -> str:
    task, example = task_and_example(name)
    here = set(os.listdir())
    reward, written = play(task, example, said)
    assert isinstance(reward, float) and 0.0 <= reward <= 1.0
    assert all(isinstance(text, str) and len(text) < 10 * LONGEST for text in written)
    assert set(os.listdir()) == here  # no text was run
    own = example.answer is not None and "".join(example.answer) in "".join(said)
    assert reward < 1.0 or own or task.name in ("math/data", "math/countdown", "webshop")
    return "some reward" if reward else "none"


@target(120, name=st.sampled_from(["sorting", "sums, partial", "webshop", "search_qa"]), said=turns)
def test_hostile_turns(name, said):
    """100 kB numbers, brackets, code, halves of characters, to verifiers and environments."""
    return hostile(name, said)


@target(5, name=st.sampled_from(["problems", "countdown", "polynomials"]), said=turns)
def test_hostile_turns_in_a_child(name, said):
    """The same to the verifiers that parse: in a child process, bounded in time and memory."""
    return hostile(name, said)


@target(40, first=st.integers(0, 2**31), prompt=st.integers(1, 40))
def test_task_samples(first, prompt):
    """Any seed: items of the pool asked for, whose own answer scores 1."""
    task, _ = task_and_example("sorting")
    held_out = bool(first % 2)
    for example in task.sample(prompt, str(first), held_out):
        assert play(task, example, example.answer)[0] == 1.0
        wrong = "".join(random.Random(first).sample(example.answer[0], len(example.answer[0])))
        assert play(task, example, [wrong])[0] == float(wrong == example.answer[0])
    return "items"
