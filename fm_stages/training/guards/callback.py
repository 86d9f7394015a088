"""Guards: a loss or gradient that is not finite, or far above what it was, is found before it reaches the weights.

Each optimizer step costs the norm of the gradients, one all-reduce of two numbers, and one wait for them: the decision
to leave a step out has to be made before the optimizer runs, on all ranks alike, so it cannot be read later. All that
follows is arithmetic of the host on two numbers that every rank has.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from fm_stages.data import TrainingData
from fm_stages.training.checkpoints.callback import Checkpoints
from fm_stages.training.checkpoints.continuity import id_of, logged_so_far
from fm_stages.training.checkpoints.files import LAST
from fm_stages.training.guards.flight import FOLDER, Flight, plain, write_record
from fm_stages.training.guards.rewinding import Rewind, find_good, write_rewound
from fm_stages.training.guards.spikes import MIN_VALUES, SpikeDetector
from fm_stages.training.guards.step_numbers import measure_step
from fm_stages.training.logs.alerts import alert
from fm_stages.training.logs.loggers import is_trial, log_metrics, run_folder
from fm_stages.training.module import FlowMatching
from fm_stages.training.ranks import gather, on_rank_0

NON_FINITE = ("off", "stop", "skip", "rewind")
SPIKE = ("off", "record", "stop", "skip", "rewind")

MAX_RECORDS = 20
"""Flight records of one run: a run that goes wrong all the time would fill the disk."""

TITLES = {
    "record": "Guards saw a spike",
    "skip": "Guards left a step out",
    "rewind": "Guards go back",
    "stop": "Guards stop the run",
}
"""Of what is told, by what is done."""


class GuardStop(SystemExit):
    """The run was stopped by its guards. The status is EX_DATAERR of sysexits.h: to start it again would not help."""

    STATUS = 65

    def __init__(self) -> None:
        super().__init__(self.STATUS)


class Guards(L.Callback):
    """Watches loss and gradient norm of every optimizer step, before the step is made.

    What a policy does, on all ranks at the same step: ``record`` writes a flight record and trains on; ``skip`` leaves
    the step out (weights, average and the optimizer's moments stay; the step is counted, so that random numbers and
    data go on as ever); ``rewind`` goes back to the newest checkpoint before the step and passes over the batches of
    all steps since; ``stop`` ends the run with status 65. ``off`` looks away. All but ``off`` write a flight record,
    ``<run>/flight/step_XXXXXXX``, which ``fm-stages replay`` reads.

    With 16-mixed the gradient scaler leaves out steps whose gradients overflow, as part of its work: then only the loss
    is watched for what is not finite.

    Args:
        nonfinite: policy for a loss or a gradient norm that is NaN or infinite on any rank.
        spike: policy for a loss or a gradient norm far above what it was.
        window: steps that "what it was" is the median of.
        threshold: robust standard deviations above that median that make a spike (which is also twice the median).
        max_skips: steps left out in a row, after which the run stops.
        max_rewinds: times that the run goes back, after which it stops.

    Raises:
        ValueError: if an argument lies outside its range.
    """

    def __init__(
        self,
        nonfinite: Literal["off", "stop", "skip", "rewind"] = "skip",
        spike: Literal["off", "record", "stop", "skip", "rewind"] = "record",
        window: int = 200,
        threshold: float = 10.0,
        max_skips: int = 10,
        max_rewinds: int = 3,
    ) -> None:
        for name, value, known in (("nonfinite", nonfinite, NON_FINITE), ("spike", spike, SPIKE)):
            if value not in known:
                raise ValueError(f"guards: {name}={value!r} is no policy; there are {', '.join(known)}")
        if window < MIN_VALUES:
            raise ValueError(f"guards: window={window} must be {MIN_VALUES} steps or more")
        if not threshold > 0:
            raise ValueError(f"guards: threshold={threshold} must be above 0")
        if max_skips < 1 or max_rewinds < 1:
            raise ValueError(f"guards: max_skips={max_skips} and max_rewinds={max_rewinds} must be 1 or more")
        self.nonfinite, self.spike, self.window, self.threshold = nonfinite, spike, window, threshold
        self.max_skips, self.max_rewinds = max_skips, max_rewinds
        self._forget()

    def _forget(self) -> None:
        self.events: list[dict[str, Any]] = []
        """What was found, and what was done about it."""
        self.rewinds = 0
        self.num_in_a_row = 0
        self._spikes = {name: SpikeDetector(self.window, self.threshold) for name in ("loss", "gradient norm")}
        self._flight = Flight()
        self._loss: Tensor | None = None
        self._batch: Any = None
        self._good: Path | None = None

    @property
    def is_on(self) -> bool:
        """Whether anything is watched."""
        return (self.nonfinite, self.spike) != ("off", "off")

    # what is watched -------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin anew, and refuse to go back where there is no way back.

        Raises:
            ValueError: with the remedy.
        """
        self._forget()
        if stage != "fit" or "rewind" not in (self.nonfinite, self.spike):
            return
        if self._checkpoints(trainer) is None:
            raise ValueError("guards: rewind goes back to checkpoints, and this run writes none: choose skip or stop")
        if not isinstance(getattr(trainer, "datamodule", None), TrainingData):
            raise ValueError("guards: rewind needs a data module of fm_stages.data: choose skip or stop")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember what this micro-batch is."""
        self._batch = batch

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Add a micro-batch's part of the step's loss, on the device."""
        if not self.is_on:
            return
        loss = loss.detach()
        self._loss = loss if self._loss is None else self._loss + loss
        outputs = getattr(pl_module, "step_outputs", None)
        self._flight.keep(self._batch, outputs)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Decide whether this step is made."""
        if not self.is_on or self._loss is None:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        loss, norm, own_norm = measure_step(self._loss / scale, optimizer, trainer.world_size)
        kind, what = self._judge(loss, norm, watch_norm=scaler is None)
        try:
            if kind:
                self._act(trainer, pl_module, optimizer, kind, what, {"loss": loss, "gradient_norm": norm})
            else:
                self.num_in_a_row = 0
            if isinstance(pl_module, FlowMatching):
                pl_module.gradient_norm = own_norm  # the clipping need not compute it again
        finally:
            self._loss = self._batch = None
            self._flight.clear()

    def _judge(self, loss: float, norm: float, watch_norm: bool) -> tuple[str, str]:
        """What is wrong with a step, if anything: nonfinite or spike, and the same in words. Equal on all ranks."""
        if not math.isfinite(loss) or (watch_norm and not math.isfinite(norm)):
            values = f"the loss is {loss:.4g}, the gradient norm {norm:.4g}"
            return ("", "") if self.nonfinite == "off" else ("nonfinite", values)
        if self.spike == "off":
            return "", ""
        watched = {"loss": loss, "gradient norm": norm}
        found = [
            f"the {name} is {text}"
            for name, value in watched.items()
            if math.isfinite(value) and (text := self._spikes[name].excess(value))
        ]
        return ("spike", "; ".join(found)) if found else ("", "")

    # what is done about it -------------------------------------------------------------------------------------------

    def _act(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        optimizer: Optimizer,
        kind: str,
        what: str,
        numbers: dict[str, float],
    ) -> None:
        """Write the record, tell, and do what the policy says; every rank comes here at the same step."""
        self.num_in_a_row += 1
        step, policy = trainer.global_step, self.nonfinite if kind == "nonfinite" else self.spike
        if policy == "record" and self.num_in_a_row > 1:
            return  # told when it began
        action, how = self._decide(trainer, policy)
        if kind == "nonfinite":
            what += self._whose(trainer)
        event = {"step": step, "kind": kind, "action": action, "what": what}
        if self.num_in_a_row == 1 or action != policy:  # a row is told where it begins and where it ends
            facts = {**event, **{name: plain(number) for name, number in numbers.items()}}
            how += self._record(trainer, module, optimizer, facts)
            alert(trainer, TITLES[action], f"step {step}: {what}. {how}")
        self.events.append(event)
        log_metrics(trainer, {"guards/events": len(self.events)})
        if action == "rewind":
            raise Rewind(self._go_back(trainer))
        if action == "stop":
            trainer.strategy.barrier()  # nobody leaves, and has the others killed, before the record is written
            rank_zero_info(f"\nStopped at step {step} by the guards: {what}. {how}")
            raise GuardStop
        if action == "skip":
            optimizer.zero_grad(set_to_none=True)  # which the optimizer, and the average, take for nothing to do
            if isinstance(module, FlowMatching):
                module.skipped_step = step + 1

    def _decide(self, trainer: L.Trainer, policy: str) -> tuple[str, str]:
        """What to do, given what was done before, and the same in words."""
        if policy == "record":
            return "record", "Training goes on."
        if policy == "stop":
            return "stop", "This step has reached no weights and no checkpoint."
        if policy == "skip":
            if self.num_in_a_row > self.max_skips:
                return "stop", (
                    f"After {self.max_skips} steps left out in a row (guards.max_skips): the weights themselves are "
                    "damaged, or the data. Resume from an earlier checkpoint, with a smaller learning rate."
                )
            return "skip", "The step is left out; so are those that follow, while they are like it."
        if self.rewinds >= self.max_rewinds:
            return "stop", (
                f"The run went back {self.rewinds} times already (guards.max_rewinds): try a smaller learning rate, or "
                "more warmup_steps."
            )
        checkpoints = self._checkpoints(trainer)
        assert checkpoints is not None
        checkpoints.settle(trainer)
        # rank 0 says whether there is one: the others may see its folder late
        folder, run_id = _folder(checkpoints), id_of(trainer)
        self._good = on_rank_0(
            trainer, "guards: checkpoints could not be read", lambda: find_good(folder, trainer.global_step, run_id)
        )
        if self._good is None:
            return "stop", f"There is no checkpoint from before step {trainer.global_step} to go back to."
        return "rewind", f"Training goes back to {self._good.name}, and passes over the batches since."

    def _go_back(self, trainer: L.Trainer) -> Path:
        """Write the checkpoint to go on from, on rank 0; its path."""
        checkpoints, data = self._checkpoints(trainer), getattr(trainer, "datamodule", None)
        assert checkpoints is not None
        assert isinstance(data, TrainingData)
        good, folder = self._good, _folder(checkpoints)
        assert good is not None
        state = {"rewinds": self.rewinds + 1, "events": self.events, "num_in_a_row": 0}
        on_rank_0(
            trainer,
            "guards: the way back could not be written",
            lambda: write_rewound(good, folder, data, self.state_key, state, logged_so_far(trainer)),
        )
        return folder / LAST

    def _whose(self, trainer: L.Trainer) -> str:
        """On which ranks the loss is not finite; every rank calls this."""
        assert self._loss is not None
        ranks = [rank for rank, fine in enumerate(gather(bool(self._loss.isfinite()))) if not fine]
        return f" (ranks {', '.join(map(str, ranks))})" if ranks and trainer.world_size > 1 else ""

    def _record(
        self, trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer, facts: dict[str, Any]
    ) -> str:
        """Write the flight record; where it is, in words. Every rank calls this."""
        if is_trial(trainer) or len(self.events) >= MAX_RECORDS:
            return ""
        again = f"_after_{self.rewinds}_rewinds" if self.rewinds else ""
        run: Path = trainer.strategy.broadcast(run_folder(trainer))  # a CSVLogger numbers its folder on each rank
        folder = run / FOLDER / f"step_{facts['step']:07d}{again}"
        failure = write_record(folder, trainer, module, optimizer, self._flight, facts)
        return f" No record: {failure}" if failure else f" Look at it: fm-stages replay --record {folder}"

    @staticmethod
    def _checkpoints(trainer: L.Trainer) -> Checkpoints | None:
        return next((c for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints)), None)

    # through a checkpoint --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The windows and what was found so far: plain numbers, the same on all ranks."""
        return {
            "windows": {name: list(spikes.values) for name, spikes in self._spikes.items()},
            "num_in_a_row": self.num_in_a_row,
            "rewinds": self.rewinds,
            "events": list(self.events),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`; where the window is shorter now, with its last values."""
        for name, values in state_dict.get("windows", {}).items():
            self._spikes[name].values.extend(values)
        self.num_in_a_row, self.rewinds = state_dict["num_in_a_row"], state_dict["rewinds"]
        self.events = list(state_dict["events"])


def _folder(checkpoints: Checkpoints) -> Path:
    return Path(str(checkpoints.dirpath))
