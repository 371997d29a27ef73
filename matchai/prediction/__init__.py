"""What trained runs are used for: prediction of volumes, evaluation by masks, export to other programs."""

from typing import TYPE_CHECKING

from matchai.system.lazy import lazy_exports

if TYPE_CHECKING:
    from matchai.prediction.evaluation import evaluate
    from matchai.prediction.export_formats import pack_onnx, pack_safetensors
    from matchai.prediction.inference import Predictor, load_model, uncertainty
    from matchai.prediction.pipeline import predict
    from matchai.prediction.volume_prediction import SliceResult, VolumeResult, predict_volume
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = [
    "Predictor", "SliceResult", "VolumeResult", "evaluate", "load_model", "pack_onnx", "pack_safetensors", "predict",
    "predict_volume", "uncertainty",
]
