"""Ways to predict slices through a checkpoint, each in a process of its own; started by `benchmarks/predict.py`."""

import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from clock import RECORD, Job, cpu_seconds, peak_memory
from peers import DTYPES, ResizedSlices
from torch import Tensor, nn

from matchai.model.cpu_layers import use_fast_layers
from matchai.model.unetplusplus import build_model
from matchai.system.machine import choose_precision, keep_heap
from matchai.training.checkpoint import load_weights

Predict = Callable[[Tensor], Tensor]  # (B, 1, S, S) standardised images to (B, S, S) class indices on the host


def load_plain(checkpoint: Path, job: Job) -> nn.Module:
    """The model as segmentation-models-pytorch builds it."""
    weights, about = load_weights(checkpoint)
    model: nn.Module = smp.UnetPlusPlus(
        about["encoder"], encoder_weights=None, in_channels=about["in_channels"], classes=len(about["class_names"])
    )
    model.load_state_dict(weights)
    return model.eval().to(torch.device(job.device))


def predict_as_notebook(checkpoint: Path, job: Job) -> Predict:
    """One slice at a time, fp32, contiguous."""
    model = load_plain(checkpoint, job)

    def predict(images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(image[None].to(job.device)).softmax(1).argmax(1).cpu() for image in images])

    return predict


def predict_in_batches(checkpoint: Path, job: Job) -> Predict:
    """In batches, fp32, channels_last."""
    model = load_plain(checkpoint, job).to(memory_format=torch.channels_last)

    def predict(images: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(images.to(job.device).to(memory_format=torch.channels_last))
            return logits.argmax(1).cpu()

    return predict


def predict_as_matchai(checkpoint: Path, job: Job) -> Predict:
    """In batches, through the model and the precision of a run's validation."""
    keep_heap()
    weights, about = load_weights(checkpoint)
    model = build_model(about["encoder"], len(about["class_names"]))
    model.load_state_dict(weights)
    model.eval().to(torch.device(job.device)).to(memory_format=torch.channels_last)
    if job.device == "cpu":
        use_fast_layers(model, torch.device("cpu"))
    precision = choose_precision("auto", torch.device(job.device))[0]

    def predict(images: Tensor) -> Tensor:
        with torch.inference_mode(), torch.autocast(job.device, DTYPES.get(precision), enabled=precision in DTYPES):
            logits: Tensor = model(images.to(job.device, non_blocking=True).to(memory_format=torch.channels_last))
            return logits.argmax(1).cpu()

    return predict


def predict_with_onnx(checkpoint: Path, job: Job) -> Predict:
    """In batches of one size, fp32, through ONNX Runtime."""
    runtime = importlib.import_module("onnxruntime")
    file = str(Path(job.output) / "model.onnx")
    example = torch.zeros(job.batch_size, 1, job.size, job.size)
    torch.onnx.export(load_plain(checkpoint, job).cpu(), (example,), file, input_names=["images"])
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = job.threads
    on_cuda = ["CUDAExecutionProvider"] if job.device == "cuda" else []
    session = runtime.InferenceSession(file, settings, providers=[*on_cuda, "CPUExecutionProvider"])

    def predict(images: Tensor) -> Tensor:
        padded = torch.cat((images, images.new_zeros(job.batch_size - len(images), *images.shape[1:])))
        logits = session.run(None, {"images": padded.numpy()})[0]
        return torch.from_numpy(logits.argmax(1))[: len(images)]

    return predict


WAYS: dict[str, Callable[[Path, Job], Predict]] = {
    "notebook": predict_as_notebook,
    "batches": predict_in_batches,
    "matchai": predict_as_matchai,
    "onnx": predict_with_onnx,
}


def main(path: Path, name: str, checkpoint: Path) -> None:
    """Times the second pass over all slices, prepared and in memory."""
    warnings.filterwarnings("ignore", "`timm-` encoders are deprecated", DeprecationWarning)
    job = Job.load(path)
    torch.set_num_threads(job.threads)
    slices = ResizedSlices(job, sorted(job.train + job.val), is_training=False)
    images = torch.stack([slices[number][0] for number in range(len(slices))])
    predict = WAYS[name](checkpoint, job)
    for _ in range(2):
        begin, begin_cpu = time.perf_counter(), cpu_seconds()
        pred = torch.cat([predict(batch) for batch in torch.split(images, job.batch_size)])
        seconds, used = time.perf_counter() - begin, cpu_seconds() - begin_cpu
    record = {
        "slices": len(images),
        "seconds": seconds,
        "cpu_s": used,
        "memory_mb": peak_memory() / 1e6,
        # by which one sees that all predict the same
        "pixels": torch.bincount(pred.flatten(), minlength=4).tolist(),
    }
    if job.device == "cuda":
        record["device_memory_mb"] = torch.cuda.max_memory_allocated() / 1e6
    (Path(job.output) / RECORD).write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
