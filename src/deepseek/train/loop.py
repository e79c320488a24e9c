"""The loop: stages one after another, each border and each kill a place to go on from."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from deepseek.data import Windows
from deepseek.errors import ConfigError, describe
from deepseek.hub import Bundle, save
from deepseek.models import Decoder, Encoder
from deepseek.ops.hardware import products_in
from deepseek.optim import build_optimizers
from deepseek.parallel import Mesh, Transport, World, open_transport
from deepseek.records import StageRecord
from deepseek.train.adapter import TRAINED, insert_adapter, merge_adapter, save_adapter
from deepseek.train.checkpoint import Checkpoints, Position
from deepseek.train.config import Run, Stage
from deepseek.train.held_out import measure_on
from deepseek.train.ledger import Ledger, next_attempt
from deepseek.train.objective import NextTokens, Objective
from deepseek.train.origin import average_with, open_start
from deepseek.train.places import Places
from deepseek.train.sources import Opener
from deepseek.train.speed import flops_per_token, peak_flops
from deepseek.train.step import BatchStep, StepResult, choose_parameters
from deepseek.train.stopping import Interrupted, StopRequest

if TYPE_CHECKING:
    from deepseek.models.divided import DividedDecoder
    from deepseek.train.divided import DividedStep


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a run says of a step."""

    stage: str
    step: int
    """Steps of the stage that are done."""
    num_steps: int
    total_step: int
    """Steps of the whole run that were done before it."""
    loss: float
    gradient_norm: float
    rate: float
    """Learning rate of the step."""
    tokens_per_s: float
    """Of all workers, over this step."""
    mfu: float
    """Share of the workers' measured peak that the step's products reached."""
    left_s: float
    """Time that the stage's other steps will take at this speed."""
    mean_gate: float | None = None
    """Of the step, where the stage has a gate penalty."""


Report = Callable[[Progress], None]
Preparing = Callable[[str, float], None]
"""Told of long work before and after the steps: what, and the share that is done."""


def num_steps_of(stage: Stage, windows: Windows) -> int:
    """Return the steps of a stage: as it says, or those of its epochs; a last batch that is not
    full goes on into the next epoch.
    """
    if stage.steps is not None:
        return stage.steps
    assert stage.epochs is not None
    return max(1, math.ceil(stage.epochs * windows.num_windows / stage.batch))


class Training:
    """A run in a folder, on one worker or several.

    All that it writes stands in the folder: the run's settings, tokenised data, checkpoints, the
    ledger, `metrics.jsonl`, and a bundle for each stage that is done.
    """

    def __init__(
        self,
        run: Run,
        model: Decoder | Encoder,
        places: Places,
        world: World,
        *,
        report: Report,
        preparing: Preparing,
        teacher: Decoder | None = None,
        objective: Objective | None = None,
    ) -> None:
        """Prepare a run; the folder's newest checkpoint is where it goes on.

        Args:
            run: what is to be done.
            model: what it starts from, in float32, with a tokenizer.
            places: the run's folder.
            world: the workers.
            report: called after each step, on the first worker.
            preparing: called during long work before and after the steps of a stage, on the first
                worker.
            teacher: that sources learn from, where one does.
            objective: of every stage; None for the loss of the tokens.
        """
        self.run, self.model, self._places, self._world = run, model, places, world
        self._report, self._teacher, self._objective = report, teacher, objective
        self._opener = dataclasses.replace(
            Opener.of(run, model, places, world),
            teacher=teacher,
            goes_on=self._go_on,
            report=preparing,
        )
        self._checkpoints = Checkpoints(places.checkpoints, world, run.keep_checkpoints)
        self._stop = StopRequest()
        self._divided: DividedDecoder | None = None
        if run.mesh.sized(world.size).is_divided:
            from deepseek.train.divided import divide

            assert isinstance(model, Decoder)
            self._divided = divide(run, model, world)

    def train(self) -> Path:
        """Run what is left, and return the folder of the last stage's bundle.

        Raises:
            Interrupted: SIGINT or SIGTERM came; a checkpoint was made.
            ConfigError: a loss or gradient was not finite; the last checkpoint is whole.
            CapacityError: a checkpoint could not be written.
        """
        found = self._checkpoints.find()
        position = Position() if found is None else found[1]
        attempt = next_attempt(self._places.ledger)
        self._world.barrier()
        ledger = Ledger(
            self._places.ledger,
            attempt=attempt,
            start=position.total_steps,
            rank=self._world.rank,
            size=self._world.size,
        )
        _cut_metrics(self._places.metrics, position.total_steps, self._world)
        resumed = None if found is None else found[0]
        optimizers: list[Optimizer] = []
        if position.stage > 0:
            self.model.bundle = Bundle.open(
                self._places.stage(self.run.stages[position.stage - 1].name)
            )
        try:
            with self._stop.listening():
                for number in range(position.stage, len(self.run.stages)):
                    optimizers = self._run_stage(number, position, optimizers, resumed, ledger)
                    position = Position(
                        stage=number + 1,
                        total_steps=position.total_steps - position.step + self._num_steps,
                    )
                    resumed = None
            self._checkpoints.wait()
        finally:
            ledger.close()
            self._checkpoints.close()
        return self._places.stage(self.run.stages[-1].name)

    def _run_stage(
        self,
        number: int,
        position: Position,
        before: Sequence[Optimizer],
        resumed: Path | None,
        ledger: Ledger,
    ) -> list[Optimizer]:
        stage = self.run.stages[number]
        windows = self._opener.open(number)
        self._num_steps = num_steps = num_steps_of(stage, windows)
        if resumed is not None and position.step == 0:
            before = self._at_border(number, resumed)
        objective = self._objective or NextTokens.of(stage, self.model, self._teacher)
        objective.begin(self.model)
        if stage.adapter is not None:
            insert_adapter(self._decoder(), stage.adapter, self.run.seed + 7919 * number)
        trained = stage.trains if stage.adapter is None else TRAINED
        parameters = self._choose(trained)
        is_idle = self._divided is not None and not parameters
        optimizers = [] if is_idle else build_optimizers(stage.optimizer, parameters)
        if resumed is not None and position.step > 0:
            self._checkpoints.load(self.model, optimizers, resumed)
        transport = open_transport(stage.transport, self._world)
        if resumed is not None and position.step > 0:
            transport.load_state_dict(self._checkpoints.remembered(resumed))
        if stage.keeps_moments and position.step == 0:
            _carry_moments(before, optimizers)
        batch_step = self._prepare_step(
            number, windows, parameters, optimizers, transport, objective
        )
        whole = self.model if self._divided is None else self._divided.whole
        clock = _Clock(whole, stage, self._world.size)
        start = position.total_steps - position.step
        self.model.train()
        with _recomputing(self.model, stage.recompute), contextlib.closing(batch_step):
            for step in range(position.step, num_steps):
                result = batch_step.run(step, num_steps)
                _check_finite(result, stage, step, self._checkpoints)
                samples = result.samples
                if self._divided is None or self._divided.grid.is_counted:
                    ledger.add(number, step, samples.first, samples.tokens)
                self._tell(clock.tick(result, step, num_steps, start + step))
                done = Position(stage=number, step=step + 1, total_steps=start + step + 1)
                self._maybe_save(done, num_steps, optimizers, transport)
        objective.end(self.model)
        self._finish_stage(number, start + num_steps, optimizers)
        return optimizers

    def _at_border(self, number: int, resumed: Path) -> list[Optimizer]:
        """Load what a stage begins with from a border's checkpoint, and return the optimizers of
        the stage before where it goes on from their state."""
        optimizers = []
        if self._next_keeps_moments(number - 1):
            before = self.run.stages[number - 1]
            optimizers = build_optimizers(before.optimizer, self._choose(before.trains))
        self._checkpoints.load(self.model, optimizers, resumed)
        return optimizers

    def _choose(self, patterns: Sequence[str]) -> list[tuple[str, nn.Parameter]]:
        """Return what is trained; of a divided model this worker's part of it, maybe none."""
        if self._divided is None:
            return choose_parameters(self.model, patterns)
        from deepseek.train.divided import choose_divided

        return choose_divided(self._divided, patterns)

    def _prepare_step(
        self,
        number: int,
        windows: Windows,
        parameters: Sequence[tuple[str, nn.Parameter]],
        optimizers: Sequence[Optimizer],
        transport: Transport,
        objective: Objective,
    ) -> BatchStep | DividedStep:
        stage = self.run.stages[number]
        if self._divided is not None:
            from deepseek.train.divided import DividedStep

            return DividedStep(self._divided, parameters, optimizers, stage, windows)
        return BatchStep(
            self.model,
            parameters,
            optimizers,
            stage,
            windows,
            world=self._world,
            transport=transport,
            seed=self.run.seed + 7919 * number,
            objective=objective,
        )

    def _decoder(self) -> Decoder:
        assert isinstance(self.model, Decoder)
        return self.model

    def _whole(self) -> Decoder | Encoder:
        """Return the model; of a divided one the whole on the first worker."""
        if self._divided is None:
            return self.model
        from deepseek.train.divided import whole_decoder

        return whole_decoder(self._divided)

    def _maybe_save(
        self, done: Position, num_steps: int, optimizers: list[Optimizer], transport: Transport
    ) -> None:
        stops = self._world.any(self._stop.is_made)
        is_last = done.step == num_steps
        if stops or (done.step % self.run.checkpoint_every == 0 and not is_last):
            self._checkpoints.save(done, self.model, optimizers, transport.state_dict())
        if stops:
            self._checkpoints.wait()
            raise Interrupted

    def _finish_stage(self, number: int, total: int, optimizers: list[Optimizer]) -> None:
        """Measure the model, write its bundle, and make the checkpoint of the border."""
        stage = self.run.stages[number]
        self.model.eval()
        if stage.adapter is not None:
            if self._world.is_first:
                save_adapter(self._decoder(), stage.adapter, self._places.adapter(stage.name))
            merge_adapter(self._decoder())
        if stage.start_share:
            start = open_start(self.run, number, self._places)
            average_with(self._decoder(), start, stage.start_share)
        whole = self._whole()
        if self._world.is_first:
            told = self._opener.report
            found = [item for text in stage.evaluate for item in measure_on(whole, text, told)]
            settings = {**stage.to_dict(), "run_seed": self.run.seed}
            record = StageRecord(name=f"train {stage.name}", settings=settings, seed=self.run.seed)
            folder = self._places.stage(stage.name)
            self.model.bundle = save(whole, folder, stage=record, measurements=found)
        self._world.barrier()
        done = Position(stage=number + 1, step=0, total_steps=total)
        kept = optimizers if self._next_keeps_moments(number) else []
        self._checkpoints.save(done, self.model, kept)

    def _go_on(self) -> None:
        """Raise where the run is to stop before a step."""
        if self._stop.is_made:
            raise Interrupted

    def _next_keeps_moments(self, number: int) -> bool:
        rest = self.run.stages[number + 1 : number + 2]
        return bool(rest) and rest[0].keeps_moments

    def _tell(self, progress: Progress) -> None:
        if not self._world.is_first:
            return
        with self._places.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(progress)) + "\n")
        self._report(progress)


class _Clock:
    def __init__(self, model: Decoder | Encoder, stage: Stage, workers: int) -> None:
        self._stage = stage
        self._flops = flops_per_token(model, stage.length)
        own = peak_flops(products_in(stage.precision), torch.get_num_threads())
        self._peak = own * workers
        self._last = time.perf_counter()
        self._speeds: list[float] = []

    def tick(self, result: StepResult, step: int, num_steps: int, total_step: int) -> Progress:
        """Return what is known of a step that is done."""
        now = time.perf_counter()
        took, self._last = now - self._last, now
        self._speeds = [*self._speeds[-9:], took]
        tokens_per_s = self._stage.batch * self._stage.length / took
        return Progress(
            stage=self._stage.name,
            step=step + 1,
            num_steps=num_steps,
            total_step=total_step,
            loss=result.loss,
            gradient_norm=result.gradient_norm,
            rate=self._stage.optimizer.rate * self._stage.schedule.factor(step, num_steps),
            tokens_per_s=tokens_per_s,
            mfu=tokens_per_s * self._flops / self._peak,
            left_s=sum(self._speeds) / len(self._speeds) * (num_steps - step - 1),
            mean_gate=result.mean_gate,
        )


def _check_finite(result: StepResult, stage: Stage, step: int, checkpoints: Checkpoints) -> None:
    if math.isfinite(result.loss) and math.isfinite(result.gradient_norm):
        return
    checkpoints.wait()
    newest = checkpoints.newest()
    left = "there is no checkpoint yet" if newest is None else f"{newest.name} is whole"
    must = "a finite loss and gradient"
    got = f"loss {result.loss}, gradient norm {result.gradient_norm}"
    next_step = f"Take a smaller rate or float32 and start again: {left}"
    raise ConfigError(describe(f"step {step}", f"stage {stage.name!r}", must, got, next_step))


def _carry_moments(before: Sequence[Optimizer], optimizers: Sequence[Optimizer]) -> None:
    known = {value: state for optimizer in before for value, state in optimizer.state.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for value in group["params"]:
                if value in known:
                    optimizer.state[value] = known[value]


@contextlib.contextmanager
def _recomputing(model: Decoder | Encoder, is_on: bool) -> Iterator[None]:
    """Let the layers forget their insides until the backward pass needs them."""
    stack = model.model.layers if isinstance(model, Decoder) else model.encoder.layer
    layers: list[nn.Module] = list(stack) if is_on else []
    for layer in layers:
        forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        vars(layer)["forward"] = forward
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _cut_metrics(path: Path, total_steps: int, world: World) -> None:
    """Take out the lines of steps that are done again."""
    if not world.is_first or not path.is_file():
        return
    kept = [
        line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) < total_steps
    ]
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _step(line: str) -> float:
    try:
        values: dict[str, Any] = json.loads(line)
        return int(values["total_step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def check_same_run(run: Run, places: Places) -> None:
    """Refuse to go on with another run's folder.

    Raises:
        ConfigError: the folder holds a run of other settings; those of checkpoints, memory, mesh
            and of when gradients are sent may differ.
    """
    if not places.run.is_file():
        return
    old = Run.from_dict(json.loads(places.run.read_text(encoding="utf-8")))
    old, new = _without_free_settings(old), _without_free_settings(run)
    if old != new:
        differing = [
            field.name
            for field in dataclasses.fields(Run)
            if getattr(old, field.name) != getattr(new, field.name)
        ]
        step = "Give another --out, or go on with the old settings"
        must = f"the run that began there (they differ in {', '.join(differing)})"
        raise ConfigError(describe("run", str(places.folder), must, "another one", step))


def _without_free_settings(run: Run) -> Run:
    """Return a run as if it had the usual checkpoints, memory, mesh and time of sending."""
    usual = {"micro_batch": None, "recompute": False, "sends_early": True}
    stages = tuple(stage.replace(**usual) for stage in run.stages)
    return run.replace(checkpoint_every=1, keep_checkpoints=1, mesh=Mesh(), stages=stages)
