"""Named, frozen launch configurations of the lm_head kernels, one set per GPU architecture.

Nothing is tuned at run time: the same machine always runs the same kernel, so that results are
reproducible to the bit. `CANDIDATES` lists what a benchmark may try instead.
"""

from dataclasses import dataclass

# For every launch. a * b + c in one instruction: triton's default up to 3.9, which warns where it
# is not asked for, as it is to change.
FUSED = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class TileConfig:
    """One tile of the logits: [block_n rows, block_v vocabulary entries], block_d features a step.

    `parts`: the epilogue treats the tile in so many column slices, for want of registers.
    `group`: row blocks that share a sweep over the vocabulary (L2 reuse of the weight).
    `tma`: load through tensor-memory-accelerator descriptors where strides allow it.
    `flat`: the loops over tiles and features are one, so that loads run ahead into the next tile.
    `programs_per_sm`: persistent programs, 1 where one fills the registers of a multiprocessor.
    """

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    parts: int = 1
    group: int = 8
    tma: bool = False
    flat: bool = False
    programs_per_sm: int = 1


@dataclass(frozen=True)
class GatherConfig:
    """One program sums gathered rows, at most `block_d` features of each.

    `group` rows of 16-bit numbers are in flight at once (half as many of fp32), and a warp has
    `warp_d` features of each: together they set the registers of a thread.
    """

    block_d: int
    group: int
    warp_d: int

    def options(self, D: int, bytes_per_number: int) -> dict[str, int]:
        """Launch options for rows of D features."""
        block_d = min(self.block_d, 1 << max(0, D - 1).bit_length())
        return {
            "BLOCK_D": block_d,
            "ENTRIES": self.group * 2 // bytes_per_number,
            "num_warps": max(1, block_d // self.warp_d),
            **FUSED,
        }


@dataclass(frozen=True)
class BitsConfig:
    """One program counts or lists the set bits of `rows` rows, `words` of 32 at a time.

    It also copies as many rows of hidden states.
    """

    rows: int
    words: int
    num_warps: int = 4


@dataclass(frozen=True)
class KernelConfig:
    """Everything that is launched on one architecture.

    `tile` serves 16-bit inputs, `tile_8bit` the codes of a screen, `tile_crowded` 16-bit inputs
    with bias and softcap together where `tile` would spill, `tile_fp32` fp32 inputs (fused
    multiply-adds: tf32 would cost the accuracy that fp32 is chosen for). `row` is the backward's
    pass over the entries of one row, which holds the whole row in registers up to `row.block_d`;
    `pieces` is the same pass where it cannot, or need not since no dX is wanted. `owner` writes one
    row of dW, `refine` computes a row's kept entries anew.
    """

    name: str
    tile: TileConfig
    tile_8bit: TileConfig = TileConfig(128, 128, 128, num_warps=8, num_stages=3)
    tile_crowded: TileConfig | None = None
    tile_fp32: TileConfig = TileConfig(64, 64, 32, num_warps=8, num_stages=2, programs_per_sm=2)
    row: GatherConfig = GatherConfig(block_d=8192, group=4, warp_d=512)
    pieces: GatherConfig = GatherConfig(block_d=2048, group=8, warp_d=512)
    owner: GatherConfig = GatherConfig(block_d=1024, group=8, warp_d=256)
    refine: GatherConfig = GatherConfig(block_d=1024, group=8, warp_d=256)
    bits: BitsConfig = BitsConfig(rows=2, words=512)


CONFIGS = {
    "sm_80": KernelConfig("sm_80", TileConfig(128, 128, 64, num_warps=8, num_stages=3)),
    "sm_90": KernelConfig(
        "sm_90",
        TileConfig(128, 256, 64, num_warps=8, num_stages=4, parts=4, tma=True, flat=True),
        TileConfig(128, 256, 128, 8, 3, parts=4, tma=True, flat=True, group=32),
        tile_crowded=TileConfig(128, 256, 64, num_warps=8, num_stages=4, parts=4, tma=True),
        row=GatherConfig(block_d=8192, group=4, warp_d=1024),
    ),
    "sm_100": KernelConfig(
        "sm_100",
        TileConfig(128, 256, 64, num_warps=8, num_stages=4, parts=4, tma=True),
        TileConfig(128, 128, 128, num_warps=8, num_stages=4, parts=4, tma=True, flat=True),
        tile_crowded=TileConfig(128, 128, 64, num_warps=8, num_stages=4, parts=2, tma=True),
        row=GatherConfig(block_d=8192, group=2, warp_d=512),
    ),
    "gfx942": KernelConfig("gfx942", TileConfig(128, 128, 64, num_warps=8, num_stages=2)),
    # Triton's interpreter on a CPU: its cost follows the number of block operations.
    "interpreter": KernelConfig(
        "interpreter",
        TileConfig(64, 256, 128, num_warps=4, num_stages=1),
        TileConfig(64, 256, 128, num_warps=4, num_stages=1),
        tile_fp32=TileConfig(64, 256, 128, num_warps=4, num_stages=1),
        row=GatherConfig(block_d=1024, group=1024, warp_d=1024),
        pieces=GatherConfig(block_d=64, group=1024, warp_d=1024),
        owner=GatherConfig(block_d=1024, group=256, warp_d=1024),
        refine=GatherConfig(block_d=1024, group=1024, warp_d=1024),
        bits=BitsConfig(rows=64, words=128),
    ),
}

# For a benchmark to try, by architecture and field of its configuration; not read by the kernels.
CANDIDATES: dict[str, dict[str, list[TileConfig] | list[GatherConfig]]] = {
    "sm_80": {
        "tile": [
            TileConfig(128, 128, 32, num_warps=8, num_stages=4),
            TileConfig(128, 128, 64, num_warps=8, num_stages=4),
            TileConfig(64, 256, 32, num_warps=8, num_stages=4),
        ]
    },
    "sm_90": {
        "tile": [
            TileConfig(128, 256, 64, num_warps=8, num_stages=4, parts=4, tma=True),
            TileConfig(128, 256, 64, 8, 4, parts=4, tma=True, flat=True, group=16),
        ],
        "tile_8bit": [
            TileConfig(128, 256, 128, 8, 3, parts=4, tma=True, flat=True),
            TileConfig(128, 128, 128, 4, 3, parts=4, tma=True, programs_per_sm=2, group=16),
        ],
        "owner": [
            GatherConfig(block_d=4096, group=4, warp_d=512),
            GatherConfig(block_d=4096, group=8, warp_d=512),
            GatherConfig(block_d=2048, group=8, warp_d=256),
            GatherConfig(block_d=2048, group=4, warp_d=512),
            GatherConfig(block_d=4096, group=2, warp_d=1024),
        ],
        "row": [
            GatherConfig(block_d=8192, group=8, warp_d=512),
            GatherConfig(block_d=8192, group=2, warp_d=512),
            GatherConfig(block_d=8192, group=4, warp_d=1024),
            GatherConfig(block_d=8192, group=8, warp_d=256),
        ],
        "refine": [
            GatherConfig(block_d=4096, group=4, warp_d=512),
            GatherConfig(block_d=2048, group=8, warp_d=512),
            GatherConfig(block_d=1024, group=16, warp_d=256),
            GatherConfig(block_d=1024, group=4, warp_d=256),
            GatherConfig(block_d=512, group=16, warp_d=128),
        ],
    },
    "sm_100": {
        "tile": [
            TileConfig(128, 128, 64, num_warps=8, num_stages=4, parts=4, tma=True, flat=True),
            TileConfig(128, 256, 64, num_warps=8, num_stages=3, parts=4, tma=True, flat=True),
        ]
    },
    "gfx942": {"tile": [TileConfig(256, 128, 64, num_warps=8, num_stages=2)]},
}


def config_for(architecture: str) -> KernelConfig:
    """Configuration for "sm_90", "gfx942", ...; the nearest relative for a name not listed.

    Consumer Blackwell (sm_12x) has neither wgmma nor tcgen05, and a third of the shared memory: it
    runs what sm_80 runs.
    """
    if architecture in CONFIGS:
        return CONFIGS[architecture]
    for prefix, name in (("sm_9", "sm_90"), ("sm_10", "sm_100"), ("gfx", "gfx942")):
        if architecture.startswith(prefix):
            return CONFIGS[name]
    return CONFIGS["sm_80"]
