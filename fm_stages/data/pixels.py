"""Base of the data sets of images, held in memory as 8-bit pixels."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fm_stages.data.loading import LabelledImages, to_pixels
from fm_stages.data.module import Opened, TrainingData


class Splits(NamedTuple):
    """What a data set's files hold: images (N, C, H, W) uint8, labels (N,) int64, and the names of the classes."""

    train_images: Tensor
    train_labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    class_names: Sequence[str]


class ImageData(TrainingData):
    """Base of the image data sets, which differ only in what they `read`.

    All images are held as one uint8 tensor, preprocessed without randomness; a batch holds them in [-1, 1]. They are in
    memory, so that ``num_workers`` 0 is fast. Arguments as for `TrainingData`.
    """

    def read(self) -> Splits:
        """Read the files; each data set's own part."""
        raise NotImplementedError

    def open(self) -> Opened:
        """The images that are `read`."""
        splits = self.read()
        num_classes = len(splits.class_names)
        val = LabelledImages(splits.val_images, splits.val_labels, num_classes, in_bank=False)
        return Opened(LabelledImages(splits.train_images, splits.train_labels, num_classes), val, splits.class_names)

    def to_pixels(self, images: Tensor) -> Tensor:
        """Images as a network draws them, (B, C, H, W), to pixels: uint8, in the same shape."""
        return to_pixels(images)
