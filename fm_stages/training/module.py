"""The LightningModule: wires network, path, timestep sampler, target and weighting together, and holds no formula."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR
from torchmetrics import MeanMetric

from fm_stages.flow import (
    LinearPath,
    Path,
    TimestepSampler,
    UniformTimesteps,
    UniformWeighting,
    Weighting,
    keyed_normal,
    keyed_uniform,
    stratified_uniform,
)
from fm_stages.oracle import measure_nearest, nearest_pays, oracle_of, rows_per_query
from fm_stages.training.ema import frozen_twin, ramped_decay, update_twin
from fm_stages.training.sharding import check_strategy
from fm_stages.training.targets import ConditionalTarget, Target

GOLDEN = 0.6180339887498949
"""Steps of this size modulo 1 fill [0, 1] evenly, however many are taken."""


class FlowMatching(L.LightningModule):
    """Flow matching of images with a velocity network.

    Args:
        network: ``network(x, t, y) -> velocity``; y is -1 for the null class.
        path: between noise and data; linear by default.
        timesteps: density that training draws t from; uniform by default.
        target: what the network regresses on; the conditional target by default.
        weighting: of the loss over t; uniform by default.
        importance_weights: whether the loss is also divided by the density of t, so that the objective is that of
            uniform t wherever t is drawn. Where a density is thin these weights are huge: choose one that is nowhere
            near 0, as steered ones are.
        optimizer: called with the parameters; AdamW with learning rate 1e-4 by default.
        warmup_steps: steps over which the learning rate rises linearly to its value.
        label_dropout: probability that a training sample's label is replaced by the null class.
        ema_decay: of the averaged weights; 0 keeps none.
        compile: whether torch.compile compiles the network.
        seed: of noise, times and label dropout. The draws depend on seed, step and place in the global batch alone.
    """

    def __init__(
        self,
        network: nn.Module,
        path: Path | None = None,
        timesteps: TimestepSampler | None = None,
        target: Target | None = None,
        weighting: Weighting | None = None,
        importance_weights: bool = False,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0),
        warmup_steps: int = 0,
        label_dropout: float = 0.1,
        ema_decay: float = 0.9999,
        compile: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, limit in (("label_dropout", label_dropout, 1.0), ("ema_decay", ema_decay, 1.0)):
            if not 0 <= value <= limit:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more, got {warmup_steps}")
        self.network = network
        self.network_ema = frozen_twin(network) if ema_decay else None
        self.path = path or LinearPath()
        self.target = target or ConditionalTarget()
        self.weighting = weighting or UniformWeighting()
        self.importance_weights = importance_weights
        self.draw_from(timesteps or UniformTimesteps())
        self.configured = self.timesteps, self.weighting, self.target
        """What the run was configured with, whatever steers it."""
        self.make_optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.label_dropout = label_dropout
        self.ema_decay = ema_decay
        self.seed = seed
        self.loaded_step = 0
        self.step_outputs: dict[str, Tensor] | None = None
        """What the newest `training_step` made of its batch, and the error of each sample, until it is over."""
        self.gradient_norm: Tensor | None = None
        """Of the step that is about to be made, if `Guards` has computed it."""
        self.skipped_step = -1
        """The newest step that `Guards` left out, counted after it."""
        self.val_loss = MeanMetric()
        self.val_loss_ema = MeanMetric()
        if compile:
            self.network.compile()  # in place: torch.compile(network) would rename every weight

    def draw_from(self, timesteps: TimestepSampler) -> None:
        """Draw t from this density from now on; the mean of the loss's weights stays 1."""
        self.timesteps = timesteps
        self.weighting.prepare(self.path, timesteps, self.importance_weights)

    def weigh_by(self, weighting: Weighting) -> None:
        """Weigh the loss by this from now on; the mean of the weights is 1."""
        self.weighting = weighting
        weighting.prepare(self.path, self.timesteps, self.importance_weights)

    def check_data(self, datamodule: Any) -> None:
        """Refuse data that the network was not built for, and a target that needs a bank where there is none.

        Raises:
            ValueError: with both values and the remedy.
        """
        _check_network(self.network, datamodule, labels_seen=self.label_dropout < 1)
        if self.target.needs_oracle and self.target.oracle is None and not hasattr(datamodule, "bank"):
            raise ValueError(
                f"{type(self.target).__name__} needs the training set's bank: give the Trainer a datamodule with "
                "bank(), or choose fm_stages.training.ConditionalTarget"
            )

    def check_precision(self, trainer: L.Trainer) -> None:
        """Refuse what would round data and noise, and with them the oracle."""
        if trainer.precision in ("bf16-true", "16-true"):
            raise ValueError(f"precision={trainer.precision} would round data and noise: use bf16-mixed or 32-true")

    def setup(self, stage: str) -> None:
        """Check the data, and hand the bank's oracle to a target that needs it."""
        check_strategy(self.trainer.strategy)
        self.check_precision(self.trainer)
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        self.check_data(datamodule)
        if stage == "fit" and self.target.needs_oracle and hasattr(datamodule, "bank"):
            # anew in a second fit: the data may be other data
            self.target.attach(oracle_of(datamodule.bank(), self.path))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember which step the weights are of, for Lightning forgets it in ``validate``; count its batches anew."""
        self.loaded_step = int(checkpoint.get("global_step", 0))
        data = getattr(self._trainer, "datamodule", None)  # there is no Trainer in `load_from_checkpoint`
        if (recount := getattr(data, "recount", None)) is not None:
            recount(checkpoint)

    def on_fit_start(self) -> None:
        """Bring the bank to where the queries will be; measure nearest neighbours if that spares more work."""
        if self.target.oracle is None:
            return
        bank = self.target.oracle.bank.to(self.device)
        if not (self.target.can_skip and self.target.oracle.collapses and bank.nearest is None):
            return
        num_queries = getattr(getattr(self.trainer, "datamodule", None), "batch_size", 0)
        if bank.group is None:  # each rank measures all of its copy, and asks for its own part of the batch
            num_queries //= self.trainer.world_size
        share = rows_per_query(bank, self.label_dropout) / bank.num_rows
        if nearest_pays(bank.num_rows, num_queries, self.trainer.max_steps, share):
            measure_nearest(bank)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Draw t, noise and label dropout; interpolate; predict; regress. Returns what callbacks need."""
        x1, labels, position, index = self._unpack(batch, batch_idx)
        t, x0, labels = self.draw(x1, labels, position)
        self.target.step = self.trainer.global_step
        x1, index = self.target.draw_data(x1, labels, index, position)
        x_t = self.path.interpolate(x0, x1, t)
        prediction = self.network(x_t, t, labels).float()
        target = self.target(self.path, x0, x1, t, labels, index)
        error = (prediction - target).square().flatten(1).mean(1)  # (B,)
        loss = (self.weighting(t) * error).mean()
        self.log("train/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(t))
        self.log("train/learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=len(t))
        seen = {"x0": x0, "x1": x1, "x_t": x_t, "t": t, "prediction": prediction.detach(), "labels": labels}
        seen |= {} if index is None else {"index": index}
        self.step_outputs = {**seen, "error": error.detach()}
        return {"loss": loss + self.weighting.own_loss(t, error), **seen}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let go of the batch."""
        self.step_outputs = None

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Regular loss at uniform t on held-out data, of raw and EMA weights; noise and t are fixed per image."""
        outputs = self.predict_fixed(batch, batch_idx)
        target = self.path.velocity(outputs["x0"], outputs["x1"], outputs["t"])
        for suffix, _, metric in self._weights():
            error = (outputs[f"prediction{suffix}"] - target).square().mean()
            metric.update(error, weight=len(outputs["t"]))
            self.log(f"val/loss{suffix}", metric, on_step=False, on_epoch=True, prog_bar=not suffix)
        return outputs

    @torch.no_grad()
    def predict_fixed(self, batch: Any, batch_idx: int = 0) -> dict[str, Tensor]:
        """Predictions of raw and EMA weights on any images; nothing is logged, and nothing of the run changes.

        Noise, uniform t and label dropout depend on seed and ``position`` alone: two sets of images at the same
        positions are under the same noise, at the same t, whenever they are measured. Weights that are sharded over
        ranks need every rank to call this.

        Args:
            batch: as `validation_step` takes it.
            batch_idx: stands for the positions of a batch that does not say them.

        Returns:
            ``x0, x1, x_t, t, labels`` (-1 = null), ``prediction`` and, where there are averaged weights,
            ``prediction_ema``; see `OracleMonitor`.
        """
        x1, labels, position, _ = self._unpack(batch, batch_idx)
        t = self._fixed_times(position).to(x1.device)
        x0 = keyed_normal(("val noise", self.seed), position, tuple(x1.shape[1:])).to(x1)
        labels = self._drop_labels(labels, ("val labels", self.seed), position)
        x_t = self.path.interpolate(x0, x1, t)
        predictions = {f"prediction{suffix}": network(x_t, t, labels).float() for suffix, network, _ in self._weights()}
        return {"x0": x0, "x1": x1, "x_t": x_t, "t": t, "labels": labels, **predictions}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the average follow, unless the step was left out."""
        super().optimizer_step(*args, **kwargs)
        left_out = all(parameter.grad is None for parameter in self.network.parameters())  # by `Guards`
        if self.network_ema is not None and not left_out:
            update_twin(self.network_ema, self.network, ramped_decay(self.ema_decay, self.trainer.global_step))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, by the norm that is known where it is."""
        norm, self.gradient_norm = self.gradient_norm, None
        if norm is None or not gradient_clip_val or gradient_clip_algorithm not in (None, "norm"):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            clip_grads_with_norm_(parameters, gradient_clip_val, norm)

    def configure_optimizers(self) -> Any:
        """The optimizer, and linear warm-up by step where asked for."""
        learned = [self.network, *([self.weighting] if isinstance(self.weighting, nn.Module) else [])]
        optimizer = self.make_optimizer(p for part in learned for p in part.parameters() if p.requires_grad)
        if not self.warmup_steps:
            return optimizer
        warmup = LinearLR(optimizer, start_factor=1 / (self.warmup_steps + 1), total_iters=self.warmup_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}

    def _weights(self) -> list[tuple[str, nn.Module, MeanMetric]]:
        """Metric suffix, network and mean loss for raw and, where they are kept, EMA weights."""
        raw = [("", self.network, self.val_loss)]
        return raw if self.network_ema is None else [*raw, ("_ema", self.network_ema, self.val_loss_ema)]

    def draw(self, x1: Tensor, labels: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Times (B,), noise (B, ...) and labels (B,) after dropout, for this step's places (B,) in the global batch."""
        step = self.trainer.global_step
        num_strata = len(x1) * self.trainer.world_size * self.trainer.accumulate_grad_batches
        u = stratified_uniform(("t", self.seed, step), position, num_strata).to(x1.device)
        t = self.timesteps.icdf(u).clamp(max=self.path.max_time)
        x0 = keyed_normal(("noise", self.seed, step), position, tuple(x1.shape[1:]), device=x1.device)
        return t, x0, self._drop_labels(labels, ("labels", self.seed, step), position)

    def _drop_labels(self, labels: Tensor, key: tuple[int | str, ...], position: Tensor) -> Tensor:
        """Labels (B,) with the null class -1 where the dropout says so."""
        kept = keyed_uniform(key, position).to(labels.device) >= self.label_dropout
        return torch.where(kept, labels, -1)

    def _fixed_times(self, position: Tensor) -> Tensor:
        """One fixed time for each held-out image (B,): even over (0, 1) for any prefix of the set."""
        u = ((position.double() + 0.5) * GOLDEN) % 1.0
        return u.float().clamp(max=self.path.max_time)  # on the positions' device

    def _unpack(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Images, labels (-1 without), places in the global batch and, where known, rows in the bank."""
        if not isinstance(batch, dict):
            x1, labels = (*batch, None)[:2] if isinstance(batch, (tuple, list)) else (batch, None)
            batch = {"x1": x1, "labels": labels}
        x1 = batch["x1"]
        labels, position = batch.get("labels"), batch.get("position")
        if labels is None:
            labels = torch.full((len(x1),), -1, device=x1.device)
        if position is None:  # a foreign loader: ranks and accumulated micro-batches follow each other
            micro = batch_idx if not self.trainer.training else batch_idx % self.trainer.accumulate_grad_batches
            part = micro * self.trainer.world_size + self.trainer.global_rank
            position = part * len(x1) + torch.arange(len(x1))
        return x1, labels, position, batch.get("index")


def _check_network(network: nn.Module, datamodule: Any, labels_seen: bool) -> None:
    """Refuse a network that was built for other images or fewer classes than the data has."""
    shape, num_classes = getattr(datamodule, "shape", None), getattr(datamodule, "num_classes", None)
    built = tuple(getattr(network, name, None) for name in ("in_channels", "input_size", "input_size"))
    if shape is not None and None not in built and tuple(shape) != built:
        raise ValueError(
            f"the data's images are {tuple(shape)} (C, H, W), the network was built for {built}: set its in_channels "
            "and input_size"
        )
    known = getattr(network, "num_classes", None)
    if labels_seen and num_classes is not None and known is not None and known < num_classes:
        raise ValueError(
            f"the data has {num_classes} classes, the network {known}: set its num_classes to {num_classes} (or "
            "label_dropout to 1, for a network that sees no labels)"
        )
