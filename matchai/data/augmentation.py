"""Training augmentation as a pure function of (slice, key); albumentations behind one small module.

Images go in windowed to 0..1 and are standardised after, since albumentations clips float images to 0..1: on
standardised ones its brightness change makes everything below the mean one value.
"""

import os
import random
from typing import Any

import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network for a newer version at import
import albumentations as A

from matchai.system import seed_sequence

_STREAM = 0xA09  # keeps these random numbers apart from the sampler's and drop path's


class Augmentation:
    """Flips, quarter turns, an affine map, and a change of brightness and contrast, each by its chance.

    Args:
        seed: Seed of the run.
        air: The value of air in the windowed image, which fills what an affine map uncovers.
        background_class: The class index that fills the target there.
        horizontal_flip: Chance of a horizontal flip.
        vertical_flip: Chance of a vertical flip.
        rotate90: Chance of a random number of quarter turns.
        affine: Chance of an affine map.
        affine_scale: Its zoom, 1 ± this.
        affine_rotate: Its rotation, ± degrees.
        affine_shear: Its shear, ± degrees.
        affine_translate: Its shift, 0 to this share of the size.
        brightness_contrast: Chance of a change of brightness and contrast.
        brightness_contrast_limit: Its strength, ± this share of the window.
        channels: Images that are changed alike: a slice and its neighbours.
    """

    def __init__(
        self,
        seed: int,
        air: float,
        background_class: int,
        *,
        horizontal_flip: float = 0.5,
        vertical_flip: float = 0.3,
        rotate90: float = 0.3,
        affine: float = 0.4,
        affine_scale: float = 0.05,
        affine_rotate: float = 10.0,
        affine_shear: float = 5.0,
        affine_translate: float = 0.03,
        brightness_contrast: float = 0.2,
        brightness_contrast_limit: float = 0.10,
        channels: int = 1,
    ) -> None:
        self.seed = seed
        # one after another, as OpenCV takes at most four channels at once, and interleaved ones take twice as long
        self.others = [f"image{k}" for k in range(1, channels)]
        limit = brightness_contrast_limit
        self.transform: Any = A.Compose(
            [
                A.HorizontalFlip(p=horizontal_flip),
                A.VerticalFlip(p=vertical_flip),
                A.RandomRotate90(p=rotate90),
                A.Affine(
                    scale=(1 - affine_scale, 1 + affine_scale),
                    rotate=(-affine_rotate, affine_rotate),
                    shear=(-affine_shear, affine_shear),
                    translate_percent=(0.0, affine_translate),
                    fill=air,
                    fill_mask=background_class,
                    p=affine,
                ),
                A.RandomBrightnessContrast(limit, limit, p=brightness_contrast),
            ],
            additional_targets=dict.fromkeys(self.others, "image"),
        )

    def __call__(
        self, image: NDArray[np.float32], target: NDArray[np.uint8], epoch: int, position: int
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Augments the draw at `position` of `epoch`; neither reads nor changes any global random state.

        Args:
            image: (H, W) or (channels, H, W) float32 in 0..1.
            target: (H, W) uint8 class indices.
            epoch: The epoch.
            position: The place of the draw in the epoch.

        Returns:
            Image and target, of the same shapes and types.
        """
        generator = np.random.default_rng(seed_sequence(_STREAM, self.seed, epoch, position))
        # one pair of generators shared by all transforms: set_random_seed would give each the same numbers
        self.transform.set_random_state(generator, random.Random(int(generator.integers(2**63))))
        first, *others = image.reshape(-1, *target.shape)
        out = self.transform(image=first, mask=target, **dict(zip(self.others, others, strict=True)))
        images = [out["image"], *(out[name] for name in self.others)]
        return np.stack(images) if image.ndim == 3 else images[0], out["mask"]
