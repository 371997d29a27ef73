"""What errors of torch's and of NCCL's mean, in the words for the user."""

import pytest
import torch
import torch.distributed as dist

from matchai.system.failures import device_message, is_dead_loader, is_lost_process, is_out_of_memory, is_sticky

NCCL = "NCCL error in: NCCLUtils.cpp:94, {}, NCCL version 2.27\n{}"
SYSTEM = (
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.\nLast error:\n"
)


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of two processes."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2 GiB",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate",
        NCCL.format("unhandled cuda error", "Cuda failure 'out of memory'"),
    ],
)
def test_a_full_memory_is_told_before_all_else(group: None, words: str) -> None:
    error = dist.DistBackendError(words) if "NCCL" in words else RuntimeError(words)
    assert is_out_of_memory(error)
    assert not is_lost_process(error)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            NCCL.format("invalid usage", "Duplicate GPU detected : rank 0 and rank 1"),
            "GPUs (--num",
        ),
        (
            NCCL.format("unhandled system error", f"{SYSTEM}Error while creating segment /dev/shm/nccl-x"),
            "shm",
        ),
        (NCCL.format("unhandled system error", f"{SYSTEM}Call to bind failed"), "NCCL_SOCKET_IFNAME"),
    ],
)
def test_nccls_own_words_are_told_with_a_way_on(group: None, words: str, told: str) -> None:
    error = dist.DistBackendError(words)
    assert not is_lost_process(error)
    assert not is_dead_loader(error)
    message = device_message(error)
    assert message is not None
    assert words.splitlines()[-1] in message
    assert told in message


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError(NCCL.format("remote process exited or there was a network error", "ncclRemoteError")),
        dist.DistBackendError("Watchdog caught collective operation timeout: NCCL WorkNCCL(...)"),
        RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:14251"),
        dist.DistNetworkError("The client socket has failed to connect"),
    ],
)
def test_a_peer_that_does_not_answer_is_lost(group: None, error: Exception) -> None:
    assert is_lost_process(error)


def test_a_card_without_code_is_told_and_other_errors_are_not() -> None:
    message = device_message(RuntimeError("CUDA error: no kernel image is available for execution on the device"))
    assert message is not None
    assert "ACCELERATE_USE_CPU=1" in message
    assert device_message(RuntimeError("shape mismatch")) is None


def test_a_gpus_sticky_error_is_told_from_a_full_memory() -> None:
    assert is_sticky(torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700))
    assert not is_sticky(RuntimeError("CUDA out of memory"))
