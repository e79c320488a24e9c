"""A stage with an exit loss makes a model that agrees with itself behind an earlier layer."""

from __future__ import annotations

from pathlib import Path

import torch

from deepseek import hub
from deepseek.evaluate import score_exits
from deepseek.hub import load
from deepseek.models import Decoder, Exits
from deepseek.optim import AdamW
from deepseek.train import ExitLoss, Run, Source, Stage, train
from tests.generate.conftest import TINY, byte_tokenizer


def test_a_trained_model_can_leave_early(text: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Decoder(TINY.replace(num_layers=4, init_std=0.1))
    model.tokenizer = byte_tokenizer(bos_token="<begin>", eos_token="<end>")
    start = hub.save(model, tmp_path / "start").path
    tokens = model.tokenizer.encode(text.read_text())
    rows = [tokens[first : first + 48] for first in range(0, 480, 48)]
    exits = Exits(layers=(2,), threshold=0.0)  # every token leaves there
    found = {}
    for name, exit_loss in (("plain", None), ("early", ExitLoss(layers=(2,)))):
        stage = Stage(
            name=name,
            data=(Source(path=str(text)),),
            steps=40,
            length=48,
            precision="float32",
            optimizer=AdamW(rate=1e-2),
            exit_loss=exit_loss,
        )
        made = load(train(Run(model=str(start), stages=(stage,)), tmp_path / name))
        assert isinstance(made, Decoder)
        settings = made.bundle.card.stage.settings  # type: ignore[attr-defined]
        assert (settings["exit_loss"] is None) == (exit_loss is None)
        (found[name],) = score_exits(made, rows, [exits], num_prompt_tokens=8)
        assert found[name].depths.unique().tolist() == [2]
    assert found["early"].disagreements.mean() < 0.5 * found["plain"].disagreements.mean()
    assert found["early"].losses.mean() < found["plain"].losses.mean()
