"""Every trained parameter belongs to one optimizer, and only matrices decay."""

from __future__ import annotations

import pytest
import torch

from deepseek.errors import ConfigError
from deepseek.models import Decoder
from deepseek.optim import AdamW, Muon, OptimizerConfig, build_optimizers
from tests.generate.conftest import TINY


@pytest.mark.parametrize("config", [AdamW(), Muon()])
def test_each_parameter_once(config: OptimizerConfig) -> None:
    model = Decoder(TINY)
    optimizers = build_optimizers(config, model.named_parameters())
    taken = [
        value for each in optimizers for group in each.param_groups for value in group["params"]
    ]
    assert len(taken) == len({id(value) for value in taken})
    assert {id(value) for value in taken} == {id(value) for value in model.parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            decays = {value.ndim > 1 for value in group["params"]}
            assert decays == {group["weight_decay"] > 0}


def test_muon_takes_the_layers_matrices() -> None:
    model = Decoder(TINY)
    muon, adamw = build_optimizers(Muon(rate=1e-2), model.named_parameters())
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    hidden = {id(value) for group in muon.param_groups for value in group["params"]}
    assert id(model.model.layers[0].mlp.down_proj.weight) in hidden
    assert id(model.model.embed_tokens.weight) not in hidden
    assert {group["lr"] for each in (muon, adamw) for group in each.param_groups} == {1e-2}


def test_adamw_is_torchs_on_a_quadratic() -> None:
    values = [torch.nn.Parameter(torch.tensor([[1.0, -2.0]])) for _ in range(2)]
    (ours,) = build_optimizers(AdamW(rate=0.1, weight_decay=0.5), [("w", values[0])])
    theirs = torch.optim.AdamW([values[1]], lr=0.1, betas=(0.9, 0.95), weight_decay=0.5)
    for _ in range(20):
        for optimizer, value in ((ours, values[0]), (theirs, values[1])):
            optimizer.zero_grad()
            (value**2).sum().backward()
            optimizer.step()
    assert torch.allclose(values[0], values[1], atol=1e-6)


def test_nothing_to_train_and_bad_rates_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        build_optimizers(AdamW(), [])
    for kind in (AdamW, Muon):
        with pytest.raises(ConfigError, match="rate"):
            kind(rate=0.0)


def test_a_kind_picks_the_config_when_it_is_read() -> None:
    assert Muon.from_dict(Muon(rate=0.5).to_dict()) == Muon(rate=0.5)
