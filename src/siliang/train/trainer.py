"""The thin subclass of transformers.Trainer: our own step and checkpoints, counting, stopping."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from siliang.data.batch import Batch
from siliang.data.prepared import EvalRows
from siliang.disk_errors import telling
from siliang.distributed import deepspeed
from siliang.distributed.ranks import Ranks
from siliang.distributed.sharding import average_gradients, full_tensors, is_sharded, no_sync, shard_optimizer_state
from siliang.engine.batches import StepCollator
from siliang.engine.evaluate import Sums, evaluate, figures_of
from siliang.engine.order import Order, Share, WithDummies
from siliang.engine.step import Engine
from siliang.files import replacing_folder
from siliang.run_folder import PREFIX
from siliang.train.guard import Guard, Trouble
from siliang.train.saving import (
    STATE_FILE,
    adapter_together,
    is_dealt_out,
    prune,
    random_state,
    read_state,
    read_weights,
    set_random_state,
    whole_weights,
    write_state,
    write_weights,
)
from siliang.train.state import check_like, check_optimizer
from siliang.train.watcher import Watcher


@dataclass
class Handlers:
    """What the trainer leaves to who made it.

    Attributes:
        on_trouble: Makes the error for a loss that is no number.
        on_memory: Makes the error for a step that does not fit the device; from its number and its tokens.
        say: One line about what happened.
    """

    on_trouble: Callable[[Trouble], BaseException]
    on_memory: Callable[[int, int], BaseException]
    say: Callable[[str], None]


class SiliangTrainer(Trainer):
    """transformers.Trainer around our own step, with checkpoints of our own, and a guard on the loss.

    What the Trainer holds for a batch is the rows of a whole optimiser step, which `training_step` runs as the batches
    that its collator has made of them.

    Args:
        order: Of the rows.
        ranks: The processes of this training.
        skips: Steps that may be left out because their loss or gradient is no number.
        fit: Split a step further where it does not fit the device.
        held_out: The rows of evaluations.

    Attributes:
        tokens_trained: So far, padding left out.
        evaluation_due: The last step's evaluation was put off when the run was stopped.
        slowest_save_s: Of the checkpoints so far.
    """

    def __init__(
        self,
        *args: Any,
        engine: Engine,
        order: Order,
        ranks: Ranks,
        handlers: Handlers,
        held_out: EvalRows,
        skips: int = 0,
        fit: bool = False,
        **kwargs: Any,
    ) -> None:
        self._order, self.ranks, self._held_out = order, ranks, held_out
        super().__init__(*args, **kwargs)
        if not ranks.is_main:
            torch.manual_seed(self.args.seed + ranks.rank)  # each rank draws its own dropout
        if is_sharded(self.model):  # type: ignore[arg-type]
            # it is what accelerate would make of it; on CPUs accelerate knows no FSDP, and would wrap it in DDP
            self.accelerator.prepare_model = lambda model, **kwargs: model  # type: ignore[method-assign]
        self.tokens_trained = 0
        self._measured: tuple[int, dict[str, float]] = (-1, {})  # the last evaluation: its step, what it found
        self.evaluation_due = False
        self.slowest_save_s = 0.0
        self.engine = engine
        self.watcher: Watcher | None = None
        self._handlers, self._skips, self._fit = handlers, skips, fit
        self.guard, self._guarded = Guard(scaled=self.args.fp16, skips=skips), 0
        self._resumed: dict[str, Any] | None = None
        # group by group, as the optimiser was given them: DeepSpeed puts parts of its own in their place
        self._trained: list[list[nn.Parameter]] = []

    # ---- the step ----

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of a step's batches; the mean loss of its labelled tokens, or of its rows."""
        model.train()
        batches = self._as_many(inputs["batches"])
        weight, tokens = self._of_all_ranks(batches)
        before = random_state() if self._fit else None
        while True:
            try:
                loss = self._forward_backward(model, batches, weight)
                break
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
            # outside of the handler: the error holds on to what it had computed
            batches = self._smaller(model, batches)
            assert before is not None
            set_random_state(before)
        self.tokens_trained += tokens
        if self.ranks.size > 1:  # all see the same, and so stop together
            mean: Any = self.accelerator.reduce(loss, "mean")
            loss = mean
        self.guard.see_batch(loss, inputs["rows"])
        if self._skips and not torch.isfinite(loss):  # keeps the log's mean a number, as the Trainer's own filter does
            return self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged)
        return loss

    def _forward_backward(self, model: nn.Module, batches: list[Batch], weight: float) -> torch.Tensor:
        sharded = is_sharded(model)

        def unsynced() -> Any:
            if self.is_deepspeed_enabled:
                return deepspeed.no_sync(self.accelerator)
            return no_sync(model) if sharded else self.accelerator.no_sync(model)

        loss = self.engine.run(
            model,
            batches,
            weight,
            autocast=lambda: self.accelerator.autocast(),
            no_sync=unsynced,
            backward=self.accelerator.backward,
        )
        if sharded:
            average_gradients(model)
        return loss

    def _of_all_ranks(self, batches: list[Batch]) -> tuple[float, int]:
        """(what each rank divides its summed loss by, so that the mean of their gradients is that of all labelled
        tokens; the step's tokens)."""
        counted = [batch for batch in batches if batch.weight]
        own = sum(b.weight for b in counted), sum(b.tokens for b in counted)
        weights, tokens = zip(*self.ranks.gather_ints(*own), strict=True)
        return max(sum(weights), 1) / self.ranks.size, sum(tokens)

    def _as_many(self, batches: list[Batch]) -> list[Batch]:
        """Where layers are put together for each batch, or DeepSpeed sends its gradients, every rank has as many as the
        one with the most."""
        if not is_sharded(self.model) and not self.is_deepspeed_enabled:  # type: ignore[arg-type]
            return batches
        missing = max(n for (n,) in self.ranks.gather_ints(len(batches))) - len(batches)
        # in front: the last batch is the one whose gradients are sent
        return [min(batches, key=lambda batch: batch.tokens).dummy()] * missing + batches

    def _smaller(self, model: nn.Module, batches: list[Batch]) -> list[Batch]:
        """A step's rows in smaller batches, or with every layer computed twice; the batches to come are so too.

        With several ranks there is neither: the others are in the middle of this step, and one that began it again
        would meet nobody.

        Raises:
            SiliangError: It is not wanted, or there is no smaller.
        """
        model.zero_grad()
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()
        halves = [half for batch in batches for half in batch.halves()]
        tokens, step = max(batch.tokens for batch in batches), self.state.global_step + 1
        collator: Any = self.data_collator
        fit = self._fit and self.ranks.size == 1
        if fit and len(halves) > len(batches):
            assert isinstance(collator, StepCollator)
            collator.narrow_to(halves)
            self._handlers.say(
                f"memory     step {step:,} did not fit in batches of up to {tokens:,} tokens: from now on up to "
                f"{collator.tokens_at_once:,}, with the same result"
            )
            return halves
        if fit and self.engine.recompute.recompute_all():
            self._handlers.say(f"memory     step {step:,} did not fit by rows: from now on every layer recomputes")
            return batches
        raise self._handlers.on_memory(step, tokens)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the Trainer's estimate is of padded batches."""
        return 0

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The Trainer's own; with several ranks, each has the share of a step that balances their tokens."""
        if self.ranks.size == 1:
            return super().get_train_dataloader()
        rows: Any = self.train_dataset
        share = Share(self._order, rows.lengths.tolist(), self._order.step, self.ranks.rank, self.ranks.size)
        loader: Any = DataLoaderShard(
            WithDummies(rows),
            batch_sampler=share,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return loader  # type: ignore[no-any-return]

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self._order

    # ---- evaluation ----

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """The figures of the held-out rows, whatever batches and ranks they meet in, and not the Trainer's, which are
        means of its batches' means. Training does not notice it: the random numbers that it draws are given back."""
        before = random_state()
        try:
            figures = figures_of(self.engine.task, self._sums(), self._held_out)
        finally:
            set_random_state(before)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self._measured = (self.state.global_step, metrics)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def metrics_now(self) -> dict[str, float]:
        """Of the held-out rows, with the weights of the last step, which may have been measured already."""
        step, metrics = self._measured
        return metrics if step == self.state.global_step else self.evaluate()

    def _sums(self) -> Sums:
        """Over the held-out rows, of which each rank runs its share."""
        tokens, ranks = self._held_out.tokens, self.ranks
        collator: Any = self.data_collator
        lengths = tokens.lengths.tolist()
        steps = Share(range(len(tokens)), lengths, self._order.step, ranks.rank, ranks.size)
        own = evaluate(
            self.model,  # type: ignore[arg-type]
            self.engine,
            tokens,
            collator,
            steps=None if ranks.size == 1 else steps,
            reader=self.engine.task.read,
            autocast=lambda: self.accelerator.autocast(),
            as_many=self._as_many,
        )
        return Sums.of(ranks.gather(own))

    # ---- between the steps ----

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The Trainer asks for it right before the optimiser's step, which a bad gradient must not reach."""
        norm: Any = full_tensors(super()._get_grad_norm(model, grad_norm=grad_norm))
        step = self.state.global_step + 1
        if self._skips and (trouble := self.guard.passes_over(step, norm)):
            for p in model.parameters():
                p.grad = None  # which the optimiser leaves alone
            self._handlers.say(
                f"warning    step {step:,} is left out ({len(self.guard.passed_over)} of at most {self._skips}): "
                f"its {trouble.what} is {trouble.value:g}"
            )
        return norm

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """What follows every optimiser step; the last call of an epoch has no step of its own."""
        if self.state.global_step > self._guarded:
            self._guarded = self.state.global_step
            self.guard.see_step(self._guarded, grad_norm)
        waits = self.control.should_log or self.control.should_save or self.control.should_evaluate
        if (waits or self.args.device.type == "cpu") and (trouble := self.guard.look()):
            trouble = replace(trouble, rows=tuple(row for rows in self.ranks.gather(trouble.rows) for row in rows))
            raise self._handlers.on_trouble(trouble)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's own makes one step at least, also in a run that was stopped behind its last."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # ---- checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Ours, in the place of the Trainer's, which pickles and has no manifest."""
        state = full_tensors(self._whole_state())
        asked = self.args.should_save or is_dealt_out(self.model)  # type: ignore[arg-type]
        weights = whole_weights(self.model) if asked else {}
        started = time.perf_counter()
        with adapter_together(self.model):
            if self.args.should_save:
                assert self.args.output_dir is not None
                folder = Path(self.args.output_dir)
                with telling(folder.parent):
                    folder.mkdir(exist_ok=True)
                    with replacing_folder(folder / f"{PREFIX}{self.state.global_step}") as checkpoint:
                        write_weights(checkpoint, self.model, weights)
                        write_state(checkpoint, state)
                        self.state.save_to_json(str(checkpoint / TRAINER_STATE_NAME))
                    prune(folder, self.args.save_total_limit or 1, spare=self.state.best_global_step)
        self.accelerator.wait_for_everyone()
        self.slowest_save_s = max(self.slowest_save_s, time.perf_counter() - started)

    def _whole_state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "optimizer": self._optimizer_state(),
            "scheduler": self.lr_scheduler.state_dict(),  # type: ignore[union-attr]
            "scaler": scaler.state_dict() if scaler is not None else None,
            "random": self.ranks.gather(random_state()),
            "since_log": {"loss": float(self._tr_loss), "step": self._globalstep_last_logged},
            "tokens_trained": self.tokens_trained,
            "guard": self.guard.state(),
            "evaluation_due": self.evaluation_due,
            "watcher": self.watcher.state() if self.watcher else None,
        }

    def _optimizer_state(self) -> dict[str, Any]:
        if self.is_deepspeed_enabled:
            return deepspeed.optimizer_state(self.optimizer.optimizer, self._trained)  # type: ignore[union-attr]
        return self.optimizer.state_dict()  # type: ignore[union-attr]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, without empty groups: DeepSpeed leaves them out, and checkpoints are to be the same."""
        first = self.optimizer is None
        made = super().create_optimizer(*args, **kwargs)
        if first:
            made.param_groups[:] = [group for group in made.param_groups if group["params"]]
            self._trained = [list(group["params"]) for group in made.param_groups]
        return made

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """The Trainer's own, which with DeepSpeed would look for DeepSpeed's checkpoints, which are pickled."""
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is not None:  # before the weights are dealt out
            self._load_from_checkpoint(resume_from_checkpoint)
        with redirect_stdout(StringIO()):  # on which each rank's DeepSpeed would tell what it has built
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        read_weights(folder, self.model)  # type: ignore[arg-type]
        self._resumed = read_state(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._resumed is None:
            return
        state, path = self._resumed.pop("optimizer"), Path(checkpoint or "") / STATE_FILE
        if self.is_deepspeed_enabled:
            deepspeed.load_optimizer_state(self.optimizer.optimizer, self._trained, state)  # type: ignore[union-attr]
        else:
            groups = self.optimizer.param_groups  # type: ignore[union-attr]
            parameters = [p for group in groups for p in group["params"]]
            check_optimizer(state, self.optimizer.state_dict(), parameters, path)  # type: ignore[union-attr]
            self.optimizer.load_state_dict(shard_optimizer_state(deepspeed.without_weights(state), parameters))  # type: ignore[union-attr]
        check_like(self._resumed["scheduler"], self.lr_scheduler.state_dict(), "scheduler", path)  # type: ignore[union-attr]
        self.lr_scheduler.load_state_dict(self._resumed["scheduler"])  # type: ignore[union-attr]

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self._resumed is not None and self.accelerator.scaler is not None and self._resumed["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(self._resumed["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The Trainer asks for it when the data loader stands where it stood."""
        if self._resumed is not None and self.args.process_index < len(self._resumed["random"]):
            set_random_state(self._resumed["random"][self.args.process_index])

    def go_on(self) -> None:
        """After the Trainer has set its own counters to the beginning, sets them to where the checkpoint was made."""
        if (state := self._resumed) is None:
            return
        self.state.compute_steps(self.args, self.state.max_steps)  # the checkpoint's may have been changed since
        self._tr_loss += state["since_log"]["loss"]
        self._globalstep_last_logged = state["since_log"]["step"]
        self._guarded, self.tokens_trained = self.state.global_step, state["tokens_trained"]
        self.guard.go_on(state["guard"])
        if self.watcher is not None and state["watcher"] is not None:
            self.watcher.go_on(state["watcher"])
        self._fill_frozen_cache()
        if state["evaluation_due"] and self.eval_dataset is not None:
            self.evaluate()
            self.control.should_save = False  # the checkpoint of this step is there

    def _fill_frozen_cache(self) -> None:
        """Replays the steps so far: a row's last bits depend on the batch in which a frozen layer first saw it."""
        if self.engine.padding is None or self.engine.padding.frozen is None:
            return
        before = random_state()
        loader: Any = self.get_train_dataloader()
        loader.set_epoch(0)
        steps = zip(range(self.state.global_step), loader.base_dataloader, strict=False)
        batches = (batch.to(self.args.device) for _, inputs in steps for batch in inputs["batches"])
        with self.accelerator.autocast():
            self.engine.fill_frozen_cache(self.model, batches)  # type: ignore[arg-type]
        set_random_state(before)


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in text
