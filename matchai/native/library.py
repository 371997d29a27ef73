"""matchai's own kernels for CPUs, compiled once on the machine that they run on.

What torch does in several passes through memory, one layer after another, these do in one: on two cores a training step
of the recipe is bound by memory outside its convolutions. torch.compile was tried for the same end and was slower than
torch's single operations (docs/explanation/performance.md). The sources lie in `matchai/native/cpp/`; without a
compiler, torch's operations do the same work.
"""

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from matchai.native import compiler

LANES = 16  # numbers in the longest register that a kernel takes at a time, see cpp/vectors.h
ROW = 128  # numbers that a row should have: eight registers, so that no sum waits for the one before

ACTIVATIONS: dict[type[torch.nn.Module], int] = {torch.nn.Identity: 0, torch.nn.ReLU: 1, torch.nn.SiLU: 2}
"""The activations that batch norm can apply at once, and their numbers in cpp/norm.cpp."""

Pair = Sequence[Tensor | None]
"""Weight and bias, or running mean and variance, each (C,) float32 or None."""

_MAP = "iqqqq"  # type, slices, rows of a slice, width of a row, channels
_SIGNATURES = {
    "norm_statistics": _MAP + "ppi",
    "norm_forward": _MAP + "ppipqppddpppi",
    "norm_running": _MAP + "ppippdppi",
    "norm_gradient_sums": _MAP + "ppippppi",
    "norm_gradient": _MAP + "pppippppdi",
    "excite_means": _MAP + "ppi",
    "excite_scale": _MAP + "pppi",
    "excite_gate_gradient": _MAP + "pppi",
    "excite_gradient": _MAP + "ppppi",
    "depthwise_gradients": "iipppppPi",
    "winograd_convolve": "iqqqqqpppi",
    "winograd_weight_gradient": "iqqqqqpppi",
    "loss_sums": "iqqpppdpi",
    "loss_gradient": "iqqpppdppi",
    "join_maps": "iqqqqpPAi",
    "split_gradient": "iqqqqpPAi",
}
_RESULTS = {"norm_forward": ctypes.c_double, "loss_sums": ctypes.c_int}
_TYPES = {
    "i": ctypes.c_int,
    "q": ctypes.c_int64,
    "d": ctypes.c_double,
    "p": ctypes.c_void_p,
    "P": ctypes.POINTER(ctypes.c_int64),
    "A": ctypes.POINTER(ctypes.c_void_p),
}


class Kernels:
    """The compiled kernels, for channels-last tensors of float32 or bfloat16 on a CPU; see the sources for formulas.

    Maps are (B, C, H, W) and `fits`, gradients of a type and layout with theirs; weights, biases and running statistics
    are (C,) float32. All kernels repeat their bits for equal shapes and numbers of threads.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {name: getattr(library, name) for name in _SIGNATURES}
        for name, signature in _SIGNATURES.items():
            self._functions[name].argtypes = [_TYPES[letter] for letter in signature]
            self._functions[name].restype = _RESULTS.get(name)

    def _call(self, name: str, sizes: Sequence[int], x: Tensor, *arguments: Any) -> Any:
        """Calls the kernel of this name for the type of x; tensors are told by their addresses."""
        values = [one.data_ptr() if isinstance(one, Tensor) else one for one in (x, *arguments)]
        return self._functions[name](x.dtype == torch.bfloat16, *sizes, *values, torch.get_num_threads())

    def norm_statistics(self, x: Tensor) -> Tensor:
        """The number of pixels, then of every channel mean and sum of squared deviations, (1 + 2 C,) float64."""
        own = torch.empty(1 + 2 * x.shape[1], dtype=torch.float64)
        self._call("norm_statistics", _rows(x.shape), x, own)
        return own

    def norm_forward(
        self, x: Tensor, activation: int, parts: Tensor, affine: Pair, eps: float, rate: float, running: Pair
    ) -> tuple[Tensor, Tensor, float]:
        """Normalises by the statistics of all parts (P, 1 + 2 C), moves the running ones by `rate`, and activates.

        Returns:
            The output, (2, C) for the gradient, and the number of pixels of all parts; below two, nothing was done.
        """
        y, saved = torch.empty_like(x), torch.empty(2, x.shape[1])
        settings = (activation, parts, len(parts), *affine, eps, rate, *running)
        count: float = self._call("norm_forward", _rows(x.shape), x, y, *settings, saved)
        return y, saved, count

    def norm_running(self, x: Tensor, activation: int, affine: Pair, eps: float, running: Pair) -> Tensor:
        """Normalises by the running statistics and activates."""
        y = torch.empty_like(x)
        self._call("norm_running", _rows(x.shape), x, y, activation, *affine, eps, *running)
        return y

    def norm_gradient_sums(self, x: Tensor, grad: Tensor, activation: int, saved: Tensor, affine: Pair) -> Tensor:
        """The gradients of weight and bias over this part's pixels, (2, C) float64."""
        own = torch.empty(2, x.shape[1], dtype=torch.float64)
        self._call("norm_gradient_sums", _rows(x.shape), x, grad, activation, saved, *affine, own)
        return own

    def norm_gradient(
        self, x: Tensor, grad: Tensor, activation: int, saved: Tensor, affine: Pair, sums: Tensor, count: float
    ) -> Tensor:
        """The gradient of x, given those sums (2, C) and the number of pixels over all parts."""
        grad_x = torch.empty_like(x)
        self._call("norm_gradient", _rows(x.shape), x, grad, grad_x, activation, saved, *affine, sums, count)
        return grad_x

    def means(self, x: Tensor) -> Tensor:
        """Means over the pixels, (B, C) float32."""
        means = torch.empty(x.shape[:2])
        self._call("excite_means", _rows(x.shape), x, means)
        return means

    def scale(self, x: Tensor, gates: Tensor) -> Tensor:
        """Multiplies x by gates (B, C) float32."""
        y = torch.empty_like(x)
        self._call("excite_scale", _rows(x.shape), x, y, gates)
        return y

    def gate_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """The gradient of the gates, (B, C) float32."""
        grad_gates = torch.empty(x.shape[:2])
        self._call("excite_gate_gradient", _rows(x.shape), x, grad, grad_gates)
        return grad_gates

    def scale_gradient(self, grad: Tensor, gates: Tensor, grad_means: Tensor) -> Tensor:
        """The gradient of an x that is scaled by `gates` and whose `means` have the gradient `grad_means`."""
        grad_x = torch.empty_like(grad)
        self._call("excite_gradient", _rows(grad.shape), grad, grad_x, gates, grad_means)
        return grad_x

    def depthwise_gradients(
        self,
        x: Tensor,
        grad: Tensor,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        wanted: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of x and of a depthwise weight (C, 1, K, K), K 3 or 5, in float32; those that are wanted."""
        exact = weight.float().contiguous()
        made = torch.empty_like(x) if wanted[0] else None, torch.empty_like(exact) if wanted[1] else None
        sizes = (ctypes.c_int64 * 10)(*x.shape, *grad.shape[2:], *stride, *padding)
        self._call("depthwise_gradients", weight.shape[2:3], x, grad, exact, *made, sizes)
        return made

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolves x at stride 1 and padding 1 by a float32 weight (O, C, 3, 3) to (B, O, H, W) of the type of x.

        It computes in float32. A slice's result depends on nothing but the slice: on no other of the batch, and not on
        the number of threads.
        """
        slices, channels, height, width = x.shape
        y = torch.empty((slices, len(weight), height, width), dtype=x.dtype, memory_format=torch.channels_last)
        turned = weight.permute(2, 3, 1, 0).contiguous()
        self._call("winograd_convolve", (slices, height, width, channels, len(weight)), x, turned, y)
        return y

    def convolution_weight_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """The gradient of such a weight, in float32, given that of the output."""
        slices, channels, height, width = x.shape
        filters = grad.shape[1]
        grad_weight = torch.empty(3, 3, channels, filters)
        self._call("winograd_weight_gradient", (slices, height, width, channels, filters), x, grad, grad_weight)
        return grad_weight.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)

    def join(self, x: Tensor, skips: Sequence[Tensor]) -> Tensor:
        """Puts x (B, C, H, W), each pixel four times, and skips (B, C', 2 H, 2 W) beside each other."""
        slices, _, height, width = x.shape
        channels = [one.shape[1] for one in (x, *skips)]
        shape = (slices, sum(channels), 2 * height, 2 * width)
        joined = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        sizes = (slices, height, width, len(channels))
        self._call("join_maps", sizes, joined, _array(channels), _addresses((x, *skips)))
        return joined

    def split_gradient(self, grad: Tensor, channels: Sequence[int]) -> list[Tensor]:
        """The gradients of the maps of so many channels that were joined, given that of the joined one."""
        slices, _, height, width = grad.shape
        scales = [2] + [1] * (len(channels) - 1)
        shapes = [(slices, own, height // s, width // s) for own, s in zip(channels, scales, strict=True)]
        grads = [torch.empty(one, dtype=grad.dtype, memory_format=torch.channels_last) for one in shapes]
        sizes = (slices, height // 2, width // 2, len(channels))
        self._call("split_gradient", sizes, grad, _array(channels), _addresses(grads))
        return grads

    def loss_sums(self, logits: Tensor, target: Tensor, class_weights: Tensor, gamma: float) -> Tensor:
        """The sums of `matchai.model.losses.SegmentationLoss.sums`, (4 + 3 C,) float64, for target (B, H, W) int64.

        Raises:
            IndexError: If a target is no class.
            ValueError: If target or class weights are not of the logits' size.
        """
        num_classes = logits.shape[1]
        if target.shape != logits[:, 0].shape or class_weights.shape != (num_classes,):
            found = f"a target {tuple(target.shape)} and {len(class_weights)} class weights"
            raise ValueError(f"logits {tuple(logits.shape)} have {found}.")
        sums, sizes = torch.empty(4 + 3 * num_classes, dtype=torch.float64), (target.numel(), num_classes)
        if not self._call("loss_sums", sizes, logits, target, class_weights, gamma, sums):
            raise IndexError(f"a target is {target.min()} or {target.max()}, but there are {num_classes} classes.")
        return sums

    def loss_gradient(
        self, logits: Tensor, target: Tensor, class_weights: Tensor, gamma: float, slopes: Tensor
    ) -> Tensor:
        """The gradient of the logits, given those of the sums, (4 + 3 C,) float32."""
        grad, sizes = torch.empty_like(logits), (target.numel(), logits.shape[1])
        self._call("loss_gradient", sizes, logits, target, class_weights, gamma, slopes, grad)
        return grad


def _array(numbers: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _addresses(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*[one.data_ptr() for one in tensors])


def fits(x: Tensor) -> bool:
    """Whether batch norm and excitation have a kernel for this map: it must also fill whole registers."""
    return is_map(x) and bool(_rows(x.shape))


def is_map(x: Tensor) -> bool:
    """Whether this is a map (B, C, H, W) of a type and a layout that the kernels know.

    No tracer sees what they do: to `torch.jit.trace` their results would be tensors that nobody has filled.
    """
    return (
        not is_traced()
        and x.device.type == "cpu"
        and x.dtype in (torch.bfloat16, torch.float32)
        and x.ndim == 4
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def is_traced() -> bool:
    """Whether a tracer looks on, to which a choice by sizes would be no choice."""
    traced: bool = torch.jit.is_tracing() or torch.compiler.is_compiling()  # type: ignore[attr-defined, no-untyped-call]
    return traced


@functools.cache
def _rows(shape: Sequence[int]) -> tuple[int, ...]:
    """Slices, rows of a slice, width of a row, channels, where rows of pixels fill whole registers; else nothing."""
    slices, channels, height, width = shape
    pixels, fold = height * width, LANES // math.gcd(channels, LANES)
    if pixels % fold:
        return ()
    while fold * channels < ROW and pixels % (2 * fold) == 0:
        fold *= 2
    return slices, pixels // fold, channels * fold, channels


@functools.cache
def load() -> tuple[Kernels | None, str]:
    """The kernels, compiled if this machine has not yet done so, and how they were; or None and the reason."""
    library, how = compiler.load_library()
    try:
        return Kernels(library) if library else None, how
    except AttributeError as error:
        return None, f"the compiled library lacks a kernel ({error})"
