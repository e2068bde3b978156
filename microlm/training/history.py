"""What a training leaves to read: points of the curves and lines of the log."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from microlm.files import atomic_file


@dataclass(frozen=True)
class Evaluation:
    """One look at a model during its training."""

    train_nats: float | None  # per token, measured where no training step gives it
    val_nats: float  # per token
    val_bpb: float
    hellaswag: dict[str, float]  # acc_norm, acc, gold_bpb
    ood_bpb: float | None = None  # of text of another kind than the corpus, where there is one


@dataclass
class History:
    """Rows of the curves and lines of the log, in memory until the end and in every checkpoint."""

    loss: list[dict[str, float]] = field(default_factory=list)
    hellaswag: list[dict[str, float]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    pending: list[float] = field(default_factory=list)  # training losses since the last evaluation
    elapsed_s: float = 0.0
    trained_tokens: int = 0

    def add_step(self, step: int, cross_entropy: float) -> None:
        self.pending.append(cross_entropy)
        self.log.append(f"{step} train {cross_entropy:.6f}")

    def add_evaluation(self, step: int, seen: Evaluation) -> None:
        """A point of each curve; its training loss is the mean since the last point, where there were steps."""
        train = sum(self.pending) / len(self.pending) if self.pending else seen.train_nats
        self.pending.clear()
        self.loss.append(
            {
                "step": step,
                "train_loss": train,
                "val_loss": seen.val_nats,
                "log10_train": math.log10(train),
                "log10_val": math.log10(seen.val_nats),
                "val_bpb": seen.val_bpb,
                "ood_bpb": seen.ood_bpb,  # blank where there is none: DVC asks every curve for its columns
            }
        )
        self.hellaswag.append({"step": step, **seen.hellaswag})
        self.log += [f"{step} val {seen.val_nats:.6f}", f"{step} hella {seen.hellaswag['acc_norm']:.6f}"]
        if seen.ood_bpb is not None:
            self.log.append(f"{step} ood_bpb {seen.ood_bpb:.6f}")

    def write(self, name: str, plots: Path, metrics: Path) -> None:
        """plots/loss/<name>.csv, plots/hellaswag/<name>.csv and metrics/<name>.log."""
        for curve, rows in (("loss", self.loss), ("hellaswag", self.hellaswag)):
            with atomic_file(plots / curve / f"{name}.csv", "w") as file:
                pd.DataFrame(rows).to_csv(file, index=False, float_format="%.6f", lineterminator="\n")
        with atomic_file(metrics / f"{name}.log", "w") as file:
            file.write("".join(line + "\n" for line in self.log))
