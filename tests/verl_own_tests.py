"""verl's own tests of its fused head, with this package's in its place.

    python tests/verl_own_tests.py CHECKOUT [--save NAME]
    torchrun --nproc_per_node 2 tests/verl_own_tests.py CHECKOUT --parallel [--save NAME]

CHECKOUT is a folder with verl's `tests/utils`, which its wheel and sdist do not ship; of verl
itself `verl.utils` is enough, with what it imports: torch, transformers, tensordict. On a GPU the
tests run as they are, in bf16. Without one the CPU stands in for "cuda", in fp32; cases other than
FULL then have fewer rows and a quarter of the vocabulary. `--parallel` shares the vocabulary over
the ranks, 1/16 of it each: those tests' own LOW_MEMORY. What ran on what, and how it ended, goes
into a record beside the benchmarks'.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import common
from benchmarks.peers import PEERS, import_peer
from dgg_kernels.integrations.verl_head import use_linear_cross_entropy

CASES = range(5)
FULL = 2  # the case that a CPU can run whole
ON_GPU = torch.cuda.is_available()
FIRST = os.environ.get("RANK", "0") == "0"


def on_the_cpu(create: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch that makes a tensor: of fp32, on the CPU, whatever is asked for."""

    def created(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if kwargs.get("dtype") is torch.bfloat16:
            kwargs["dtype"] = torch.float32
        return create(*args, **kwargs)

    return created


def pretended() -> SimpleNamespace:
    """`torch` for a module that asks for "cuda" and is to get the CPU; times and memory read 0."""
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda _: 0.0)
    nothing = ("empty_cache", "reset_peak_memory_stats", "synchronize", "set_device")
    cuda = dict.fromkeys(nothing, lambda *_: None) | {
        "Event": lambda **_: event, "max_memory_allocated": lambda: 0, "is_available": lambda: True,
    }  # fmt: skip
    made = {name: on_the_cpu(getattr(torch, name)) for name in ("empty", "zeros", "randint")}
    return SimpleNamespace(**vars(torch) | made | {"cuda": SimpleNamespace(**cuda)})


def load(checkout: Path, name: str) -> Any:
    path = checkout / "tests" / "utils" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not ON_GPU:
        module.torch = pretended()
    return module


def smaller(test: Any, rows: int, share: int) -> None:
    """Bound its rows and divide its vocabulary, where the CPU stands in."""
    whole = test.generate_hyper

    def hyper() -> None:
        whole()
        test.dtype = test.dtype if ON_GPU else torch.float32
        if not ON_GPU and test.test_case_idx != FULL:
            test.num_tokens = min(rows, test.num_tokens)
            test.vocab_size //= share

    test.generate_hyper = hyper


def attempt(
    record: dict[str, Any], save: str | None, name: str, test: Any, run: Callable[[], None]
) -> None:
    """Run a case and note how it ended, whatever ends it."""
    began, result = time.perf_counter(), "passed"
    try:
        run()
    except Exception as error:
        result = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
    shape = [getattr(test, size, None) for size in ("num_tokens", "hidden_size", "vocab_size")]
    row = {"test": name, "rows, features, vocabulary": shape, "result": result,
           "dtype": str(getattr(test, "dtype", "")),
           "seconds": round(time.perf_counter() - began, 1)}  # fmt: skip
    record["tests"].append(row)
    if FIRST:
        print(row, flush=True)
        if save:
            common.save(save, record)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--parallel", action="store_true", help="the vocabulary over the ranks")
    parser.add_argument("--grad-eps", type=float, default=0.0, help="of our head (default: exact)")
    parser.add_argument("--save", metavar="NAME")
    args = parser.parse_args()
    os.environ.setdefault("LOW_MEMORY", "1")
    import_peer(PEERS["verl"][1])  # without the packages around it, which want ray and more
    use_linear_cross_entropy(grad_eps=args.grad_eps)
    rounds = 5 if ON_GPU else 2  # the first is not timed
    stamp = common.stamp(torch.device("cuda" if ON_GPU else "cpu"), torch.get_num_threads())
    record: dict[str, Any] = {"stamp": stamp, "ranks": 1, "grad_eps": args.grad_eps, "tests": []}
    note = partial(attempt, record, args.save)
    if args.parallel:
        module = load(args.checkout, "test_special_linear_cross_entropy_tp")
        begin = dist.init_process_group
        stand_in = {} if ON_GPU else {"backend": "gloo"}
        with mock.patch.object(dist, "init_process_group", lambda **kw: begin(**kw | stand_in)):
            test = module.TestLinearCrossEntropy_TensorParallel()
        smaller(test, 64, 1)
        record["ranks"] = test.world_size
        for case in CASES:
            test.initialize(case)
            run = partial(test.verify_kernel_correctness, rounds)
            note(f"vocabulary-parallel case {case}", test, run)
        test.shutdown()
    else:
        module = load(args.checkout, "test_linear_cross_entropy")
        if importlib.util.find_spec("flash_attn") is None:
            # verl's log-probs, one of what ours are compared with, flatten labels with it alone.
            theirs = module.logprobs_from_logits
            module.logprobs_from_logits = lambda logits, labels, **kwargs: theirs(
                logits=logits, labels=labels.reshape(logits.shape[:-1]), **kwargs
            )
        for case in CASES:
            test = module.TestLinearCrossEntropy(case)
            smaller(test, 64, 4)
            note(f"case {case}", test, partial(test.verify_correctness, rounds))
        note("padded vocabulary", None, module.test_lce_non_divisible_vocab_padding)
    passed = sum(row["result"] == "passed" for row in record["tests"])
    if FIRST:
        print(f"{passed} of {len(record['tests'])} passed")
    return int(passed < len(record["tests"]))


if __name__ == "__main__":
    sys.exit(main())
