"""A GPU that is not there: tensors of the CPU that say they lie on `cuda:0`, with real numbers and real gradients.

What Python asks (devices, copies, factories) is answered by a function mode; what reaches the operators is watched by a
dispatch mode, which refuses tensors of two devices in one operator, as CUDA does, and counts what would wait for a GPU.
Not shown: layouts, streams, cuDNN, NCCL, and CUDA's own list of what autocast casts.
"""

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.utils.clip_grad
from accelerate import PartialState
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
READS = {"_local_scalar_dense", "nonzero", "bincount", "equal", "masked_select", "is_nonzero", "unique_dim", "_unique2"}
INDEXING = {"index", "index_put", "index_put_"}
OF_BUCKETS = {"mul", "mul_", "mul_out", "div", "div_", "add_"}
MAY_MIX = {"copy_", "_to_copy", *INDEXING}


class Waits(collections.Counter[str]):
    """What would have waited for the GPU, by name, and how many operators there were."""

    num_operators: int = 0
    num_bytes: int = 0


def is_far(tensor: Tensor) -> bool:
    """Whether a tensor pretends to lie on the GPU."""
    return bool(getattr(tensor.untyped_storage(), "is_far", False))


def send(out: Any) -> Any:
    """Lets the tensors of a result pretend to lie on the GPU."""

    def mark(tensor: Tensor) -> Tensor:
        tensor.untyped_storage().is_far = True  # type: ignore[attr-defined]
        return tensor

    return tree_map_only(Tensor, mark, out)


def copy_of(tensor: Tensor) -> Tensor:
    """The same numbers in other memory, beside all modes."""
    with torch.no_grad(), _disable_current_modes():
        return torch.empty_like(tensor).copy_(tensor)


ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh"}
VIEWS = {
    *{"view", "_unsafe_view", "t", "transpose", "permute", "slice", "select", "expand", "unsqueeze", "squeeze"},
    *{"split", "as_strided", "unbind", "split_with_sizes", "_reshape_alias", "unfold", "set_", "resize_", "is_pinned"},
    *{"detach", "alias"},
}


class _Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, waits: Waits) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        far = [one for one in tensors if is_far(one)]
        near = [one for one in tensors if not is_far(one) and one.ndim and one.numel()]
        if far and near and dist.is_initialized() and name in OF_BUCKETS:
            send(near)  # the buckets of DDP, which it makes beside Python
            far, near = [*far, *near], []
        has_host_index = name in INDEXING and (near or any(one.dtype == torch.bool for one in far[1:]))
        if far and (name in READS or has_host_index):
            self.waits[name] += 1
        if far and near and name not in MAY_MIX:
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} was given two.")
        out = func(*args, **(kwargs or {}))
        if far and name not in ALLOCATIONS | VIEWS:
            self.waits.num_operators += 1
            results = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
            self.waits.num_bytes += sum(one.numel() * one.element_size() for one in (*tensors, *results))
        # autograd allocates without asking Python for a device
        is_of_backward = name in ALLOCATIONS and not tensors and torch._C._current_graph_task_id() != -1
        # autograd allocates without asking Python for a device
        is_of_backward = name in ALLOCATIONS and not tensors and torch._C._current_graph_task_id() != -1
        return send(out) if is_of_backward or (far and name != "copy_") else out


class _Answering(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.__name__ == "__get__":
            answers = {"device": (CUDA, CPU), "is_cuda": (True, False), "is_cpu": (False, True)}
            asked = getattr(func.__self__, "__name__", "")
            if asked in answers:
                return answers[asked][0 if is_far(args[0]) else 1]
        if func in (Tensor.cpu, Tensor.tolist, Tensor.numpy) and is_far(args[0]):
            self.waits[func.__name__] += 1
            args = (copy_of(args[0]), *args[1:])
        if func is Tensor.pin_memory:
            return args[0].clone()
        if func is Tensor.to:
            return self._move(args, kwargs)
        kwargs.pop("pin_memory", None)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            return send(func(*args, **(kwargs | {"device": CPU})))
        return func(*args, **kwargs)

    def _move(self, args: Any, kwargs: Any) -> Any:
        tensor, *rest = args
        kwargs.pop("copy", None)
        rest = [(CUDA if is_far(one) else CPU) if isinstance(one, Tensor) else one for one in rest]
        device, dtype, is_later, layout = torch._C._nn._parse_to(*rest, **kwargs)
        is_moved = device is not None and (device.type == "cuda") != is_far(tensor)
        if is_moved:
            self.waits["to"] += not is_later
            tensor = tensor.clone() if tensor.requires_grad else copy_of(tensor)
        moved = Tensor.to(tensor, dtype or tensor.dtype, memory_format=layout or torch.preserve_format)
        return send(moved) if is_moved and device.type == "cuda" else moved


def _by_gpu(group: Callable[..., Any]) -> Callable[..., Any]:
    def grouped(*args: Any, **kwargs: Any) -> Any:
        return {(CUDA, dtype): value for (_, dtype), value in group(*args, **kwargs).items()}

    return grouped


class _Generator(torch.Generator):
    """A generator of the CPU, whatever device is asked for."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        return super().__new__(cls)

    def __init__(self, device: Any = "cpu") -> None: ...


class _Event:
    """An event of a stream that has always come."""

    def __init__(self, enable_timing: bool = False) -> None: ...

    def record(self, *_: Any) -> None: ...

    def elapsed_time(self, _: "_Event") -> float:
        return 0.0

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def pretended_gpu(major: int = 9, count: int = 1) -> Iterator[Waits]:
    """While the block runs there is a GPU; what would wait for it is counted.

    Args:
        major: Of its compute capability; from 8 on it computes bf16.
        count: GPUs that this host has.
    """
    waits = Waits()
    autocast = torch.autocast.__init__

    def has_bf16(including_emulation: bool = True) -> bool:
        return major >= 8 or including_emulation

    properties = mock.Mock(major=major, minor=0, total_memory=80 * 2**30)
    properties.name = "Pretended GPU"
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: count,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "manual_seed": lambda _: None,
        "manual_seed_all": lambda _: None,
        "empty_cache": lambda: None,
        "synchronize": lambda *_: None,
        "Event": _Event,
        "get_rng_state": lambda *_: torch.zeros(1),
        "set_rng_state": lambda *_: None,
        "get_device_properties": lambda *_: properties,
        "get_device_name": lambda *_: properties.name,
        "get_device_capability": lambda *_: (major, 0),
        "get_arch_list": lambda: ["sm_75", "sm_80", "sm_90"],
        "is_bf16_supported": has_bf16,
        "mem_get_info": lambda *_: (70 * 2**30, 80 * 2**30),
    }
    name = "_group_tensors_by_device_and_dtype"
    group = Optimizer._group_tensors_by_device_and_dtype
    health = "_accelerator_graph_capture_health_check"
    with contextlib.ExitStack() as stack:
        for asked, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, asked, answer))
        as_cpu = lambda self, device_type, *a, **k: autocast(self, "cpu", *a, **k)  # noqa: E731 a method
        stack.enter_context(mock.patch.object(torch.autocast, "__init__", as_cpu))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(mock.patch.object(Optimizer, health))
        stack.enter_context(mock.patch.object(Optimizer, name, staticmethod(_by_gpu(group))))
        clip = torch.nn.utils.clip_grad
        stack.enter_context(mock.patch.object(clip, name, _by_gpu(getattr(clip, name))))
        PartialState._reset_state()  # which else remembers the device of an earlier run
        stack.callback(PartialState._reset_state)
        stack.enter_context(_Watching(waits))
        stack.enter_context(_Answering(waits))
        yield waits
