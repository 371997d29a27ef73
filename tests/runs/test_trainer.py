"""A run from Python, as in a notebook."""

import errno
import io
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from matchai import TrainConfig, run
from matchai.data.prepared import SliceDataset
from matchai.settings.config import PRESETS
from matchai.system.console import Display
from matchai.system.errors import InputError
from matchai.system.processes import StopSignal
from matchai.training import checkpoint
from matchai.training.checkpoint import State, load_weights, pack_weights


def config(data: Path, cache: Path, output: Path, **settings: Any) -> TrainConfig:
    small = {"image_size": 64, "encoder": "tu-test_efficientnet", "epochs": 1, "mixed_precision": "no"}
    place = {"data": data, "cache": cache, "output": output}
    return TrainConfig().updated(**{**PRESETS["quick"], **small, **place, **settings})


def test_a_run_tells_each_epoch_and_leaves_the_global_random_state(phantom: Path, cache: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    told: list[int] = []
    result = run(config(phantom, cache, tmp_path / "run"), on_epoch=lambda row: told.append(row["epoch"]))
    assert told == [1]
    assert result.is_finished
    assert result.best_epoch == 1
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_figure_that_is_undefined_is_not_told_as_0(data: Path, cache: Path, tmp_path: Path) -> None:
    """A lesion is in one slice alone, which must train."""
    masks = np.load(data / "masks_medseg.npy")
    masks[1:, ..., 2] |= masks[1:, ..., :2].any(axis=-1)
    masks[1:, ..., :2] = False
    np.save(data / "masks_medseg.npy", masks)
    said = io.StringIO()
    run(config(data, cache, tmp_path / "run"), display=Display(True, said))
    end = " ".join(said.getvalue().split())
    assert "lesion undefined, ground glass undefined, consolidation undefined, lungs other 0." in end


def test_no_loss_is_shown_before_one_is_known(
    phantom: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a step is known with the next."""
    shown: list[str] = []
    monkeypatch.setattr(Display, "show", lambda _self, _what, _done, _total, told="": shown.append(told))
    run(config(phantom, cache, tmp_path / "run"))
    assert "images/s" in next(told for told in shown if told)
    assert not any("loss 0.000" in told for told in shown)


def test_the_folds_validate_every_slice_once(phantom: Path, cache: Path, tmp_path: Path) -> None:
    import json

    seen: list[int] = []
    for fold in range(2):
        output = tmp_path / f"fold{fold}"
        run(config(phantom, cache, output, folds=2, fold=fold))
        seen += json.loads((output / "split.json").read_text())["val"]
    assert sorted(seen) == list(range(32))


def test_options_of_training_run_together(phantom: Path, cache: Path, tmp_path: Path) -> None:
    settings = {"ema_decay": 0.9, "clip_grad_norm": 1.0, "accumulate": 2, "tracker": ["tensorboard"]}
    result = run(config(phantom, cache, tmp_path / "run", **settings))
    assert result.is_finished
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_a_run_with_context_says_so_in_its_weights_and_is_not_taken_for_another(
    phantom: Path, cache: Path, tmp_path: Path
) -> None:
    with_context = config(phantom, cache, tmp_path / "run", context=1, soft_boundary=2)
    said = io.StringIO()
    assert run(with_context, display=Display(True, said)).is_finished
    assert "Neighbours within 4 volumes" in said.getvalue()
    weights, about = load_weights(tmp_path / "run")
    assert (about["context"], about["in_channels"]) == (1, 3)
    assert run(with_context).is_finished  # the same again goes on from there
    with pytest.raises(InputError, match=r"context was 1 and is 0.*soft_boundary was 2 and is 0"):
        run(config(phantom, cache, tmp_path / "run"))
    with pytest.raises(InputError, match="context 1 there, 2 here"):
        run(config(phantom, cache, tmp_path / "other", context=2, init=tmp_path / "run"))
    path = tmp_path / "then.safetensors"
    path.write_bytes(pack_weights(weights, {name: value for name, value in about.items() if name != "context"}))
    with pytest.raises(InputError, match="context 0 there, 1 here"):
        run(config(phantom, cache, tmp_path / "another", context=1, init=path))
    # what could not begin leaves no experiment behind that another --init would differ from
    assert not (tmp_path / "another" / "config.yaml").exists()


def children() -> set[int]:
    """Processes of this one, those that ended and were not waited for included."""
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_loader_workers_persist_over_epochs_and_end_with_the_run(phantom: Path, cache: Path, tmp_path: Path) -> None:
    before, seen = children(), []
    settings = config(phantom, cache, tmp_path / "run", epochs=3, num_workers=2)
    run(settings, on_epoch=lambda _: seen.append(children() - before))
    assert [len(one) for one in seen] == [3, 3, 3]  # two for training, one for validation
    assert seen[0] == seen[1] == seen[2]
    assert children() == before


@pytest.mark.parametrize("way", ["finished", "stopped"])
def test_a_run_whose_end_finds_no_room_is_an_error_and_goes_on_once_there_is(
    way: str, phantom: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, stop = config(phantom, cache, tmp_path / "run", epochs=2), StopSignal()
    real, count = checkpoint.save_state, iter(range(10))

    def save(folder: Path, state: State) -> None:
        if next(count) > 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(folder, state)

    def ask(row: dict[str, Any]) -> None:
        stop.received = signal.SIGTERM if way == "stopped" else None

    monkeypatch.setattr(checkpoint, "save_state", save)
    with pytest.raises(InputError, match=r"does not hold all of it \(No space left on device\)"):
        run(settings, on_epoch=ask, stop=stop)
    monkeypatch.undo()
    result = run(settings)
    assert [row["epoch"] for row in result.history] == [1, 2]


@pytest.mark.parametrize("calls", [2, 6])
def test_no_loader_worker_outlives_a_run_that_fails(calls: int, phantom: Path, cache: Path, tmp_path: Path) -> None:
    """In the middle of the training's four steps, and in the validation's two."""
    before, count = children(), iter(range(1, 100))

    def fail(*_: int) -> None:
        if next(count) == calls:
            assert children() > before
            raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="the caller's own") as kept:
        run(config(phantom, cache, tmp_path / "run", num_workers=2), on_step=fail)
    assert kept.tb is not None  # which holds every frame of the run
    assert children() == before


def test_a_run_that_waits_for_its_data_says_so_once(
    phantom: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = SliceDataset.__getitem__

    def load_slowly(self: SliceDataset, draw: int) -> Any:
        time.sleep(0.02)
        return load(self, draw)

    monkeypatch.setattr(SliceDataset, "__getitem__", load_slowly)
    said = io.StringIO()
    run(config(phantom, cache, tmp_path / "run", epochs=2), display=Display(True, said))
    assert said.getvalue().count("spent waiting for data") == 1


def test_an_epoch_is_saved_before_it_is_told(
    phantom: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []

    def look(_self: Display, text: str) -> None:
        if text.startswith("epoch "):
            state = checkpoint.load_state(tmp_path / "run")
            assert state is not None
            kept.append(len(state.record["history"]))
            assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == kept[-1]

    monkeypatch.setattr(Display, "say", look)
    run(config(phantom, cache, tmp_path / "run", epochs=3))
    assert kept == [1, 2, 3]
