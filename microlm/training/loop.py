"""The loop of every training. What is minimized is handed in."""

import inspect
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from microlm.corpus.batches import Batch, Batches
from microlm.errors import UserError
from microlm.models.student import StudentLM
from microlm.objective.fused_head import HeadLoss
from microlm.parameters import OptimizationConfig
from microlm.runtime import distributed
from microlm.runtime.launcher import stop_requests
from microlm.runtime.terminal import banner, duration, progress_bar, waiting
from microlm.training.average import Average
from microlm.training.checkpoint import Pace, restore_checkpoint, save_checkpoint
from microlm.training.history import Evaluation, History
from microlm.training.memory import memory_explained
from microlm.training.optimizer import Optimizers, learning_rate_multiplier

Loss = Callable[[Tensor, Tensor, Batch, int, float], HeadLoss]
"""(hidden [N, D], head weight [V, D], batch, tokens of the whole step, share of the training done) -> loss of this
part of the step."""
Evaluator = Callable[[StudentLM, np.ndarray | None], Evaluation]
"""(model, training windows whose loss is wanted too) -> what is measured. Every process calls it, and gets the same."""

# the rotary tables are equal everywhere and never change; before PyTorch 2.13 the argument had another name
_ARGUMENTS = inspect.signature(DistributedDataParallel).parameters
WITHOUT_BUFFERS = {"forward_sync_buffers" if "forward_sync_buffers" in _ARGUMENTS else "broadcast_buffers": False}


@dataclass(frozen=True)
class Plan:
    """One training: how long, under which schedule, and where its steps stand on the plots' axis."""

    name: str  # of the model
    steps: int
    first_step: int  # the curves' x of step 0: where the control's end
    optimization: OptimizationConfig


class Interrupted(UserError):
    """Asked to stop by a signal; the state is saved."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.status = 128 + number


def train(
    model: StudentLM,
    batches: Batches,
    loss: Loss,
    plan: Plan,
    optimizers: Optimizers,
    evaluator: Evaluator,
    directory: Path,
    show: Callable[[History], None] = lambda history: None,
) -> History:
    """Train to the end, from the checkpoint in `directory` where there is one.

    Several processes share each step's micro-batches and each evaluation, stop at the same step and refuse the same
    update; the first one saves.

    Args:
        show: called with what there is so far after each evaluation.

    Raises:
        Interrupted: SIGINT or SIGTERM came; run the same command again to go on.
        UserError: a loss or gradient is not finite, and the last checkpoint stands; or memory is too small.
    """
    teacher = getattr(loss, "teacher", None)
    ids = teacher.identity.top_k if teacher else 0  # of a token, that the loss compares with its teacher's
    with memory_explained(model, batches.config, plan.name, plan.optimization, ids):
        average = Average(model, plan.optimization)
        start, history = restore_checkpoint(directory, model, optimizers, average)
        step_tokens, replica = batches.config.batch_tokens, Replica(model)
        feed = Feed(batches, loss, lambda step: step / plan.steps, model.head_weight.device)
        announce_expected_time(replica, feed, plan, optimizers, start)
        bar, pace = progress_bar(plan.steps * step_tokens, start * step_tokens, "tok", plan.name), Pace()
        with stop_requests() as stopping, bar:
            for step in range(start, plan.steps + 1):
                if step % plan.optimization.evaluate_every == 0 or step == plan.steps:
                    if step > start:  # before evaluating: an evaluation that dies must not cost the steps before it
                        refuse_infinite_weights(model, plan, batches, step)
                        if pace.is_due():
                            began = time.perf_counter()
                            save_checkpoint(directory, model, optimizers, average, step, history)
                            pace.saved(time.perf_counter() - began)
                    unseen = None if history.pending else batches.of_step(step)  # no step yet tells the training loss
                    with average.in_place():
                        history.add_evaluation(plan.first_step + step, evaluator(model, unseen))
                    show(history)
                if step == plan.steps:
                    break
                began = time.perf_counter()
                cross_entropy = take_step(replica, feed, plan, optimizers, step)
                average.add(step)
                history.elapsed_s += time.perf_counter() - began
                history.trained_tokens += step_tokens
                history.add_step(plan.first_step + step + 1, cross_entropy)
                bar.set_postfix_str(f"loss {cross_entropy:.3f}, lr {optimizers.learning_rate:.1e}", refresh=False)
                bar.update(step_tokens)
                if number := distributed.largest(stopping()):
                    refuse_infinite_weights(model, plan, batches, step + 1)
                    save_checkpoint(directory, model, optimizers, average, step + 1, history)
                    raise Interrupted(
                        f"{plan.name}: stopped after step {step + 1} of {plan.steps}, saved in {directory}; "
                        "run the same command again to go on",
                        number,
                    )
        average.take_over()
        return history


class Feed:
    """The micro-batches of this process on the training's device, and the loss that is made of them. On CUDA a thread
    reads and pins the next step's during this one.

    Args:
        loss: what it reads of a batch (`Distillation.read`), where it reads anything, comes with the batch.
        progress: the share of the training that is done at a step.
    """

    def __init__(self, batches: Batches, loss: Loss, progress: Callable[[int], float], device: torch.device) -> None:
        self.batches, self.loss, self.progress, self._device = batches, loss, progress, device
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="batches") if device.type == "cuda" else None
        self._coming: dict[int, Future[list[Batch]]] = {}

    def micro_batches(self, step: int) -> list[Batch]:
        """This process's forward passes of the step, in order."""
        if self._reader is None:
            found = self._read(step)
        else:
            coming = self._coming.get(step) or self._reader.submit(self._read, step)
            found, self._coming = coming.result(), {step + 1: self._reader.submit(self._read, step + 1)}
        return [_each(batch, lambda tensor: tensor.to(self._device, non_blocking=True)) for batch in found]

    def _read(self, step: int) -> list[Batch]:
        found = self.batches.micro_batches(step, distributed.rank(), distributed.size())
        if read := getattr(self.loss, "read", None):
            found = [replace(batch, records=read(batch.windows, self.progress(step))) for batch in found]
        return [_each(batch, Tensor.pin_memory) for batch in found] if self._device.type == "cuda" else found


def _each(batch: Batch, moved: Callable[[Tensor], Tensor]) -> Batch:
    return replace(batch, rows=moved(batch.rows), records=None if batch.records is None else moved(batch.records))


class Replica:
    """The model as one of several equal copies, whose gradients are summed over the processes once a step; the model
    itself where there is one process.

    The head's weight is used outside the wrapped forward pass too, by the loss. Its gradient arrives whole all the
    same: DistributedDataParallel hooks the parameter's one accumulator, which runs when autograd has summed all uses.
    """

    def __init__(self, model: StudentLM) -> None:
        self.model = model
        self._shared: DistributedDataParallel | None = None
        if distributed.size() > 1:
            # blocks are compiled one by one, so that gradients leave between them: none has to be split for that
            torch._dynamo.config.optimize_ddp = False
            self._shared = DistributedDataParallel(model, gradient_as_bucket_view=True, **WITHOUT_BUFFERS)
            self._shared.register_comm_hook(None, _sum_gradients)

    def hidden(self, tokens: Tensor) -> Tensor:
        """As `StudentLM.hidden` of tokens [B, T]."""
        return self.model.hidden(tokens) if self._shared is None else self._shared(tokens)

    def part(self, last: bool) -> AbstractContextManager[None]:
        """Around a forward and backward pass: gradients stay here until the step's `last` one has added its own."""
        return nullcontext() if last or self._shared is None else self._shared.no_sync()


def _sum_gradients(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The sum, not DistributedDataParallel's mean: every part of the loss is divided by the whole step's tokens."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def take_step(replica: Replica, feed: Feed, plan: Plan, optimizers: Optimizers, step: int) -> float:
    """One update. Returns the cross-entropy before it, nats per token, of all micro-batches.

    On CUDA the host waits for the device once: for the sum of the losses and the gradient's norm, in one copy, without
    which nothing may be updated. What a loss waits for comes on top. Several processes agree over gloo, on the host.
    """
    nats = accumulate_gradients(replica, feed, step)
    norm = torch.nn.utils.clip_grad_norm_(replica.model.parameters(), plan.optimization.clip_norm)
    nats, norm = torch.stack((nats, norm.double())).tolist()
    cross_entropy = per_token(nats, feed)
    if distributed.any_rank(not (math.isfinite(cross_entropy) and math.isfinite(norm))):
        raise UserError(
            f"{plan.name}: step {step + 1} is not finite (cross-entropy {cross_entropy}, gradient norm {norm}; windows "
            f"{feed.batches.of_step(step)[:8].tolist()} ...); nothing was updated. Lower the learning rates in "
            "params.yaml"
        )
    optimizers.step(learning_rate_multiplier(plan.optimization, step, plan.steps))
    return cross_entropy


def accumulate_gradients(replica: Replica, feed: Feed, step: int) -> Tensor:
    """Sum the gradients of the step's micro-batches, and their nats: those of this process, a float64 on the device."""
    model = replica.model.train()
    nats = torch.zeros((), dtype=torch.float64, device=model.head_weight.device)
    parts, step_tokens = feed.micro_batches(step), feed.batches.config.batch_tokens
    for index, batch in enumerate(parts):
        with replica.part(last=index == len(parts) - 1):
            hidden = replica.hidden(batch.tokens).flatten(0, 1)
            part = feed.loss(hidden, model.head_weight, batch, step_tokens, feed.progress(step))
            part.loss.backward()
        nats += part.cross_entropy.double()
    return nats


def per_token(nats: float, feed: Feed) -> float:
    """The cross-entropy of a step whose nats in this process are `nats`."""
    return distributed.sum_over_ranks(torch.tensor(nats, dtype=torch.float64)).item() / feed.batches.config.batch_tokens


def refuse_infinite_weights(model: StudentLM, plan: Plan, batches: Batches, step: int) -> None:
    """An update can leave what no loss has shown yet: that is never saved, and nothing is measured on it."""
    if not torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all():
        raise UserError(
            f"{plan.name}: the update of step {step} left weights that are not finite (windows "
            f"{batches.of_step(step - 1)[:8].tolist()} ...); nothing was saved. Lower the learning rates in params.yaml"
        )


def announce_expected_time(replica: Replica, feed: Feed, plan: Plan, optimizers: Optimizers, start: int) -> None:
    """Rehearse a step twice without an update, beside as much memory as its state will take: what does not fit fails
    now, and the second pass is timed.
    """
    if start >= plan.steps:
        return
    with optimizers.room_for_state(), waiting(f"{plan.name}: a step for rehearsal, compiled where that pays"):
        for _ in range(2):
            began = time.perf_counter()
            accumulate_gradients(replica, feed, start).item()
            step_s = time.perf_counter() - began
            replica.model.zero_grad(set_to_none=True)
    rest = plan.steps - start
    resumed = f", resumed after step {start}" if start else ""
    banner(
        f"{plan.name}: {rest} steps to go{resumed}",
        [f"expected {duration(rest * step_s)} at {feed.batches.config.batch_tokens / step_s:,.0f} tokens/s"],
    )
