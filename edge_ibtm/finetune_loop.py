"""The state of a training run, its steps and epochs, and its checkpoints (see finetune.py)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edge_ibtm.batches import class_numbers
from edge_ibtm.errors import EdgeIBTMError
from edge_ibtm.finetune import Data, EpochMetrics, FinetuneConfig, History, Progress
from edge_ibtm.finetune_checkpoint import MetricsLog, load_checkpoint, restore, save_checkpoint, state_of
from edge_ibtm.finetune_data import Plan, as_dataset, epoch_batches, sample_batches, seed_everything
from edge_ibtm.finetune_eval import evaluate
from edge_ibtm.finetune_loss import LossWeights, classifier_of, ib_term, pooled_features, training_loss
from edge_ibtm.finetune_setup import build_accelerator, build_optimizer, build_scheduler, carry_state
from edge_ibtm.site import Site
from edge_ibtm.statistics import Clusters, all_sum, fit_clusters

_NOT_IN_FINGERPRINT = {
    "checkpoint_dir", "checkpoint_seconds", "resume", "tensorboard", "log_every", "workers", "eval_every", "max_steps",
}  # fmt: skip


class Run:
    """One run. `raw` is the user's model, `model` what accelerate and torch.compile made of it."""

    def __init__(
        self,
        model: nn.Module,
        train: Data,
        config: FinetuneConfig,
        teacher: nn.Module | None,
        merge: Callable[[nn.Module], object] | None,
    ) -> None:
        self.raw, self.train_data, self.config, self.merge = model, train, config, merge
        self.accelerator = build_accelerator(config)
        device = self.accelerator.device
        self.teacher = teacher.to(device).eval() if teacher is not None and config.distill else None
        self.plan = Plan(
            len(as_dataset(train)[0]),  # type: ignore[arg-type]
            config.batch_size,
            config.accumulate,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        self.plan.check()
        self.weights = LossWeights(
            config.label_smoothing, config.lambda_ib, config.ib_conditional, config.distill, config.distill_temperature
        )
        self.transform = config.augment.build() if config.augment else None
        self.folder = Path(config.checkpoint_dir) if config.checkpoint_dir else None
        self.clusters: Clusters | None = None
        self.history = History()
        self.epoch, self.step, self.bad = 0, 0, 0
        self.sums: dict[str, tuple[float, int]] = {}  # of each loss of this epoch, and the steps that had it
        self.speed = 0.0
        self.saved_at = time.monotonic()
        self._place()
        if merge is not None and config.unmerged_epochs == 0:
            merge(self.raw)
            self._place()
        self.fingerprint = self._fingerprint()
        self._build()
        self._restore()

    # --- building -------------------------------------------------------------------------------------------------

    def _place(self) -> None:
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        self.raw.to(self.accelerator.device).to(memory_format=layout)

    def _fingerprint(self) -> str:
        settings = {k: v for k, v in asdict(self.config).items() if k not in _NOT_IN_FINGERPRINT}
        shapes = [(name, tuple(p.shape)) for name, p in self.raw.named_parameters()]
        sites = [(n, type(m.merger).__name__, m.extra_repr()) for n, m in self.raw.named_modules() if isinstance(m, Site)]
        text = repr((sorted(settings.items()), shapes, sites, self.plan.samples, self.merge is not None))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _build(self, old: torch.optim.Optimizer | None = None) -> None:
        """Optimizer, scheduler, weight average and the wrapped model, for the parameters that `raw` has now."""
        config = self.config
        if config.sync_batchnorm and self.plan.world > 1:
            self.raw = nn.SyncBatchNorm.convert_sync_batchnorm(self.raw)
        optimizer = build_optimizer(self.raw, config)
        if old is not None:
            carry_state(old, optimizer)
        self.bare_optimizer = optimizer
        self.ema: Any = None
        if config.ema:
            from timm.utils import ModelEmaV3

            self.ema = ModelEmaV3(self.raw, decay=config.ema, use_warmup=True)
        compiled = torch.compile(self.raw) if config.compile else self.raw
        self.model, self.optimizer = self.accelerator.prepare(compiled, optimizer)
        self.scheduler = build_scheduler(optimizer, config, self.plan.steps)

    def _merge_now(self) -> None:
        """Surgery in the middle of training: the new parameters join, the old ones keep their optimizer state."""
        if self.merge is None:
            return
        self.unwrap()
        average = self.ema.module if self.ema is not None else None
        self.merge(self.raw)
        self._place()
        self._build(self.bare_optimizer)
        if average is not None:
            self.ema.module.load_state_dict(average.state_dict(), strict=False)

    def unwrap(self) -> None:
        """Take accelerate's wrappers off `raw` again."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint (the first process only; parameters are equal on all)."""
        self.saved_at = time.monotonic()
        if self.folder is not None and self.accelerator.is_main_process:
            save_checkpoint(self.folder, state_of(self))

    def _restore(self) -> None:
        state = load_checkpoint(self.folder, self.fingerprint) if self.folder and self.config.resume else None
        if state is None:
            return
        epoch, step = state["progress"]["epoch"], state["progress"]["step"]
        # a checkpoint written at the boundary itself is still unmerged
        if 0 < self.config.unmerged_epochs < epoch or (0 < self.config.unmerged_epochs == epoch and step):
            self._merge_now()
        restore(self, state)

    # --- training -------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """All epochs, or max_steps, are done."""
        limit = self.config.max_steps
        return self.epoch >= self.config.epochs or (limit is not None and self.history.steps >= limit)

    def train(self, val: Data | None, progress: Callable[[Progress], None] | None) -> History:
        """Run to the end from wherever the checkpoint left off; the model ends in eval mode, contiguous."""
        main = self.accelerator.is_main_process
        log = MetricsLog(self.folder if main else None, self.history.steps, self.config.tensorboard)
        try:
            if self.config.epochs == 0:
                self.refresh()
            while not self.finished:
                if self.step == 0:
                    self._begin_epoch()
                self._epoch(progress if main else None, log)
                if self.step >= self.plan.steps:
                    self._end_epoch(val, log)
            if self.step:  # stopped by max_steps within an epoch
                self.save()
        finally:
            log.close()
            self._hand_over()
        if self.history.steps and self.history.skipped_steps == self.history.steps and self.accelerator.scaler is None:
            raise EdgeIBTMError(f"none of {self.history.steps} steps had a finite gradient; nothing was trained")
        if val is not None and (self.history.top1 is None or self.config.epochs == 0 or self.step):
            self._evaluate(val)  # the weights moved since the last epoch's end
        return self.history

    def _hand_over(self) -> None:
        self.unwrap()
        if self.ema is not None and self.finished:
            self.raw.load_state_dict(self.ema.module.state_dict())
        self.ema = None
        self.raw.to(memory_format=torch.contiguous_format).eval()

    def _begin_epoch(self) -> None:
        if self.merge is not None and 0 < self.config.unmerged_epochs == self.epoch:
            self._merge_now()
        self.sums = {}
        self.refresh()

    def _ib_is_on(self) -> bool:
        """Whether the share `ib_start` of the epochs is done (in a run of one epoch this comes in its middle)."""
        done = self.epoch * self.plan.steps + self.step
        return bool(self.config.lambda_ib) and done >= self.config.ib_start * self.config.epochs * self.plan.steps

    def refresh(self) -> None:
        """Fit the mask modules' buffers, and the loss's clusters once it is on, to the weights of this moment."""
        from edge_ibtm.statistics_sites import copy_mask_buffers, last_features, refresh_mask_buffers

        config, plan = self.config, self.plan
        small = replace(plan, batch=min(plan.step_images, 64 * plan.world * plan.accumulate))

        def batches() -> Any:
            return sample_batches(self.train_data, small, config.statistics_images, config.seed)

        refresh_mask_buffers(self.raw, batches(), self.accelerator, config.ib_clusters)
        if self.ema is not None:
            copy_mask_buffers(self.raw, self.ema.module)
        if config.epochs and self._ib_is_on():
            features, labels = last_features(self.raw, batches())
            classes: int = classifier_of(self.raw).out_features  # type: ignore[assignment]
            self.clusters = fit_clusters(
                features,
                class_numbers(labels, classes),
                classes,
                count=config.ib_clusters,
                reduce=all_sum(self.accelerator),
            )

    def _epoch(self, progress: Callable[[Progress], None] | None, log: MetricsLog) -> None:
        """Optimizer steps from self.step to the end of the epoch."""
        config, plan = self.config, self.plan
        self.raw.train()
        began, first = time.monotonic(), self.step
        stream = epoch_batches(
            self.train_data, plan, (config.seed, self.epoch, self.step), self.transform, config.workers
        )
        while self.step < plan.steps and not self.finished:
            micro = [batch for _, batch in zip(range(config.accumulate), stream)]
            if len(micro) < config.accumulate:  # a stream shorter than it said
                self.step = plan.steps
                break
            if self.clusters is None and self._ib_is_on():
                self.refresh()
            lr = self.optimizer_step(micro)
            self.step += 1
            self.history.steps += 1
            self.speed = speed = (self.step - first) * plan.step_images / (time.monotonic() - began)
            self._after_step(Progress(
                self.epoch, config.epochs, self.step, plan.steps, self._means().get("loss", 0.0), lr, speed,
                ((config.epochs - self.epoch) * plan.steps - self.step) * plan.step_images / speed,
            ), progress, log)  # fmt: skip

    def _after_step(self, now: Progress, progress: Callable[[Progress], None] | None, log: MetricsLog) -> None:
        if self.history.steps % self.config.log_every == 0:
            log.write(self.history.steps, {k: v for k, v in asdict(now).items() if k not in ("step", "steps")})
        if time.monotonic() - self.saved_at >= self.config.checkpoint_seconds:
            self.save()
        if progress is not None:
            try:
                progress(now)
            except BaseException:
                self.save()
                raise

    def optimizer_step(self, micro: list[tuple[Tensor, Tensor]]) -> float:
        """One optimizer step over the micro-batches; a non-finite gradient skips it. Returns the learning rate."""
        config, done = self.config, self.history.steps
        seed_everything(config.seed, 1, done, self.plan.rank)
        self.scheduler.step_update(done)
        totals: dict[str, Tensor] = {}
        for i, (images, labels) in enumerate(micro):
            last = i == len(micro) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss, parts = self._loss(images, labels)
                self.accelerator.backward(loss / len(micro))
            for name, value in {"loss": loss.detach(), **parts}.items():
                totals[name] = totals.get(name, 0) + value / len(micro)
        limit = config.clip_grad or float("inf")
        norm = self.accelerator.clip_grad_norm_(self.raw.parameters(), limit)
        finite = bool(torch.isfinite(norm))
        if finite or self.accelerator.scaler is not None:  # the scaler skips the step itself and lowers its scale
            self.optimizer.step()
        self.optimizer.zero_grad()
        if finite and self.ema is not None:
            self.ema.update(self.raw, step=done + 1)
        self._count(totals, finite)
        return float(self.bare_optimizer.param_groups[-1]["lr"])

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        device, given = self.accelerator.device, labels
        images, labels = images.to(device), labels.to(device)
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        targets: Tensor = labels
        if self.config.mixup or self.config.cutmix:
            images, targets = self._mix(images, labels)
        teacher_logits = None
        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                teacher_logits = self.teacher(images)
        watched: Any = nullcontext() if self.clusters is None else pooled_features(self.raw)  # captured graphs have no head
        with watched as kept, self.accelerator.autocast():
            logits = self.model(images)
        numbers = class_numbers(given, logits.shape[-1])[: len(images)]  # where they came from: a GPU would be waited for
        ib = None
        if self.clusters is not None:
            ib = ib_term(kept[0], numbers.to(device), self.clusters, self.config.ib_conditional)
        return training_loss(self.weights, logits, targets, teacher_logits, ib)

    def _mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        from timm.data.mixup import Mixup

        classes: int = classifier_of(self.raw).out_features  # type: ignore[assignment]
        mixup = Mixup(
            self.config.mixup, self.config.cutmix, label_smoothing=self.config.label_smoothing, num_classes=classes
        )
        even = len(images) // 2 * 2
        if even == 0:
            return images, labels
        mixed, targets = mixup(images[:even], labels[:even])
        return mixed, targets

    def _count(self, totals: dict[str, Tensor], finite: bool) -> None:
        if finite:
            self.bad = 0
        else:
            self.bad += 1
            self.history.skipped_steps += 1
        for name, value in totals.items():
            total, steps = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + float(value), steps + 1) if finite else (total, steps)
        if self.bad >= self.config.max_bad_steps:
            raise EdgeIBTMError(
                f"training diverged: {self.bad} steps in a row with non-finite gradients at step {self.history.steps} "
                f"(lr {self.config.lr}, precision {self.config.precision}); lower the learning rate or use fp32"
            )

    def _means(self) -> dict[str, float]:
        """Each loss of this epoch over the steps that had it and a finite gradient; without those that no step had."""
        return {name: total / steps for name, (total, steps) in self.sums.items() if steps}

    def _end_epoch(self, val: Data | None, log: MetricsLog) -> None:
        losses = self._means()
        done = self.epoch + 1
        due = done % self.config.eval_every == 0 or done == self.config.epochs or self.finished
        if val is not None and due:
            self._evaluate(val)
        lr = float(self.bare_optimizer.param_groups[-1]["lr"])
        top1, val_loss = (self.history.top1, self.history.val_loss) if due else (None, None)
        metrics = EpochMetrics(self.epoch, losses, lr, self.speed, top1, val_loss)
        self.history.epochs.append(metrics)
        log.write(self.history.steps, {"epoch_end": self.epoch, "lr": lr, "top1": top1, "val_loss": val_loss, **losses})
        self.epoch, self.step = done, 0
        self.save()

    def _evaluate(self, val: Data) -> None:
        model = self.ema.module if self.ema is not None else self.raw
        result = evaluate(model, val, batch_size=max(self.plan.micro, 64), accelerator=self.accelerator)
        self.history.top1, self.history.val_loss = result.top1, result.loss
