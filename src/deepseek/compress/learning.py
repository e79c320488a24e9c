"""What the stages that train share: their settings, their teacher, and the run that does them."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from deepseek import hub, train
from deepseek.compress.prune.vocabulary import cut_rows, tokens_within
from deepseek.compress.stage import Stage, kind_of
from deepseek.compress.work import Outcome, Work
from deepseek.errors import ConfigError, describe
from deepseek.models import Decoder, Encoder
from deepseek.ops.hardware import products_in
from deepseek.optim import AdamW, Cosine, OptimizerConfig, ScheduleConfig
from deepseek.records import Measurement
from deepseek.train.config import PYTHON_TOPICS
from deepseek.train.summary import read_metrics, summarize_run
from deepseek.train.teacher import check_teacher


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learning(Stage):
    """A stage that trains the model; what it is given, and how it steps, in the words of
    `deepseek.train.Stage`."""

    teacher: str | None = None
    """A bundle to learn from; None for the one that the pipeline began with."""
    data: tuple[train.Source, ...] = (train.Source(path=PYTHON_TOPICS),)
    """Text; a decoder's teacher may write it (`teacher-text`). An encoder takes it by lines."""
    steps: int = 500
    """Optimizer steps."""
    length: int = 512
    """Tokens of a sample."""
    batch: int = 8
    """Samples of a step."""
    micro_batch: int | None = None
    """Samples of a forward pass; None for the batch in one."""
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: AdamW(rate=1e-4, weight_decay=0.0)
    )
    schedule: ScheduleConfig = dataclasses.field(default_factory=Cosine)
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of products, the teacher's too."""
    checkpoint_every: int = 50
    """Steps between the places from which a killed stage goes on."""

    def __post_init__(self) -> None:
        self.run_stage()

    def run_stage(self) -> train.Stage:
        """Return the stage of a run that it is.

        Raises:
            ConfigError: a setting is none that can be.
        """
        return train.Stage(
            name=kind_of(self),
            data=tuple(source.replace(target="teacher") for source in self.data),
            steps=self.steps,
            length=self.length,
            batch=self.batch,
            micro_batch=self.micro_batch,
            optimizer=self.optimizer,
            schedule=self.schedule,
            precision=self.precision,
        )


def open_teacher(
    stage: Learning, work: Work, dtype: torch.dtype | None = None
) -> Decoder | Encoder:
    """Return the model that a stage learns from, which is not trained.

    Where the work's model has lost tokens that the teacher has, the teacher loses them too: it says
    what it would if there were no others.

    Args:
        stage: that names it.
        work: whose start it is otherwise.
        dtype: of its weights; None for that of the stage's products.

    Raises:
        ConfigError: it is not there, of another kind than the model, or of a tokenizer that has not
            all of the model's tokens.
        FormatError: it is damaged.
    """
    name = stage.teacher or work.start
    teacher = hub.load(name, dtype=dtype or products_in(stage.precision))
    if isinstance(teacher, Decoder) != isinstance(work.model, Decoder):
        must = f"one of the model's kind, {type(work.model).__name__}"
        raise ConfigError(describe("teacher", kind_of(stage), must, type(teacher).__name__))
    kept = tokens_within(work.model, teacher)
    if kept is not None and work.model.tokenizer is not None:
        teacher = cut_rows(teacher, work.model.tokenizer, kept)
    check_teacher(work.model, teacher)
    return teacher.requires_grad_(False).eval()


def learn(
    stage: Learning, work: Work, objective: train.Objective, teacher: Decoder | Encoder
) -> Outcome:
    """Train the model of `work` in its folder, from where that stands.

    Args:
        stage: how.
        work: its model is trained in place.
        objective: what is lowered.
        teacher: that writes text where the data asks for it.

    Returns:
        The loss of the first and of the last tenth of the steps, and their speed.

    Raises:
        ConfigError: the settings cannot be done, are not those that the folder was begun with, or
            the steps diverged.
        FormatError: data or checkpoints are damaged.
        CapacityError: memory or disk ran out.
        Interrupted: a signal came; what was done is kept.
    """

    def report(progress: train.Progress) -> None:
        done = f"{progress.stage}: step {progress.step}/{progress.num_steps}"
        work.report(f"{done}, loss {progress.loss:.4f}", progress.step / progress.num_steps)
        work.goes_on()

    run = train.Run(
        stages=(stage.run_stage(),),
        model=str(work.start),
        teacher=stage.teacher,
        seed=work.seed,
        checkpoint_every=stage.checkpoint_every,
    )
    origin = work.model.bundle
    folder = train.train_model(
        run,
        work.model,
        work.folder,
        teacher=teacher if isinstance(teacher, Decoder) else None,
        objective=objective,
        report=report,
        preparing=work.report,
    )
    # where the run was done before, nothing was trained here
    work.model.load_state_dict(hub.load(folder, dtype="float32").state_dict())
    work.model.eval().bundle = origin
    return _outcome(stage, work)


def _outcome(stage: Learning, work: Work) -> Outcome:
    losses = [line["loss"] for line in read_metrics(work.folder)]
    tenth = max(1, len(losses) // 10)
    first = Measurement(
        name="first_training_loss",
        value=sum(losses[:tenth]) / tenth,
        unit="nats",
        conditions={"stage": kind_of(stage), "steps": len(losses)},
    )
    return (first, *summarize_run(work.folder))
