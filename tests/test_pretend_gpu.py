"""The GPU's benchmarks and tests, on a GPU that is not there: `TRITON_INTERPRET=1 pytest ...`.

Every stage of `benchmarks.gpu_suite`, to its end, on small shapes, its kernels in Triton's
interpreter: computed where results are checked, as by the benchmarks themselves, and only launched
where they are timed. Then the tests of tests/gpu, smaller too.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import sys
import time
from contextlib import nullcontext, redirect_stderr, redirect_stdout

import pytest
import torch
from pretend_gpu import REHEARSAL, pretended_gpu
from triton_tools import interpreting

from benchmarks import bench_gate, bench_kernels, bench_step, common, gpu_suite, rows
from dgg_kernels import GateConfig, GradientGate, linear_logprob, lm_head, lm_head_forward, screen
from dgg_kernels import gate as gate_module

if not interpreting():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

D, V = "128", "64"
# What the others do not do already, on small shapes.
STAGES = [stage.name if stage.name in ("info", "head", "gate", "step", "tune")
          else pytest.param(stage.name, marks=REHEARSAL)
          for stage in gpu_suite.stages("cuda") if "pytest" not in stage.command]  # fmt: skip

with pretended_gpu():
    from gpu import test_on_gpu as on_gpu


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """The benchmarks collect garbage before they measure: not all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def gpu(monkeypatch):
    """An H100, that draws in a small vocabulary, too."""
    monkeypatch.setattr(lm_head, "_WORTH_DRAWING", 0.0)
    with pretended_gpu() as gpu:
        yield gpu


@pytest.fixture
def small(gpu, monkeypatch, tmp_path):
    """Shapes that the interpreter can do, and code that times made to launch only."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(10, 16, generator=generator), 1.5 * torch.randn(48, 16, generator=generator)
    monkeypatch.setattr(rows, "cached", lambda: base)
    monkeypatch.setitem(bench_kernels.COPIED, "cuda", 2**20)
    monkeypatch.setattr(bench_kernels, "profile", gpu.profile)
    shape = {**bench_step.SHAPES["tiny"], "vocab_size": int(V)}
    monkeypatch.setitem(bench_step.SHAPES, "qwen2.5-1.5b", shape)
    monkeypatch.setitem(bench_step.SIZES, "qwen2.5-1.5b", bench_step.Size(1, 2, 2, 4))
    monkeypatch.setattr(common.save, "__defaults__", (tmp_path,))
    monkeypatch.setattr(gpu_suite, "run", in_this_process)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # rests for a hot GPU
    for module, name, few in (
        (common, "interleave", {}), (common, "peak_extra_bytes", {}),
        (bench_kernels, "milliseconds", {"rounds": 1}), (bench_kernels, "kernels", {"rounds": 1}),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, launching(gpu, getattr(module, name), few))


def launching(gpu, measure, few):
    """`measure` with kernels that are not computed, a few times."""

    def measured(run, *args, **options):
        with gpu.only_launches():
            return measure(run, *(() if few else args), **options, **few)

    return measured


def smaller(module, arguments):
    """What to add to a command line: the last of several values counts."""
    if not module.startswith("benchmarks.bench"):
        return []
    sizes = ["--features", D, "--vocabulary", V, "--rows", "8"]
    rounds = ["--rounds", "1"]
    if module == "benchmarks.bench_lm_head":
        at = arguments.index("--rows") + 1
        several = all(a.isdigit() for a in arguments[at : at + 2])
        return [*sizes, *(["4"] if several else []), *rounds]
    return {"bench_kernels": sizes, "bench_gate": [*sizes, *rounds], "bench_step": rounds}[
        module.removeprefix("benchmarks.")
    ]


def in_this_process(stage, out, seconds):
    """In place of `gpu_suite.run`, whose processes would see no GPU."""
    module, *arguments = stage.command[2:]
    with (out / f"{stage.name}.log").open("w") as log, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments, *smaller(module, arguments)])
        with redirect_stdout(log), redirect_stderr(log):
            try:
                importlib.import_module(module).main()
            except SystemExit as ended:
                if ended.code:
                    return f"exit {ended.code}"
    return "ok"


OURS = {"ours", "ours, with lse_ref", "ours, with lse_ref, screen int8",
        "ours, with lse_ref, screen fp8", "ours, grad_eps=0"}  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
def test_stage(name, small, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu_suite", "--out", str(tmp_path), "--only", name])
    gpu_suite.main()
    ended = json.loads((tmp_path / "suite.json").read_text())["stages"]
    log = (tmp_path / f"{name}.log").read_text()
    assert {stage: of["result"] for stage, of in ended.items()} == {name: "ok", "plot": "ok"}, log
    records = [json.loads(f.read_text()) for f in tmp_path.glob("*.json") if f.stem != "suite"]
    several = {"info": 0, "rows": 2, "models": 6, "entropies": 3, "models-rows": 12}
    assert len(records) == several.get(name, 1)
    for record in records:
        # One of ours that fails is listed as missing, and ends no benchmark.
        assert not [why for name, why in record.get("missing", {}).items() if "ours" in name]
        CHECKS[record["benchmark"]](record)


def check_head(record):
    exponents = [name for name in record["variants"] if "grad_eps=2^" in name]
    assert len(exponents) == 5 if exponents else {*record["variants"]} >= OURS


def check_kernels(record):
    sparse = {"row_kernel", "owner_kernel", "scan_kernel", "compact_kernel"}
    screened = {"quantize_kernel", "screen_kernel", "refine_kernel", *sparse}
    wanted = {
        "forward alone": {"scan_kernel"}, "with lse_ref": sparse, "without lse_ref": sparse,
        "grad_eps=0": {"scan_kernel", "dlogits_kernel", "round_kernel"},
        "screen int8, with lse_ref": screened, "screen int8": screened,
        "screen fp8, with lse_ref": screened,
    }  # fmt: skip
    for part in ("kernels", "steps", "replayed"):
        assert wanted.keys() == record[part].keys()
    for step, kernels in wanted.items():
        assert kernels <= {*record["kernels"][step]}
    for tried in record.get("tune", ()):
        assert all(isinstance(ms, float) for ms in tried["ms"].values()), tried


def check_step(record):
    assert {name for name in record["variants"] if "ours" in name} == {
        "ours", "ours, with lse_ref", "ours, screen int8", "ours, screen fp8",
    }  # fmt: skip


def check_gate(record):
    assert {*record["loops"]} == {*bench_gate.LOOPS}


CHECKS = {"lm_head": check_head, "kernels": check_kernels, "step": check_step, "gate": check_gate}


# -- tests/gpu ------------------------------------------------------------------------------------

CALLS = [
    *(("test_exact_values_and_gradients", 17, 70, 72, dtype) for dtype in on_gpu.DTYPES),
    ("test_the_gpu_decides_as_the_cpu_does",),
    ("test_partial_squares_are_summed_in_a_fixed_order_in_fp64",),
    ("test_the_whole_update_in_one_graph", 0.0),
    ("test_a_shut_gate_leaves_nothing_to_do",),
    ("test_the_loop_never_waits_for_the_device",),
    ("test_energy_is_the_norm_as_stored_and_a_nan_changes_nothing",),
]
LONG = [
    ("test_screen_on_large_shapes", "int8"),
    ("test_screen_on_large_shapes", "fp8"),
    ("test_the_whole_update_in_one_graph", 2**-8),
]
NOT_HERE = {
    "test_random_tail_is_unbiased_and_reproducible": "256 draws: tests/test_triton_kernels.py",
    "test_more_than_2_to_the_31_logits": "5 GB of them",
}


def test_every_gpu_test_is_called_here_or_has_a_reason():
    named = {name for name, *_ in CALLS + LONG} | {*NOT_HERE}
    assert named == {name for name in vars(on_gpu) if name.startswith("test_")}


@pytest.mark.parametrize(
    "call", [*CALLS, *(pytest.param(c, marks=REHEARSAL) for c in LONG)], ids=str
)
def test_on_a_pretended_gpu(call, gpu, monkeypatch):
    name, *arguments = call
    made = on_gpu.inputs
    small = lambda n, v, d, *rest: made(min(n, 17), min(v, 70), min(d, 72), *rest)  # noqa: E731
    monkeypatch.setattr(on_gpu, "inputs", small)
    monkeypatch.setattr(on_gpu.loop, "__defaults__", (6, 40, 16))
    with gpu.only_launches() if "never_waits" in name else nullcontext():
        getattr(on_gpu, name)(*arguments)


# -- what only a GPU shows ------------------------------------------------------------------------


def test_a_gate_follows_its_weight_to_where_it_is_attached(gpu, monkeypatch):
    """As in a Trainer, which moves the model that it is given."""
    head = torch.nn.Linear(16, 40, bias=False)
    gate = GradientGate(GateConfig(threshold=math.inf), head.weight)
    gate.new_batch()
    head.weight = gate.weight = torch.nn.Parameter(head.weight.detach().to("cuda"))
    optimizer = torch.optim.AdamW([head.weight], fused=True)
    gate.attach(optimizer, max_grad_norm=1.0)
    x, y = torch.randn(8, 16, device="cuda"), torch.randint(40, (8,), device="cuda")
    before = head.weight.detach().clone()
    linear_logprob(x, head.weight, y, gate=gate).logp.mean().backward()
    gate.decide()
    optimizer.step()
    assert gate.applied_updates(wait=True) == 1
    assert not before.cpu().equal(head.weight.detach().cpu())
    monkeypatch.setattr(gate_module, "gate_devices", lambda: ("cpu",))
    with pytest.raises(RuntimeError, match="weight: expected one on a device that the gate has op"):
        GradientGate(GateConfig(), head.weight)


def test_an_eager_step_follows_a_replayed_decision(gpu):
    """As of an optimizer that cannot be captured: a replay tells the host of no decision."""
    x, weight, y = on_gpu.inputs(8, 40, 16, torch.float32)[:3]
    weight = torch.nn.Parameter(weight)
    gate = GradientGate(GateConfig(threshold=math.inf), weight)
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    gate.attach(optimizer, max_grad_norm=1.0)

    def decided():
        optimizer.zero_grad(set_to_none=True)
        linear_logprob(x, weight, y, gate=gate, grad_eps=0.0).logp.mean().backward()
        gate.decide()

    gate.new_batch()
    decided()
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decided()
    for broken in (False, True):
        gate.new_batch()
        if broken:
            x[1] = math.nan
        before = weight.detach().cpu()
        graph.replay()
        optimizer.step()
        assert weight.detach().cpu().equal(before) is broken


@pytest.mark.parametrize("ranks", [1, 2])
def test_several_ranks_hear_of_a_shut_gate_at_the_same_use(ranks, gpu, monkeypatch):
    gate = GradientGate(GateConfig(), torch.zeros(4, 2, device="cuda"))
    waits = []
    monkeypatch.setattr(gate._copied, "synchronize", lambda: waits.append(1), raising=False)
    monkeypatch.setattr(gate_module, "_world", lambda: ranks)
    gate.is_shut()
    gate.applied_updates()
    assert len(waits) == (2 if ranks > 1 else 0)


def test_outputs_are_fp32_whatever_torchs_default_is(gpu):
    inputs = on_gpu.inputs(4, 40, 16, torch.float32)
    torch.set_default_dtype(torch.float64)
    try:
        out = linear_logprob(*inputs[:3])
    finally:
        torch.set_default_dtype(torch.float32)
    assert {o.dtype for o in out[:4]} == {torch.float32}


def test_no_codes_are_kept_once_a_step_was_captured(gpu, monkeypatch):
    monkeypatch.setattr(screen, "_steps_are_captured", False)
    weight = torch.nn.Parameter(torch.randn(64, 16, device="cuda"))
    optimizer = torch.optim.AdamW([weight], fused=True, capturable=True)
    screen.codes_of(weight, "int8", weight)
    assert weight in screen._copies
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    screen.codes_of(weight, "int8", weight)
    assert len(screen._copies) == 0


# -- the pretence itself --------------------------------------------------------------------------


def refused(error, wrong):
    with pytest.raises(error):
        wrong()


def test_what_a_gpu_refuses(gpu):
    x, y = torch.ones(4, device="cuda"), torch.ones(4)
    refused(RuntimeError, lambda: x + y)
    refused(RuntimeError, lambda: y[x > 0])
    refused(RuntimeError, lambda: torch.rand(4, device="cuda", generator=torch.Generator()))
    refused(RuntimeError, lambda: torch.rand(4, generator=torch.Generator("cuda")))
    refused(TypeError, x.numpy)
    count = torch.ones(1, dtype=torch.int32)
    refused(ValueError, lambda: lm_head_forward.count_kernel[(1,)](x, x, count, x, 1, 2, 1))
    waits = [x.item, x.cpu, x.tolist, x.nonzero, lambda: x[x > 0], lambda: y.to("cuda"),
             lambda: y.copy_(x), lambda: bool((x > 0).all())]  # fmt: skip
    torch.cuda.set_sync_debug_mode("error")
    for wait in waits:
        refused(RuntimeError, wait)
    assert (x + 1).sum(0, keepdim=True).to("cuda", torch.float64).device.type == "cuda"
    torch.cuda.set_sync_debug_mode("default")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        for wait in waits:
            refused(RuntimeError, wait)
    assert x.tolist() == [1, 1, 1, 1]


def test_a_graph_runs_when_it_is_replayed(gpu):
    x, graph = torch.ones(4, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = (x.view(2, 2) * 2)[0]
        x += 1
    assert x.tolist() == [1, 1, 1, 1]
    for _ in range(3):
        graph.replay()
    assert x.tolist() == [4, 4, 4, 4] and y.tolist() == [6, 6]
