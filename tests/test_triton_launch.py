"""Every launch of a forward and backward, through triton's own path, for GPUs that are not there.

What lies between `kernel[grid](...)` and the driver is as on a GPU: specialisation by the real
arguments, descriptors, options of the architecture's configuration, compilation. Nothing runs.
In a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import time

import pytest
import torch
from pretend_gpu import REHEARSAL, pretended_gpu
from triton_tools import interpreting

from benchmarks import bench_kernels
from benchmarks.rows import Rows
from dgg_kernels import configs, linear_logprob

pytestmark = pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET=1 compiles nothing")

# For one block of rows: two rungs of redraws, whether or not there is a row to redraw.
SELECTION = {"gather_rows_kernel": 3, "count_kernel": 3, "compact_kernel": 1}
SPARSE = {"row_kernel": 1, "owner_kernel": 1}
SCREENED = {"quantize_kernel": 2, "gather_rows_kernel": 4, "count_kernel": 4, "compact_kernel": 1,
            "combine_kernel": 1, "scan_kernel": 3, "refine_kernel": 1, **SPARSE}  # fmt: skip
LAUNCHES = {
    "lse_ref": {**SELECTION, **SPARSE, "scan_kernel": 3, "combine_kernel": 1},
    "no reference": {**SELECTION, **SPARSE, "gather_rows_kernel": 4, "scan_kernel": 4,
                     "combine_kernel": 1},
    "exact": {"gather_rows_kernel": 2, "scan_kernel": 1, "combine_kernel": 1, "dlogits_kernel": 1,
              "round_kernel": 1},
    "int8": {**SCREENED, "screen_kernel": 1},
    "int8, no reference": {**SCREENED, "screen_kernel": 2},
    "fp8": {**SCREENED, "screen_kernel": 1},
}  # fmt: skip


def zeros(N, V, D):
    """hidden, weight, target, lse."""
    hidden, weight = (
        torch.zeros(n, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (N, V)
    )
    return hidden, weight, torch.zeros(N, device="cuda", dtype=torch.int64), hidden.new_zeros(N)


def capability(architecture):
    return divmod(int(architecture.removeprefix("sm_")), 10)


@pytest.mark.parametrize("way", LAUNCHES)
@pytest.mark.parametrize(
    "architecture", ["sm_90", *(pytest.param(a, marks=REHEARSAL) for a in ("sm_80", "sm_100"))]
)
def test_launches(architecture, way):
    if way == "fp8" and architecture == "sm_80":
        pytest.skip("fp8 begins with sm_89")
    options = {"grad_eps": 0.0} if way == "exact" else {}
    if way.startswith(("int8", "fp8")):
        options["screen"] = way.split(",")[0]
    with pretended_gpu(capability(architecture)) as gpu:
        hidden, weight, target, lse = zeros(256, 8192, 4096)
        if way in ("lse_ref", "int8", "fp8"):
            options["lse_ref"] = lse
        linear_logprob(hidden, weight, target, **options).logp.sum().backward()
    assert dict(gpu.launches) == LAUNCHES[way]
    tiles = sum(gpu.launches[k] for k in ("scan_kernel", "screen_kernel", "dlogits_kernel"))
    assert gpu.descriptors == (2 * tiles if configs.CONFIGS[architecture].tile.tma else 0)


@REHEARSAL
@pytest.mark.parametrize("architecture", ["sm_90", "sm_80", "sm_100"])
def test_candidates(architecture, monkeypatch):
    """What `bench_kernels --tune` would try fits the GPU."""
    with pretended_gpu(capability(architecture)) as gpu:
        monkeypatch.setattr(bench_kernels, "profile", gpu.profile)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        rows = Rows(*zeros(256, 8192, 4096), entropy=0.0, kept=0.0, softcap=None)
        tried = bench_kernels.tune(rows, torch.zeros(256, device="cuda"), lambda said: None)
    for candidate in tried:
        for step, ms in candidate["ms"].items():
            assert isinstance(ms, float) or (architecture == "sm_80" and "fp8" in step), candidate
