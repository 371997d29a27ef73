"""What the machine can do."""

import pytest
import torch

from matchai.system import machine
from matchai.system.errors import InputError
from matchai.system.machine import choose_precision, default_workers

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


def pretend(monkeypatch: pytest.MonkeyPatch, *, native: bool, launcher: str | None = None) -> None:
    """A CPU and a GPU that both have native bf16 or both have not; the GPU emulates it anyhow, as a T4 does."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launcher is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native}, raising=False)

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)


@pytest.mark.parametrize("launcher", [None, "no"])
@pytest.mark.parametrize(
    ("device", "native", "expected"),
    [
        (CPU, True, "bf16"),
        (CPU, False, "no"),
        (CUDA, True, "bf16"),
        (CUDA, False, "fp16"),
        (MPS, True, "no"),
    ],
    ids=str,
)
def test_auto_without_a_launchers_choice_goes_by_the_device(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, native: bool, expected: str, launcher: str | None
) -> None:
    pretend(monkeypatch, native=native, launcher=launcher)
    assert choose_precision("auto", device)[0] == expected


@pytest.mark.parametrize(("launcher", "device"), [("bf16", CPU), ("bf16", CUDA), ("fp16", CUDA)], ids=str)
@pytest.mark.parametrize("native", [True, False])
def test_auto_takes_a_launchers_half_precision(
    monkeypatch: pytest.MonkeyPatch, launcher: str, device: torch.device, native: bool
) -> None:
    pretend(monkeypatch, native=native, launcher=launcher)
    assert choose_precision("auto", device)[0] == launcher


@pytest.mark.parametrize("asked", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("launcher", ["no", "bf16", "fp16"])
def test_what_is_asked_for_wins_over_the_launcher(monkeypatch: pytest.MonkeyPatch, asked: str, launcher: str) -> None:
    pretend(monkeypatch, native=True, launcher=launcher)
    assert choose_precision(asked, CUDA) == (asked, "as asked")


@pytest.mark.parametrize(("asked", "launcher"), [("fp16", None), ("auto", "fp16")])
def test_fp16_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch, asked: str, launcher: str | None) -> None:
    pretend(monkeypatch, native=True, launcher=launcher)
    with pytest.raises(InputError, match="--mixed-precision"):
        choose_precision(asked, CPU)


def test_a_torch_without_capabilities_counts_as_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, native=True)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert choose_precision("auto", CPU)[0] == "no"


def test_a_cpu_has_no_loader_workers() -> None:
    assert default_workers(CPU, 1) == 0


@pytest.mark.parametrize(("cores", "processes", "expected"), [(1, 1, 0), (4, 1, 3), (64, 1, 8), (8, 4, 1), (2, 8, 0)])
def test_a_gpus_workers_are_its_share_of_the_cores_but_one_and_at_most_8(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, expected: int
) -> None:
    monkeypatch.setattr(machine, "num_cores", lambda: cores)
    assert default_workers(CUDA, processes) == expected
