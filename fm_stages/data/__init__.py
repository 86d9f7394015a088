"""Training data: each data module says once, in `bank()`, what its training set is."""

from fm_stages.data.as_pictures import Pictures, pictures_of
from fm_stages.data.atomic_files import PART, remove_parts, whole_file, whole_folder
from fm_stages.data.batches import describe_shares
from fm_stages.data.encode import Encoder, Encoding, planned_index, rows_per_shard, sums_of_shard
from fm_stages.data.foreign import (
    check_array,
    check_pixels,
    load_safetensors,
    load_tensors,
    parse_json,
    read_array_header,
    read_json,
    read_yaml,
    read_yaml_file,
)
from fm_stages.data.host import available_memory_bytes
from fm_stages.data.image_files import ImageFiles, list_images, splits_of
from fm_stages.data.images import CIFAR10, Digits, FashionMNIST, ImageFolder
from fm_stages.data.latent_index import LatentIndex, locked
from fm_stages.data.latents import Latents
from fm_stages.data.loading import (
    EpochSampler,
    HeldOutSampler,
    LabelledImages,
    LabelledRows,
    Planned,
    to_model_range,
    to_pixels,
)
from fm_stages.data.module import Opened, TrainingData
from fm_stages.data.pixels import ImageData, Splits
from fm_stages.data.rows import Rows, read_rows, some_rows
from fm_stages.data.shard_writing import check_own_files, complete_folder, list_of_sources, open_folder, write_shard
from fm_stages.data.statistics import channel_statistics, combine_sums, statistics_of, write_statistics
from fm_stages.data.vae import PRECISIONS, VAE, load_vae
from fm_stages.data.without_memory import TooLargeError, without_memory

__all__ = [
    "CIFAR10",
    "Digits",
    "Encoder",
    "Encoding",
    "EpochSampler",
    "FashionMNIST",
    "HeldOutSampler",
    "ImageData",
    "ImageFiles",
    "ImageFolder",
    "LabelledImages",
    "LabelledRows",
    "LatentIndex",
    "Latents",
    "Opened",
    "PART",
    "PRECISIONS",
    "Pictures",
    "Planned",
    "Rows",
    "Splits",
    "TooLargeError",
    "TrainingData",
    "VAE",
    "available_memory_bytes",
    "channel_statistics",
    "check_array",
    "check_own_files",
    "check_pixels",
    "combine_sums",
    "complete_folder",
    "describe_shares",
    "list_images",
    "list_of_sources",
    "load_safetensors",
    "load_tensors",
    "load_vae",
    "locked",
    "open_folder",
    "parse_json",
    "pictures_of",
    "planned_index",
    "read_array_header",
    "read_json",
    "read_rows",
    "read_yaml",
    "read_yaml_file",
    "remove_parts",
    "rows_per_shard",
    "some_rows",
    "splits_of",
    "statistics_of",
    "sums_of_shard",
    "to_model_range",
    "to_pixels",
    "whole_file",
    "whole_folder",
    "without_memory",
    "write_shard",
    "write_statistics",
]
