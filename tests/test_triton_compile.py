"""Every Triton kernel, compiled for GPUs that need not be there: no spills, memory within limits.

Run in a process of its own, without TRITON_INTERPRET: `pytest tests/test_triton_compile.py`.
"""

import pytest
import triton
from triton_tools import SHARED_MEMORY, compile_kernel, interpreting, usage

from dgg_kernels import lm_head_backward as backward
from dgg_kernels import lm_head_forward as forward
from dgg_kernels import lm_head_screen as screen
from dgg_kernels.configs import CONFIGS

pytestmark = pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET=1 compiles nothing")

ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "gfx942"]

EIGHT_BITS = ("i8", "fp8e4nv")
# Instructions that touch local memory. Triton 3.6, with which the H100's records were taken and
# this tile was the fastest, lacks a few registers for the loop over tiles and features in one.
SPILLS = {("scan_kernel", "sm_90"): 95} if triton.__version__.startswith("3.6.") else {}
TYPES = {
    **dict.fromkeys(["count", "kept", "bits", "columns", "keys", "owners"], "*i32"),
    **dict.fromkeys(["start", "index"], "*i32"),
    **dict.fromkeys(["place", "rows", "target", "seed", "begin", "end", "limit", "order"], "*i64"),
    **dict.fromkeys(["threshold", "stats", "target_logit", "logp", "entropy", "lse"], "*fp32"),
    **dict.fromkeys(["sum_p2", "values", "grad_logp", "grad_entropy", "grad_lse"], "*fp32"),
    **dict.fromkeys(["row_sq", "sums", "scale"], "*fp32"),
    **dict.fromkeys(["num_rows", "num_words", "num_tiles_v", "num_owners", "V", "D"], "i32"),
    **dict.fromkeys(["x_stride", "w_stride", "source_stride", "first_column"], "i32"),
    **dict.fromkeys(["x_scale", "w_scale", "far_lse", "tail", "weights", "report"], "*fp32"),
    **dict.fromkeys(["norm_sq", "residual_sq"], "*fp32"),
    **dict.fromkeys(["inv_temperature", "softcap", "log_eps", "largest"], "fp32"),
    "exact": "*i1",
    "code_stride": "i32",
}


def check(
    kernel, architecture, dtype, constants, num_warps, num_stages=1, *, absent=(), tiles=None
):
    """Compiles a kernel; returns its usage, which must have no spills and fit the GPU."""
    signature = {}
    for name in kernel.arg_names:
        if name not in constants and name not in absent:
            signature[name] = TYPES.get(name, f"*{dtype}")  # what has no type of its own: data
    signature |= tiles or {}
    used = usage(compile_kernel(kernel, architecture, signature, constants, num_warps, num_stages))
    print(f"{architecture} {kernel.__name__} {dtype} {used}")
    if allowed := SPILLS.get((kernel.__name__, architecture)):
        assert used.spills <= allowed
    else:
        assert used.spills == 0
        assert used.stack == 0
    assert used.shared <= SHARED_MEMORY[architecture]
    return used


def tile(architecture, dtype, crowded):
    """The tile that `Head.tile` takes; crowded: bias and softcap together."""
    config = CONFIGS[architecture]
    if dtype == "fp32":
        return config.tile_fp32
    if dtype in EIGHT_BITS:
        return config.tile_8bit
    return (config.tile_crowded if crowded else None) or config.tile


def check_tile(kernel, architecture, dtype, constants, *, crowded=False, absent=()):
    """`check` for a kernel of logits tiles, with the tensor cores and the TMA it claims."""
    t = tile(architecture, dtype, crowded)
    constants = {
        "BLOCK_N": t.block_n, "BLOCK_V": t.block_v, "BLOCK_D": t.block_d, "GROUP": t.group,
        "PARTS": t.parts, "TMA": t.tma, "EVEN_D": True,
        "HAS_BIAS": crowded, "SOFTCAP": crowded, **constants,
    }  # fmt: skip
    tiles = {
        "x": f"tensordesc<{dtype}[{t.block_n}, {t.block_d}]>",
        "w": f"tensordesc<{dtype}[{t.block_v}, {t.block_d}]>",
    }
    absent = {*absent, *(() if crowded else ("bias",))}
    used = check(kernel, architecture, dtype, constants, t.num_warps, t.num_stages,
                 absent=absent, tiles=tiles if t.tma else None)  # fmt: skip
    if dtype != "fp32":
        assert used.wgmma == (architecture == "sm_90")
        # Blackwell's tensor memory takes no int8 from triton: the older instruction, then.
        assert used.tcgen05 == (architecture == "sm_100" and dtype != "i8")
        assert used.tma == t.tma
    if architecture == "sm_80":
        assert used.shared <= 101_376  # consumer GPUs run this configuration
    return used


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("dtype", "stats", "select", "crowded"),
    [
        ("bf16", True, True, False),
        ("bf16", True, True, True),
        ("bf16", False, True, False),
        ("fp16", True, False, False),
        ("fp32", True, True, True),
    ],
)
def test_scan(architecture, dtype, stats, select, crowded):
    absent = ([] if stats else ["stats", "target_logit"]) + (
        [] if select else ["threshold", "seed", "bits"]
    )
    flat = tile(architecture, dtype, crowded).flat
    constants = {"STATS": stats, "SELECT": select, "FLAT": flat}
    check_tile(forward.scan_kernel, architecture, dtype, constants, crowded=crowded, absent=absent)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("dtype", "crowded"), [("bf16", False), ("bf16", True), ("fp16", False), ("fp32", True)]
)
def test_dlogits(architecture, dtype, crowded):
    everything = dtype != "fp16"
    absent = () if everything else ("grad_entropy", "grad_lse")
    check_tile(backward.dlogits_kernel, architecture, dtype,
               {"HAS_ENTROPY": everything, "HAS_LSE": everything},
               crowded=crowded, absent=absent)  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "bytes_per_number"), [("bf16", 2), ("fp16", 2), ("fp32", 4)])
@pytest.mark.parametrize(("D", "in_registers"), [(1024, True), (4096, True), (8192, True),
                                                 (16384, False)])  # fmt: skip
def test_row(architecture, dtype, bytes_per_number, D, in_registers):
    config = CONFIGS[architecture]
    options = (config.row if in_registers else config.pieces).options(D, bytes_per_number)
    num_warps = options.pop("num_warps")
    everything = dtype != "fp16"
    switches = dict.fromkeys(["HAS_BIAS", "HAS_ENTROPY", "HAS_LSE", "SOFTCAP"], everything)
    constants = {"SUM": in_registers, "WEIGHTED": dtype == "bf16", **switches}
    absent = (
        ([] if dtype == "bf16" else ["weights"])
        + ([] if in_registers else ["dx"])
        + ([] if everything else ["bias", "grad_entropy", "grad_lse"])
    )
    check(backward.row_kernel, architecture, dtype, constants | options, num_warps, absent=absent)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "bytes_per_number"), [("bf16", 2), ("fp32", 4)])
def test_owner(architecture, dtype, bytes_per_number):
    options = CONFIGS[architecture].owner.options(4096, bytes_per_number)
    num_warps = options.pop("num_warps")
    constants = {"STORE": True, "SQUARES": True, "BIAS": True}
    check(backward.owner_kernel, architecture, dtype, constants | options, num_warps)


@pytest.mark.parametrize("select", [False, True])
@pytest.mark.parametrize(
    ("architecture", "codes"),
    [("sm_80", "i8"), *((a, codes) for a in ("sm_90", "sm_100") for codes in EIGHT_BITS)],
)
def test_screen(architecture, codes, select):
    absent = [] if select else ["rows", "threshold", "seed", "bits"]
    constants = {"INT8": codes == "i8", "SELECT": select, "FLAT": tile(architecture, codes, 0).flat}
    check_tile(screen.screen_kernel, architecture, codes, constants, absent=absent)


@pytest.mark.parametrize(
    ("architecture", "codes"), [("sm_80", "i8"), ("sm_90", "i8"), ("sm_90", "fp8e4nv"),
                                ("sm_100", "fp8e4nv"), ("sm_90", "bf16")],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_refine(architecture, codes, dtype):
    options = CONFIGS[architecture].refine.options(4096, 4 if dtype == "fp32" else 2)
    num_warps = options.pop("num_warps")
    constants = {"HAS_BIAS": True, "SOFTCAP": True, "INT8": codes == "i8", **options}
    tiles = {"x_codes": f"*{codes}", "w_codes": f"*{codes}"}
    check(screen.refine_kernel, architecture, dtype, constants, num_warps, tiles=tiles)
    constants = {"BLOCK_D": 4096, "INT8": codes == "i8", "ASK": True}
    check(screen.quantize_kernel, architecture, dtype, constants, 4,
          tiles={"codes": f"*{codes}"})  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_small_kernels(architecture):
    bits = CONFIGS[architecture].bits
    blocks = {"BLOCK_N": bits.rows, "BLOCK_W": bits.words}
    check(forward.count_kernel, architecture, "", blocks, bits.num_warps)
    check(forward.compact_kernel, architecture, "", blocks, bits.num_warps)
    check(forward.gather_rows_kernel, architecture, "bf16",
          {"BLOCK_N": bits.rows, "BLOCK_D": 2048}, 4)  # fmt: skip
    check(forward.combine_kernel, architecture, "", {"BLOCK_N": 32, "BLOCK_T": 32}, 8)
    constants = {"BLOCK_D": 1024, "STORE": True, "SQUARES": True}
    check(backward.round_kernel, architecture, "bf16", constants, 4)


def test_sizes_of_one():
    """An integer argument of 1 reaches a kernel as a constant, which has fewer methods."""
    one = dict.fromkeys(["num_rows", "num_words", "num_tiles_v", "num_owners", "V", "D"], 1)
    one |= dict.fromkeys(["x_stride", "w_stride", "source_stride", "first_column"], 1)
    tile = {"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_D": 32, "GROUP": 8, "PARTS": 1, "TMA": False,
            "EVEN_D": False}  # fmt: skip
    bits = {"BLOCK_N": 2, "BLOCK_W": 1}
    on = {"HAS_BIAS": True, "SOFTCAP": True}
    entropy = {"HAS_ENTROPY": True, "HAS_LSE": True}
    for kernel, constants in (
        (forward.scan_kernel, {**tile, **on, "STATS": True, "SELECT": True, "FLAT": False}),
        (forward.combine_kernel, {"BLOCK_N": 32, "BLOCK_T": 32}),
        (forward.count_kernel, bits),
        (forward.compact_kernel, bits),
        (forward.gather_rows_kernel, {"BLOCK_N": 2, "BLOCK_D": 1}),
        (backward.dlogits_kernel, {**tile, **on, **entropy}),
        (backward.row_kernel, {**on, **entropy, "BLOCK_D": 1, "ENTRIES": 4, "SUM": True}),
        (backward.owner_kernel,
         {"BLOCK_D": 1, "ENTRIES": 8, "STORE": True, "SQUARES": True, "BIAS": True}),
        (backward.round_kernel, {"BLOCK_D": 1, "STORE": True, "SQUARES": True}),
    ):  # fmt: skip
        sizes = {name: 1 for name in one if name in kernel.arg_names}
        check(kernel, "sm_90", "bf16", {**constants, **sizes}, num_warps=4)
