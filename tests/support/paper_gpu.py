"""A GPU of paper: tensors lie in host memory, and a mark on their storage says that they are on a GPU.

What a GPU would refuse is refused (operands on two devices, `numpy` of what is on it), and what the host would wait for
is counted. Values are those of the CPU, so code whose branches depend on them runs too.
"""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
COPIES = ("aten::copy_", "aten::_to_copy", "aten::set_", "aten::detach", "aten::alias", "aten::lift_fresh")
"""Operations whose operands may lie on two devices."""
SELECTIONS = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")
"""Operations whose indices may lie in host memory; a GPU waits for them."""
WAITS = (
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique"),
    *("aten::unique_", "aten::bincount", "aten::_linalg_eigh", "aten::_linalg_svd", "aten::_linalg_check_errors"),
)
"""Operations whose answer, or its shape, the host needs, or that look whether they have converged."""
UNORDERED = ("aten::cumsum", "aten::cumsum_", "aten::histc", "aten::median", "aten::kthvalue", "aten::put_")
"""Operations on numbers that a GPU refuses where deterministic algorithms are asked for: it has none of them."""


class MixedDevices(RuntimeError):
    """One operation was given tensors of two devices."""


class PaperGpu:
    """Marks of storages, and what the host has waited for: (operation, file:line of shoal) -> times."""

    def __init__(self) -> None:
        self.waits: Counter[tuple[str, str]] = Counter()
        self._marked: dict[int, StorageWeakRef] = {}
        self._is_moving = False

    def holds(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is on the GPU."""
        if tensor.device.type == "meta":
            return False
        mark = self._marked.get(tensor.untyped_storage()._cdata)
        return mark is not None and not mark.expired()

    def mark(self, found: Any, on_gpu: bool = True) -> Any:
        """``found``, whose tensors are on the GPU from now on, or in host memory."""
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if on_gpu:
                    self._marked[storage._cdata] = StorageWeakRef(storage)
                else:
                    self._marked.pop(storage._cdata, None)
        return found

    @contextmanager
    def moving(self) -> Iterator[None]:
        """What is computed here is the move of a tensor from one device to the other."""
        before, self._is_moving = self._is_moving, True
        try:
            yield
        finally:
            self._is_moving = before

    def note(self, operation: str) -> None:
        """The host waits for the GPU, or copies to it."""
        for frame in reversed(traceback.extract_stack(limit=200)):
            parts = frame.filename.split("/")
            if "tests" not in parts and {"compress", "train", "eval", "shoal", "lab", "launch"} & set(parts[-4:]):
                self.waits[operation, f"{'/'.join(parts[-2:])}:{frame.lineno}"] += 1
                return
        self.waits[operation, "?"] += 1

    @property
    def waited(self) -> int:
        """How often shoal has waited; what a test waits for by itself does not count."""
        return sum(times for (_, place), times in self.waits.items() if place != "?")

    @contextmanager
    def card(self) -> Iterator[PaperGpu]:
        """Inside, `cuda` is this GPU."""
        with _Operations(self), _Calls(self):
            yield self


class _Operations(TorchDispatchMode):
    """What comes of operations, below autograd."""

    def __init__(self, gpu: PaperGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled():  # autograd, which would have taken it apart, is not there
            with self:
                found = func.decompose(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        gpu, name = self.gpu, func.name().partition(".")[0]
        tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        with torch._C.DisableTorchFunction():
            on_gpu = [gpu.holds(tensor) for tensor in tensors]
        found = func(*args, **(kwargs or {}))
        if gpu._is_moving or not any(on_gpu):
            return found
        with torch._C.DisableTorchFunction():
            if name == "aten::copy_":
                if on_gpu[0] != on_gpu[1]:
                    gpu.note("copy_ between devices")
                return found
            if not all(on_gpu) and name not in COPIES:
                self._refuse_mixed(name, args, tensors, on_gpu)
            if name in UNORDERED and torch.are_deterministic_algorithms_enabled() and args[0].is_floating_point():
                raise RuntimeError(f"{name} does not have a deterministic implementation")
            if name in SELECTIONS and any(leaf is not None and leaf.dtype == torch.bool for leaf in args[1]):
                gpu.note("selection by a mask")
            if name.startswith(WAITS):
                gpu.note(name)
                return found if name != "aten::nonzero" else gpu.mark(found)
            return gpu.mark(found)

    def _refuse_mixed(self, name: str, args: Any, tensors: list[Tensor], on_gpu: list[bool]) -> None:
        elsewhere = [tensor for tensor, there in zip(tensors, on_gpu, strict=True) if not there and tensor.dim()]
        if name in SELECTIONS and on_gpu[0]:
            indices = [id(leaf) for leaf in tree_leaves(args[1])]
            if any(id(tensor) in indices for tensor in elsewhere):
                self.gpu.note("index from host memory")
            elsewhere = [tensor for tensor in elsewhere if id(tensor) not in indices]
        if elsewhere:
            places = [("cuda" if there else "cpu", tuple(t.shape)) for t, there in zip(tensors, on_gpu, strict=True)]
            raise MixedDevices(f"{name}: {places}")


class _Calls(TorchFunctionMode):
    """What code asks of tensors and for them, above autograd."""

    def __init__(self, gpu: PaperGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, gpu = dict(kwargs or {}), self.gpu
        is_tensor = bool(args) and isinstance(args[0], Tensor)
        if func in (Tensor.device.__get__, Tensor.is_cuda.__get__):  # pyright: ignore[reportAttributeAccessIssue]
            on_gpu = gpu.holds(args[0])
            return (GPU if on_gpu else func(*args)) if func == Tensor.device.__get__ else on_gpu  # pyright: ignore
        if is_tensor and func in (Tensor.numpy, Tensor.__array__, Tensor.pin_memory) and gpu.holds(args[0]):
            raise TypeError(f"{func.__name__} of a tensor on the GPU; copy it to host memory first")
        if func is Tensor.tolist and gpu.holds(args[0]):
            gpu.note("tolist")
        if func is Tensor.pin_memory:
            return args[0].clone()
        if func is Tensor.cpu:
            return self._moved(args[0], False, waits=True) if gpu.holds(args[0]) else args[0]
        if func is Tensor.cuda:
            return args[0].to(GPU)
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if func is Tensor.__deepcopy__:
            with gpu.moving():
                return gpu.mark(func(*args, **kwargs), gpu.holds(args[0]))
        kwargs.pop("pin_memory", None)
        wanted = kwargs.get("device")
        if wanted is None or torch.device(wanted).type == "meta":
            return func(*args, **kwargs)
        with gpu.moving():
            found = func(*args, **{**kwargs, "device": "cpu"})
        if torch.device(wanted).type == "cuda" and func is torch.tensor and found.numel():
            gpu.note("torch.tensor on the GPU")
        return gpu.mark(found, torch.device(wanted).type == "cuda")

    def _to(self, tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*_without_gpu(args), **_without_gpu(kwargs))  # pyright: ignore[reportAttributeAccessIssue]
        asked = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, str | int | torch.device | Tensor)]
        asked = [leaf for leaf in asked if not isinstance(leaf, bool)]
        there = self.gpu.holds(tensor)
        on_gpu = there if not asked else self._is_gpu(asked[0])
        if device is not None and device.type == "meta":
            return tensor.to(device, dtype)
        if on_gpu == there:
            return Tensor.to(tensor, dtype or tensor.dtype, copy=copy)
        return self._moved(tensor, on_gpu, dtype, waits=there or not non_blocking)

    def _is_gpu(self, place: Any) -> bool:
        if isinstance(place, Tensor):
            return self.gpu.holds(place)
        return isinstance(place, int) or torch.device(place).type == "cuda"

    def _moved(self, tensor: Tensor, on_gpu: bool, dtype: torch.dtype | None = None, *, waits: bool) -> Tensor:
        if waits:
            self.gpu.note("copy to the GPU" if on_gpu else "copy to host memory")
        with self.gpu.moving(), torch._C.DisableTorchFunction():
            found = tensor.to(dtype=dtype or tensor.dtype, copy=True)
            return self.gpu.mark(found, on_gpu)


def _without_gpu(given: Any) -> Any:
    """Arguments of `to` as they would be for host memory."""
    if isinstance(given, dict):
        return dict(zip(given, _without_gpu(tuple(given.values())), strict=True))
    return tuple("cpu" if _is_place(each) and torch.device(each).type == "cuda" else each for each in given)


def _is_place(each: Any) -> bool:
    return isinstance(each, str | torch.device) or (isinstance(each, int) and not isinstance(each, bool))


@pytest.fixture
def paper_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PaperGpu]:
    """A GPU of paper which shoal computes on."""
    import shoal.runtime

    autocast, own = torch.autocast, shoal.runtime.device

    class OfTheCpu(autocast):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type.startswith("cuda") else device_type, *args, **kwargs)

    monkeypatch.setattr(torch, "autocast", OfTheCpu)
    monkeypatch.setattr(torch.amp, "autocast", OfTheCpu)
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        of_cpu = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *_, of_cpu=of_cpu: of_cpu("cpu"))
    for module in [module for name, module in sys.modules.items() if name.startswith("shoal")]:
        if getattr(module, "device", None) is own:
            monkeypatch.setattr(module, "device", lambda: GPU)
    with PaperGpu().card() as gpu:
        yield gpu
