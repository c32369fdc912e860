"""Triton: all logits in 8-bit arithmetic, those that matter again at full precision.

Codes of hidden states and weights (int8 or fp8, one scale a row) give every logit z an estimate z~,
cheaply. An entry is kept with probability pi = min(1, exp(z~ - threshold)), as in the forward
without a screen, and every kept entry is computed anew from the numbers themselves. The sums over
the vocabulary then are

    sum of e^z  ~  sum over z~ < threshold of e^z~            (the tail, as screened)
                 + sum over kept, z~ >= threshold of e^z      (exact, apart: nothing cancels)
                 + sum over kept, z~ < threshold of (e^z - e^z~) / pi,

whose last line makes it unbiased: the screen is a control variate, and the entries drawn for the
gradient correct it. Rows that it does not suit are computed without it (see `suits`).
"""

# Triton's annotations describe a kernel's body, not its launch, and bodies are not quite Python;
# a kernel's parameters have the types that they are launched with.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportUnboundVariable=false, reportAttributeAccessIssue=false
# pyright: reportMissingParameterType=false

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import FUSED
from .lm_head_forward import (
    Entries,
    Head,
    by_rows,
    column_slices,
    combine,
    count_bits,
    gather_rows,
    inverse_probability,
    row_blocks,
    scale_logits,
    scan,
    sort_rows,
    store_kept,
    tile_position,
    tile_scores,
    uniform,
)
from .screen import Codes

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.bfloat16: 0.0}  # 0: scale 1

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# -- kernels --------------------------------------------------------------------------------------


@triton.jit
def above_threshold(
    coded, step, w_step, bias, above, inv_temperature, softcap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """log2(e) (z~ - threshold) from products of codes: what exp2 wants, in two operations."""
    if HAS_BIAS or SOFTCAP:
        raw = coded.to(tl.float32) * step * w_step
        if HAS_BIAS:
            raw += bias
        d = (scale_logits(raw, softcap, inv_temperature, SOFTCAP) - above) * LOG2_E
        # 0 log 0 = 0: a banned token has no part. A GPU's maximum drops a NaN, unless told not to.
        d = tl.maximum(d, -1e4, propagate_nan=tl.PropagateNan.ALL)
    else:
        d = coded.to(tl.float32) * (step * (inv_temperature * LOG2_E)) * w_step - above * LOG2_E
    return d


@triton.jit
def quantize_kernel(
    x, codes, scale, norm_sq, residual_sq, unchanged, D, x_stride, largest,
    BLOCK_D: tl.constexpr, INT8: tl.constexpr, ASK: tl.constexpr,
):  # fmt: skip
    """Codes of one row, its scale (amax / largest), and squared norms of row and rounding error.

    ASK: unless `unchanged` is 1.0, and they are there already.
    """
    if ASK:  # noqa: SIM102  # a pointer that is None cannot stand in an "and"
        if tl.load(unchanged) == 1.0:
            return
    i = tl.program_id(0).to(tl.int64)
    top = tl.zeros([BLOCK_D], tl.float32)
    for d in range(0, D, BLOCK_D):
        k = d + tl.arange(0, BLOCK_D)
        value = tl.load(x + i * x_stride + k, k < D, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.abs(value), propagate_nan=tl.PropagateNan.ALL)
    step = 1.0
    if largest > 0.0:
        step = tl.maximum(tl.max(top, 0), 1e-30) / largest
    square = tl.zeros([BLOCK_D], tl.float32)
    error = tl.zeros([BLOCK_D], tl.float32)
    for d in range(0, D, BLOCK_D):
        k = d + tl.arange(0, BLOCK_D)
        value = tl.load(x + i * x_stride + k, k < D, other=0.0).to(tl.float32)
        if INT8:
            code = tl.floor(value / step + 0.5)
        else:
            code = value / step
        rounded = code.to(codes.dtype.element_ty)
        tl.store(codes + i * D + k, rounded, k < D)
        off = value - rounded.to(tl.float32) * step
        square += value * value
        error += off * off
    tl.store(scale + i, step)
    tl.store(norm_sq + i, tl.sum(square, 0))
    tl.store(residual_sq + i, tl.sum(error, 0))


@triton.jit
def screen_kernel(
    x, w, x_scale, w_scale, bias, count, rows, threshold, seed, stats, bits,
    num_rows, V, D, w_stride, inv_temperature, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, TMA: tl.constexpr, EVEN_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, INT8: tl.constexpr, SELECT: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """One pass over the screened logits z~ of the first `count` rows of codes x [num_rows, D].

    SELECT, with e = exp(z~ - threshold): stats [3, vocabulary tiles, num_rows] are the sum of e
    over all entries, and the sums of e and e (z~ - threshold) over the tail, z~ < threshold; bits
    as in `scan_kernel`, but for the target's. Else the maximum m and the sum of exp(z~ - m).
    """
    SLICE: tl.constexpr = BLOCK_V // PARTS
    active = tl.load(count)
    num_tiles_v = tl.cdiv(V, BLOCK_V)
    num_row_blocks = tl.cdiv(active, BLOCK_N)
    num_tiles = num_row_blocks * num_tiles_v
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLAT):
        block, tile_v = tile_position(tile, num_row_blocks, num_tiles_v, GROUP)
        scores = tile_scores(x, w, block * BLOCK_N, tile_v * BLOCK_V, num_rows, V, D, w_stride,
                             BLOCK_N, BLOCK_V, BLOCK_D, TMA, EVEN_D, INT8)  # fmt: skip
        i = block * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = i < active
        step = tl.load(x_scale + i, valid, other=0.0)
        above = tl.zeros([BLOCK_N], tl.float32)
        if SELECT:
            row = tl.load(rows + i, valid, other=0).to(tl.uint32)
            above = tl.load(threshold + i, valid, other=0.0)
            seed32 = tl.load(seed).to(tl.uint32)
        m = tl.full([BLOCK_N], -1e30, tl.float32)
        total = tl.zeros([BLOCK_N], tl.float32)
        s = tl.zeros([BLOCK_N], tl.float32)
        t = tl.zeros([BLOCK_N], tl.float32)
        slices = column_slices(scores, BLOCK_N, BLOCK_V, PARTS)
        for part in tl.static_range(PARTS):
            first = tile_v * BLOCK_V + part * SLICE
            v = first + tl.arange(0, SLICE)
            w_step = tl.load(w_scale + v, v < V, other=0.0)
            b = tl.zeros([SLICE], tl.float32)
            if HAS_BIAS:
                b = tl.load(bias + v, v < V, other=0.0).to(tl.float32)
            d = above_threshold(slices[part], step[:, None], w_step[None, :], b[None, :],
                                above[:, None], inv_temperature, softcap,
                                HAS_BIAS, SOFTCAP)  # fmt: skip
            d = tl.where((v < V)[None, :], d, -1e4)
            if SELECT:
                e = tl.exp2(d)
                tail = tl.where(d >= 0.0, 0.0, e)
                total += tl.sum(e, 1)
                s += tl.sum(tail, 1)
                t += tl.sum(tail * d, 1)
                keep = uniform(row[:, None], v.to(tl.uint32)[None, :], seed32) < e
                store_kept(keep, bits, i, valid, first, V, BLOCK_N, SLICE)
            else:
                m_new = tl.maximum(m, tl.max(d, 1))
                s = s * tl.exp2(m - m_new) + tl.sum(tl.exp2(d - m_new[:, None]), 1)
                m = m_new
        out = stats + tile_v.to(tl.int64) * num_rows + i
        plane = tl.cast(num_tiles_v, tl.int64) * num_rows
        if SELECT:
            tl.store(out, total, valid)
            tl.store(out + plane, s, valid)
            tl.store(out + 2 * plane, t * LN_2, valid)
        else:
            tl.store(out, m * LN_2, valid)
            tl.store(out + plane, s, valid)


@triton.jit
def refine_kernel(
    x, w, x_codes, w_codes, x_scale, w_scale, bias, count, rows, target, exact, threshold, far_lse,
    tail, start, kept, columns, weights, logp, entropy, lse, sum_p2, report,
    num_rows, D, w_stride, code_stride, inv_temperature, softcap, log_eps,
    BLOCK_D: tl.constexpr, ENTRIES: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """One row: its kept entries at full precision, their weights 1 / pi, and the row's results.

    Where `exact`, the row was selected by its exact logits, and its results are there already.
    """
    i = tl.program_id(0).to(tl.int64)
    if i >= tl.load(count):
        return
    r = tl.load(rows + i)
    y = tl.load(target + r)
    above = tl.load(threshold + r)
    first = tl.load(start + r).to(tl.int64)
    num_entries = tl.load(kept + r)
    is_exact = tl.load(exact + i) != 0
    step = tl.load(x_scale + i)
    important = tl.load(far_lse + i) + log_eps - above  # where p = eps, relative to the threshold
    s = tl.zeros([ENTRIES], tl.float32)
    t = tl.zeros([ENTRIES], tl.float32)
    q = tl.zeros([ENTRIES], tl.float32)
    missed = tl.zeros([ENTRIES], tl.float32)
    error_sq = tl.zeros([ENTRIES], tl.float32)
    z_target = tl.zeros([ENTRIES], tl.float32)
    for e in range(0, num_entries, ENTRIES):
        j = e + tl.arange(0, ENTRIES)
        here = j < num_entries
        v = tl.load(columns + first + j, here, other=0)
        raw = tl.zeros([ENTRIES], tl.float32)
        if INT8:
            coded = tl.zeros([ENTRIES], tl.int32)
        else:
            coded = tl.zeros([ENTRIES], tl.float32)
        for d in range(0, D, BLOCK_D):
            k = d + tl.arange(0, BLOCK_D)
            inside = here[:, None] & (k < D)[None, :]
            at = v.to(tl.int64)[:, None]
            piece = tl.load(w + at * w_stride + k[None, :], inside, other=0.0).to(tl.float32)
            x_piece = tl.load(x + i * D + k, k < D, other=0.0).to(tl.float32)
            raw += tl.sum(piece * x_piece[None, :], 1)
            if INT8:
                code = tl.load(w_codes + at * code_stride + k[None, :], inside, other=0)
                x_code = tl.load(x_codes + i * D + k, k < D, other=0)
                coded += tl.sum(code.to(tl.int32) * x_code.to(tl.int32)[None, :], 1)
            else:
                code = tl.load(w_codes + at * code_stride + k[None, :], inside, other=0.0)
                x_code = tl.load(x_codes + i * D + k, k < D, other=0.0)
                coded += tl.sum(code.to(tl.float32) * x_code.to(tl.float32)[None, :], 1)
        b = tl.zeros([ENTRIES], tl.float32)
        if HAS_BIAS:
            b = tl.load(bias + v, here, other=0.0).to(tl.float32)
            raw += b
        # Both relative to the threshold.
        z = scale_logits(raw, softcap, inv_temperature, SOFTCAP) - above
        w_step = tl.load(w_scale + v, here, other=0.0)
        z_far = LN_2 * above_threshold(coded, step, w_step, b, above, inv_temperature, softcap,
                                       HAS_BIAS, SOFTCAP)  # fmt: skip
        z_far = tl.where(is_exact, z, z_far)
        hit = v == y
        weight = inverse_probability(z_far)
        weight = tl.where((z_far >= 0.0) | hit, 1.0, weight)  # the target is kept whatever its u
        tl.store(weights + first + j, weight, here)
        a = tl.where(here, tl.exp(tl.minimum(z, 80.0)), 0.0)
        in_tail = tl.where(here & (z_far < 0.0), tl.exp(tl.minimum(z_far, 0.0)), 0.0)
        s += weight * (a - in_tail)
        t += weight * (a * tl.maximum(z, -1e4) - in_tail * z_far)
        q += weight * a * a  # the drawn ones alone are unbiased, and of no weight in this sum
        missed += tl.where(here & (z > important), weight - 1.0, 0.0)
        off = tl.where(here, z - z_far, 0.0)
        error_sq += off * off
        z_target += tl.where(hit & here, z, 0.0)
    if is_exact:
        return
    S = tl.load(tail + i) + tl.sum(s, 0)
    T = tl.load(tail + num_rows + i) + tl.sum(t, 0)
    log_s = tl.log(S)
    tl.store(lse + r, above + log_s)
    tl.store(logp + r, tl.sum(z_target, 0) - log_s)
    tl.store(entropy + r, log_s - T / S)
    tl.store(sum_p2 + r, tl.sum(q, 0) / (S * S))
    tl.store(report + r * 4 + 1, num_entries.to(tl.float32))
    tl.store(report + r * 4 + 2, tl.sum(error_sq, 0))
    tl.store(report + r * 4 + 3, tl.sum(missed, 0))


# -- host -----------------------------------------------------------------------------------------


def quantize_rows(x: Tensor, dtype: torch.dtype) -> Codes:
    """Codes of x [R, D], one scale a row."""
    made = Codes.empty(x, dtype)
    quantize_rows_into(x, made)
    return made


def quantize_rows_into(x: Tensor, to: Codes, unchanged: Tensor | None = None) -> None:
    """Writes the codes of x [R, D], unless the 0-dim fp32 `unchanged` is 1.0."""
    R, D = x.shape
    x = by_rows(x)
    if R > 0:
        quantize_kernel[(R,)](
            x, *to, unchanged, D, x.stride(0), LARGEST[to.codes.dtype],
            BLOCK_D=min(4096, triton.next_power_of_2(D)), INT8=to.codes.dtype == torch.int8,
            ASK=unchanged is not None, **FUSED,
        )  # fmt: skip


# Standard deviations of the screen's error that the threshold is lowered by: an entry with p > eps
# then is kept with certainty but for one in a thousand or so.
MARGIN = 3.0
# The bound on a row's log-prob error is so many standard deviations of the sums' own error.
BOUND = 5.0
# Tensor cores add up products of fp8 with about 14 bits, cut off towards zero: screened logits are
# off by this, in nats, in a way that the refinement, which adds up in fp32, does not see.
FP8_SUMS = 0.1
# Rows whose bound is higher, in nats, are computed exactly;
LIMIT = 1e-2
# and so are rows where a screened logit's own error is larger, in nats,
NOISE_LIMIT = 1.0
# or whose reference is off by more, in nats: the draw would be a poor one.
REFERENCE_OFF = 1.0


def screen_vocabulary(
    head: Head,
    screen: Sequence[Tensor],  # codes, scale, norm_sq, residual_sq of the weight
    mask: Tensor,  # [N] bool: rows with work
    reference: Tensor | None,  # [N] fp32: an estimate of lse
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],  # logp, entropy, lse, sum_p2 [N]
    report: Tensor,  # [N, 4] fp32: bound (-1: exact), entries refined, squared error, missed
) -> Tensor:
    """Goes over all screened logits, by blocks of rows; returns the kept entries."""
    _, V, D = head.sizes
    entries = Entries.empty(head, weighted=True)
    weight = Codes(*screen)
    block_v = min(head.tile_of(t).block_v for t in (head.hidden, weight.codes))
    row_bytes = D * (2 * head.hidden.element_size() + weight.codes.element_size())
    row_bytes += 16 * triton.cdiv(V, block_v) + 4 * triton.cdiv(V, 32)
    for first, rows, count, x in row_blocks(head, mask, row_bytes):
        M = len(rows)
        device = x.device
        here = torch.arange(M, device=device) < count
        log_eps = math.log(head.grad_eps)
        codes = quantize_rows(x, weight.codes.dtype)
        # What codes leave out acts like noise on every product: its standard deviation, in nats.
        noise_sq = codes.residual_sq * typical(weight.norm_sq)
        noise_sq += codes.norm_sq * typical(weight.residual_sq)
        sigma = noise_sq.div(D).sqrt() / head.temperature
        ref = rough_lse(head, weight, codes, count, rows) if reference is None else reference[rows]
        fp8 = weight.codes.dtype == torch.float8_e4m3fn
        threshold = ref + (log_eps - MARGIN * sigma - (FP8_SUMS if fp8 else 0.0))
        bits = torch.empty(M, triton.cdiv(V, 32), dtype=torch.int32, device=device)
        stats = screened_scan(head, weight, codes, count, rows, threshold, bits)
        keep_targets(bits, head.target[rows])
        total, *tail = (plane.sum(0) for plane in stats.unbind(0))
        del stats
        far_lse = threshold + total.log()
        share = tail[0] / total
        bound = BOUND * sigma * (share / total).sqrt()
        if fp8:
            bound += FP8_SUMS * share
        suits = (bound <= LIMIT) & (sigma <= NOISE_LIMIT) & ((far_lse - ref).abs() <= REFERENCE_OFF)
        suits &= count_bits(head, bits, count) <= entries.slots
        exact = here & ~suits
        # The other rows are selected, and summed up, by their exact logits.
        threshold = torch.where(exact, far_lse.where(far_lse.isfinite(), ref) + log_eps, threshold)
        scan_exactly(head, x, exact, rows, threshold, bits, outputs)
        entries.add(head, x, count, rows, threshold, bits, outputs[2][rows], first)
        report[rows, 0] = torch.where(exact, -1.0, torch.where(here, bound, 0.0))
        gather = head.config.refine.options(D, head.weight.element_size())
        refine_kernel[(M,)](
            x, head.weight, codes.codes, weight.codes, codes.scale, weight.scale, head.bias, count,
            rows, head.target, exact, entries.threshold, far_lse, torch.stack(tail), entries.start,
            entries.count, entries.columns, entries.weights, *outputs, report,
            M, D, head.weight.stride(0), weight.codes.stride(0), *head.scalars, log_eps,
            INT8=weight.codes.dtype == torch.int8, **head.switches, **gather,
        )  # fmt: skip
    return entries.packed


def typical(squares: Tensor) -> Tensor:
    """A mean in which large values, whose logits matter most, count for most, 0-dim fp32."""
    return squares.square().sum() / squares.sum().clamp(min=1e-30)


def keep_targets(bits: Tensor, target: Tensor) -> None:
    """Sets the bit of every row's target [M] (rows of -1 are not looked at again)."""
    word = (target.clamp(min=0) // 32)[:, None]
    bit = (1 << (target % 32)).to(torch.int32)[:, None]
    bits.scatter_(1, word, bits.gather(1, word) | bit)


def rough_lse(head: Head, weight: Codes, codes: Codes, count: Tensor, rows: Tensor) -> Tensor:
    """Log-sum-exp of the screened logits [M] fp32."""
    m, s, _ = screened_scan(head, weight, codes, count, rows, None, None).unbind(0)
    top = m.amax(0)
    return top + (s * (m - top).exp()).sum(0).log()


def scan_exactly(
    head: Head,
    x: Tensor,  # [M, D]
    chosen: Tensor,  # [M] bool
    rows: Tensor,  # [M] int64
    threshold: Tensor,  # [M] fp32
    bits: Tensor,  # [M, words], written anew for the chosen rows
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Results and selection of some rows of a block without the screen."""
    M = len(rows)
    place, count = sort_rows(chosen)
    tiles = triton.cdiv(head.weight.shape[0], head.tile_of(head.hidden).block_v)
    stats = torch.empty(4, tiles, M, dtype=torch.float32, device=x.device)
    target_logit = torch.empty(M, dtype=torch.float32, device=x.device)
    gathered = gather_rows(head, x, place, count)
    scan(head, gathered, count, place, rows, threshold, bits, stats, target_logit)
    combine(stats, target_logit, count, place, rows, outputs)


def screened_scan(
    head: Head,
    weight: Codes,
    hidden: Codes,  # of the block's M rows
    count: Tensor,  # [1] int32: rows that are there
    rows: Tensor,  # [M] int64
    threshold: Tensor | None,  # [M] fp32, with
    bits: Tensor | None,  # [M, words] int32, written
) -> Tensor:
    """Runs `screen_kernel`; stats [3, tiles, M]."""
    M, D = hidden.codes.shape
    V = weight.codes.shape[0]
    tile = head.tile_of(weight.codes)
    operands, options = head.operands(hidden.codes, weight.codes)
    tiles = triton.cdiv(V, tile.block_v)
    stats = torch.zeros(3, tiles, M, dtype=torch.float32, device=hidden.codes.device)
    screen_kernel[(head.programs(hidden.codes, V),)](
        *operands, hidden.scale, weight.scale, head.bias, count, rows, threshold,
        head.seed, stats, bits, M, V, D, weight.codes.stride(0), *head.scalars,
        INT8=weight.codes.dtype == torch.int8, SELECT=bits is not None, FLAT=tile.flat,
        **head.switches, **options,
    )  # fmt: skip
    return stats
