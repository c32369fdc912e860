"""A GPU that is not there: inside `pretended_gpu()` code that asks for "cuda" finds a device.

What lies "on" it is memory of the CPU, in tensors of a class that says otherwise. Every op on them
goes through a dispatch mode, which refuses what a GPU refuses (operands on two devices, a generator
of the other one, a wait while waiting is forbidden) and records CUDA graphs, so that they replay.
Triton kernels run in the interpreter where TRITON_INTERPRET is 1; elsewhere they are compiled for
the pretended architecture, and "launched" by a driver that checks the arguments and does nothing.
New memory is full of NaN, and so are results then. The gate's CUDA ops run as on the CPU.

Times, memory and streams are not modelled.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor, nn
from torch._C import DispatchKey
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from triton.backends.nvidia import driver as nvidia
from triton.tools.tensor_descriptor import TensorDescriptor
from triton_tools import SHARED_MEMORY, interpreting, poisoned, repair_interpreter

import dgg_kernels  # noqa: F401  (its ops)

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
aten = torch.ops.aten

# What takes minutes.
REHEARSAL = pytest.mark.skipif("DGG_REHEARSAL" not in os.environ, reason="DGG_REHEARSAL is unset")

# Ops whose result, or its shape, the host reads.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2",
           "unique_dim", "unique_consecutive", "bincount"}  # fmt: skip
# A mask among their indices asks for its number of entries.
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# Those that take tensors of both devices.
CROSSING = {"copy_", "_to_copy", *INDEXING}
# Products with an out_dtype, which a CPU lacks.
WIDE_PRODUCTS = {aten.mm.dtype, aten.mm.dtype_out, aten.addmm.dtype, aten.addmm.dtype_out}


def wide_product(func: Any) -> Callable[..., Tensor]:
    def product(*args: Any, out: Tensor | None = None, **kwargs: Any) -> Tensor:
        dtype = next(a for a in args if isinstance(a, torch.dtype))
        wide = [a.to(dtype) if isinstance(a, Tensor) else a for a in args if a is not dtype]
        result = func.overloadpacket(*wide, **kwargs)
        return result if out is None else out.copy_(result)

    return product


class GpuTensor(Tensor):
    """A tensor that says it is on the GPU; `plain` is the same memory as the CPU's own."""

    gpu: Gpu
    plain: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    data = property(lambda self: self.detach())  # type: ignore[assignment]

    @staticmethod
    def of(plain: Tensor, gpu: Gpu) -> GpuTensor:
        made = Tensor._make_subclass(GpuTensor, plain)
        made.plain, made.gpu = plain, gpu
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor of the pretended GPU is used after its end")

    def __repr__(self, **_: Any) -> str:
        return f"GpuTensor({self.plain!r})"

    def get_device(self) -> int:
        return 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made: Tensor = GpuTensor.of(self.plain.detach().clone(), self.gpu)
        return memo.setdefault(id(self), like(made, self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain.detach().__reduce_ex__(protocol)

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type == "cuda":
            return super().to(dtype or self.dtype, copy=copy)
        assert not (self.requires_grad and torch.is_grad_enabled()), "not through autograd"
        self.gpu.wait("a copy to the host")
        return self.plain.to(dtype or self.dtype, copy=True)

    def cuda(self, *_: Any, **__: Any) -> Tensor:
        return self

    def cpu(self, *_: Any) -> Tensor:
        return self.to("cpu")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def like(made: Tensor, old: Tensor) -> Tensor:
    """A parameter where the old one is."""
    if isinstance(old, nn.Parameter):
        return nn.Parameter(made, old.requires_grad)
    return made.requires_grad_(old.requires_grad)


def moved(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """In place of `nn.Module._apply`, which would put other memory into the same parameters.

    They become others once, when they reach the device, as under
    `torch.__future__.set_overwrite_module_params_on_conversion`.
    """
    new: dict[int, Tensor] = {}
    for part in module.modules() if recurse else [module]:
        for held in (part._parameters, part._buffers):
            for name, old in held.items():
                if old is None:
                    continue
                if id(old) not in new:
                    with torch.no_grad():
                        made = change(old)
                    new[id(old)] = old if made is old else like(made, old)
                held[name] = new[id(old)]
    return module


def load(file: Any, map_location: Any = CPU, **options: Any) -> Any:
    """In place of torch.load."""
    found = _load(file, map_location="cpu", **options)
    return tree_map_only(Tensor, lambda t: t.to(map_location), found)


_load = torch.load


class Generator(torch.Generator):
    """torch.Generator that may say it is the GPU's."""

    def __new__(cls, device: Any = CPU) -> Generator:
        made = super().__new__(cls, "cpu")
        made.of = torch.device(device).type
        return made

    device = property(lambda self: CUDA if self.of == "cuda" else CPU)


class Calls(TorchFunctionMode):
    """What is lost below Python: that a generator is the GPU's, and which GPU "cuda" is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def indexed(a: Any) -> Any:
            return CUDA if isinstance(a, str | torch.device) and str(a) == "cuda" else a

        args = [indexed(a) for a in args]
        kwargs = {name: indexed(a) for name, a in (kwargs or {}).items()}
        if (generator := kwargs.get("generator")) is not None:
            of = args[0].device if args and isinstance(args[0], Tensor) else CPU
            wanted = torch.device(kwargs.get("device") or of)
            if generator.device.type != wanted.type:
                name = getattr(func, "__name__", func)
                message = f"expected a {wanted.type!r} device type for generator"
                raise RuntimeError(f"{name}: {message} but found {generator.device.type!r}")
        return func(*args, **kwargs)


class Gpu(TorchDispatchMode):
    """The pretended device: what was launched on it, and where it stands."""

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__()
        self.capability = capability
        self.architecture = f"sm_{capability[0]}{capability[1]}"
        self.launches: Counter[str] = Counter()
        self.descriptors = 0  # of TMA tiles, made for launches
        self.computes = True  # in the interpreter
        self.waiting_is_an_error = False
        self.graph: Graph | None = None  # that is being captured
        self.pinned: list[Tensor] = []  # memory of the host

    @contextmanager
    def only_launches(self) -> Iterator[None]:
        """Kernels are counted, not run: for code that times, whose results nobody reads."""
        with mock.patch.object(self, "computes", False):
            yield

    def profile(self, activities: Any) -> Profile:
        """In place of torch.profiler.profile."""
        return Profile(self)

    def wait(self, what: str) -> None:
        """The host waits for the device."""
        if self.graph is not None:
            raise RuntimeError(f"{what}: operation not permitted when stream is capturing")
        if self.waiting_is_an_error:
            raise RuntimeError(f"{what}: called a synchronizing CUDA operation")

    def do(self, run: Callable[[], Any]) -> None:
        """Run what has no results but in its arguments: later, when a graph is being captured."""
        if self.graph is not None:
            self.graph.nodes.append(run)
        else:
            run()

    # -- ops --------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        mine = [t for t in tensors if isinstance(t, GpuTensor)]
        if func.namespace == "dgg":
            return self.own_op(func, args, kwargs) if mine else func(*args, **kwargs)
        # Beside such a tensor "cpu" is what torch's C++ takes it to be on.
        if not mine and torch.device(kwargs.get("device") or CPU).type == "cpu":
            return self.on_the_host(func, name, args, kwargs)
        self.check(func, name, args, kwargs, tensors)
        kwargs.pop("pin_memory", None)
        return self.run(func, args, kwargs | ({"device": CPU} if "device" in kwargs else {}))

    def on_the_host(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        if name == "is_pinned":
            return self.is_pinned(args[0])
        pinned = kwargs.pop("pin_memory", False)
        out = func(*args, **kwargs)
        if pinned:
            self.pinned.append(out)
        return out

    def is_pinned(self, t: Tensor) -> bool:
        return any(t.data_ptr() == mine.data_ptr() for mine in self.pinned)

    def check(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> None:
        """Raise where a GPU would: devices that do not go together, and forbidden waits."""
        theirs = [t for t in tensors if not isinstance(t, GpuTensor)]
        if name not in CROSSING and any(t.dim() > 0 for t in theirs):
            raise RuntimeError(
                f"{func}: expected all tensors to be on one device, got cuda and cpu"
            )
        if name == "index" and not isinstance(args[0], GpuTensor):
            raise RuntimeError(f"{func}: indices should be on the indexed tensor's device, the cpu")
        crosses = name in ("copy_", "_to_copy") and theirs
        blocking = not (
            kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        )
        by_mask = name in INDEXING and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in WAITING or (crosses and blocking) or by_mask:
            self.wait(str(func))

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The op on the CPU's memory. A graph keeps it, and its results' memory."""
        whose = {}

        def plain(t: Tensor) -> Tensor:
            bare = t.plain if isinstance(t, GpuTensor) else t
            whose[id(bare)] = t
            return bare

        args, kwargs = tree_map_only(Tensor, plain, (args, kwargs))
        do = wide_product(func) if func in WIDE_PRODUCTS else func
        if func.overloadpacket.__name__ in ("empty", "empty_like", "new_empty", "empty_strided"):
            out = poisoned(do(*args, **kwargs))
        elif self.graph is not None and func._schema.is_mutable:
            self.graph.nodes.append(lambda: do(*args, **kwargs))
            at = [i for i, a in enumerate(func._schema.arguments) if a.is_out or a.is_write]
            name = func._schema.arguments[at[0]].name
            out = None
            if func._schema.returns:
                out = kwargs[name] if name in kwargs else args[at[0]]
        else:
            out = do(*args, **kwargs)
            if self.graph is not None:
                self.graph.keep(do, args, kwargs, out)
        wrapped = lambda t: whose[id(t)] if id(t) in whose else GpuTensor.of(t, self)  # noqa: E731
        return tree_map_only(Tensor, wrapped, out)

    def own_op(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An op of the package: the gate's C++ on the CPU's memory, the others as registered."""
        if func.overloadpacket.__name__ not in ("gate_new_batch", "gate_decide"):
            with self:
                return func.redispatch(torch._C.DispatchKeySet(DispatchKey.CUDA), *args, **kwargs)
        given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
        header = given.get("header")
        for name, t in given.items():
            if isinstance(t, Tensor) and t is not header and not isinstance(t, GpuTensor):
                raise RuntimeError(f"{func}: {name} is on the cpu")
        if header is not None and not self.is_pinned(header):
            raise RuntimeError(f"{func}: header: expected pinned memory of the host")
        given = tree_map_only(GpuTensor, lambda t: t.plain, given)
        given |= {"header": None} if "header" in given else {}

        def decide() -> None:
            func(**given)
            if header is not None:
                header.copy_(given["state"][: len(header)])

        self.do(decide)
        return None

    # -- kernels ----------------------------------------------------------------------------------

    def launched(self, name: str, arguments: Any) -> None:
        """Count a launch; refuse arguments that a kernel cannot reach."""
        for i, a in enumerate(arguments):
            base = a.base if isinstance(a, TensorDescriptor) else a
            if isinstance(base, Tensor) and not isinstance(base, GpuTensor):
                raise ValueError(f"{name}: pointer argument {i} is a tensor of the cpu")
        self.launches[name] += 1

    def interpret(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        """In place of `InterpretedFunction.run`."""
        self.launched(kernel.__name__, [*args, *kwargs.values()])

        def plain(a: Any) -> Any:
            if isinstance(a, TensorDescriptor):
                return TensorDescriptor(a.base.plain, a.shape, a.strides, a.block_shape, a.padding)
            return a.plain if isinstance(a, GpuTensor) else a

        args, kwargs = [plain(a) for a in args], {k: plain(a) for k, a in kwargs.items()}

        def run() -> None:
            if self.computes:
                with torch._C._DisableTorchDispatch():
                    _interpreted_run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

        self.do(run)


class Graph:
    """torch.cuda.CUDAGraph: the ops and launches of its capture, done again at each replay."""

    gpu: Gpu

    def __init__(self) -> None:
        self.nodes: list[Callable[[], Any]] = []

    def keep(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Do the op again, into the memory of its first results (a view has none of its own)."""
        inputs = {t.untyped_storage().data_ptr() for t in tree_flatten((args, kwargs))[0]
                  if isinstance(t, Tensor)}  # fmt: skip
        results = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        if all(t.untyped_storage().data_ptr() in inputs for t in results):
            return

        def again() -> None:
            new = [t for t in tree_flatten(func(*args, **kwargs))[0] if isinstance(t, Tensor)]
            for old, t in zip(results, new, strict=True):
                old.copy_(t)

        self.nodes.append(again)

    @contextmanager
    def capture(self) -> Iterator[None]:
        assert self.gpu.graph is None
        self.gpu.graph = self
        try:
            yield
        finally:
            self.gpu.graph = None

    def replay(self) -> None:
        with torch._C._DisableTorchDispatch():
            for node in self.nodes:
                node()


class Profile:
    """torch.profiler.profile: every kernel that was launched, a millisecond each time."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def __enter__(self) -> Profile:
        self.before = self.gpu.launches.copy()
        return self

    def __exit__(self, *_: object) -> None:
        self.launches = self.gpu.launches - self.before

    def key_averages(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(key=name, count=count, self_device_time_total=1e3 * count)
                for name, count in self.launches.items()]  # fmt: skip


class Stream:
    """torch.cuda.Stream, and Event: everything is done at once, in order."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def nothing(self, *_: Any) -> None: ...

    wait_stream = wait_event = wait = record = record_event = synchronize = nothing

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Stream) -> float:
        return 1.0  # milliseconds


class Driver(nvidia.CudaDriver):
    """Triton's driver of the pretended GPU: it loads nothing, and checks what it would launch."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.utils = self
        self.get_device_capability = lambda _=None: gpu.capability
        self.get_current_stream = lambda _=None: 0
        # What was compiled is kept by device: one for each architecture.
        self.get_current_device = lambda: 10 * gpu.capability[0] + gpu.capability[1]

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self.gpu.architecture]}

    def load_binary(self, *_: Any) -> tuple[object, int, int, int, int]:
        return object(), 0, 0, 0, 1024  # module, function, registers, spills, threads at most

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        tiles = iter(getattr(metadata, "tensordesc_meta", None) or ())
        of_tile = {n: next(tiles, None) for n, t in source.signature.items()
                   if str(t).startswith("tensordesc")}  # fmt: skip

        # triton 3.9 hands over a third argument, which it does not read.
        unread = [None] * (nvidia.make_tensordesc_arg.__code__.co_argcount - 2)

        def launch(x: int, y: int, z: int, *rest: Any) -> None:
            arguments = dict(zip(source.signature, rest[6:], strict=True))
            assert 0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16
            for name, meta in of_tile.items():
                nvidia.make_tensordesc_arg(arguments[name], meta, *unread)
            # Compiled kernels outlive this driver.
            triton.runtime.driver.active.gpu.launched(source.name, arguments.values())

        return launch

    def fill_tma_descriptor_tiled(
        self, address: int, swizzle: int, size: int, _: int, block: Any, shape: Any, strides: Any,
        __: Any,
    ) -> object:  # fmt: skip
        """What cuTensorMapEncodeTiled asks of its arguments."""
        assert address % 16 == 0 and all(s * size % 16 == 0 for s in strides[:-1])
        assert all(0 < b <= 256 for b in block) and all(0 < s <= 2**32 for s in shape)
        assert block[-1] * size <= (16, 32, 64, 128)[swizzle]
        triton.runtime.driver.active.gpu.descriptors += 1
        return object()

    fill_tma_descriptor = fill_tma_descriptor_tiled  # of triton 3.6


if interpreting():
    from triton.runtime.interpreter import InterpretedFunction

    repair_interpreter()
    _interpreted_run = InterpretedFunction.run


def _grouped(original: Callable[..., Any]) -> Callable[..., Any]:
    """torch's grouping by device and dtype, which asks no Python class for its device."""

    def group(lists: Any, with_indices: bool = False) -> Any:
        found = original(lists, with_indices)
        return {(CUDA if isinstance(of[0][0][0], GpuTensor) else device, dtype): of
                for (device, dtype), of in found.items()}  # fmt: skip

    return group


@contextmanager
def pretended_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[Gpu]:
    """For the time of a with block, "cuda" is there.

    Args:
        capability: of the GPU; (9, 0) is an H100.
    """
    gpu = Gpu(capability)
    name = f"pretended {gpu.architecture}"
    properties = SimpleNamespace(multi_processor_count=132, major=capability[0])
    stand_ins: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "_lazy_init": lambda: None, "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0, "set_device": lambda _: None,
        "get_device_name": lambda _=None: name,
        "get_device_capability": lambda _=None: gpu.capability,
        "get_device_properties": lambda _=None: properties,
        "synchronize": lambda _=None: gpu.wait("synchronize") if gpu.graph else None,
        "empty_cache": lambda: None, "reset_peak_memory_stats": lambda _=None: None,
        "memory_allocated": lambda _=None: 0, "max_memory_allocated": lambda _=None: 0,
        "Stream": Stream, "Event": Stream, "current_stream": lambda _=None: Stream(),
        "stream": lambda _: nullcontext(), "CUDAGraph": type("CUDAGraph", (Graph,), {"gpu": gpu}),
        "graph": lambda graph: graph.capture(),
        "is_current_stream_capturing": lambda: gpu.graph is not None,
        "set_sync_debug_mode": lambda mode: setattr(gpu, "waiting_is_an_error", mode == "error"),
        "is_initialized": lambda: True, "is_bf16_supported": lambda *_: True,
        # What is drawn there is drawn from the CPU's.
        "default_generators": (torch.default_generator,),
    }  # fmt: skip
    group = "_group_tensors_by_device_and_dtype"
    with ExitStack() as stack:
        for function, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(torch.cuda, function, stand_in))
        # Asked by the optimizers of torch 2.15.
        stream = SimpleNamespace(is_capturing=lambda: gpu.graph is not None)
        patch_stream = mock.patch.object(torch.accelerator, "current_stream", lambda *_: stream)
        stack.enter_context(patch_stream)
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(mock.patch.object(nn.Module, "_apply", moved))
        stack.enter_context(mock.patch.object(torch, "load", load))
        build = [torch.ops.dgg.build()[0], name]
        stack.enter_context(mock.patch.object(torch.ops.dgg, "build", lambda: build))
        stack.enter_context(mock.patch.object(torch._C, group, _grouped(getattr(torch._C, group))))
        if interpreting():
            run = lambda kernel, *args, **options: gpu.interpret(kernel, *args, **options)  # noqa: E731
            stack.enter_context(mock.patch.object(InterpretedFunction, "run", run))
        else:
            active = triton.runtime.driver
            stack.callback(setattr, active, "_active", active._active)
            active.set_active(Driver(gpu))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        # torch.tensor(..., device="cuda") shall ask the mode, too.
        lifted = torch._C._only_lift_cpu_tensors()
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        torch._C._set_only_lift_cpu_tensors(True)
        stack.enter_context(Calls())
        stack.enter_context(gpu)
        yield gpu
