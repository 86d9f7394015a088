"""Training data: each data module says once, in `bank()`, what its training set is."""

from fm_stages.data.as_pictures import Pictures, pictures_of
from fm_stages.data.atomic_files import PART, whole_file
from fm_stages.data.batches import describe_shares
from fm_stages.data.images import CIFAR10, Digits, FashionMNIST, ImageFolder
from fm_stages.data.latents import Latents
from fm_stages.data.loading import EpochSampler, HeldOutSampler, LabelledImages, Planned, to_model_range, to_pixels
from fm_stages.data.module import TrainingData
from fm_stages.data.pixels import ImageData
from fm_stages.data.rows import Rows, read_rows, some_rows
from fm_stages.data.statistics import channel_statistics, write_statistics
from fm_stages.data.vae import VAE, load_vae

__all__ = [
    "PART",
    "VAE",
    "CIFAR10",
    "Digits",
    "EpochSampler",
    "FashionMNIST",
    "HeldOutSampler",
    "ImageData",
    "ImageFolder",
    "LabelledImages",
    "Latents",
    "Pictures",
    "Planned",
    "Rows",
    "TrainingData",
    "channel_statistics",
    "describe_shares",
    "load_vae",
    "pictures_of",
    "read_rows",
    "some_rows",
    "to_model_range",
    "to_pixels",
    "whole_file",
    "write_statistics",
]
