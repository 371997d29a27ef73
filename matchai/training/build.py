"""From settings and data to the parts of the training loop."""

import dataclasses
import functools
import math
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from matchai.data import Augmentation, Data, SliceDataset
from matchai.model import (
    PROBE_SIZE,
    SegmentationLoss,
    balanced_class_weights,
    build_model,
    join_buffers,
    keyed_layers,
    probe,
    set_dropout,
    synchronise_processes,
    use_fast_layers,
)
from matchai.sampling import DistributedWeightedSampler, collate, slice_weights
from matchai.settings import TrainConfig
from matchai.system import InputError, default_workers, num_local_processes
from matchai.training.averaging import AveragedWeights
from matchai.training.checkpoint import load_weights
from matchai.training.deterministic import DeterministicGradient
from matchai.training.loop import Training

AIR = -1000.0  # HU
LEAST_VAL_BATCH, MOST_VAL_BATCH = 16, 32  # slices of a validation batch on a GPU


def build_model_of(config: TrainConfig, *, is_resuming: bool) -> nn.Module:
    """The model that the settings ask for, with the weights of `init`; random ones where a stored state replaces them.

    Raises:
        InputError: If it cannot be built, or the weights are of another model.
    """
    network, num_classes, in_channels = config.network, len(config.input.class_names), num_channels(config)
    weights = "none" if config.run.init or is_resuming else network.encoder_weights
    size = config.input.image_size
    model = build_model(
        network.encoder,
        num_classes,
        in_channels=in_channels,
        encoder_weights=weights,
        seed=config.run.seed,
        image_size=size if size > 0 and size % 32 == 0 else None,  # another is told by the check of the settings
    )
    if config.run.init is not None and not is_resuming:
        _start_from(config.run.init, model, config)
    return model


def _start_from(path: Path, model: nn.Module, config: TrainConfig) -> None:
    weights, about = load_weights(path)
    network = config.network
    mine = {
        "encoder": network.encoder,
        "class_names": list(config.input.class_names),
        "context": network.context,
    }
    about = {"context": 0, **about}  # files of the time before context do not name it
    wrong = [f"{name} {about[name]} there, {value} here" for name, value in mine.items() if about[name] != value]
    if wrong:
        raise InputError(f"--init {path} is of another model: {'; '.join(wrong)}.")
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise InputError(
            f"The weights of --init {path} do not fit the {network.encoder} of this run at image_size "
            f"{config.input.image_size}; give the --image-size of that run, or leave --init out."
        ) from None


def num_channels(config: TrainConfig) -> int:
    """Channels of an image: the slice and its neighbours."""
    return 2 * config.network.context + 1


def dataset_of(
    config: TrainConfig, data: Data, indices: list[int], augmentation: Augmentation | None = None
) -> SliceDataset:
    """Some slices as the model takes them."""
    context = config.network.context
    return SliceDataset(data.slices, indices, data.mean, data.std, augmentation, volumes=data.volumes, context=context)


def slice_weights_of(config: TrainConfig, data: Data) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The training slices' weights in the draw."""
    targets = [config.input.class_names.index(name) for name in config.sampling.target_classes]
    return slice_weights(data.presence()[data.train], targets, config.sampling.sampler_weight)


def step_problems(
    config: TrainConfig, num_train: int, num_processes: int, device: torch.device, model: nn.Module | None = None
) -> list[str]:
    """What is wrong with the sizes of a step: a share, or a last short batch, that the model cannot take.

    Without the `model`, as far as that can be told of any.
    """
    batch_size, accumulate = config.sampling.batch_size, config.sampling.accumulate
    if batch_size < num_processes:
        return [f"batch_size is {batch_size}, but {num_processes} processes share it: {num_processes} is the least."]
    if accumulate > batch_size:
        return [f"accumulate is {accumulate}, but a batch has {batch_size} slices: {batch_size} is the most."]
    if accumulate > 1 and _is_deterministic(config, device):
        return [f"accumulate is {accumulate}, but --deterministic computes slice by slice on a CPU: leave it at 1."]

    def least(batch: int) -> int:
        """Slices of the smallest micro-batch of an epoch, over all processes."""
        return min(one // min(accumulate, one) for one in (num_train % batch or batch, min(batch, num_train)))

    def least_of_norm(batch: int) -> int:
        """Slices that the smallest batch norm of an epoch sees."""
        is_shared = config.network.sync_batch_norm or _is_deterministic(config, device)
        return least(batch) if is_shared else max(1, least(batch) // num_processes)

    def nearest(is_fitting: Callable[[int], bool]) -> str:
        batches = range(max(2, num_processes, accumulate), num_train + 1)
        found = min(filter(is_fitting, batches), key=lambda batch: abs(batch - batch_size), default=None)
        return f"--batch-size {found}" if found else ""

    begin = f"With batch_size {batch_size} and {num_train} training slices"
    if least_of_norm(batch_size) < 2 and (few := _norm_problem(config, model)):
        remedies = [few[1], nearest(lambda batch: least_of_norm(batch) > 1)]
        shown = " or ".join(filter(None, remedies)) or "--sync-batch-norm, or more slices"
        return [f"{begin} a batch of one slice comes up, which batch norm cannot take {few[0]}: what works is {shown}."]
    if model is not None and least(batch_size) < num_processes and not _takes(model, config, 0):
        fitting = nearest(lambda batch: least(batch) >= num_processes) or f"--num_processes {least(batch_size)}"
        return [
            f"{begin} one of {num_processes} processes has no slice in some batch, which the encoder "
            f"{config.network.encoder} cannot take: what works is {fitting}, or another --encoder."
        ]
    return []


def _norm_problem(config: TrainConfig, model: nn.Module | None) -> tuple[str, str] | None:
    """Why batch norm cannot take a slice alone, and the size of slices at which it can; None if it can.

    It needs two values a channel, and the deepest map has (size / 32)² of each slice; some encoders have means alone.
    """
    size = config.input.image_size
    if (size // 32) ** 2 < 2:
        return f"at image_size {size}", "--image-size 64"
    if model is not None and not _takes(model, config, 1, normalises=True):
        return f"in the encoder {config.network.encoder}", ""
    return None


def _takes(
    model: nn.Module, config: TrainConfig, num_slices: int, image_size: int | None = None, *, normalises: bool = False
) -> bool:
    """Whether a model computes so many slices, of the settings' size or another; see `probe`."""
    try:
        probe(model, num_slices, num_channels(config), image_size or config.input.image_size, normalises=normalises)
    except (RuntimeError, ValueError):  # what torch's layers raise for a shape that they do not take
        return False
    return True


def _is_deterministic(config: TrainConfig, device: torch.device) -> bool:
    return config.run.deterministic and device.type == "cpu"


def build_training(
    config: TrainConfig, accelerator: Accelerator, data: Data, model: nn.Module, is_asked_to_stop: Callable[[], bool]
) -> Training:
    """Builds and prepares everything that the loop needs."""
    optimisation, ema = config.optimisation, None
    model = model.to(accelerator.device).to(memory_format=torch.channels_last)
    use_fast_layers(model, accelerator.device)
    if optimisation.ema_decay:
        ema = AveragedWeights(model, optimisation.ema_decay)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=optimisation.max_lr, weight_decay=optimisation.weight_decay, fused=True)
    sampler = DistributedWeightedSampler(
        slice_weights_of(config, data),
        config.sampling.batch_size,
        seed=config.run.seed,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        accumulate=config.sampling.accumulate,
    )
    model = _prepare_model(config, accelerator, model)
    buffers = join_buffers(model)  # after Accelerate, which puts other tensors in their place
    loss, val_loss = _losses(config, accelerator.device, data)
    loader, val_loader, num_val_batches = _loaders(config, accelerator, data, sampler)
    return Training(
        accelerator=accelerator,
        model=model,
        buffers=buffers,
        keyed_layers=keyed_layers(model),
        loss=loss,
        val_loss=val_loss,
        optimizer=optimizer,
        scheduler=OneCycleLR(optimizer, optimisation.max_lr, total_steps=optimisation.epochs * len(sampler)),
        sampler=sampler,
        loader=loader,
        val_loader=val_loader,
        num_val_batches=num_val_batches,
        deterministic=_deterministic_gradient(config, accelerator, model, loss),
        ema=ema,
        seed=config.run.seed,
        clip_grad_norm=optimisation.clip_grad_norm,
        is_asked_to_stop=is_asked_to_stop,
    )


def _prepare_model(config: TrainConfig, accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The model as several processes train it; alone, as it is."""
    if accelerator.num_processes == 1 or _is_deterministic(config, accelerator.device):
        return model
    size = PROBE_SIZE if _takes(model, config, 1, PROBE_SIZE) else config.input.image_size
    if config.network.sync_batch_norm:
        model = synchronise_processes(model)
    with warnings.catch_warnings():  # Accelerate has no other name yet for what DDP now calls forward_sync_buffers
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        model = accelerator.prepare(model)
    _settle_buckets(model, config.run.seed, num_channels(config), size)
    return model


def _deterministic_gradient(
    config: TrainConfig, accelerator: Accelerator, model: nn.Module, loss: SegmentationLoss
) -> DeterministicGradient | None:
    if not _is_deterministic(config, accelerator.device):
        return None
    torch.set_num_threads(1)
    place = (config.sampling.batch_size, accelerator.num_processes, accelerator.process_index)
    return DeterministicGradient(model, *place, loss=loss, seed=config.run.seed, autocast=accelerator.autocast)


def _losses(config: TrainConfig, device: torch.device, data: Data) -> tuple[SegmentationLoss, SegmentationLoss]:
    """The loss of the training, and that of the validation, which judges by the labels as they are."""
    class_weights = balanced_class_weights(torch.from_numpy(np.asarray(data.slices.pixels)[data.train].sum(axis=0)))
    judging = dataclasses.replace(config.loss, soft_boundary=0)
    loss, val_loss = (SegmentationLoss(class_weights, **vars(one)).to(device) for one in (config.loss, judging))
    return loss, val_loss


def _loaders(
    config: TrainConfig, accelerator: Accelerator, data: Data, sampler: DistributedWeightedSampler
) -> tuple[DataLoader[Any], DataLoader[Any], int]:
    """This process's training and validation loaders, and the validation batches of the process that has most."""
    device, num_processes = accelerator.device, accelerator.num_processes
    (low, high), background = config.input.hu_window, config.input.background_index
    air = min(max((AIR - low) / (high - low), 0.0), 1.0)
    augmentation = Augmentation(
        config.run.seed, air, background, **vars(config.augmentation), channels=num_channels(config)
    )
    train_set, val_set = dataset_of(config, data, data.train, augmentation), dataset_of(config, data, data.val)
    # kernels round differently for batches of other sizes, so the same bits need every slice predicted alone
    batch_size = 1 if _is_deterministic(config, device) else config.sampling.batch_size
    if device.type == "cuda":  # which small batches leave idle; the counts do not depend on it
        batch_size = min(max(batch_size, LEAST_VAL_BATCH), MOST_VAL_BATCH)
    mine = range(accelerator.process_index, len(data.val), num_processes)
    val_batches = [list(mine[k : k + batch_size]) for k in range(0, len(mine), batch_size)]
    workers = config.machine.num_workers
    workers = default_workers(device, num_local_processes(num_processes)) if workers is None else workers

    def load(dataset: SliceDataset, batches: Any, num_workers: int) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,  # else each epoch would begin by forking them
            collate_fn=functools.partial(collate, like=val_set[0]),
            pin_memory=device.type == "cuda",
            worker_init_fn=_init_worker,
            generator=torch.Generator(),  # else every pass would draw from the global one
        )

    # validation has its own workers, which wait while the others work; half as many, as a slice that is not augmented
    # loads in a fifth of the time, and a forward pass takes a third of a step
    val_loader = load(val_set, val_batches, (workers + 1) // 2)
    num_val_batches = math.ceil(math.ceil(len(data.val) / num_processes) / batch_size)
    return load(train_set, sampler, workers), val_loader, num_val_batches


def end_workers(training: Training) -> None:
    """Ends the loaders' workers, which would else live as long as anyone keeps a failed run's traceback."""
    for loader in (training.loader, training.val_loader):
        if loader._iterator is not None:  # only a loader with persistent workers keeps one
            loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
            loader._iterator = None


def _settle_buckets(model: nn.Module, seed: int, in_channels: int, image_size: int) -> None:
    """Two throw-away backward passes, after which DistributedDataParallel has its gradients in their final buckets.

    It reorders them after the first pass. The order of a sum of three or more processes' numbers hangs on their place
    in a bucket, so a resumed run would else begin with other sums than the uninterrupted one had.
    """
    kept = [buffer.clone() for buffer in model.buffers()]
    blank = next(model.parameters()).new_zeros(2, in_channels, image_size, image_size)
    model.train()
    for _ in range(2):
        set_dropout(keyed_layers(model), seed, 0, [0, 1], blank.device)
        model(blank).sum().backward()
        model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), kept, strict=True):
            buffer.copy_(value)


def _init_worker(_: int) -> None:
    """A loader worker leaves signals to the training process, and its cores to the others."""
    if hasattr(os, "setpgid"):  # torchrun signals the training process's whole group; a worker's death loses the state
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cv2.setNumThreads(0)
