"""The one training loop: data -> model -> backward -> optimizer -> telemetry -> run record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mango import data as datasets
from mango import models, optim
from mango.data.base import Readable, Skips
from mango.errors import ConfigError, NonFinite
from mango.optim.base import Observable
from mango.registry import Registry
from mango.telemetry import MemoryLedger, PowerSampler, RunLog, wandb
from mango.telemetry.memory import rss_peak, write_csv
from mango.training import atomic, checkpoint, record, schedule, summary
from mango.training.config import RunSpec
from mango.training.evaluation import cross_entropy, mean_scores
from mango.training.record import RunRecord
from mango.training.session import (
    CHECKPOINT,
    MEMORY,
    METRICS,
    MODEL,
    RECORD,
    Interrupted,
    Stop,
    choose_device,
    deterministic,
    open_folder,
    threads,
)
from mango.training.summary import Counters, plan_of

# by name: runs without one do not depend on its code
CONVERSIONS = Registry("conversion", {"mole": "mango.training.mole:MoleRun", "lora": "mango.models.adapters:adapt"})
# what is done ("images decoded", "steps"), how many so far, of how many (0 = unknown); a rate ("images/s") of the steps, its value and 0
Progress = Callable[[str, int, int], None]


@runtime_checkable
class Writer(Protocol):
    """A language model, such as ``mango.models.gpt.GPT``."""

    recompute: bool

    def write(self, prompt: Tensor, count: int, temperature: float, *, seed: int) -> Tensor: ...

    def eval(self) -> object: ...


def train(run: RunSpec, out: str | Path, *, resume: bool = False, force: bool = False, progress: Progress | None = None) -> RunRecord:
    """Train one variant with one seed and write ``run.json``, ``metrics.jsonl``, ``memory.csv`` and ``model.pt`` into ``out``.

    While it runs, ``checkpoint.pt`` is what ``resume`` continues from, bit for bit on the CPU; it is removed once the run is complete.

    Args:
        run: from ``mango.training.config.resolve``.
        resume: continue from the checkpoint in ``out``; without one start from the beginning; a completed run is returned as it is.
        force: start over, whatever ``out`` holds.
        progress: told what is going on.

    Raises: ConfigError, DataError, MissingExtra; NonFinite when the loss or a weight is not finite (the last checkpoint is kept);
        OSError when files cannot be written; Interrupted after SIGINT or SIGTERM.
    """
    out = Path(out)
    open_folder(out, resume=resume, force=force)
    if resume and (out / RECORD).is_file():
        done = record.load(out / RECORD)
        if (done.config_hash, done.seed) != (run.config.hash(), run.seed):
            raise ConfigError.of(
                "--resume",
                str(out),
                "the folder of this very run; it holds a completed run with another configuration or seed (--force replaces it)",
            )
        (out / CHECKPOINT).unlink(missing_ok=True)
        return done
    with threads(run.config.train.threads):
        return _Trainer(run, out, resume, progress).run()


class _Trainer:
    def __init__(self, run: RunSpec, out: Path, resume: bool, progress: Progress | None) -> None:
        self.spec, self.config, self.out = run, run.config, out
        self.progress = progress or (lambda *_: None)
        settings = self.config.train
        self.device = choose_device(settings.device)
        if self.config.optimizer not in optim.REGISTRY:
            raise ConfigError.of("optimizer", self.config.optimizer, "one of " + ", ".join(sorted(optim.REGISTRY)))
        torch.manual_seed(run.seed)
        chosen = self.config.data
        loaded = datasets.load(**self.config.data_arguments(), progress=lambda done: self.progress("images decoded", done, 0))
        if chosen.evaluate not in loaded.splits:
            raise ConfigError.of("data.validation", chosen.validation, "at least 1 when data.evaluate is validation")
        if settings.batch > len(loaded.splits["train"]):
            raise ConfigError.of("train.batch", settings.batch, f"at most the {len(loaded.splits['train'])} training examples")
        self.identity = loaded.identity()
        self.data = loaded.to(self.device)
        options = self.config.model.model_dump(exclude={"name"})
        self.model: nn.Module = models.get(self.config.model.name, **self.data.model_arguments(), **options).to(self.device)
        if settings.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.total = sum(parameter.numel() for parameter in self.model.parameters())
        matrices, _ = optim.split(self.model, self.config.exclude)
        under_test = optim.matching(matrices, self.config.under_test) if self.config.under_test else matrices
        self.under_test = sum(parameter.numel() for _, parameter in under_test)
        for _, parameter in under_test if self.config.freeze else ():
            parameter.requires_grad_(False)
        fields = self.config.mole
        self.mole = None if fields is None else CONVERSIONS.get("mole", model=self.model, fields=fields, write=self._write_mole)
        if self.config.lora is not None:
            CONVERSIONS.get("lora", model=self.model, **self.config.lora.model_dump())
        if isinstance(self.model, Writer):
            self.model.recompute = self.config.recompute
        self.optimizer = optim.build(self.config.optimizer, self.model, exclude=self.config.exclude, **self.config.options)
        self.observable = self.optimizer if isinstance(self.optimizer, Observable) else None
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        ema = settings.ema
        self.mean = None if ema is None else AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True)
        self.ledger = MemoryLedger(self.model, self.optimizer)
        self.pending: list[tuple[int, Tensor, Tensor, int]] = []  # step, loss, correct answers and answers of steps not read yet
        self.counters = Counters(started=datetime.now(UTC).isoformat(timespec="seconds"), plan=plan_of(self.optimizer))
        self.plans: dict[str, Any] = {}  # as they were last looked at
        lines = self._restore() if resume and (out / CHECKPOINT).is_file() else []
        self.log = RunLog(out / METRICS, lines)

    def run(self) -> RunRecord:
        with ExitStack() as stack:
            stack.enter_context(self.log)
            stack.enter_context(deterministic())
            self.sink = self._open_wandb(stack) if self.spec.wandb else None
            stop = stack.enter_context(Stop().listening())
            source = "auto" if self.device.type == "cuda" else "rapl"
            self.power = stack.enter_context(PowerSampler(source=source, require=self.spec.energy == "require"))
            self.joules_before, self.faults_before = self.counters.joules, (self.counters.missed, self.counters.malformed)
            self.resumed_at = time.monotonic() - self.counters.wall_seconds
            saved_step, saved_at = self.counters.step, time.monotonic()
            settings = self.config.train
            while self.counters.step < settings.steps:
                self._step()
                step = self.counters.step
                self.progress("steps", step, settings.steps)
                if step % settings.log_every == 0 or step == settings.steps:
                    self._log_training()
                if step % settings.eval_every == 0 or step == settings.steps:
                    self._evaluate()
                due = step % settings.checkpoint_every == 0 or time.monotonic() - saved_at >= settings.checkpoint_seconds
                if step > saved_step and (due or step == settings.steps or stop.number is not None):
                    self._checkpoint()
                    saved_step, saved_at = step, time.monotonic()
                if stop.number is not None:
                    raise Interrupted(stop.number, self.out / CHECKPOINT)
            self.power.sample()
            self._update_costs()
            result = self._result()
            if self.sink is not None:
                wandb.summarise(self.sink, result.model_dump(include=wandb.SUMMARY))
        return self._finish(result)

    def _open_wandb(self, stack: ExitStack) -> Any:
        spec = self.spec
        return stack.enter_context(
            wandb.session(self.out, f"{spec.variant}-{spec.seed}", f"{spec.tier}-{spec.experiment}", spec.model_dump())
        )

    def _step(self) -> None:
        """One optimizer step; counts it only when it is whole."""
        settings, counters = self.config.train, self.counters
        begin = time.perf_counter()
        lr_factor = schedule.factor(counters.step, settings.steps, settings.schedule, settings.warmup, settings.floor, settings.warmdown)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
        inputs, targets = self.data.batch(counters.step, settings.batch, self.spec.seed)
        self.model.train()
        first = counters.step == 0
        self.optimizer.zero_grad(set_to_none=True)
        with self.ledger.activations() if first else nullcontext():  # the backward pass too: blocks that are computed again save again
            loss, logits = cross_entropy(self.model, inputs, targets, self.config.train, self.device)
            loss.backward()
        if first:
            counters.gradients, counters.saved_activations = self.ledger.peak_gradients, self.ledger.saved_activations
        if settings.clip is not None:
            nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], settings.clip)
        answers = targets.argmax(-1) if targets.is_floating_point() else targets
        self.pending.append((counters.step + 1, loss.detach(), (logits.detach().argmax(-1) == answers).sum(), answers.numel()))
        last = counters.step + 1 == settings.steps
        if self.device.type == "cpu" or (counters.step + 1) % settings.log_every == 0 or last:
            self._settle()
        observer = self.observable if last or (counters.step + 1) % settings.eval_every == 0 else None
        if observer is not None:
            observer.observe(True)
        try:
            self.optimizer.step()
        except NonFinite as error:
            raise self._non_finite(str(error), counters.step + 1) from error
        if self.mean is not None:
            self.mean.update_parameters(self.model)
        counters.step += 1
        self._note_plans()
        counters.trained += answers.numel()
        if observer is not None:
            self._observe(observer)
        counters.step_seconds += time.perf_counter() - begin

    def _note_plans(self) -> None:
        """Record plans where they have changed: a policy, or a budget of the whole run, has chosen anew."""
        plans = self.optimizer.plans() if isinstance(self.optimizer, optim.Mango) else {}
        if plans != self.plans:  # quick to compare; what they are in plain values is not
            self.plans, now = plans, plan_of(self.optimizer)
            if now and now[0]["layers"] != self.counters.plan[-1]["layers"]:
                self.counters.plan.append({"step": self.counters.step, "layers": now[0]["layers"]})

    def _settle(self) -> None:
        """Read the losses of the last steps: at every step on a CPU, seldom on an accelerator, where each reading waits for the device."""
        counters = self.counters
        for step, loss, correct, count in self.pending:
            value = float(loss)
            if not math.isfinite(value):
                raise self._non_finite(f"the training loss is {value}", step)
            counters.losses.append(value)
            counters.correct += int(correct)
            counters.seen += count
        self.pending = []

    def _observe(self, observer: Observable) -> None:
        """Keep what the optimizer certified and measured on this step; other diagnostics go to wandb alone."""
        for layer, values in observer.diagnostics().items():
            self._sink(f"layers/{layer}", values)
            row = {"step": self.counters.step, "layer": layer}
            self.counters.contraction.append(
                row | {key: float(values[key]) for key in ("certified", "measured", "energy", "drift") if key in values}
            )
        observer.observe(False)

    def _log_training(self) -> None:
        counters = self.counters
        counters.memory.append(self.ledger.categories(counters.saved_activations))
        self._sink("memory", counters.memory[-1])
        counters.train_loss = math.fsum(counters.losses) / len(counters.losses)
        if isinstance(self.optimizer, optim.Mango):  # its policy, if it has one, decides anew by what it is told
            self.optimizer.signal(loss=counters.train_loss, progress=counters.step / self.config.train.steps)
        self._write("train", counters.train_loss, self.data.scores("train", counters.train_loss, counters.correct / counters.seen))
        counters.losses, counters.correct, counters.seen = [], 0, 0
        self.progress(f"{self.data.unit}/s", round(counters.trained / counters.step_seconds), 0)

    def _evaluate(self) -> None:
        split = self.config.data.evaluate
        model = self._evaluated().eval()
        batches = self.data.evaluation(split, self.config.train.eval_batch)
        loss_value, accuracy, top5 = mean_scores(model, batches, self.config.train, self.device)
        if not math.isfinite(loss_value):
            raise self._non_finite(f"the {split} loss is {loss_value}", self.counters.step)
        found = self.data.scores(split, loss_value, accuracy) | ({} if top5 is None else {"top5": top5})
        self._write(split, loss_value, found)
        scores: dict[str, float | None] = {
            "step": self.counters.step,
            "train_loss": self.counters.train_loss,
            f"{split}_loss": loss_value,
            **{f"{split}_{metric}": value for metric, value in found.items()},
        }
        self.counters.final = scores
        if self.counters.lowest is None or loss_value < self.counters.lowest:
            self.counters.lowest, self.counters.best = loss_value, scores

    def _evaluated(self) -> nn.Module:
        """The model whose weights are judged and kept."""
        return self.model if self.mean is None else self.mean.module

    def _write(self, split: str, loss: float, scores: dict[str, float]) -> None:
        lr = self.optimizer.param_groups[0]["lr"]
        row = {"step": self.counters.step, "split": split, "loss": loss, **scores, "lr": lr}
        costs: dict[str, float | None] = {"time": round(time.monotonic() - self.resumed_at, 3)}
        if self.spec.energy != "record":
            self._update_costs()
            costs["joules"] = self.counters.joules  # null where nothing measures it
        self.log.write(row | costs)
        self._sink(split, {"loss": loss, **scores, "lr": lr, **costs})

    def _sink(self, prefix: str, values: Mapping[str, Any]) -> None:
        if self.sink is not None:
            wandb.log(self.sink, self.counters.step, prefix, values)

    def _write_mole(self, row: dict[str, Any]) -> None:
        """What a converted layer tells of its gradient: it counts passes, of which there is one a step."""
        self.log.write({"step": row["step"], "split": "mole", **{key: value for key, value in row.items() if key != "step"}})
        self._sink(f"mole/{row['layer']}", {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"})

    def _non_finite(self, what: str, step: int) -> NonFinite:
        kept = self.out / CHECKPOINT
        last = f"the last good checkpoint is {kept}" if kept.is_file() else "there is no checkpoint yet"
        return NonFinite(f"{what} at step {step}: lower the learning rate or clip the gradient (train.clip); {last}")

    def _update_costs(self) -> None:
        counters = self.counters
        counters.wall_seconds = time.monotonic() - self.resumed_at
        counters.rss_peak = max(counters.rss_peak, rss_peak())
        counters.missed, counters.malformed = self.faults_before[0] + self.power.missed, self.faults_before[1] + self.power.malformed
        measured = self.power.joules
        if isinstance(self.data, Skips):
            counters.skipped = sorted({*counters.skipped, *self.data.skipped})
        counters.joules = None if measured is None or self.joules_before is None else self.joules_before + measured

    def _checkpoint(self) -> None:
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise self._non_finite(f"{name} is not finite", self.counters.step)
        self._settle()
        self._update_costs()
        self.log.sync()
        content = {
            "run": self._identity(),
            "counters": asdict(self.counters),
            "metrics": self.log.lines,
            "model": self.model.state_dict(),
            "mean": None if self.mean is None else self.mean.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "mole": None if self.mole is None else self.mole.state_dict(),
            "rng": torch.get_rng_state(),
            "rng_device": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        checkpoint.save(self.out / CHECKPOINT, content)

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued."""
        return {
            "experiment": self.spec.experiment,
            "variant": self.spec.variant,
            "seed": self.spec.seed,
            "config_hash": self.config.hash(),
            "fingerprint": self.identity["fingerprint"],
        }

    def _restore(self) -> list[str]:
        """Take up the checkpoint; returns the metrics lines it kept."""
        path = self.out / CHECKPOINT
        content = checkpoint.load(path)
        for key, value in self._identity().items():
            if content["run"].get(key) != value:
                raise ConfigError.of(
                    f"--resume: {key} of {path}", content["run"].get(key), f"{value!r}, as this run asks; --force starts over"
                )
        self.model.load_state_dict(content["model"])
        if self.mean is not None:
            self.mean.load_state_dict(content["mean"])
        self.optimizer.load_state_dict(content["optimizer"])
        if self.mole is not None:
            self.mole.load_state_dict(content["mole"])
        torch.set_rng_state(content["rng"])
        if content["rng_device"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(content["rng_device"], self.device)
        self.counters = Counters(**content["counters"])
        self.counters.resumed.append(self.counters.step)
        return content["metrics"]

    def _sample(self) -> str | None:
        """What the trained model writes of its own, from the start of a line."""
        count = self.config.train.sample
        if not count or not isinstance(self.model, Writer) or not isinstance(self.data, Readable):
            return None
        self.model.eval()
        start = self.data.encode("\n").to(self.device)[None]
        return self.data.decode(self.model.write(start, count, temperature=0.8, seed=self.spec.seed)[0, start.shape[1] :].cpu())

    def _result(self) -> RunRecord:
        return summary.record_of(
            self.spec,
            self.counters,
            device=self.device,
            data=self.identity | ({"corrupt": len(self.counters.skipped)} if isinstance(self.data, Skips) else {}),
            unit=f"{self.data.unit}/s",
            memory={"parameters": self.ledger.parameters(), "optimizer_state": optim.state_nbytes(self.optimizer)},
            parameters={"total": self.total, "compressed": self.under_test},
            power=self.power,
            condition=summary.condition_of(self.optimizer, self.counters.plan, self.counters.step),
            mole=None if self.mole is None else self.mole.record(),
            sample=self._sample(),
        )

    def _finish(self, result: RunRecord) -> RunRecord:
        """Write the final weights, then the record (its presence means: complete), then drop the checkpoint."""
        for name, content in self.data.files().items():
            atomic.write(self.out / name, lambda file, text=content: file.write(text.encode()))  # type: ignore[misc]
        write_csv(self.out / MEMORY, self.counters.memory)
        checkpoint.save(self.out / MODEL, {"run": self._identity(), "step": self.counters.step, "model": self._evaluated().state_dict()})
        record.save(self.out / RECORD, result)
        (self.out / CHECKPOINT).unlink(missing_ok=True)
        return result
