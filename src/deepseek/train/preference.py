"""Preference tuning (DPO) by TRL, from a bundle to a bundle."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from deepseek import hub
from deepseek.config import Config
from deepseek.data.texts import read_lines, text_files
from deepseek.errors import ConfigError, FormatError, describe, missing_extra
from deepseek.hub import Bundle
from deepseek.models import Decoder
from deepseek.ops.hardware import products_in
from deepseek.records import Measurement, StageRecord
from deepseek.train.config import ALL_LINEAR
from deepseek.train.places import Places
from deepseek.train.stopping import Interrupted, StopRequest

if TYPE_CHECKING:
    from transformers import Trainer

STAGE = "preference"
_SHARE = 0.1
_LEAST = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference(Config):
    """What direct preference optimization is given.

    Source: Rafailov et al., "Direct preference optimization" (2305.18290), equation 7, as TRL
    computes it.
    """

    model: str
    """A bundle: a name or folder."""
    data: str
    """A `.jsonl` of pairs: `prompt` (text or messages), `chosen` and `rejected`."""
    epochs: float = 1.0
    steps: int | None = None
    """Optimizer steps in place of epochs."""
    beta: float = 0.1
    """How dear it is to move away from the model as it was."""
    rate: float | None = None
    """Largest learning rate; None for 1e-6, or 2e-5 of adapters."""
    rank: int | None = 16
    """Of adapters on all linear layers; None to train all weights."""
    length: int = 512
    """Most tokens of a prompt and an answer."""
    batch: int = 8
    """Pairs of a step."""
    micro_batch: int = 2
    """Pairs of a forward pass; a divisor of `batch`."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of products."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "beta", "length", "batch", "micro_batch", "rate", "rank"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(describe(name, "Preference", "positive", value))
        if self.batch % self.micro_batch:
            must = f"a divisor of the batch, {self.batch}"
            raise ConfigError(describe("micro_batch", "Preference", must, self.micro_batch))


def prefer(
    asked: Preference,
    folder: str | Path,
    *,
    report: Callable[[str, float], None] = lambda words, share: None,
) -> Path:
    """Tune a bundle to preferences, and return the folder of the new one; the last tenth of the
    pairs is kept back, and measured on.

    TRL trains, and its checkpoints in the folder are gone on from. SIGINT and SIGTERM end the run
    after the step that is being done, with a checkpoint.

    Args:
        asked: what, on what.
        folder: new, or one in which this was begun.
        report: told of each step, and the share that is done.

    Raises:
        ConfigError: the data or the model cannot be used, or the folder is another run's.
        FormatError: a line is no pair.
        MissingExtra: TRL is not installed.
        Interrupted: a signal came; the state is saved.
    """
    places = Places(Path(folder))
    _check_same(asked, places)
    learned, kept = _split(read_pairs(asked.data))
    origin = hub.load(asked.model, dtype="float32")
    if not isinstance(origin, Decoder) or not isinstance(origin.bundle, Bundle):
        raise ConfigError(describe("model", "adapt", "a decoder's bundle", asked.model))
    trainer = _trainer(asked, origin.bundle.path, learned, kept, places)
    stop = StopRequest()
    trainer.add_callback(_callback(stop, report))
    with _quiet(), stop.listening():
        trainer.train(resume_from_checkpoint=_newest(places.checkpoints))
    if stop.is_made:
        raise Interrupted
    with _quiet():
        found = _measurements(trainer.evaluate(), len(kept), asked)
    return _save(asked, trainer, origin, places, found)


def read_pairs(path: str | Path) -> list[dict[str, Any]]:
    """Return the pairs of a file, or of all in a folder.

    Raises:
        ConfigError: there are no files.
        FormatError: a line is no pair.
    """
    pairs = []
    for file in text_files(Path(path)):
        for number, fields in read_lines(file):
            pair = {name: fields.get(name) for name in ("prompt", "chosen", "rejected")}
            kinds = {type(value) for value in pair.values()}
            if kinds not in ({str}, {list}) or not all(pair.values()):
                must = 'an object with "prompt", "chosen" and "rejected", all text or all messages'
                raise FormatError(describe(f"line {number}", str(file), must, fields))
            pairs.append(pair)
    return pairs


def _split(pairs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    if len(pairs) < _LEAST:
        must, step = f"at least {_LEAST}", "Give more"
        raise ConfigError(describe("pairs", "the data", must, len(pairs), step))
    kept = max(1, int(len(pairs) * _SHARE))
    return pairs[:-kept], pairs[-kept:]


def _check_same(asked: Preference, places: Places) -> None:
    if places.run.is_file():
        if json.loads(places.run.read_text(encoding="utf-8")) != asked.to_dict():
            step = "Give another --out, or go on with the old settings"
            must = "the run that began there"
            raise ConfigError(describe("run", str(places.folder), must, "another one", step))
        return
    places.folder.mkdir(parents=True, exist_ok=True)
    places.run.write_text(json.dumps(asked.to_dict(), indent=1) + "\n", encoding="utf-8")


def _trainer(
    asked: Preference,
    model: Path,
    learned: list[dict[str, Any]],
    kept: list[dict[str, Any]],
    places: Places,
) -> Trainer:
    try:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer
    except ImportError as error:
        raise missing_extra("trl", "preference", "to tune to preferences") from error
    torch.manual_seed(asked.seed)
    with _quiet():
        settings = DPOConfig(
            output_dir=str(places.checkpoints),
            beta=asked.beta,
            learning_rate=asked.rate or (1e-6 if asked.rank is None else 2e-5),
            num_train_epochs=asked.epochs,
            max_steps=asked.steps or -1,
            per_device_train_batch_size=asked.micro_batch,
            per_device_eval_batch_size=asked.micro_batch,
            gradient_accumulation_steps=asked.batch // asked.micro_batch,
            max_length=asked.length,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            bf16=products_in(asked.precision) == torch.bfloat16,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            seed=asked.seed,
            data_seed=asked.seed,
            save_steps=50,
            save_total_limit=2,
            logging_steps=1,
            disable_tqdm=True,
            report_to="none",
        )
        return DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            args=settings,
            train_dataset=Dataset.from_list(learned),
            eval_dataset=Dataset.from_list(kept),
            processing_class=AutoTokenizer.from_pretrained(model),
            peft_config=_adapters(asked),
        )


def _adapters(asked: Preference) -> Any:
    if asked.rank is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=asked.rank,
        lora_alpha=2 * asked.rank,
        target_modules=ALL_LINEAR,
        task_type="CAUSAL_LM",
    )


def _callback(stop: StopRequest, report: Callable[[str, float], None]) -> Any:
    """Return what ends a Trainer after the step that is being done, and tells of each step."""
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if stop.is_made:
                control.should_save = control.should_training_stop = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                right = 100 * logs.get("rewards/accuracies", float("nan"))
                report(
                    f"{STAGE} {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  "
                    f"{right:.0f} % of the pairs right",
                    state.global_step / max(1, state.max_steps),
                )

    return Callback()


def _newest(folder: Path) -> str | None:
    """Return the newest of the Trainer's checkpoints that was written to its end."""
    whole = [
        path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()
    ]
    newest = max(whole, key=lambda path: int(path.name.partition("-")[2]), default=None)
    return None if newest is None else str(newest)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' bars and remarks off the screen."""
    import datasets
    from transformers.utils import logging

    verbosity, was_on = logging.get_verbosity(), datasets.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
        if was_on:
            datasets.enable_progress_bars()


def _measurements(logs: dict[str, float], pairs: int, asked: Preference) -> list[Measurement]:
    conditions = {"pairs": pairs, "beta": asked.beta}
    return [
        Measurement(name=name, value=logs[key], unit=unit, conditions=conditions)
        for name, key, unit in (
            ("preference_accuracy", "eval_rewards/accuracies", "1"),
            ("preference_loss", "eval_loss", "nats"),
            ("preference_margin", "eval_rewards/margins", "nats"),
        )
    ]


def _save(
    asked: Preference, trainer: Any, origin: Decoder, places: Places, found: list[Measurement]
) -> Path:
    tuned = trainer.model
    if asked.rank is not None:
        tuned.save_pretrained(places.adapter(STAGE))
        tuned = tuned.merge_and_unload()
    with tempfile.TemporaryDirectory(dir=places.folder) as place, _quiet():
        tuned.save_pretrained(place)
        model = hub.load(place, dtype="float32")
        assert isinstance(model, Decoder)
        model.tokenizer, model.bundle = origin.tokenizer, origin.bundle
        record = StageRecord(name=STAGE, settings=asked.to_dict(), seed=asked.seed)
        hub.save(model, places.stage(STAGE), stage=record, measurements=found)
    return places.stage(STAGE)
