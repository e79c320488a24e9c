"""A run made ready: its model, its folder, and the proof of what it read."""

from __future__ import annotations

import json
from pathlib import Path

from deepseek.errors import ConfigError, describe
from deepseek.hub.atomic import replace_file, writing
from deepseek.models import Decoder, Encoder
from deepseek.ops.memory import keep_freed_memory
from deepseek.parallel import World
from deepseek.train.capacity import memory_errors_told
from deepseek.train.checkpoint import Checkpoints
from deepseek.train.config import Run
from deepseek.train.ledger import StageProof, prove
from deepseek.train.loop import Preparing, Report, Training, check_same_run, num_steps_of
from deepseek.train.objective import Objective
from deepseek.train.origin import open_model, open_teacher
from deepseek.train.places import Places
from deepseek.train.sources import Opener
from deepseek.train.teacher import check_teacher


def train(
    run: Run,
    folder: str | Path,
    *,
    world: World | None = None,
    report: Report = lambda progress: None,
    preparing: Preparing = lambda words, share: None,
) -> Path:
    """Train in a folder, from where it stands, and return the folder of the last stage's bundle.

    Args:
        run: what is to be done.
        folder: new, or one in which this run was begun.
        world: the workers, of `parallel.joined_world`; None for this process alone.
        report: called after each step, on the first worker.
        preparing: called during long work before and after the steps of a stage, with what it is
            and the share that is done, on the first worker.

    Raises:
        ConfigError: the run cannot be done, is not the folder's, or diverged.
        FormatError: data or checkpoints are damaged.
        CapacityError: a checkpoint could not be written, or memory ran out.
        Interrupted: a signal came; the state is saved.
    """
    world = world or World()
    check_same_run(run, Places(Path(folder)))
    model, teacher = open_model(run), open_teacher(run)
    _check_gates(run, model)
    return train_model(
        run, model, folder, teacher=teacher, world=world, report=report, preparing=preparing
    )


def train_model(
    run: Run,
    model: Decoder | Encoder,
    folder: str | Path,
    *,
    teacher: Decoder | None = None,
    objective: Objective | None = None,
    world: World | None = None,
    report: Report = lambda progress: None,
    preparing: Preparing = lambda words, share: None,
) -> Path:
    """Train a model that is there already, in place, and return the folder of the last stage's
    bundle; the rest as `train`.

    Args:
        run: what is to be done; what it says of the start is only compared with the folder's run.
        model: in float32, with a tokenizer, the same at every start; on the way it is what the
            newest checkpoint holds. Left as it is where the folder's run is done.
        folder: new, or one in which this run was begun.
        teacher: that writes text, or that rows are taught by.
        objective: what the steps lower; None for the loss of the tokens.
        world, report, preparing: as `train` takes them.

    Raises:
        ConfigError: as `train`, and a teacher of another vocabulary.
        FormatError: as `train`.
        CapacityError: as `train`.
        Interrupted: as `train`.
    """
    keep_freed_memory()
    world = world or World()
    places = Places(Path(folder))
    check_same_run(run, places)
    if teacher is not None:
        check_teacher(model, teacher)
    if world.is_first:
        with writing(places.run):
            places.folder.mkdir(parents=True, exist_ok=True)
            replace_file(places.run, json.dumps(run.to_dict(), indent=1).encode() + b"\n")
    world.barrier()
    training = Training(
        run,
        model,
        places,
        world,
        report=report,
        preparing=preparing,
        teacher=teacher,
        objective=objective,
    )
    with memory_errors_told(places):
        return training.train()


def _check_gates(run: Run, model: Decoder) -> None:
    for stage in run.stages:
        if stage.gate_penalty and model.config.gates is None:
            owner, must = f"stage {stage.name!r}", "0 for a model without gates"
            step = "Give the run `gates`"
            raise ConfigError(describe("gate_penalty", owner, must, stage.gate_penalty, step))


def prove_run(folder: str | Path) -> tuple[list[StageProof], list[int]]:
    """Return what the ledger of a run's folder shows of each stage that was begun, up to its newest
    checkpoint, and the workers of each start.

    Raises:
        ConfigError: there is no run in the folder.
        FormatError: its data or checkpoints are damaged.
    """
    places = Places(Path(folder))
    if not places.run.is_file():
        raise ConfigError(describe("folder", "prove", "that of a run", str(folder), "Train first"))
    run = Run.from_dict(json.loads(places.run.read_text(encoding="utf-8")))
    checkpoints = Checkpoints(places.checkpoints, World(), run.keep_checkpoints)
    found = checkpoints.find()
    if found is None:
        got = "none yet"
        raise ConfigError(describe("checkpoint", str(folder), "there", got, "Train on"))
    model, position = open_model(run), found[1]
    stages, counts = [], []
    for number, stage in enumerate(run.stages[: position.stage + 1]):
        windows = Opener.of(run, model, places, World()).open(number)
        stages.append((stage.name, windows, stage.batch))
        is_done = number < position.stage
        counts.append(num_steps_of(stage, windows) if is_done else position.step)
    return prove(places.ledger, stages, counts)
