"""``fm-stages compare``: ways to train, paired: the same weights, images and noise, the same probe."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from tqdm import tqdm

from fm_stages.data import read_yaml_file, remove_parts
from fm_stages.oracle import StageProfile
from fm_stages.studies.commands import check_least, command_parser, interruptible, parse_options
from fm_stages.studies.compare.arms import (
    Arm,
    choose_reference,
    first_difference,
    read_arms,
    resolve,
    resolve_arms,
)
from fm_stages.studies.compare.comparison import Comparison
from fm_stages.studies.compare.measure import Probe, ProbeSettings, measure_stages
from fm_stages.studies.compare.report import write_report
from fm_stages.studies.compare.runs import (
    Run,
    RunFailedError,
    alone,
    cluster_commands,
    has_begun,
    sweep,
    train,
    training_seconds,
    write_arms,
)
from fm_stages.studies.runs import build_run
from fm_stages.studies.text_files import write_json, write_text
from fm_stages.training import ALLOWED_BY, read_checkpoint


def compare_parser() -> ArgumentParser:
    """The options of the command."""
    parser = command_parser("compare", __doc__)
    files: dict[str, Any] = {"type": str, "nargs": "+", "action": "extend", "required": True}
    parser.add_argument("--config", **files, help="the base, as for fit; a later file lies on an earlier one")
    parser.add_argument(
        "--arms",
        **files,
        help="YAML files of overrides: one arm each, or a mapping from names to overrides; or folders of them",
    )
    parser.add_argument("--seeds", type=int, required=True, help="number of seeds: 0, 1, ...; more may be added later")
    parser.add_argument("--out", type=str | None, default=None, help="folder; default: runs/compare_<base>")
    parser.add_argument(
        "--reference", type=str | None, default=None, help="arm; default: the one without overrides, or the first"
    )
    parser.add_argument("--num_probe", type=int, default=2048, help="training and held-out images that are measured")
    parser.add_argument("--num_samples", type=int, default=1000, help="generated images")
    parser.add_argument("--solver_steps", type=int, default=50, help="Euler steps of each")
    parser.add_argument("--milestones", type=int, default=5, help="times along each run at which it is measured")
    parser.add_argument("--run", type=str | None, default=None, help="ARM/SEED: only this run, without a report")
    parser.add_argument("--report", action="store_true", help="only the report, of the runs that are finished")
    parser.add_argument(
        "--dry-run", action="store_true", help="train nothing: print the commands for a cluster, write sweep.yaml"
    )
    return parser


def compare_command(arguments: list[str] | None = None) -> None:
    """The command: trains what is missing, measures it, writes the report. Exit status 1 if a run is missing.

    Args:
        arguments: those after ``fm-stages compare``; None: of this process.
    """
    options = parse_options(compare_parser(), arguments)
    check_least(options, 1, "seeds")
    study = _Comparing(options)
    if options.dry_run:
        print(study.commands())
        return
    with interruptible(f"what was finished is in {study.out}, the same command goes on"):
        missing = study.work()
    for name, reason in missing.items():
        print(f"fm-stages: run {name} failed: {reason}", file=sys.stderr)
    if missing:
        sys.exit(1)


class _Comparing:
    """One call of the command: what is compared, checked before anything is trained."""

    def __init__(self, options: Namespace) -> None:
        overrides = read_arms(options.arms)
        self.options = options
        self.settings = ProbeSettings(**{f.name: options[f.name] for f in fields(ProbeSettings) if f.name in options})
        self.reference = choose_reference(overrides, options.reference)
        self.out = Path(options.out or f"runs/compare_{Path(options.config[0]).stem}")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        for folder in (self.out, self.out / "arms"):
            remove_parts(folder)
        base = resolve(options.config)
        self.module, self.data = build_run(base)
        self.data.prepare_data()
        self.data.setup()
        self.profile = self._stages()
        self.arms = resolve_arms(options.config, overrides, self.profile)
        self._check_unchanged()
        write_arms(self.out, self.arms)
        self.runs = [self._run(arm, seed) for seed in range(options.seeds) for arm in self.arms]  # a seed is a whole
        if options.run and options.run not in [run.name for run in self.runs]:
            raise ValueError(f"--run {options.run}: the runs are {', '.join(run.name for run in self.runs)}")
        loggers = base["trainer"]["logger"]
        wandb = [one for one in (loggers if isinstance(loggers, list) else [loggers]) if _is_wandb(one)]
        self.project: str | None = wandb[0]["init_args"].get("project") or "fm-stages" if wandb else None

    def commands(self) -> str:
        """What runs the comparison on a cluster."""
        words = self._option_words()
        write_text(self.out / "sweep.yaml", sweep(self.runs, words, self.out.name))
        return cluster_commands(self.runs, words) + (
            f"\n# Or as a wandb sweep:\n# wandb sweep {self.out / 'sweep.yaml'}"
        )

    def work(self) -> dict[str, str]:
        """Train and measure what is missing, and report; returns why runs failed, by name."""
        failed: dict[str, str] = {}
        wanted = [run for run in self.runs if self.options.run in (None, run.name)]
        todo = [] if self.options.report else [run for run in wanted if run.result() is None]
        probe = Probe(self.module, self.data, self.profile, self.settings, self.device) if todo else None
        with tqdm(total=len(wanted), initial=len(wanted) - len(todo), unit="run", disable=not todo) as bar:
            for run in todo:
                bar.set_description(f"{run.arm.name}, seed {run.seed}")
                try:
                    assert probe is not None
                    _finish(run, probe, self.out.name, bar)
                except RunFailedError as error:
                    failed[run.name] = str(error)
                    bar.write(f"Run {run.name} failed: {error}", file=sys.stderr)
                bar.update()
        if self.options.run is None:
            self._report(failed, news=len(todo) > len(failed))
        return failed

    def _report(self, failed: dict[str, str], news: bool) -> None:
        """Write the report, and tell wandb if there is something new in it."""
        results: dict[str, dict[int, dict[str, Any]]] = {arm.name: {} for arm in self.arms}
        missing = {}
        for run in self.runs:
            found = run.result()
            if found is None:
                missing[run.name] = failed.get(run.name, "not run yet")
            else:
                results[run.arm.name][run.seed] = found
        hashes = {arm.name: arm.weights_hash for arm in self.arms}
        comparison = Comparison(
            name=self.out.name,
            base=self.options.config,
            arms=[arm.name for arm in self.arms],
            reference=self.reference,
            seeds=list(range(self.options.seeds)),
            results=results,
            missing=missing,
            other_weights=[name for name, found in hashes.items() if found != hashes[self.reference]],
            profile=self.profile,
            settings=self.settings,
            options=self._option_words(),
        )
        news = news or not (self.out / "report.json").is_file()
        write_report(comparison, self.out)
        if self.project and news and any(results.values()):
            from fm_stages.studies.compare.to_wandb import log_comparison  # wandb takes a second to import

            log_comparison(comparison, self.project, self.out)
        print(f"Report: {self.out / 'report.md'}")

    def _stages(self) -> StageProfile:
        """The stages of the data, measured once; the first process of several keeps its own."""
        file = self.out / "profile.json"
        if not file.is_file():
            profile = measure_stages(self.module, self.data, self.device, partial(print, file=sys.stderr))
            part = file.with_name(f"profile.{os.getpid()}.part")
            profile.save(part)
            try:
                os.link(part, file)  # fails where another process was faster; its numbers are then everybody's
            except FileExistsError:
                pass
            finally:
                part.unlink()
        return StageProfile.load(file)

    def _check_unchanged(self) -> None:
        """Refuse arms or a probe that are not those of the runs that are there. Other arms and seeds may be added.

        An arm that has not been trained yet, or failed as it started, may be corrected.

        Raises:
            ValueError: with the first difference.
        """
        file = self.out / "comparison.yaml"
        known = read_yaml_file(file) if file.is_file() else {"probe": {}, "arms": {}}
        now = {"probe": asdict(self.settings), "arms": {arm.name: arm.config for arm in self.arms}}
        begun = [name for name in known["arms"] if any(map(has_begun, (self.out / name).glob("seed_*")))]
        for what, before, new in (
            ("the probe", known["probe"] if begun else None, now["probe"]),
            *((f"arm {name}", known["arms"][name], now["arms"].get(name)) for name in begun),
        ):
            different = first_difference(before, new) if before and new else None
            if different:
                key, old, value = different
                raise ValueError(
                    f"{self.out} holds a comparison in which {what} had {key}={old!r}, now it is {value!r}: restore "
                    "it, or give another folder with --out"
                )
        write_text(file, yaml.safe_dump({**now, "arms": {**known["arms"], **now["arms"]}}, sort_keys=False))

    def _run(self, arm: Arm, seed: int) -> Run:
        same_mix = arm.config["model"]["label_dropout"] == self.module.label_dropout
        profile = self.out / "profile.json" if same_mix else None
        run = Run(arm, seed, self.out, tuple(self.options.config), profile, self.settings.milestones)
        found = run.result()
        if found and found["config_hash"] != arm.config_hash:
            raise ValueError(
                f"{run.result_file} is of another configuration ({found['config_hash']} there, {arm.config_hash} "
                "here): restore it, or give another folder with --out"
            )
        return run

    def _option_words(self) -> list[str]:
        """The options that say what is compared, as words of a command line."""
        words = ["--config", *self.options.config, "--arms", *self.options.arms, "--seeds", str(self.options.seeds)]
        words += ["--out", str(self.out)]
        if self.options.reference:
            words += ["--reference", self.options.reference]
        for name, default in asdict(ProbeSettings()).items():
            if getattr(self.settings, name) != default:
                words += [f"--{name}", str(getattr(self.settings, name))]
        packages = os.environ.get(ALLOWED_BY, "").split(",")
        return words + [f"--allow-import={package}" for package in packages if package]


def _finish(run: Run, probe: Probe, group: str, bar: tqdm) -> None:
    """Train and measure one run, unless another process does so meanwhile."""

    def say_that_it_waits() -> None:
        bar.write(f"Run {run.name} is being trained by another process; waiting for it (log: {run.folder / 'log.txt'})")

    with alone(run, say_that_it_waits) as lock:
        if run.result() is not None:
            return
        remove_parts(run.folder)
        train(run, lock, group, bar.refresh if sys.stderr.isatty() else lambda: None)
        checkpoint = read_checkpoint(run.checkpoint)
        network = build_run(run.arm.config)[0].network
        found = {"arm": run.arm.name, "seed": run.seed, "config_hash": run.arm.config_hash}
        found |= {"steps": checkpoint["global_step"], "train_sec": training_seconds(checkpoint)}
        found |= probe.measure(network, checkpoint, list(run.milestone_folder.glob("*.ckpt")))
        write_json(run.result_file, found)
        shutil.rmtree(run.milestone_folder, ignore_errors=True)


def _is_wandb(logger: Any) -> bool:
    return isinstance(logger, dict) and str(logger.get("class_path")).endswith("WandbLogger")
