"""A part of a decoder: consecutive layers, with the embedding before the first and the head behind
the last."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepseek.models.decoder import Decoder
from deepseek.ops.cross_entropy import linear_cross_entropy


class Absent(nn.Module):
    """Stands where another stage has a module: it has no parameters, and passes states on."""

    def forward(self, states: Tensor, *_: object) -> Tensor:
        """Return the states."""
        return states


class DecoderStage(nn.Module):
    """Layers `first` to `stop - 1` of a decoder, and what stands before the first and behind the
    last.

    The decoder is changed in place: what belongs to other stages is taken out, the names of what
    stays are as before. A tied head and embedding stay together in both stages that use them.
    """

    def __init__(self, decoder: Decoder, first: int = 0, stop: int | None = None) -> None:
        """Take a part.

        Args:
            decoder: whole.
            first: number of its first layer.
            stop: number of the layer behind its last one; None for all.
        """
        super().__init__()
        num_layers = len(decoder.model.layers)
        stop = num_layers if stop is None else stop
        self.decoder, self.is_first, self.is_last = decoder, first == 0, stop == num_layers
        self.products = torch.float32
        """Dtype of products; may be changed between passes."""
        for layer in range(num_layers):
            if not first <= layer < stop:
                decoder.model.layers[layer] = Absent()
        keeps_both = decoder.config.tie_embeddings and (self.is_first or self.is_last)
        if not (self.is_first or keeps_both):
            decoder.model.embed_tokens = Absent()  # type: ignore[assignment]
        if not (self.is_last or keeps_both):
            decoder.lm_head = Absent()  # type: ignore[assignment]
        if not self.is_last:
            decoder.model.norm = Absent()  # type: ignore[assignment]

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return states for the next stage, or, from the last one, the sum of the cross-entropies
        of the next tokens in nats, float32 [1].

        Args:
            inputs: int64 [B, T] tokens in the first stage, states [B, T, hidden] in others.
            labels: int64 [B, T] for the last stage: the tokens themselves, -100 where none counts.
        """
        with torch.autocast(
            inputs.device.type, self.products, enabled=self.products != torch.float32
        ):
            return self._forward(inputs, labels)

    def _forward(self, inputs: Tensor, labels: Tensor | None) -> Tensor:
        if self.is_first:
            states = self.decoder.final_states(inputs)
        else:
            states = self.decoder.final_states(inputs_embeds=inputs)
        if not self.is_last:
            return states
        assert labels is not None
        states, targets = states[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        total = linear_cross_entropy(states, self.decoder.lm_head.weight, targets)
        return torch.stack([total])  # a view would be refused by whoever hooks what is returned


def layers_of(num_layers: int, stage: int, num_stages: int) -> tuple[int, int]:
    """Return the first layer of a stage and the one behind its last; sizes differ by at most
    one."""
    return num_layers * stage // num_stages, num_layers * (stage + 1) // num_stages
