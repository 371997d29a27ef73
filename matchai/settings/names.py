"""What other programs call a setting, so that a name that is not ours leads to the one that is."""

import difflib
from collections.abc import Collection

_OTHERS = {
    "max_lr": "lr learning_rate base_lr initial_lr lr_max peak_lr max_learning_rate lr0 step_size",
    "batch_size": "bs batch batchsize train_batch_size per_device_train_batch_size per_gpu_batch_size",
    "epochs": "num_epochs n_epochs max_epochs nb_epochs num_train_epochs total_epochs n_epoch epoch",
    "accumulate": "accumulation_steps gradient_accumulation_steps accumulate_grad_batches grad_accum accum_steps",
    "weight_decay": "wd l2 l2_reg weight_decay_rate",
    "clip_grad_norm": "max_grad_norm grad_clip clip_grad gradient_clip_val gradient_clipping max_norm",
    "ema_decay": "ema model_ema ema_momentum",
    "mixed_precision": "amp precision fp16 bf16 half dtype",
    "image_size": "img_size imgsz size resolution input_size patch_size crop_size roi_size",
    "encoder": "encoder_name backbone arch architecture model model_name network",
    "encoder_weights": "pretrained weights pretrained_weights imagenet",
    "data": "data_dir data_path data_root dataset dataset_path root input_dir train_dir dataroot",
    "output": "output_dir out out_dir save_dir logdir log_dir work_dir run_dir results",
    "init": "finetune from_checkpoint init_from warm_start",
    "restart": "overwrite force from_scratch fresh",
    "seed": "random_seed random_state manual_seed rng_seed",
    "num_workers": "workers n_workers num_processes dataloader_num_workers loader_workers cpus",
    "folds": "n_folds num_folds n_splits k_folds kfold k_fold cv",
    "val_fraction": "val_split validation_split val_size valid_size val_ratio validation_fraction test_size",
    "class_names": "classes labels num_classes n_classes",
    "hu_window": "window hu_range intensity_range a_min a_max clip clip_range",
    "sampler_weight": "oversample oversampling lesion_weight pos_weight class_weight class_weights",
    "dice_weight": "lambda_dice w_dice dice",
    "ce_weight": "lambda_ce w_ce ce cross_entropy_weight",
    "focal_weight": "lambda_focal w_focal focal",
    "focal_gamma": "gamma",
    "horizontal_flip": "hflip flip_lr random_flip",
    "vertical_flip": "vflip flip_ud",
    "affine_rotate": "rotate rotation degrees rotate_limit rotation_degrees",
    "affine_scale": "scale zoom scale_limit",
    "tracker": "log_with logger report_to wandb tensorboard tracking",
    "save_every": "save_steps save_interval checkpoint_interval save_freq ckpt_interval",
    "tta": "test_time_augmentation mirror",
    "trials": "n_trials num_trials max_trials",
    "storage": "db database store",
}
_MEANT = {other: name for name, others in _OTHERS.items() for other in others.split()}


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known setting that a name means: by what others call it, or by its letters where they are nearly the same.

    >>> nearest("learning-rate", ["max_lr", "affine_rotate"]), nearest("epoch_s", ["epochs"]), nearest("x", ["epochs"])
    ('max_lr', 'epochs', None)
    """
    plain = name.casefold().replace("-", "_").replace(" ", "_").strip("_")
    plain = plain.rpartition(".")[2]  # as other programs name a setting in its group
    meant = _MEANT.get(plain, plain)
    return meant if meant in known else next(iter(difflib.get_close_matches(plain, known, 1, 0.75)), None)
