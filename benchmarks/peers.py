"""What a user would run instead of matchai, each in a process of its own; started by `benchmarks/train.py`.

All train the same UNet++ on the same slices with the losses of segmentation-models-pytorch, AdamW and a one-cycle
schedule. The notebook's loop keeps its faults of speed; the others have what a good engineer writes today: resized
slices kept in memory, channels_last, mixed precision where the device has it, fused AdamW, nothing read back in a step.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import segmentation_models_pytorch as smp
import torch
from accelerate import Accelerator
from clock import Clock, Job
from numpy.typing import NDArray
from segmentation_models_pytorch.losses import DiceLoss, FocalLoss
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from matchai.system.machine import choose_precision, default_workers

EPOCHS = 2  # the first warms up, the second is timed
NUM_CLASSES = 4
HU_LOW, HU_HIGH = -1500.0, 500.0
MAX_LR, WEIGHT_DECAY = 5e-4, 1e-4
FOCAL_GAMMA = 2.5
SETS = ("medseg", "radiopedia")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def read_arrays(job: Job, rows: list[int]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """All pixels of some slices: (N, H, W) in units of the window, (N, H, W, C) one-hot."""
    folder = Path(job.data)
    names = [name for name in SETS if (folder / f"images_{name}.npy").exists()]
    images = np.concatenate([np.load(folder / f"images_{name}.npy").squeeze(-1) for name in names])[rows]
    masks = np.concatenate([np.load(folder / f"masks_{name}.npy") for name in names])[rows]
    windowed = (np.clip(images, HU_LOW, HU_HIGH) - HU_LOW) / (HU_HIGH - HU_LOW)
    return windowed.astype(np.float32), masks.astype(bool)


def augmentations() -> list[Any]:
    """The recipe's, after the resize."""
    return [
        A.HorizontalFlip(p=0.5),
        A.VerticalFlip(p=0.3),
        A.RandomRotate90(p=0.3),
        A.Affine(scale=(0.95, 1.05), rotate=(-10, 10), shear=(-5, 5), translate_percent=(0.0, 0.03), p=0.4),
        A.RandomBrightnessContrast(0.1, 0.1, p=0.2),
    ]


class FullSizeSlices(Dataset[tuple[Tensor, Tensor]]):
    """The notebook's: standardised float32 slices at full size, one-hot int16 masks, resized anew at every draw."""

    def __init__(self, job: Job, rows: list[int], *, is_training: bool) -> None:
        windowed, masks = read_arrays(job, rows)
        self.images = ((windowed - job.mean) / (job.std + 1e-8)).astype(np.float32)
        self.masks = masks.astype(np.int16)
        self.transform: Any = A.Compose([A.Resize(job.size, job.size), *(augmentations() if is_training else [])])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        out = self.transform(image=self.images[index], mask=self.masks[index])
        return torch.from_numpy(out["image"].copy())[None], torch.from_numpy(out["mask"].copy()).permute(2, 0, 1)


class ResizedSlices(Dataset[tuple[Tensor, Tensor]]):
    """Slices resized once and kept in memory with their class indices."""

    def __init__(self, job: Job, rows: list[int], *, is_training: bool) -> None:
        windowed, masks = read_arrays(job, rows)
        shape = (job.size, job.size)
        self.mean, self.std = job.mean, job.std
        self.images = [cv2.resize(image, shape, interpolation=cv2.INTER_AREA) for image in windowed]
        labels = masks.argmax(-1).astype(np.uint8)
        self.targets = [cv2.resize(target, shape, interpolation=cv2.INTER_NEAREST) for target in labels]
        self.transform: Any = A.Compose(augmentations()) if is_training else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, target = self.images[index], self.targets[index]
        if self.transform:
            out = self.transform(image=image, mask=target)
            image, target = out["image"], out["mask"]
        standardised = np.ascontiguousarray((image - self.mean) / self.std, dtype=np.float32)
        return torch.from_numpy(standardised)[None], torch.from_numpy(target.astype(np.int64))


def make_loaders(
    job: Job, kind: type[FullSizeSlices] | type[ResizedSlices], num_workers: int
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training slices drawn by weight, validation slices in order."""
    sampler = WeightedRandomSampler(job.slice_weights, len(job.train), generator=torch.Generator().manual_seed(0))
    how: dict[str, Any] = {
        "batch_size": job.batch_size,
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": job.device == "cuda",
    }
    train, val = kind(job, job.train, is_training=True), kind(job, job.val, is_training=False)
    return DataLoader(train, sampler=sampler, **how), DataLoader(val, **how)


def make_model(job: Job) -> nn.Module:
    model: nn.Module = smp.UnetPlusPlus(job.encoder, encoder_weights=None, in_channels=1, classes=NUM_CLASSES)
    return model.to(torch.device(job.device))


class RecipeLoss(nn.Module):
    """The recipe's loss of the parts that its peers have."""

    def __init__(self, class_weights: list[float] | None = None) -> None:
        super().__init__()
        self.cross_entropy = nn.CrossEntropyLoss(torch.tensor(class_weights) if class_weights else None)
        self.dice = DiceLoss(mode="multiclass")
        self.focal = FocalLoss(mode="multiclass", gamma=FOCAL_GAMMA)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """0.25 cross-entropy + 0.5 Dice + 0.25 focal."""
        cross_entropy, dice, focal = (term(logits, target) for term in (self.cross_entropy, self.dice, self.focal))
        loss: Tensor = 0.25 * cross_entropy + 0.5 * dice + 0.25 * focal
        return loss


class Peer:
    """The parts that all but the notebook share."""

    def __init__(self, job: Job) -> None:
        self.device = torch.device(job.device)
        self.precision = choose_precision("auto", self.device)[0]
        self.loader, self.val_loader = make_loaders(job, ResizedSlices, default_workers(self.device, 1))
        self.model = make_model(job).to(memory_format=torch.channels_last)
        self.loss = RecipeLoss(job.class_weights).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=MAX_LR, weight_decay=WEIGHT_DECAY, fused=True)
        self.scheduler = OneCycleLR(self.optimizer, MAX_LR, total_steps=EPOCHS * job.steps)
        self.overlap, self.sizes = (torch.zeros(NUM_CLASSES, device=self.device) for _ in range(2))

    def to_device(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Moves a batch, without waiting for it."""
        moved = images.to(self.device, non_blocking=True).to(memory_format=torch.channels_last)
        return moved, target.to(self.device, non_blocking=True)

    def count(self, logits: Tensor, target: Tensor) -> None:
        """Adds a batch to what Dice is made of, on the device."""
        classes = torch.arange(NUM_CLASSES, device=self.device).view(-1, 1, 1, 1)
        predicted, true = logits.argmax(1) == classes, target == classes
        self.overlap += (predicted & true).sum((1, 2, 3))
        self.sizes += predicted.sum((1, 2, 3)) + true.sum((1, 2, 3))

    def dice(self) -> list[float]:
        """The classes' Dice of what was counted, which is counted anew from here."""
        dice: list[float] = (2 * self.overlap / self.sizes).tolist()
        self.overlap.zero_()
        self.sizes.zero_()
        return dice


def drive(clock: Clock, train_epoch: Callable[[], object], validate: Callable[[], object]) -> None:
    """Trains and validates as many epochs as there are; the clock keeps the last one's marks."""
    for _ in range(EPOCHS):
        clock.mark("begin")
        train_epoch()
        clock.mark("trained")
        validate()
        clock.mark("validated")


def run_notebook(job: Job, clock: Clock) -> None:
    """The notebook's loop: fp32 outside CUDA, contiguous tensors, a Dice of every batch by an `.item()` per class."""
    loader, val_loader = make_loaders(job, FullSizeSlices, 0)
    on_cuda = job.device == "cuda"
    model = make_model(job)
    criterion = RecipeLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=WEIGHT_DECAY)
    scheduler = OneCycleLR(optimizer, MAX_LR, steps_per_epoch=len(loader), epochs=EPOCHS)
    scaler = torch.amp.GradScaler(job.device, enabled=on_cuda)

    def batches(source: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        for images, masks in source:
            yield images.to(job.device), masks.to(job.device).argmax(1)

    def batch_dice(logits: Tensor, target: Tensor) -> list[float]:
        pred = logits.softmax(1).argmax(1)
        scores = []
        for number in range(NUM_CLASSES):
            predicted, true = (pred == number).float(), (target == number).float()
            size = predicted.sum() + true.sum()
            scores.append((2 * (predicted * true).sum() / size).item() if size.item() > 0 else 1.0)
        return scores

    def train_epoch() -> tuple[float, list[list[float]]]:
        model.train()
        total, scores = 0.0, []
        for images, target in batches(loader):
            optimizer.zero_grad()
            with torch.autocast(job.device, torch.float16, enabled=on_cuda):
                logits = model(images)
                loss = criterion(logits, target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            total += loss.item()
            scores.append(batch_dice(logits, target))
        return total / len(loader), scores

    def validate() -> tuple[float, list[list[float]]]:
        model.eval()
        total, scores = 0.0, []
        with torch.no_grad():
            for images, target in batches(val_loader):
                with torch.autocast(job.device, torch.float16, enabled=on_cuda):
                    logits = model(images)
                    loss = criterion(logits, target)
                total += loss.item()
                scores.append(batch_dice(logits, target))
        return total / len(val_loader), scores

    drive(clock, train_epoch, validate)


def run_raw(job: Job, clock: Clock) -> None:
    """A plain loop."""
    peer = Peer(job)
    scaler = torch.amp.GradScaler(job.device, enabled=peer.precision == "fp16")

    def forward(images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(job.device, DTYPES.get(peer.precision), enabled=peer.precision in DTYPES):
            logits = peer.model(images)
            return logits, peer.loss(logits, target)

    def train_epoch() -> float:
        peer.model.train()
        total = torch.zeros((), device=peer.device)
        for batch in peer.loader:
            _, loss = forward(*peer.to_device(*batch))
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.step(peer.optimizer)
            scaler.update()
            peer.optimizer.zero_grad(set_to_none=True)
            peer.scheduler.step()
            total += loss.detach()
        return total.item() / len(peer.loader)

    def validate() -> tuple[float, list[float]]:
        peer.model.eval()
        total = torch.zeros((), device=peer.device)
        with torch.inference_mode():
            for batch in peer.val_loader:
                images, target = peer.to_device(*batch)
                logits, loss = forward(images, target)
                total += loss
                peer.count(logits, target)
        return total.item() / len(peer.val_loader), peer.dice()

    drive(clock, train_epoch, validate)


def run_accelerate(job: Job, clock: Clock) -> None:
    """The plain loop through Accelerate, which keeps autocast, scaler and devices."""
    peer = Peer(job)
    accelerator = Accelerator(mixed_precision=peer.precision, cpu=job.device == "cpu")
    model, optimizer, loader, val_loader, scheduler = accelerator.prepare(
        peer.model, peer.optimizer, peer.loader, peer.val_loader, peer.scheduler
    )

    def train_epoch() -> float:
        model.train()
        total = torch.zeros((), device=accelerator.device)
        for images, target in loader:
            with accelerator.autocast():
                loss = peer.loss(model(images.to(memory_format=torch.channels_last)), target)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            total += loss.detach()
        return total.item() / len(loader)

    def validate() -> tuple[float, list[float]]:
        model.eval()
        total = torch.zeros((), device=accelerator.device)
        with torch.inference_mode():
            for images, target in val_loader:
                with accelerator.autocast():
                    logits = model(images.to(memory_format=torch.channels_last))
                    total += peer.loss(logits, target)
                peer.count(logits, target)
        return total.item() / len(val_loader), peer.dice()

    drive(clock, train_epoch, validate)


def run_lightning(job: Job, clock: Clock) -> None:
    """A LightningModule under a Trainer that neither logs, saves nor shows anything."""
    lightning = importlib.import_module("lightning")
    peer = Peer(job)

    class Segmenter(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss = peer.model, peer.loss

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            loss: Tensor = self.loss(self.model(batch[0].to(memory_format=torch.channels_last)), batch[1])
            return loss

        def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
            logits = self.model(batch[0].to(memory_format=torch.channels_last))
            self.log("val_loss", self.loss(logits, batch[1]))
            peer.count(logits, batch[1])

        def configure_optimizers(self) -> dict[str, Any]:
            return {"optimizer": peer.optimizer, "lr_scheduler": {"scheduler": peer.scheduler, "interval": "step"}}

    class Marks(lightning.Callback):  # type: ignore[misc, name-defined]
        def on_train_epoch_start(self, *_: Any) -> None:
            clock.mark("begin")

        def on_validation_start(self, *_: Any) -> None:
            clock.mark("trained")

        def on_validation_end(self, *_: Any) -> None:
            peer.dice()
            clock.mark("validated")

    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator=job.device,
        devices=1,
        precision={"bf16": "bf16-mixed", "fp16": "16-mixed", "no": "32-true"}[peer.precision],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[Marks()],
        default_root_dir=job.output,
    )
    trainer.fit(Segmenter(), peer.loader, peer.val_loader)


def run_monai(job: Job, clock: Clock) -> None:
    """MONAI's engines with `amp=True`, which they heed on CUDA alone."""
    engines, handlers = importlib.import_module("monai.engines"), importlib.import_module("monai.handlers")
    transforms = importlib.import_module("monai.transforms")
    events = importlib.import_module("ignite.engine").Events
    peer = Peer(job)

    def prepare(batch: Any, device: Any, non_blocking: bool, **_: Any) -> tuple[Tensor, Tensor]:
        images, target = batch
        return images.to(device, non_blocking=non_blocking), target.to(device, non_blocking=non_blocking)

    shared = {"device": peer.device, "amp": True, "non_blocking": True, "prepare_batch": prepare}
    discrete = transforms.Compose(
        [
            transforms.AsDiscreted(keys="pred", argmax=True, to_onehot=NUM_CLASSES),
            transforms.Lambdad(keys="label", func=lambda target: target[None]),
            transforms.AsDiscreted(keys="label", to_onehot=NUM_CLASSES),
        ]
    )
    evaluator = engines.SupervisedEvaluator(
        val_data_loader=peer.val_loader,
        network=peer.model,
        postprocessing=discrete,
        key_val_metric={"dice": handlers.MeanDice(output_transform=handlers.from_engine(["pred", "label"]))},
        **shared,
    )
    trainer = engines.SupervisedTrainer(
        max_epochs=EPOCHS,
        train_data_loader=peer.loader,
        network=peer.model,
        optimizer=peer.optimizer,
        loss_function=peer.loss,
        optim_set_to_none=True,
        **shared,
    )

    # functions without arguments, as ignite hands the engine to whatever takes one
    def step_schedule() -> None:
        peer.scheduler.step()

    def validate() -> None:
        clock.mark("trained")
        evaluator.run(trainer.state.epoch)
        clock.mark("validated")

    trainer.add_event_handler(events.ITERATION_COMPLETED, step_schedule)
    trainer.add_event_handler(events.EPOCH_STARTED, clock.mark, "begin")
    trainer.add_event_handler(events.EPOCH_COMPLETED, validate)
    trainer.run()


PEERS: dict[str, Callable[[Job, Clock], None]] = {
    "notebook": run_notebook,
    "raw": run_raw,
    "accelerate": run_accelerate,
    "lightning": run_lightning,
    "monai": run_monai,
}


def main(path: Path, name: str) -> None:
    """Times a peer's second epoch."""
    warnings.filterwarnings("ignore", "`timm-` encoders are deprecated", DeprecationWarning)
    job = Job.load(path)
    torch.set_num_threads(job.threads)
    clock = Clock(job.device)
    PEERS[name](job, clock)
    clock.save(job)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
