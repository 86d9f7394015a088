"""What all data modules share: batches, bank, and the place in the data that a restart needs."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from fm_stages.data.bank import bank_of
from fm_stages.data.batches import accumulate, recount
from fm_stages.data.host import available_memory_bytes
from fm_stages.data.loading import EpochSampler, HeldOutSampler, LabelledRows
from fm_stages.data.workers import Loader, planned_loader
from fm_stages.oracle import BankPlan, DataBank, GaussianMixtureBank, plan_bank, together


class Opened(NamedTuple):
    """What a data set holds: its training rows, its held-out ones, and the names of the classes."""

    train: LabelledRows
    val: LabelledRows
    class_names: Sequence[str]


class TrainingData(L.LightningDataModule):
    """Base of all data modules: they differ in what they `open`, and in how its rows become pixels.

    The only augmentation is the horizontal flip, because the bank can hold flips as rows of their own. Any other would
    make the oracle inexact.

    A training batch is a dict: ``x1`` (B, C, H, W) float32, what the network sees, ``labels`` (B,) int64, -1
    without, ``index`` (B,) int64, the rows in the bank, and ``position`` (B,) int64, the places in the global batch. A
    held-out batch has no ``index``, and its ``position`` is the number of the held-out image.

    `setup` sets ``shape`` (C, H, W), ``num_classes`` (0 without labels), ``class_names``, ``num_train`` and
    ``num_val``. Without a Trainer everything works as on one rank without accumulation; then choose the epoch with
    ``loader.sampler.set_epoch``.

    Args:
        batch_size: images per optimizer step, over all ranks and accumulated micro-batches.
        val_batch_size: held-out images per batch over all ranks; None: as many as batch_size.
        flip: whether training images are flipped horizontally at random (and the bank holds both).
        seed: of the order and the flips.
        num_workers: processes that load batches.
        shard_bank: whether each rank holds a part of the bank instead of a copy; None: where copies would be large.
        micro_batch_size: most images that a rank takes at once. The Trainer then accumulates over as few equal
            micro-batches as that allows, and its ``val_check_interval`` and ``limit_train_batches`` count optimizer
            steps; None: as its ``accumulate_grad_batches`` says.

    Raises:
        ValueError: if an argument lies outside its range.
    """

    shape: tuple[int, int, int]
    num_classes: int
    class_names: list[str]
    num_train: int
    num_val: int

    def __init__(
        self,
        batch_size: int = 128,
        val_batch_size: int | None = None,
        flip: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        shard_bank: bool | None = None,
        micro_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        val_batch_size = batch_size if val_batch_size is None else val_batch_size
        if min(batch_size, val_batch_size) < 1 or num_workers < 0:
            raise ValueError(
                f"batch_size={batch_size} and val_batch_size={val_batch_size} must be 1 or more, "
                f"num_workers={num_workers} 0 or more"
            )
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size={micro_batch_size} must be 1 or more, or null for no limit")
        self.batch_size, self.val_batch_size = batch_size, val_batch_size
        self.flip, self.seed, self.num_workers, self.shard_bank = flip, seed, num_workers, shard_bank
        self.micro_batch_size = micro_batch_size
        self._accumulating: L.Trainer | None = None
        self._opened: Opened | None = None
        self._bank: DataBank | GaussianMixtureBank | None = None
        self._resumed = {"epoch": 0, "samples": 0, "batches": 0}

    def open(self) -> Opened:
        """Find the data; each data set's own part.

        Raises:
            FileNotFoundError: if the files are not there.
            ValueError: if they are not what they should be.
        """
        raise NotImplementedError

    def to_pixels(self, images: Tensor) -> Tensor:
        """What a network draws, (B, C, H, W), as pixels: uint8, (B, C', H', W')."""
        raise NotImplementedError

    def picture_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int] | None:
        """Shape of the pixels of what a network draws, (C, H, W); None where nothing makes pixels of it."""
        return shape

    def setup(self, stage: str | None = None) -> None:
        """Read the data, once; later calls are free.

        Raises:
            FileNotFoundError: if the files are not there.
            ValueError: if a split is empty, a label lies outside the classes, or the Trainer has overfit_batches, or
                accumulates otherwise than follows from micro_batch_size.
        """
        if overfit := getattr(self.trainer, "overfit_batches", 0):
            raise ValueError(
                f"overfit_batches={overfit} would replace the samplers, and with them the order that a restart and the "
                "oracle rely on: use limit_train_batches or fewer images"
            )
        if stage == "fit":  # a checkpoint's place, if there is one, comes after this
            self._resumed = {"epoch": 0, "samples": 0, "batches": 0}
            if self.trainer and self.micro_batch_size and self.trainer is not self._accumulating:
                accumulate(self.trainer, self.batch_size, self.micro_batch_size)
                self._accumulating = self.trainer
        if self._opened is not None:
            return
        with together(dist.group.WORLD if self._on_ranks else None):
            opened = self.open()
        self.class_names = list(opened.class_names)
        self.num_classes = len(self.class_names)
        self.num_train, self.num_val = len(opened.train), len(opened.val)
        channels, height, width = opened.train.shape[-3:]
        self.shape = (channels, height, width)
        self._opened = opened

    def bank(self) -> DataBank | GaussianMixtureBank:
        """The training set as the oracle sees it, made on the first call.

        Row i is training image i; with flips row num_train + i is its flip. What it gives back is what batches hold,
        bit for bit. On several ranks it is sharded if ``shard_bank`` says so, or if copies would take too much memory;
        every rank calls this.

        Raises:
            MemoryError: if the bank does not fit.
        """
        if self._bank is None:
            train = self._ready().train
            ranks = dist.get_world_size() if self._on_ranks else 1
            with together(dist.group.WORLD if ranks > 1 else None) as meeting:
                meeting.size = self._memory_per_rank()
            memory = min(meeting.sizes)  # all must come to the same plan, and free memory differs
            plan = self.plan_bank(memory, ranks)
            own = plan.rows_of(dist.get_rank() if plan.sharded else 0)
            self._bank = bank_of(train, own, dist.group.WORLD if plan.sharded else None)
        return self._bank

    def plan_bank(self, memory_bytes: float, num_ranks: int) -> BankPlan:
        """How ranks of so much memory each would hold the bank, without making it.

        Raises:
            MemoryError: if it does not fit.
        """
        train = self._ready().train
        num_rows = self.num_train * (2 if self.flip else 1)
        values, value_bytes = math.prod(train.shape), train.dtype.itemsize
        return plan_bank(num_rows, values, value_bytes, memory_bytes, num_ranks, self.shard_bank)

    def train_dataloader(self) -> Loader:
        """Micro-batches of this rank, from the Trainer's place in the epoch on.

        Raises:
            ValueError: if batch_size does not fit the data or the ranks, or a checkpoint from the middle of an epoch
                was made with another order of the data.
        """
        train, trainer = self._ready().train, self.trainer
        if trainer is None:
            return planned_loader(
                train, EpochSampler(train, self.batch_size, flip=self.flip, seed=self.seed), self.num_workers
            )
        self._check_resumable()
        sampler = EpochSampler(
            train,
            self.batch_size,
            flip=self.flip,
            seed=self.seed,
            num_replicas=trainer.world_size,
            rank=trainer.global_rank,
            accumulation=trainer.accumulate_grad_batches,
            place=self._place,
        )
        return planned_loader(train, sampler, self.num_workers)

    def val_dataloader(self) -> Loader:
        """Held-out batches of this rank: each image once over all ranks, in order."""
        val = self._ready().val
        ranks = {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank} if self.trainer else {}
        return planned_loader(val, HeldOutSampler(val, self.val_batch_size, **ranks), self.num_workers)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave positions on the CPU, where random draws are keyed: to read them back would wait for the device."""
        position = batch.pop("position")
        return {**super().transfer_batch_to_device(batch, device, dataloader_idx), "position": position}

    def state_dict(self) -> dict[str, Any]:
        """The place in the data: the epoch, how many images of it (global) are done, and what fixes their order.

        Raises:
            RuntimeError: without a Trainer, which is who counts.
        """
        if self.trainer is None:
            raise RuntimeError("the place in the data is the Trainer's: a plain loop keeps its own epoch and start")
        epoch, samples = self._place()
        return {"epoch": epoch, "samples": samples, "batches": self._batches_done(), **self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the place of a checkpoint."""
        self._resumed = dict(state_dict)

    def recount(self, checkpoint: dict[str, Any]) -> None:
        """Count the micro-batches of a checkpoint as this run's, where it accumulates otherwise than the last one.

        For ``LightningModule.on_load_checkpoint``, which comes before `load_state_dict` and before Lightning reads its
        counts. Without it, and inside an optimizer step, another accumulation is refused.
        """
        place = checkpoint.get(type(self).__qualname__, {})
        if self.trainer is None or place.get("accumulation", new := self.trainer.accumulate_grad_batches) == new:
            return
        more = recount(checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"], place["accumulation"], new)
        if more is not None:
            place.update(accumulation=new, batches=place["batches"] + more)

    def pass_over(self, checkpoint: dict[str, Any]) -> None:
        """Let a checkpoint of an earlier step go on with the data after the step that is being made now.

        Args:
            checkpoint: of this data; changed in place.
        """
        epoch, samples = self._place()  # micro-batches that are done: not yet the one that completes this step
        after = (samples // self.batch_size + 1) * self.batch_size
        checkpoint[type(self).__qualname__].update(epoch=epoch, samples=after)

    @property
    def _on_ranks(self) -> bool:
        """Whether there are ranks to work with; while a run is only being checked there are none yet."""
        return self.trainer is not None and self.trainer.world_size > 1 and dist.is_initialized()

    def _memory_per_rank(self) -> int:
        """Memory where this rank's bank will lie, or less where it is made, which is always on the host."""
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        of_host = available_memory_bytes() // (self.trainer.num_devices if self.trainer else 1)
        if device.type == "cuda":
            return min(torch.cuda.get_device_properties(device).total_memory, of_host)
        return of_host

    def _ready(self) -> Opened:
        """The training and the held-out set, opened if they were not yet."""
        if self._opened is None:
            self.setup()
        assert self._opened is not None
        return self._opened

    def _order(self) -> dict[str, int | bool]:
        """What decides which images a micro-batch holds, beside the place."""
        assert self.trainer is not None
        return {
            "batch_size": self.batch_size,
            "accumulation": self.trainer.accumulate_grad_batches,
            "num_train": self.num_train,
            "flip": self.flip,
            "seed": self.seed,
        }

    def _batches_done(self) -> int:
        """Micro-batches that the Trainer has finished on each rank, in all epochs and earlier runs."""
        assert self.trainer is not None
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.state_dict()["processed"]

    def _place(self) -> tuple[int, int]:
        """The epoch, and the images of it that are done, from the one count that Lightning always restores right.

        Its counts per epoch do not serve: after a restart from a checkpoint of an epoch's end under max_steps,
        `set_epoch` is told one epoch too many. Until Lightning has restored its counts, this is the checkpoint's place.
        """
        assert self.trainer is not None
        micro_batch_size = self.batch_size // self.trainer.accumulate_grad_batches
        full = self.num_train // self.batch_size * self.trainer.accumulate_grad_batches
        per_epoch = min(full, self.trainer.num_training_batches)  # fewer with limit_train_batches
        since = max(self._batches_done() - self._resumed["batches"], 0)
        epochs, batches = divmod(self._resumed["samples"] // micro_batch_size + since, int(per_epoch))
        return self._resumed["epoch"] + epochs, batches * micro_batch_size

    def _check_resumable(self) -> None:
        """Raise or warn if a place in the middle of an epoch is not the same place in this run."""
        saved, samples = self._resumed, self._resumed["samples"]
        if not samples:
            return
        changed = {k: (saved[k], v) for k, v in self._order().items() if saved[k] != v}
        if changed:
            differences = ", ".join(f"{k} was {old} and is {new}" for k, (old, new) in changed.items())
            raise ValueError(
                f"the checkpoint lies inside epoch {saved['epoch']}, after {samples} images, which cannot go on with "
                f"other batches: {differences}. Restore these, or start from a checkpoint of an epoch's end"
            )
        if samples % self.batch_size:
            rank_zero_warn(
                f"The checkpoint lies inside an optimizer step: {samples % self.batch_size} of its {self.batch_size} "
                "images were done, but their gradients are not in the file. The first step goes without them; save "
                "after whole steps to continue exactly."
            )
