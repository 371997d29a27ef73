"""What happens before the first step: the processes, the output folder, the data, and what the user is told."""

import json
import platform
import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, GradScalerKwargs, ProjectConfiguration
from torch import nn

from matchai.data import Data, built_in_phantom, read_data
from matchai.native import library
from matchai.settings import FREE, LEAVES, TrainConfig, check, parsing
from matchai.system import (
    Display,
    InputError,
    Problems,
    alone,
    check_agreement,
    check_launch,
    decide,
    is_out_of_memory,
    is_there,
    join_group,
    machine,
    num_restarts,
    write_whole,
)
from matchai.training import build_model_of, checkpoint, slice_weights_of, step_problems

T = TypeVar("T")


@dataclass(frozen=True)
class Setup:
    """All that a run needs before its loop is built.

    Attributes:
        accelerator: Devices, precision, processes.
        display: Where things are said.
        data: The slices, prepared and split.
        model: With its first weights, on the CPU.
    """

    accelerator: Accelerator
    display: Display
    data: Data
    model: nn.Module


def set_up(config: TrainConfig, output: Path, display: Display | None, stack: ExitStack) -> Setup:
    """Joins the processes, locks the folder, reads the data, builds the model, and says what will be done.

    Args:
        config: All settings.
        output: The run's folder.
        display: Where to say things; without it, the terminal.
        stack: Lets go of the folder and the terminal at its end.

    Raises:
        InputError: With every problem found, before anything but the folder and the cache is written.
    """
    problems = Problems(check(config))
    accelerator, precision = make_accelerator(config, output, problems)
    machine.set_threads(machine.num_local_processes(accelerator.num_processes))
    check_agreement(
        {name: value for name, value in config.flat().items() if name not in FREE}
        | {"precision": precision.split()[0], "torch": torch.__version__},
        "start all of them by the same command, with the same packages.",
    )
    display = display or Display(accelerator.is_main_process)
    stack.callback(display.close)
    announce_data(config, display)
    with problems.collect():
        decide(lambda: open_output(output, config, stack, display))
    data, model = _read_and_build(config, output, accelerator, display, problems)
    check_agreement(data.digests, "all of them must read the same slices.")
    record = make_record(accelerator, data, precision)
    decide(lambda: check_experiment(output, config, record))
    if accelerator.is_main_process:
        write_split(output, config, data)
    announce_run(display, accelerator, config, data, precision)
    return Setup(accelerator, display, data, model)


def _read_and_build(
    config: TrainConfig, output: Path, accelerator: Accelerator, display: Display, problems: Problems
) -> tuple[Data, nn.Module]:
    """The data and the model; raises InputError with what is wrong with either, and with `problems`."""
    cache = config.input.cache or output.parent / "cache"
    is_resuming = any((output / checkpoint.LAST).glob("state-*"))
    data, model = None, None
    with problems.collect():
        data = on_main_first(lambda: read(config, cache, display))
    display.close()
    with problems.collect():
        model = on_main_first(lambda: build_model_of(config, is_resuming=is_resuming))
    if data is not None:
        problems += step_problems(config, len(data.train), accelerator.num_processes, accelerator.device, model)
    if problems or data is None or model is None:
        raise InputError(*dict.fromkeys(problems))
    return data, model


def make_accelerator(config: TrainConfig, output: Path, problems: Problems) -> tuple[Accelerator, str]:
    """The accelerator, and why it has its precision; adds to `problems` what it cannot do."""
    precision, reason = "no", "as nothing else was possible"
    processes = join_group(config.machine.collective_timeout)
    with problems.collect():
        precision, reason = machine.choose_precision(config.optimisation.mixed_precision, processes.device)
    AcceleratorState._reset_state()  # a notebook's second run may take another precision
    trackers = list(config.machine.tracker)
    missing = sorted(set(trackers) - {str(one) for one in get_available_trackers()})
    if missing:
        problems.append(f"tracker {', '.join(missing)} is not installed; `pip install {' '.join(missing)}`.")
        trackers = []
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            log_with=trackers or None,
            project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output)),
            kwargs_handlers=[
                # the running statistics are made equal before each validation, see `matchai.training.loop.validate`
                DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
                # from torch's 65536 sixteen halvings may go before the first step, more than may be skipped in a row
                GradScalerKwargs(init_scale=2.0**13),
            ],
        )
    except Exception as error:  # what it says of settings of the environment that `check_launch` does not know
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"Accelerate does not start with the settings that it finds ({str(error).splitlines()[0]}); start with "
            "`accelerate launch --config_file accelerate_config.yaml -m matchai.train` in matchai's folder."
        ) from error
    check_launch(accelerator.num_processes)
    if accelerator.device.type == "cuda" and (told := machine.unsupported_gpu(accelerator.local_process_index)):
        problems.append(told)  # before the first kernel, which would end with fewer words
    return accelerator, f"{precision} ({reason})"


def announce_data(config: TrainConfig, display: Display) -> None:
    """Says first what is trained on; every run on the phantom says that it is synthetic."""
    preset = config.run.preset
    if config.input.data is None:
        display.say(
            f"matchai: preset {preset} on the built-in synthetic phantom, which is no patient's data. For your own "
            "slices: accelerate launch --quiet -m matchai.train --data DIR"
        )
    else:
        display.say(f"matchai: preset {preset} on {config.input.data}")


def announce_run(display: Display, accelerator: Accelerator, config: TrainConfig, data: Data, precision: str) -> None:
    """What the user should know before the first step."""
    for note in data.notes:
        display.say(f"data: {note}")
    weights = slice_weights_of(config, data)
    if weights.min() == weights.max():
        targets = " or ".join(config.sampling.target_classes)
        display.warn(
            f"the sampler does nothing, as all training slices weigh the same (sampler_weight {weights[0]:g}, all or "
            f"none show {targets}); choose other --target-classes."
        )
    display.say(
        f"training on {len(data.train)} slices, validating on {len(data.val)}; {accelerator.device}, "
        f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''}, "
        f"{torch.get_num_threads()} threads, mixed precision {precision}"
    )
    kernels, how = library.load() if accelerator.device.type == "cpu" else (None, "")
    if how and kernels is None:
        display.say(
            f"without matchai's own kernels for CPUs, as {how}: with them a step takes about two thirds of the time "
            "(on Debian and Ubuntu: apt install g++)."
        )


def open_output(output: Path, config: TrainConfig, stack: ExitStack, display: Display) -> None:
    """Makes and locks the run's folder; with --restart, moves the old run aside first.

    Raises:
        InputError: If another run works in it, it cannot be written, or it holds what is no run.
    """
    is_there(output / checkpoint.LAST)  # a folder that cannot be entered is told by its own name
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context(ExitStack())
        lock.enter_context(checkpoint.lock_folder(output, display.say))
        if config.run.restart and not num_restarts() and (output / "config.yaml").exists():
            number = 1
            while (aside := output.with_name(f"{output.name}-old-{number}")).exists():
                number += 1
            output.rename(aside)
            output.mkdir()
            lock.enter_context(checkpoint.lock_folder(output, display.say))
    except OSError as error:
        words = f"The output folder {output} cannot be written ({error.strerror}); name another with --output."
        raise InputError(words) from None
    foreign = [path.name for path in output.iterdir() if path.name != "run.lock" and not path.name.endswith(".tmp")]
    if foreign and not (output / "config.yaml").exists():
        raise InputError(f"{output} holds {min(foreign)} and is no matchai run; name another folder with --output.")


def read(config: TrainConfig, cache: Path, display: Display) -> Data:
    """Reads the data that the settings name.

    Args:
        config: All settings; without `data`, the built-in phantom is made and read.
        cache: The folder of prepared slices.
        display: Where progress, and a wait for another run, is shown.

    Raises:
        InputError: With every problem found.
    """
    settings = config.input
    if settings.background_class not in settings.class_names:
        raise InputError  # told by the check of the settings
    with alone(cache, lambda: display.say(f"waiting for another run, which prepares slices in {cache}")):
        return read_data(
            settings.data or built_in_phantom(cache, settings.phantom_slices),
            cache,
            settings,
            seed=config.run.seed,
            context=config.network.context,
            progress=lambda done, total: display.show("preparing slices", done, total),
        )


def make_record(accelerator: Accelerator, data: Data, precision: str) -> dict[str, Any]:
    """What config.yaml records of the run beside its settings."""
    return {
        "data": data.digests,
        "notes": data.notes,
        "slices": {"train": len(data.train), "val": len(data.val)},
        "precision": precision,
        "num_processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "kernels": library.load()[1] if accelerator.device.type == "cpu" else "torch's",
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a run depends on."""
    packages = ("matchai", "torch", "segmentation-models-pytorch", "timm", "albumentations", "accelerate", "numpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def describe_weights(config: TrainConfig, data: Data, row: dict[str, Any]) -> dict[str, Any]:
    """What prediction needs beside the weights of an epoch, given its row of the history."""
    settings, (low, high) = config.input, config.input.hu_window
    return {
        "class_names": list(settings.class_names),
        "background_class": settings.background_class,
        "lesion_classes": list(settings.lesion_classes),
        "hu_window": [low, high],
        "mean_hu": low + data.mean * (high - low),
        "std_hu": data.std * (high - low),
        "image_size": settings.image_size,
        "data_kind": data.kind,
        "orientation": data.orientation,
        "rescale": list(settings.rescale),
        "encoder": config.network.encoder,
        "context": config.network.context,
        "in_channels": 2 * config.network.context + 1,
        "epoch": row["epoch"],
        "mean_dice": row["mean_dice"],
        "synthetic": settings.data is None,
        "matchai": metadata.version("matchai"),
    }


def check_experiment(output: Path, config: TrainConfig, record: dict[str, Any]) -> None:
    """Writes config.yaml of a new run, or compares an old one's.

    Raises:
        InputError: With every difference.
    """
    path = output / "config.yaml"
    if not path.exists():
        write_whole(path, parsing.dump(config, record))
        return
    was, now = TrainConfig().updated(**parsing.load(path)).flat(), config.flat()
    old, new = parsing.load_recorded(path).get("data", {}), record["data"]
    differences = [
        f"{name} was {was[name]} and is {now[name]}" for name in LEAVES if name not in FREE and was[name] != now[name]
    ]
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    differences += [f"the content of {name} is another" for name in changed]
    changes = {f"epochs was {was['epochs']} and is {now['epochs']}", f"init was {was['init']} and is {now['init']}"}
    if was["epochs"] != now["epochs"] and set(differences) <= changes:
        old_run, new_run = shlex.quote(str(output)), shlex.quote(f"{output}-more")
        raise InputError(
            f"{output} was planned for {was['epochs']} epochs, over which its learning rate goes down to 0. To train "
            f"longer, start a new run from its best weights: the same command with --init {old_run} --output {new_run}."
        )
    if differences:
        raise _another(output, differences)


def _another(output: Path, differences: Sequence[str]) -> InputError:
    return InputError(
        f"{output} holds another experiment: {'; '.join(differences)}. Name another folder with --output, or start "
        "over with --restart, which moves the old run aside."
    )


def write_split(output: Path, config: TrainConfig, data: Data) -> None:
    """Writes split.json: which slices train, which validate, and their groups."""
    split = {
        "seed": config.run.seed,
        "folds": config.input.folds,
        "fold": config.input.fold,
        "train": data.train,
        "val": data.val,
        "groups": data.groups.tolist(),
    }
    write_whole(output / "split.json", json.dumps(split))


def on_main_first(work: Callable[[], T]) -> T:
    """Runs `work` on the main process, then, if it could be done, on all others, which find what it has made.

    What it raises on the main process comes out on all of them, see `matchai.system.decide`.
    """
    done: list[T] = []
    decide(lambda: done.append(work()))
    return done[0] if done else work()
