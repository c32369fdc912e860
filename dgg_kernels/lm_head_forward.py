"""Triton forward of the lm_head: log-probs from hidden states, logits only ever in registers.

The vocabulary is scanned in tiles of logits; a tile leaves behind four numbers a row (and, where a
reference is known, one bit an entry: kept in the backward or not). Rows without a target are
sorted to the end on the device and never touched; the host learns no count.
"""

# Triton's annotations describe a kernel's body, not its launch, and bodies are not quite Python;
# a kernel's parameters have the types that they are launched with.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportUnboundVariable=false, reportAttributeAccessIssue=false
# pyright: reportMissingParameterType=false

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs

# Extra memory: the logits' workspace, and the kept entries of all rows (4 bytes an entry here, 44
# at the peak of the backward's sort). Together under 512 MiB at any number of rows.
WORKSPACE_BYTES = 352 * 2**20
MAX_ENTRIES = 2**23
ENTRIES_PER_ROW = 512

LOG_4 = math.log(4.0)

# -- device functions -----------------------------------------------------------------------------


@triton.jit
def scale_logits(raw, softcap, inv_temperature, SOFTCAP: tl.constexpr):
    """Logits z of raw scores h . w + b."""
    if SOFTCAP:
        # tanh by its exponential, good to 1e-7 absolute: libdevice is not in the interpreter.
        tanh = 1.0 - 2.0 / (tl.exp((2.0 / softcap) * raw) + 1.0)
        z = (softcap * inv_temperature) * tanh
    else:
        z = raw * inv_temperature
    return z


@triton.jit
def uniform(row, column, seed):
    """A number in [0, 1), a multiple of 2^-24, that depends on nothing but its arguments (uint32).

    The same hash as on a CPU: the same seed keeps the same entries on every device and grid.
    """
    x = ((row * 0x9E3779B1) ^ seed) + column * 0x85EBCA77
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    return (x >> 8).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def inverse_probability(z):
    """1 / (probability of having been kept) of entries z above the threshold (nats), at least 1."""
    # u is a multiple of 2^-24, so u < pi has probability ceil(2^24 pi) / 2^24.
    pi = tl.exp(tl.minimum(z, 0.0))
    return 16777216.0 / tl.maximum(tl.ceil(pi * 16777216.0), 1.0)


@triton.jit
def store_kept(keep, bits, row, valid, first, V, BLOCK_N: tl.constexpr, SLICE: tl.constexpr):
    """keep [BLOCK_N, SLICE], columns from `first` on -> words of bits [*, ceil(V / 32)]."""
    WORDS: tl.constexpr = SLICE // 32
    grouped = tl.reshape(keep.to(tl.uint32), (BLOCK_N, WORDS, 32))
    shift = tl.arange(0, 32).to(tl.uint32)[None, None, :]
    word = first // 32 + tl.arange(0, WORDS)
    num_words = tl.cdiv(V, 32)
    tl.store(
        bits + row.to(tl.int64)[:, None] * num_words + word[None, :],
        tl.sum(grouped << shift, 2).to(tl.int32, bitcast=True),
        valid[:, None] & (word < num_words)[None, :],
    )


@triton.jit
def popcount(x):
    """Number of set bits of every uint32, as int32."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def tile_scores(
    x, w, row0, column0, num_rows, V, D, w_stride,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, EVEN_D: tl.constexpr, INT8: tl.constexpr = False,
):  # fmt: skip
    """Products of BLOCK_N rows of x [num_rows, D] and BLOCK_V rows of w [V, D], fp32 or int32."""
    if INT8:
        scores = tl.zeros([BLOCK_N, BLOCK_V], tl.int32)
    else:
        scores = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    if TMA:
        for d in range(0, D, BLOCK_D):
            a = x.load([row0, d])
            b = w.load([column0, d])
            scores = tl.dot(a, b.T, scores, input_precision="ieee", out_dtype=scores.dtype)
    else:
        # Past the end the last row is read again: its results are masked where they are stored.
        rows = tl.minimum(row0 + tl.arange(0, BLOCK_N), num_rows - 1).to(tl.int64)
        columns = tl.minimum(column0 + tl.arange(0, BLOCK_V), V - 1).to(tl.int64)
        k = tl.arange(0, BLOCK_D)
        a_ptr = x + rows[:, None] * D + k[None, :]
        b_ptr = w + columns[:, None] * w_stride + k[None, :]
        for d in range(0, D, BLOCK_D):
            if EVEN_D:
                a = tl.load(a_ptr + d)
                b = tl.load(b_ptr + d)
            else:
                a = tl.load(a_ptr + d, (d + k < D)[None, :], other=0.0)
                b = tl.load(b_ptr + d, (d + k < D)[None, :], other=0.0)
            scores = tl.dot(a, b.T, scores, input_precision="ieee", out_dtype=scores.dtype)
    return scores


@triton.jit
def halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Left and right half of x [ROWS, COLUMNS]."""
    return x.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit
def column_slices(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """x [ROWS, COLUMNS] as a tuple of 1, 2 or 4 slices: an epilogue on each fits registers."""
    if PARTS == 1:
        slices = (x,)
    elif PARTS == 2:
        slices = halves(x, ROWS, COLUMNS)
    else:
        left, right = halves(x, ROWS, COLUMNS)
        a, b = halves(left, ROWS, COLUMNS // 2)
        c, d = halves(right, ROWS, COLUMNS // 2)
        slices = (a, b, c, d)
    return slices


@triton.jit
def tile_position(tile, num_row_blocks, num_tiles_v, GROUP: tl.constexpr):
    """(row block, vocabulary tile): GROUP row blocks sweep the vocabulary together (L2 reuse)."""
    group = tile // (GROUP * num_tiles_v)
    size = tl.minimum(num_row_blocks - group * GROUP, GROUP)
    within = tile % (GROUP * num_tiles_v)
    return group * GROUP + within % size, within // size


# -- kernels --------------------------------------------------------------------------------------


@triton.jit
def gather_rows_kernel(
    x, out, rows, count, D, x_stride, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out[i] = x[rows[i]] for i < count."""
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = i < tl.load(count)
    source = x + tl.load(rows + i, valid, other=0).to(tl.int64)[:, None] * x_stride
    target = out + i.to(tl.int64)[:, None] * D
    for d in range(0, tl.where(tl.max(valid.to(tl.int32), 0) > 0, D, 0), BLOCK_D):
        k = (d + tl.arange(0, BLOCK_D))[None, :]
        inside = valid[:, None] & (k < D)
        tl.store(target + k, tl.load(source + k, inside), inside)


@triton.jit
def scan_kernel(
    x, w, bias, count, place, rows, target, threshold, seed, stats, target_logit, bits,
    num_rows, V, D, w_stride, inv_temperature, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, TMA: tl.constexpr, EVEN_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, STATS: tl.constexpr, SELECT: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """One pass over the logits of the first `count` rows of x [num_rows, D].

    Row i of x is row place[i] of the block, whose tables are rows (the index in the whole input),
    target and threshold. STATS leaves stats [4, vocabulary tiles, num_rows] (maximum m, and the
    sums of e = exp(z - m), e (z - m) and e^2) and the target's logit; SELECT leaves the bitmask
    bits [num_rows, ceil(V / 32)] of the entries with u < exp(z - threshold), and the target's.

    Persistent: programs take tiles in turn, and as many as `count`, read here, asks for. A gate
    that is shut may simply write count = 0.
    """
    SLICE: tl.constexpr = BLOCK_V // PARTS
    active = tl.load(count)
    num_tiles_v = tl.cdiv(V, BLOCK_V)
    num_row_blocks = tl.cdiv(active, BLOCK_N)
    num_tiles = num_row_blocks * num_tiles_v
    # One flat loop: the next tile's loads run under this tile's epilogue.
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLAT):
        block, tile_v = tile_position(tile, num_row_blocks, num_tiles_v, GROUP)
        scores = tile_scores(x, w, block * BLOCK_N, tile_v * BLOCK_V, num_rows, V, D, w_stride,
                             BLOCK_N, BLOCK_V, BLOCK_D, TMA, EVEN_D)  # fmt: skip
        i = block * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = i < active
        at = tl.load(place + i, valid, other=0)
        y = tl.load(target + at, valid, other=-1).to(tl.int32)
        if SELECT:
            row = tl.load(rows + at, valid, other=0).to(tl.uint32)
            above = tl.load(threshold + at, valid, other=0.0)
            seed32 = tl.load(seed).to(tl.uint32)
        m = tl.full([BLOCK_N], -1e30, tl.float32)
        s = tl.zeros([BLOCK_N], tl.float32)
        t = tl.zeros([BLOCK_N], tl.float32)
        q = tl.zeros([BLOCK_N], tl.float32)
        slices = column_slices(scores, BLOCK_N, BLOCK_V, PARTS)
        for part in tl.static_range(PARTS):
            first = tile_v * BLOCK_V + part * SLICE
            v = first + tl.arange(0, SLICE)
            raw = slices[part]
            if HAS_BIAS:
                raw += tl.load(bias + v, v < V, other=0.0).to(tl.float32)[None, :]
            z = scale_logits(raw, softcap, inv_temperature, SOFTCAP)
            z = tl.where((v < V)[None, :], z, float("-inf"))
            hit = v[None, :] == y[:, None]
            if STATS:
                # A finite floor: a slice may lie wholly past V, or be banned by a bias of -inf.
                m_new = tl.maximum(m, tl.max(z, 1))
                d = z - m_new[:, None]
                e = tl.exp(d)
                shrink = tl.exp(m - m_new)
                t = shrink * (t + s * (m - m_new)) + tl.sum(tl.where(e == 0.0, 0.0, e * d), 1)
                s = shrink * s + tl.sum(e, 1)
                q = shrink * shrink * q + tl.sum(e * e, 1)
                m = m_new
                owner = (y >= first) & (y < first + SLICE)
                tl.store(target_logit + at, tl.sum(tl.where(hit, z, 0.0), 1), valid & owner)
            if SELECT:
                u = uniform(row[:, None], v.to(tl.uint32)[None, :], seed32)
                keep = (u < tl.exp(z - above[:, None])) | hit
                store_kept(keep, bits, at, valid, first, V, BLOCK_N, SLICE)
        if STATS:
            out = stats + tile_v.to(tl.int64) * num_rows + at
            plane = tl.cast(num_tiles_v, tl.int64) * num_rows
            tl.store(out, m, valid)
            tl.store(out + plane, s, valid)
            tl.store(out + 2 * plane, t, valid)
            tl.store(out + 3 * plane, q, valid)


@triton.jit
def combine_kernel(
    stats, target_logit, count, place, rows, logp, entropy, lse, sum_p2, num_rows, num_tiles_v,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Statistics of the vocabulary tiles -> results of the rows, always in the same order."""
    number = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = number < tl.load(count)
    i = tl.load(place + number, valid, other=0)
    plane = tl.cast(num_tiles_v, tl.int64) * num_rows
    top = tl.full([BLOCK_N], -1e30, tl.float32)
    for tile in range(0, num_tiles_v, BLOCK_T):
        k = tile + tl.arange(0, BLOCK_T)
        here = (k < num_tiles_v)[:, None] & valid[None, :]
        m = tl.load(stats + k.to(tl.int64)[:, None] * num_rows + i[None, :], here, other=-1e30)
        top = tl.maximum(top, tl.max(m, 0))
    s = tl.zeros([BLOCK_N], tl.float32)
    t = tl.zeros([BLOCK_N], tl.float32)
    q = tl.zeros([BLOCK_N], tl.float32)
    for tile in range(0, num_tiles_v, BLOCK_T):
        k = tile + tl.arange(0, BLOCK_T)
        here = (k < num_tiles_v)[:, None] & valid[None, :]
        at = stats + k.to(tl.int64)[:, None] * num_rows + i[None, :]
        below = tl.load(at, here, other=-1e30) - top[None, :]
        shrink = tl.exp(below)
        part = tl.load(at + plane, here, other=0.0)
        s += tl.sum(shrink * part, 0)
        t += tl.sum(shrink * (tl.load(at + 2 * plane, here, other=0.0) + part * below), 0)
        q += tl.sum(shrink * shrink * tl.load(at + 3 * plane, here, other=0.0), 0)
    log_s = tl.log(s)
    row = tl.load(rows + i, valid, other=0)
    tl.store(lse + row, top + log_s, valid)
    tl.store(logp + row, (tl.load(target_logit + i, valid, other=0.0) - top) - log_s, valid)
    # Relative to the maximum: no cancellation between logits of magnitude 100.
    tl.store(entropy + row, log_s - t / s, valid)
    tl.store(sum_p2 + row, q / (s * s), valid)


@triton.jit
def count_kernel(bits, place, count, kept, num_words, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):
    """kept[r] = number of set bits of row r of bits, for r = place[i], i < count."""
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = i < tl.load(count)
    row = tl.load(place + i, valid, other=0)
    begin = bits + row.to(tl.int64)[:, None] * num_words
    total = tl.zeros([BLOCK_N], tl.int32)
    for first in range(0, tl.where(tl.max(valid.to(tl.int32), 0) > 0, num_words, 0), BLOCK_W):
        k = (first + tl.arange(0, BLOCK_W))[None, :]
        word = tl.load(begin + k, valid[:, None] & (k < num_words), other=0)
        total += tl.sum(popcount(word.to(tl.uint32, bitcast=True)), 1)
    tl.store(kept + row, total, valid)


@triton.jit
def compact_kernel(
    bits, kept, limit, start, target, columns, num_rows, num_words,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Set bits of row r -> ascending column indices at columns[start[r]:]."""
    r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    num_kept = tl.load(kept + r, r < num_rows, other=0)
    valid = (num_kept > 0)[:, None]
    overflow = (num_kept > tl.load(limit))[:, None]
    y = tl.load(target + r, r < num_rows, other=0).to(tl.int32)[:, None]
    position = tl.load(start + r, r < num_rows, other=0)
    begin = bits + r.to(tl.int64)[:, None] * num_words
    for first in range(0, tl.where(tl.max(num_kept, 0) > 0, num_words, 0), BLOCK_W):
        k = (first + tl.arange(0, BLOCK_W))[None, :]
        word = tl.load(begin + k, valid & (k < num_words), other=0).to(tl.uint32, bitcast=True)
        alone = (k == y // 32).to(tl.uint32) << (y % 32).to(tl.uint32)
        word = tl.where(overflow, alone, word)
        length = popcount(word)
        write = position[:, None] + tl.cumsum(length, 1) - length
        # Every word gives up its lowest bit until none has any: a handful of rounds, since a row
        # keeps hundreds of entries and has thousands of words.
        for _ in range(tl.max(tl.max(length, 1), 0)):
            others = word & (word - 1)
            column = k * 32 + popcount((word ^ others) - 1)
            tl.store(columns + write, column, word != 0)
            write += (word != 0).to(tl.int32)
            word = others
        position += tl.sum(length, 1)


# -- host -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """What every row of one call shares."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [N] int64, -1 where ignored
    bias: Tensor | None  # [V]
    temperature: float
    softcap: float  # 0.0: none
    grad_eps: float
    seed: Tensor | None  # [1] int64

    @property
    def sizes(self) -> tuple[int, int, int]:
        """N, V, D."""
        return self.hidden.shape[0], self.weight.shape[0], self.weight.shape[1]

    @property
    def config(self) -> configs.KernelConfig:
        return configs.config_for(architecture(self.hidden.device))

    def tile_of(self, x: Tensor) -> configs.TileConfig:
        """Tiles for products of x: hidden states, or their codes."""
        config = self.config
        if x.dtype == torch.float32:
            return config.tile_fp32
        if x.element_size() == 1:
            return config.tile_8bit
        if config.tile_crowded and self.bias is not None and self.softcap > 0:
            return config.tile_crowded
        return config.tile

    @property
    def scalars(self) -> tuple[float, float]:
        return 1.0 / self.temperature, self.softcap

    @property
    def switches(self) -> dict[str, bool]:
        return {"HAS_BIAS": self.bias is not None, "SOFTCAP": self.softcap > 0}

    def operands(
        self, x: Tensor, w: Tensor
    ) -> tuple[tuple[Tensor, Tensor] | tuple[TensorDescriptor, TensorDescriptor], dict[str, int]]:
        """x [M, D] and w [C, D] as tiled operands (descriptors where they pay), and options."""
        t = self.tile_of(x)
        options = {
            "BLOCK_N": t.block_n, "BLOCK_V": t.block_v, "BLOCK_D": t.block_d,
            "GROUP": t.group, "PARTS": t.parts,
            "EVEN_D": x.shape[1] % t.block_d == 0,
            "num_warps": t.num_warps, "num_stages": t.num_stages, **configs.FUSED,
        }  # fmt: skip
        aligned = all(
            m.data_ptr() % 16 == 0 and m.stride(0) * m.element_size() % 16 == 0 for m in (x, w)
        )
        if not (t.tma and aligned):
            return (x, w), {"TMA": False, **options}
        x_tiles = TensorDescriptor.from_tensor(x, [t.block_n, t.block_d])
        w_tiles = TensorDescriptor.from_tensor(w, [t.block_v, t.block_d])
        return (x_tiles, w_tiles), {"TMA": True, **options}

    def programs(self, x: Tensor, num_columns: int) -> int:
        """Persistent programs for the tiles of x [M, D] and so many vocabulary entries."""
        t = self.tile_of(x)
        num_rows = x.shape[0]
        tiles = triton.cdiv(num_rows, t.block_n) * triton.cdiv(num_columns, t.block_v)
        return min(int(tiles), t.programs_per_sm * multiprocessors(self.hidden.device))


def architecture(device: torch.device) -> str:
    """Name for `configs.config_for`: "sm_90", "gfx942", or "interpreter" for CPU tensors."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def sort_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of a mask's rows, set ones first and in order, int64 [N], and their count, int32 [1].

    All on the device: kernels read the count, the host never does.
    """
    order = torch.argsort((~mask).to(torch.uint8), stable=True)
    return order, mask.sum(dtype=torch.int32).reshape(1)


def gather_rows(head: Head, x: Tensor, rows: Tensor, count: Tensor) -> Tensor:
    """Copy [len(rows), D] of the first `count` of the given rows of x, zeros after."""
    M, D = rows.shape[0], x.shape[1]
    out = torch.zeros(M, D, dtype=x.dtype, device=x.device)
    block_n = head.config.bits.rows
    gather_rows_kernel[(triton.cdiv(M, block_n),)](
        x, out, rows, count, D, x.stride(0),
        BLOCK_N=block_n, BLOCK_D=min(2048, triton.next_power_of_2(D)), **configs.FUSED,
    )  # fmt: skip
    return out


def scan(
    head: Head,
    x: Tensor,  # [M, D], contiguous
    count: Tensor,  # [1] int32: rows of x that are there
    place: Tensor,  # [M] int64: their rows in the tables below
    rows: Tensor,  # [M] int64: index in head.hidden
    threshold: Tensor | None,  # [M] fp32
    bits: Tensor | None,  # [M, ceil(V / 32)] int32, written if given
    stats: Tensor | None = None,  # [4, tiles, M] fp32, written if given, with
    target_logit: Tensor | None = None,  # [M] fp32
) -> None:
    """Runs `scan_kernel` over rows of a block."""
    operands, options = head.operands(x, head.weight)
    _, V, D = head.sizes
    scan_kernel[(head.programs(x, V),)](
        *operands, head.bias, count, place, rows, head.target[rows], threshold, head.seed,
        stats, target_logit, bits, x.shape[0], V, D, head.weight.stride(0), *head.scalars,
        STATS=stats is not None, SELECT=bits is not None, FLAT=head.tile_of(x).flat,
        **head.switches, **options,
    )  # fmt: skip


@dataclass(frozen=True)
class Entries:
    """The kept entries of all rows, packed into one int32 tensor that autograd can save.

    start [N] | count [N] | threshold [N] (bits of fp32) | columns [capacity]: row i keeps the
    vocabulary indices columns[start[i]:][:count[i]], ascending, its target among them. Entry v was
    kept with probability min(1, exp(z - threshold)); count is 0 for a row without work.
    Of screened logits z this can't be told later: then weights [capacity] (bits of fp32) follow,
    the inverse probabilities.
    """

    packed: Tensor
    num_rows: int
    weighted: bool

    @classmethod
    def empty(cls, head: Head, weighted: bool) -> "Entries":
        """Room for the expected entries of every row, within MAX_ENTRIES; all counts 0."""
        N, V, _ = head.sizes
        # The expected number is at most 1 / eps, and its standard deviation at most the root.
        slots = min(V, math.ceil(1.05 / head.grad_eps) + 64)
        room = min(slots, max(1, min(MAX_ENTRIES, max(ENTRIES_PER_ROW * N, 2**20)) // N))
        size = N * (3 + room * (2 if weighted else 1))
        packed = torch.empty(size, dtype=torch.int32, device=head.hidden.device)
        packed[: 3 * N] = 0
        return cls(packed, N, weighted)

    @property
    def start(self) -> Tensor:
        return self.packed[: self.num_rows]

    @property
    def count(self) -> Tensor:
        return self.packed[self.num_rows : 2 * self.num_rows]

    @property
    def threshold(self) -> Tensor:
        return self.packed[2 * self.num_rows : 3 * self.num_rows].view(torch.float32)

    @property
    def columns(self) -> Tensor:
        return self.packed[3 * self.num_rows :][: self.capacity]

    @property
    def capacity(self) -> int:
        return (len(self.packed) - 3 * self.num_rows) // (2 if self.weighted else 1)

    @property
    def slots(self) -> int:
        """Entries that a row has room for, whatever the others keep."""
        return self.capacity // self.num_rows

    @property
    def weights(self) -> Tensor | None:
        weights = self.packed[3 * self.num_rows + self.capacity :].view(torch.float32)
        return weights if self.weighted else None

    def add(
        self,
        head: Head,
        x: Tensor,  # [M, D]
        active: Tensor,  # [1] int32: rows of x with work
        rows: Tensor,  # [M] int64
        threshold: Tensor,  # [M] fp32
        bits: Tensor,  # [M, ceil(V / 32)] int32
        lse: Tensor,  # [M] fp32, exact
        first: int,
    ) -> None:
        """Takes over the entries of a block of rows; redraws rows that keep more than fits.

        A redraw raises a row's threshold and asks the same u again: a subset of the entries, each
        with its new, smaller probability. It stays unbiased although the row was redrawn because of
        its own draws: thresholds form a ladder fixed in advance, and the row stops at the first
        rung with few enough entries. An entry that is kept in the end was counted on every rung
        before, whatever its u below its last probability: so its u had no say in where the row
        stopped (Ting, Adaptive threshold sampling, 2022). No row is ever truncated.
        """
        M, words = bits.shape
        slots = self.slots
        V = head.weight.shape[0]
        grid, options = bits_launch(head, bits)
        log_eps = math.log(head.grad_eps)
        kept = count_bits(head, bits, active)
        limit = fair_share(kept, slots * M)
        # The first rung also mends a reference that was far too low. On the last, 4 times fewer
        # entries are expected than there are slots, whatever the distribution.
        last = max(math.log(4 / slots), log_eps + LOG_4)
        for rung in () if slots >= V else (log_eps, last):
            overflow = kept > limit
            raised = torch.maximum(threshold + LOG_4, lse + rung)
            threshold = torch.where(overflow, raised, threshold)
            place, count = sort_rows(overflow)
            scan(head, gather_rows(head, x, place, count), count, place, rows, threshold, bits)
            count_kernel[grid](bits, place, count, kept, words, **options)
        # Past the last rung (probability under 1e-8 a row) only the target stays.
        count = torch.where(kept > limit, 1, kept)
        start = count.cumsum(0, dtype=torch.int32) - count
        columns = self.columns[slots * first :]
        target = head.target[rows]
        compact_kernel[grid](bits, kept, limit, start, target, columns, M, words, **options)
        self.start[rows] = start + slots * first
        self.count[rows] = count
        self.threshold[rows] = threshold


def bits_launch(head: Head, bits: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Grid and options of the kernels that go through bits [M, words]."""
    config = head.config.bits
    block_w = min(config.words, int(triton.next_power_of_2(bits.shape[1])))
    options = {"BLOCK_N": config.rows, "BLOCK_W": block_w, "num_warps": config.num_warps}
    options |= configs.FUSED
    return (int(triton.cdiv(bits.shape[0], config.rows)),), options


def count_bits(head: Head, bits: Tensor, count: Tensor) -> Tensor:
    """Set bits of the first `count` rows [M] int32, 0 for the others."""
    M, words = bits.shape
    kept = torch.zeros(M, dtype=torch.int32, device=bits.device)
    place = torch.arange(M, device=bits.device)
    grid, options = bits_launch(head, bits)
    count_kernel[grid](bits, place, count, kept, words, **options)
    return kept


def combine(
    stats: Tensor,  # [4, tiles, M]
    target_logit: Tensor,  # [M]
    count: Tensor,  # [1] int32
    place: Tensor,  # [M]: the rows of the block that are summed up, `count` of them
    rows: Tensor,  # [M]: index in the outputs of every row of the block
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],  # logp, entropy, lse, sum_p2 [N]
) -> None:
    """Runs `combine_kernel`."""
    _, tiles, M = stats.shape
    options = {"BLOCK_N": 32, "BLOCK_T": 32, "num_warps": 8, **configs.FUSED}
    combine_kernel[(triton.cdiv(M, 32),)](
        stats, target_logit, count, place, rows, *outputs, M, tiles, **options
    )


def fair_share(kept: Tensor, room: int) -> Tensor:
    """The largest L with sum_i min(kept_i, L) <= room, on the device: short rows leave theirs."""
    ascending = kept.sort().values.long()
    before = ascending.cumsum(0) - ascending
    sharing = torch.arange(len(kept), 0, -1, device=kept.device)
    return ((room - before) // sharing).amax()


def scan_vocabulary(
    head: Head,
    mask: Tensor,  # [N] bool: rows with work
    reference: Tensor | None,  # [N] fp32: an lse to select entries by
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] | None,  # logp, entropy, lse, sum_p2
) -> Tensor:
    """Goes over all logits once, by blocks of rows; returns the kept entries (see `Entries`)."""
    _, V, D = head.sizes
    device = head.hidden.device
    tiles = triton.cdiv(V, head.tile_of(head.hidden).block_v)
    words = triton.cdiv(V, 32)
    entries = Entries.empty(head, weighted=False) if reference is not None else None
    row_bytes = 2 * D * head.hidden.element_size() + 16 * tiles + 4 * words
    for first, rows, count, x in row_blocks(head, mask, row_bytes):
        M = rows.shape[0]
        place = torch.arange(M, device=device)
        threshold = bits = stats = target_logit = None
        if reference is not None:
            bits = torch.empty(M, words, dtype=torch.int32, device=device)
            threshold = reference[rows] + math.log(head.grad_eps)
        if outputs is not None:
            stats = torch.empty(4, tiles, M, dtype=torch.float32, device=device)
            target_logit = torch.empty(M, dtype=torch.float32, device=device)
        scan(head, x, count, place, rows, threshold, bits, stats, target_logit)
        if outputs is not None:
            combine(stats, target_logit, count, place, rows, outputs)
            del stats
        if entries is not None and reference is not None:
            lse = reference if outputs is None else outputs[2]
            entries.add(head, x, count, rows, threshold, bits, lse[rows], first)
    return torch.empty(0, dtype=torch.int32, device=device) if entries is None else entries.packed


def row_blocks(
    head: Head, mask: Tensor, row_bytes: int
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Rows with work, in blocks that the workspace holds: first, their indices, count, hidden."""
    order, total = sort_rows(mask)
    size = max(128, WORKSPACE_BYTES // row_bytes // 128 * 128)
    blocks = max(1, triton.cdiv(len(mask), size))
    size = max(128, triton.cdiv(len(mask), 128 * blocks) * 128)  # all of one size
    for first in range(0, len(mask), size):
        rows = order[first : first + size]
        count = (total - first).clamp(0, len(rows))
        yield first, rows, count, gather_rows(head, head.hidden, rows, count)


def by_rows(x: Tensor) -> Tensor:
    """x [*, D], or a copy, whose rows lie apart and are contiguous: as the kernels read them."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def lm_head_forward(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N] int64, -1 where ignored
    bias: Tensor | None,  # [V]
    temperature: float,
    softcap: float,  # 0.0: none
    grad_eps: float,
    lse_ref: Tensor | None,  # [N] fp32
    seed: Tensor | None,  # [1] int64; None: no backward will want a selection
    screen: Sequence[Tensor],  # the weight's `Codes`, or nothing
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy, lse, sum_p2 [N] fp32 (0 where ignored), the kept entries, the screen's report.

    The entries are empty unless seed, grad_eps > 0 and lse_ref are all there: without a reference
    the backward selects, when the log-sum-exp is known (a screen finds its own). A reference that
    is not finite counts as one that is far too low: such a row is drawn again with its exact
    log-sum-exp.
    """
    N = hidden.shape[0]
    hidden, weight = by_rows(hidden), by_rows(weight)
    bias = None if bias is None else bias.contiguous()
    head = Head(hidden, weight, target, bias, temperature, softcap, grad_eps, seed)
    logp, entropy, lse, sum_p2 = (
        torch.zeros(N, dtype=torch.float32, device=hidden.device) for _ in range(4)
    )
    reference = None
    if N > 0 and seed is not None and grad_eps > 0 and lse_ref is not None:
        reference = lse_ref.where(lse_ref.isfinite(), -torch.inf)
    outputs = (logp, entropy, lse, sum_p2)
    report = torch.zeros(N if screen else 0, 4, dtype=torch.float32, device=hidden.device)
    with torch.cuda.device_of(hidden):
        if screen and N > 0:
            from .lm_head_screen import screen_vocabulary

            active = screen_vocabulary(head, screen, target >= 0, reference, outputs, report)
        else:
            active = scan_vocabulary(head, target >= 0, reference, outputs)
    return *outputs, active, report
