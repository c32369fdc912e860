"""Triton backward of the lm_head: sparse in the entries that the forward kept, or exact.

Sparse: one program per row gathers the rows of W that it kept, recomputes their logits, and sums
dX; the entries are then sorted by vocabulary index, and one program per row of dW (and piece of D)
gathers rows of X, writes the final value once, and squares it while it is in registers. No
atomics, no locks: the same bits every time.
Exact (grad_eps = 0): dlogits by chunks of the vocabulary, multiplied by the library's GEMM.
"""

# Triton's annotations describe a kernel's body, not its launch, and bodies are not quite Python;
# a kernel's parameters have the types that they are launched with.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportUnboundVariable=false, reportAttributeAccessIssue=false
# pyright: reportMissingParameterType=false

from dataclasses import dataclass, replace

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
    gather_rows,
    inverse_probability,
    scale_logits,
    scan_vocabulary,
    sort_rows,
    tile_position,
    tile_scores,
)

# Extra memory of the exact backward: what grows with rows, and with one chunk of the vocabulary.
EXACT_ROW_BYTES = 320 * 2**20
EXACT_CHUNK_BYTES = 160 * 2**20

# -- device functions -----------------------------------------------------------------------------


@triton.jit
def logit_gradient(
    z, hit, weight, c, c_entropy, mass, lse, softcap, inv_temperature, SOFTCAP: tl.constexpr
):
    """dL/d(h . W_v + b_v) of logits z; `weight` is 1 / (probability of having been kept).

    `mass`, c - c_lse + c_entropy entropy: of the row's factors, what the kernel keeps in registers.
    """
    logp = z - lse
    p = tl.exp(logp)
    slope = mass + c_entropy * logp
    # 0 log 0 = 0: a banned token has no part.
    d = tl.where(hit, c, 0.0) - tl.where(p == 0.0, 0.0, weight * p * slope)
    if SOFTCAP:
        tanh = z / (inv_temperature * softcap)
        d *= 1.0 - tanh * tanh
    return d * inv_temperature


# -- kernels: sparse ------------------------------------------------------------------------------


@triton.jit
def row_kernel(
    x, w, bias, target, lse, entropy, grad_logp, grad_entropy, grad_lse, start, count, threshold,
    columns, weights, keys, values, owners, dx,
    D, x_stride, w_stride, inv_temperature, softcap,
    BLOCK_D: tl.constexpr, ENTRIES: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_LSE: tl.constexpr,
    SOFTCAP: tl.constexpr, SUM: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """One row: (keys, values, owners) = (v, dL/draw_v, row) of its entries, and their sum, dX.

    SUM, for D <= BLOCK_D: a gathered row of W gives the logit and takes part in dX (zeros where a
    row has no entries). Else the logits alone, by pieces of BLOCK_D.
    """
    i = tl.program_id(0).to(tl.int64)
    y = tl.load(target + i)
    c = tl.load(grad_logp + i)
    works = c != 0.0
    mass = c
    c_entropy = 0.0
    if HAS_ENTROPY:
        c_entropy = tl.load(grad_entropy + i)
        mass += c_entropy * tl.load(entropy + i)
        works |= c_entropy != 0.0
    if HAS_LSE:
        c_lse = tl.load(grad_lse + i)
        mass -= c_lse
        works |= c_lse != 0.0
    works &= y >= 0
    num_entries = tl.where(works, tl.load(count + i), 0)
    first = tl.load(start + i).to(tl.int64)
    row_lse = tl.load(lse + i)
    above = tl.load(threshold + i)
    k = tl.arange(0, BLOCK_D)
    x_row = x + i * x_stride
    if SUM:
        x_whole = tl.load(x_row + k, k < tl.where(works, D, 0), other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK_D], tl.float32)
    for e in range(0, num_entries, ENTRIES):
        j = e + tl.arange(0, ENTRIES)
        here = j < num_entries
        v = tl.load(columns + first + j, here, other=0)
        w_rows = w + v.to(tl.int64)[:, None] * w_stride
        if SUM:
            inside = here[:, None] & (k < D)[None, :]
            gathered = tl.load(w_rows + k[None, :], inside, other=0.0).to(tl.float32)
            raw = tl.sum(gathered * x_whole[None, :], 1)
        else:
            raw = tl.zeros([ENTRIES], tl.float32)
            for d in range(0, D, BLOCK_D):
                inside = here[:, None] & (d + k < D)[None, :]
                piece = tl.load(w_rows + (d + k)[None, :], inside, other=0.0).to(tl.float32)
                x_piece = tl.load(x_row + d + k, d + k < D, other=0.0).to(tl.float32)
                raw += tl.sum(piece * x_piece[None, :], 1)
        if HAS_BIAS:
            raw += tl.load(bias + v, here, other=0.0).to(tl.float32)
        z = scale_logits(raw, softcap, inv_temperature, SOFTCAP)
        if WEIGHTED:
            weight = tl.load(weights + first + j, here, other=0.0)
        else:
            weight = inverse_probability(z - above)
        hit = v == y
        weight = tl.where(hit, 1.0, weight)  # kept whatever its u
        d_raw = logit_gradient(z, hit, weight, c, c_entropy, mass, row_lse, softcap,
                               inv_temperature, SOFTCAP)  # fmt: skip
        if SUM:
            d_raw = tl.where(here, d_raw, 0.0)
            total += tl.sum(d_raw[:, None] * gathered, 0)
        tl.store(keys + first + j, v, here)
        tl.store(values + first + j, d_raw, here)
        tl.store(owners + first + j, tl.zeros_like(v) + tl.program_id(0), here)
    if SUM:
        tl.store(dx + i * D + k, total.to(dx.dtype.element_ty), k < D)


@triton.jit
def owner_kernel(
    source, begin, end, order, index, values, out, row_sq, d_bias,
    num_owners, D, source_stride,
    BLOCK_D: tl.constexpr, ENTRIES: tl.constexpr,
    STORE: tl.constexpr, SQUARES: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """out[o] = sum of values[j] source[index[j]] over begin[o] <= j < end[o], one piece of D.

    Owners take their turn by `order`, those with most entries first: none is left to the end.
    SQUARES: row_sq[piece, o] = sum of squares of the value as stored, i.e. rounded to out's dtype,
    whether or not it is stored. BIAS: d_bias[o] = sum of values[j]. The pieces of D are the slow
    index of the grid: the slice of `source` in use stays in L2, and an owner of thousands of
    entries is spread over programs.
    """
    pid = tl.program_id(0)
    piece = pid // num_owners
    o = tl.load(order + pid % num_owners)
    k = piece * BLOCK_D + tl.arange(0, BLOCK_D)
    last = tl.load(end + o)
    total = tl.zeros([BLOCK_D], tl.float32)
    bias_total = tl.zeros([ENTRIES], tl.float32)
    for e in range(tl.load(begin + o), last, ENTRIES):
        j = e + tl.arange(0, ENTRIES)
        here = j < last
        value = tl.load(values + j, here, other=0.0)
        rows = source + tl.load(index + j, here, other=0).to(tl.int64)[:, None] * source_stride
        inside = here[:, None] & (k < D)[None, :]
        gathered = tl.load(rows + k[None, :], inside, other=0.0).to(tl.float32)
        total += tl.sum(value[:, None] * gathered, 0)
        if BIAS:
            bias_total += value
    stored = total.to(out.dtype.element_ty)
    if STORE:
        tl.store(out + o.to(tl.int64) * D + k, stored, k < D)
    if SQUARES:
        rounded = stored.to(tl.float32)
        tl.store(row_sq + piece.to(tl.int64) * num_owners + o, tl.sum(rounded * rounded, 0))
    if BIAS and piece == 0:
        tl.store(d_bias + o, tl.sum(bias_total, 0).to(d_bias.dtype.element_ty))


# -- kernels: exact -------------------------------------------------------------------------------


@triton.jit
def dlogits_kernel(
    x, w, bias, count, rows, target, lse, entropy, grad_logp, grad_entropy, grad_lse, out,
    first_column, num_rows, V, D, w_stride, inv_temperature, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, TMA: tl.constexpr, EVEN_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_LSE: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """out [num_rows, V] = dL/draw of the first `count` rows of x, for a chunk w [V, D] of weight.

    Row i of x is row rows[i] of the whole input; w begins at its vocabulary index first_column. Its
    loop is never flat: that spills here.
    """
    SLICE: tl.constexpr = BLOCK_V // PARTS
    active = tl.load(count)
    num_tiles_v = tl.cdiv(V, BLOCK_V)
    num_row_blocks = tl.cdiv(active, BLOCK_N)
    num_tiles = num_row_blocks * num_tiles_v
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        block, tile_v = tile_position(tile, num_row_blocks, num_tiles_v, GROUP)
        scores = tile_scores(x, w, block * BLOCK_N, tile_v * BLOCK_V, num_rows, V, D, w_stride,
                             BLOCK_N, BLOCK_V, BLOCK_D, TMA, EVEN_D)  # fmt: skip
        i = block * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = i < active
        row = tl.load(rows + i, valid, other=0)
        y = tl.load(target + row, valid, other=-1).to(tl.int32) - first_column
        c = tl.load(grad_logp + row, valid, other=0.0)[:, None]
        row_lse = tl.load(lse + row, valid, other=0.0)[:, None]
        mass = c
        c_entropy = 0.0
        if HAS_ENTROPY:
            c_entropy = tl.load(grad_entropy + row, valid, other=0.0)[:, None]
            mass += c_entropy * tl.load(entropy + row, valid, other=0.0)[:, None]
        if HAS_LSE:
            mass -= tl.load(grad_lse + row, valid, other=0.0)[:, None]
        slices = column_slices(scores, BLOCK_N, BLOCK_V, PARTS)
        for part in tl.static_range(PARTS):
            v = tile_v * BLOCK_V + part * SLICE + tl.arange(0, SLICE)
            raw = slices[part]
            if HAS_BIAS:
                raw += tl.load(bias + v, v < V, other=0.0).to(tl.float32)[None, :]
            z = scale_logits(raw, softcap, inv_temperature, SOFTCAP)
            d_raw = logit_gradient(z, v[None, :] == y[:, None], 1.0, c, c_entropy, mass, row_lse,
                                   softcap, inv_temperature, SOFTCAP)  # fmt: skip
            # int64 for the tile's base, int32 within the tile: registers.
            base = out + (block * BLOCK_N).to(tl.int64) * V
            within = tl.arange(0, BLOCK_N)[:, None] * V + v[None, :]
            inside = valid[:, None] & (v < V)[None, :]
            tl.store(base + within, d_raw.to(out.dtype.element_ty), inside)


@triton.jit
def round_kernel(
    sums, scale, out, row_sq, D,
    BLOCK_D: tl.constexpr, STORE: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    """out[o] = scale sums[o] in out's dtype, and row_sq[o] the sum of its squares as stored."""
    o = tl.program_id(0)
    factor = tl.load(scale)
    total = tl.zeros([BLOCK_D], tl.float32)
    for d in range(0, D, BLOCK_D):
        k = d + tl.arange(0, BLOCK_D)
        at = o.to(tl.int64) * D + k
        stored = (tl.load(sums + at, k < D, other=0.0) * factor).to(out.dtype.element_ty)
        rounded = stored.to(tl.float32)
        total += rounded * rounded
        if STORE:
            tl.store(out + at, stored, k < D)
    if SQUARES:
        tl.store(row_sq + o, tl.sum(total, 0))


# -- host -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Upstream:
    """What the loss sends back, and the two results of the forward that its gradient needs."""

    grad_logp: Tensor  # [N] fp32
    grad_entropy: Tensor | None  # [N] fp32
    grad_lse: Tensor | None  # [N] fp32
    lse: Tensor  # [N] fp32
    entropy: Tensor  # [N] fp32

    @property
    def grads(self) -> tuple[Tensor, ...]:
        every = (self.grad_logp, self.grad_entropy, self.grad_lse)
        return tuple(grad for grad in every if grad is not None)

    @property
    def works(self) -> Tensor:
        """Rows with a coefficient, [N] bool (NaN is one)."""
        return torch.stack([grad != 0 for grad in self.grads]).any(0)

    @property
    def magnitude(self) -> Tensor:
        """Largest coefficient, [1] fp32; 1 where that is 0 or not a number."""
        top = torch.stack(self.grads).abs().amax()
        return torch.where((top > 0) & top.isfinite(), top, 1.0).reshape(1)

    def divided(self, by: Tensor) -> "Upstream":
        c_entropy = None if self.grad_entropy is None else self.grad_entropy / by
        c_lse = None if self.grad_lse is None else self.grad_lse / by
        return Upstream(self.grad_logp / by, c_entropy, c_lse, self.lse, self.entropy)

    @property
    def switches(self) -> dict[str, bool]:
        """For a kernel's launch."""
        has_lse = self.grad_lse is not None
        return {"HAS_ENTROPY": self.grad_entropy is not None, "HAS_LSE": has_lse}


@dataclass(frozen=True)
class Gradients:
    """The results; None where not needed."""

    hidden: Tensor | None  # [N, D]
    weight: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]
    row_sq: Tensor | None  # [V] fp32

    @property
    def of_weight(self) -> bool:
        """Whether anything indexed by the vocabulary is needed."""
        return any(g is not None for g in (self.weight, self.bias, self.row_sq))


def sparse_backward(
    head: Head, upstream: Upstream, active: Tensor, weighted: bool, out: Gradients
) -> None:
    """Fills `out` from the kept entries; draws them first if the forward had no reference."""
    N, V, D = head.sizes
    device = head.hidden.device
    if active.numel() == 0:
        mask = upstream.works & (head.target >= 0)
        active = scan_vocabulary(head, mask, upstream.lse, None)
    entries = Entries(active, N, weighted)
    capacity = entries.capacity
    # Places without an entry sort past the vocabulary.
    keys = torch.full((capacity,), V, dtype=torch.int32, device=device)
    values = torch.empty(capacity, dtype=torch.float32, device=device)
    owners = torch.empty(capacity, dtype=torch.int32, device=device)
    config = head.config
    in_registers = out.hidden is not None and config.row.block_d >= D
    gather = config.row if in_registers else config.pieces
    options = gather.options(D, head.weight.element_size())
    row_kernel[(N,)](
        head.hidden, head.weight, head.bias, head.target, upstream.lse, upstream.entropy,
        upstream.grad_logp, upstream.grad_entropy, upstream.grad_lse, entries.start, entries.count,
        entries.threshold, entries.columns, entries.weights, keys, values, owners, out.hidden,
        D, head.hidden.stride(0), head.weight.stride(0), *head.scalars,
        SUM=in_registers, WEIGHTED=weighted, **upstream.switches, **head.switches, **options,
    )  # fmt: skip
    if out.hidden is not None and not in_registers:
        count = entries.count.where(upstream.works, 0)
        gather_sum(head, head.weight, entries.start, entries.start + count, keys, values,
                   Gradients(None, out.hidden, None, None))  # fmt: skip
    if out.of_weight:
        keys, order = keys.sort(stable=True)
        edges = torch.searchsorted(keys, torch.arange(V + 1, dtype=torch.int32, device=device))
        gather_sum(head, head.hidden, edges[:-1], edges[1:], owners[order], values[order], out)


def gather_sum(
    head: Head,
    source: Tensor,  # [*, D]
    begin: Tensor,  # [owners]
    end: Tensor,  # [owners]
    index: Tensor,  # [entries] int32: row of source
    values: Tensor,  # [entries] fp32
    out: Gradients,  # its weight [owners, D], bias and row_sq are filled
) -> None:
    """Runs `owner_kernel`: sums of weighted rows, each owned by one program."""
    owners, D = begin.shape[0], source.shape[1]
    order = (begin - end).argsort()
    options = head.config.owner.options(D, source.element_size())
    pieces = triton.cdiv(D, options["BLOCK_D"])
    row_sq = None
    if out.row_sq is not None:
        row_sq = torch.empty(pieces, owners, dtype=torch.float32, device=source.device)
    owner_kernel[(owners * pieces,)](
        source, begin, end, order, index, values, head.weight if out.weight is None else out.weight,
        row_sq, out.bias, owners, D, source.stride(0),
        STORE=out.weight is not None, SQUARES=row_sq is not None, BIAS=out.bias is not None,
        **options,
    )  # fmt: skip
    if out.row_sq is not None:
        torch.sum(row_sq, 0, out=out.row_sq)


def exact_backward(head: Head, upstream: Upstream, out: Gradients) -> None:
    """Fills `out` from all entries.

    dX is summed over the vocabulary and dW over the rows, both in fp32. Where the sums of dX for
    all rows are too large to hold, dlogits are computed twice, once for each.
    """
    N, _, D = head.sizes
    # fp32 sums of dX, the product about to be added to them, and a copy of hidden.
    size = EXACT_ROW_BYTES // (D * (8 + head.hidden.element_size()))
    size = min(max(128, size), 2**15)
    # fp16 has no room for coefficients such as 1e-8: in the products the largest one is 1.
    scale = upstream.magnitude
    upstream = upstream.divided(scale)
    order, total = sort_rows(upstream.works & (head.target >= 0))
    blocks = [(order[i : i + size], (total - i).clamp(0, size)) for i in range(0, N, size)]
    if len(blocks) == 1:
        exact_pass(head, upstream, scale, blocks, out)
        return
    if out.of_weight:
        exact_pass(head, upstream, scale, blocks, replace(out, hidden=None))
    if out.hidden is not None:
        for block in blocks:
            exact_pass(head, upstream, scale, [block], Gradients(out.hidden, None, None, None))


def exact_pass(
    head: Head,
    upstream: Upstream,  # divided by
    scale: Tensor,  # [1] fp32
    blocks: list[tuple[Tensor, Tensor]],  # rows, and how many of them have work
    out: Gradients,  # its hidden may be needed with a single block only
) -> None:
    """One pass over the vocabulary, by chunks; every chunk sees all blocks of rows."""
    _, V, D = head.sizes
    size = blocks[0][0].shape[0]
    x = head.hidden if len(blocks) > 1 else gather_rows(head, head.hidden, *blocks[0])
    sums = None
    if out.hidden is not None:
        sums = torch.zeros(size, D, dtype=torch.float32, device=x.device)
    column_bytes = size * x.element_size() + 4 * D * min(2, len(blocks))
    width = max(256, EXACT_CHUNK_BYTES // column_bytes // 256 * 256)
    for first in range(0, V, width):
        chunk = slice(first, min(first + width, V))
        w = head.weight[chunk]
        dw = db = None
        for rows, count in blocks:
            if len(blocks) > 1:
                x = gather_rows(head, head.hidden, rows, count)
            d = dlogits(head, upstream, x, rows, count, first, w)
            if sums is not None:
                sums += mm_fp32(d, w)
            if out.weight is not None or out.row_sq is not None:
                part = mm_fp32(d.T, x)
                dw = part if dw is None else dw.add_(part)
            if out.bias is not None:
                part = d.sum(0, dtype=torch.float32)
                db = part if db is None else db.add_(part)
        if db is not None and out.bias is not None:
            out.bias[chunk] = (db * scale).to(out.bias.dtype)
        if dw is not None:
            round_kernel[(w.shape[0],)](
                dw, scale, w if out.weight is None else out.weight[chunk],
                None if out.row_sq is None else out.row_sq[chunk], D,
                BLOCK_D=min(1024, triton.next_power_of_2(D)),
                STORE=out.weight is not None, SQUARES=out.row_sq is not None, **FUSED,
            )  # fmt: skip
    if sums is not None and out.hidden is not None:
        out.hidden[blocks[0][0]] = sums.mul_(scale).to(out.hidden.dtype)


def dlogits(
    head: Head,
    upstream: Upstream,
    x: Tensor,  # [M, D]
    rows: Tensor,  # [M] int64
    count: Tensor,  # [1] int32
    first: int,
    w: Tensor,  # [C, D]: head.weight[first : first + C]
) -> Tensor:
    """dL/draw [M, C] in x's dtype; zeros in rows past `count`."""
    operands, options = head.operands(x, w)
    M, C = x.shape[0], w.shape[0]
    out = torch.zeros(M, C, dtype=x.dtype, device=x.device)
    bias = None if head.bias is None else head.bias[first : first + C]
    dlogits_kernel[(head.programs(x, C),)](
        *operands, bias, count, rows, head.target, upstream.lse, upstream.entropy,
        upstream.grad_logp, upstream.grad_entropy, upstream.grad_lse, out,
        first, M, C, x.shape[1], w.stride(0), *head.scalars,
        **upstream.switches, **head.switches, **options,
    )  # fmt: skip
    return out


def mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and returned in fp32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cpu":  # the interpreter's; no out_dtype there
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def lm_head_backward(
    grad_logp: Tensor,  # [N] fp32
    grad_entropy: Tensor | None,  # [N] fp32
    grad_lse: Tensor | None,  # [N] fp32
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N] int64, -1 where ignored
    bias: Tensor | None,  # [V]
    lse: Tensor,  # [N] fp32
    entropy: Tensor,  # [N] fp32
    active: Tensor,  # the forward's
    seed: Tensor | None,  # [1] int64
    temperature: float,
    softcap: float,
    grad_eps: float,
    screened: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    need_row_sq: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d_hidden [N, D], d_weight [V, D], d_bias [V] and row_sq [V] fp32; empty where not needed.

    dL/dz_iv = c_i (1[v = y_i] - p_iv) + cZ_i p_iv - cH_i p_iv (log p_iv + H_i), times
    dz/d(h . W_v + b_v), of the gradients c of logp, cZ of lse and cH of the entropy.
    With grad_eps > 0 and a seed, p_iv < eps stands for itself in expectation only: kept with
    probability p_iv / eps, and divided by it.
    """
    hidden, weight = by_rows(hidden), by_rows(weight)
    bias = None if bias is None else bias.contiguous()
    head = Head(hidden, weight, target, bias, temperature, softcap, grad_eps, seed)
    fill = torch.empty if hidden.shape[0] > 0 else torch.zeros
    device = hidden.device
    out = Gradients(
        fill(hidden.shape, dtype=hidden.dtype, device=device) if need_hidden else None,
        fill(weight.shape, dtype=weight.dtype, device=device) if need_weight else None,
        fill(bias.shape, dtype=bias.dtype, device=device)
        if need_bias and bias is not None
        else None,
        fill(weight.shape[0], dtype=torch.float32, device=device) if need_row_sq else None,
    )
    if hidden.shape[0] > 0:
        c, c_entropy, c_lse = (
            None if grad is None else grad.contiguous()
            for grad in (grad_logp, grad_entropy, grad_lse)
        )
        upstream = Upstream(c, c_entropy, c_lse, lse, entropy)
        with torch.cuda.device_of(hidden):
            if seed is None or grad_eps == 0:
                exact_backward(head, upstream, out)
            else:
                sparse_backward(head, upstream, active, screened, out)
    results = (out.hidden, out.weight, out.bias, out.row_sq)
    d_hidden, d_weight, d_bias, row_sq = (
        torch.empty(0, dtype=hidden.dtype, device=device) if r is None else r for r in results
    )
    return d_hidden, d_weight, d_bias, row_sq
