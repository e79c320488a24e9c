"""Where a model makes much of a last bit, rounding is no departure, and a wrong norm is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deepseek.export import verify
from deepseek.export.formats import Floats, Ids
from deepseek.export.verifying.cases import Case
from deepseek.export.verifying.source import ModelReader
from deepseek.hub import load
from deepseek.models import Decoder
from deepseek.models.layers import RMSNorm

pytestmark = pytest.mark.slow

# Behind its second token, layer 11 stands half-way into the mode in which states grow to 26,000.
CASE = Case(id="edge", kind="lengths", rows=((21992, 33092, 27538, 35500),))


class Rough(ModelReader):
    """A runtime whose products are off by four last bits of float32."""

    def __init__(self, model: Decoder, seed: int) -> None:
        super().__init__(model)
        self.draw = torch.Generator().manual_seed(seed)

    def forward(self, ids: Ids, mask: Ids) -> Floats:
        """Return what the model answers; see `Reader`."""

        def rough(module: nn.Module, given: object, states: Tensor) -> Tensor:
            return states * (1 + (torch.rand(states.shape, generator=self.draw) - 0.5) * 2.0**-20)

        linear = [each for each in self.model.modules() if isinstance(each, nn.Linear)]
        handles = [each.register_forward_hook(rough) for each in linear]
        try:
            return super().forward(ids, mask)
        finally:
            for handle in handles:
                handle.remove()


@pytest.fixture(scope="module")
def model(smollm2_folder: Path) -> Iterator[Decoder]:
    """Return the real model in float32."""
    found = load(smollm2_folder, dtype="float32")
    assert isinstance(found, Decoder)
    yield found


def test_rounding_alone_is_no_departure(model: Decoder) -> None:
    found = [verify(model, Rough(model, seed), only=CASE) for seed in range(6)]
    assert max(each.outcomes[0].difference for each in found) > 1e-3  # beyond the tolerance
    assert all(each.holds for each in found)


def test_a_wrong_norm_is_one(model: Decoder, smollm2_folder: Path) -> None:
    wrong = load(smollm2_folder, dtype="float32")
    assert isinstance(wrong, Decoder)
    for norm in wrong.modules():
        if isinstance(norm, RMSNorm):
            norm.eps *= 10
    assert not verify(model, ModelReader(wrong), only=CASE).holds
