"""Triton without a GPU: an interpreter that knows bf16 and fp8, and kernels compiled for any GPU.

The two do not go together in one process: TRITON_INTERPRET is read when kernels are declared.
"""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dgg_kernels.configs import FUSED

SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}


def poisoned(t: torch.Tensor) -> torch.Tensor:
    """Full of NaN, or of indices out of any range: what a kernel leaves unwritten shows."""
    return t.fill_(torch.nan if t.is_floating_point() else torch.iinfo(t.dtype).min // 2)


# -- interpreter ----------------------------------------------------------------------------------


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bf16, ties to even, NaN kept."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    wide = values.view(np.uint32).astype(np.uint64)
    nearest = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


FP8_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


def fp8_to_fp32(bits: np.ndarray) -> np.ndarray:
    return FP8_VALUES[bits]


def fp32_to_fp8(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest fp8 (e4m3), no further than the largest, as on a GPU."""
    within = np.ascontiguousarray(np.clip(values, -448.0, 448.0), dtype=np.float32)
    return torch.from_numpy(within).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


# Types that numpy lacks: from bits, to bits.
NARROW = {
    tl.bfloat16: (bf16_to_fp32, fp32_to_bf16),
    tl.float8e4nv: (fp8_to_fp32, fp32_to_fp8),
}


def repair_interpreter() -> None:
    """Makes the interpreter of triton 3.6 to 3.9 right for bf16, fp8, NaN: casts, tl.dot, maxima.

    It keeps them as raw integers, and multiplies those. Elementwise arithmetic on them stays wrong:
    kernels cast to fp32 first. Also lets `range` take runtime values under numpy >= 2.4.
    """
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "narrow_types_repaired", False):
        return
    builder.narrow_types_repaired = True
    create_dot, cast_impl = builder.create_dot, builder.cast_impl
    create_fp_to_fp = builder.create_fp_to_fp

    def widened(x: object) -> object:
        narrow = NARROW.get(x.dtype.scalar)
        return handle(narrow[0](x.data), tl.float32) if narrow else x

    def cast(self, source: object, target: object) -> object:
        scalar = target.scalar
        if source.dtype.scalar == scalar:
            return cast_impl(self, source, target)
        source = widened(source)
        if scalar in NARROW:
            return handle(NARROW[scalar][1](source.data), scalar)
        if scalar == tl.float32 and source.dtype.scalar == tl.float32:
            return source
        return cast_impl(self, source, target)

    def fp_to_fp(self, source: object, target: object, rounding: object) -> object:
        if source.dtype.scalar in NARROW or target.scalar in NARROW:
            return cast(self, source, target)
        return create_fp_to_fp(self, source, target, rounding)

    builder.cast_impl = cast
    builder.create_fp_to_fp = fp_to_fp
    builder.create_dot = lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest)
    # A GPU's maximum of a NaN and a number is the number.
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    builder.get_bf16 = lambda self, value: handle(
        fp32_to_bf16(np.array([value], np.float32)), tl.bfloat16
    )

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: object, scope: object) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    interpreter._patch_lang_tensor = patched

    # Every call of a device function patches triton.language anew, for up to half of the time: once
    # in a launch is enough.
    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[int] = set()

    def patch_once(function: object) -> object:
        module = id(function.__globals__)
        if module not in done:
            done.add(module)
            return patch_lang(function)

    def launched(self, *args: object, **options: object) -> None:
        done.clear()
        launch(self, *args, **options)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launched


# -- compile only ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel asks of a multiprocessor."""

    registers: int
    stack: int  # bytes
    spills: int  # instructions that touch local memory
    shared: int  # bytes
    wgmma: bool
    tcgen05: bool
    tma: bool


def compile_kernel(kernel, architecture, signature, constants, num_warps, num_stages):
    """Compiles a kernel for an architecture that need not be there.

    `signature` holds the type of every argument that is not a constant ("*bf16", "i32", ...);
    pointers and integers are taken to be multiples of 16, except integers named in capitals of one
    letter or starting with "num_", which may be anything.
    """
    names = kernel.arg_names
    types = {name: signature.get(name, "constexpr") for name in names}
    free = {n for n in names if n in ("N", "V") or n.startswith("num_")}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if types[n].startswith("*") or (types[n].startswith("i") and n not in free)
    }
    constants = {n: constants.get(n) for n in names if types[n] == "constexpr"}
    if architecture.startswith("gfx"):
        target = GPUTarget("hip", architecture, 64)
    else:
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, **FUSED}
    return triton.compile(source, target=target, options=options)


def usage(compiled) -> Usage:
    """Registers, spills and instructions of a compiled kernel."""
    if "amdgcn" in compiled.asm:
        return _amd_usage(compiled)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources, sass = (
            subprocess.check_output([tool, flag, file.name], text=True)
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", resources)
    return Usage(
        registers=int(found[1]),
        stack=int(found[2]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        shared=compiled.metadata.shared,
        wgmma=any(f"{kind}GMMA" in sass for kind in "HIQ"),
        tcgen05=any(f"UTC{kind}MMA" in sass for kind in "HQ"),
        tma="UTMALDG" in sass,
    )


def _amd_usage(compiled) -> Usage:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])

    return Usage(
        registers=number("vgpr_count"),
        stack=number("private_segment_fixed_size"),
        # Scalar registers spill into lanes of vector registers, not into memory.
        spills=number("vgpr_spill_count"),
        shared=compiled.metadata.shared,
        wgmma=False,
        tcgen05=False,
        tma=False,
    )


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
