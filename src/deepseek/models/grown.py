"""A larger encoder that computes what a smaller one does, as a start for training it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepseek.errors import ConfigError, describe
from deepseek.models.encoder import Encoder

SPREAD = 0.25
"""Of the shares in which copies of an input divide its weight, around equal ones: copies that are
exactly alike would get the same gradients for ever."""


def grow_encoder(model: Encoder, *, width: int = 2, depth: int = 1, seed: int = 0) -> Encoder:
    """Return an encoder with `width` times the channels and `depth` times the layers.

    Channels, feed-forward units and the channels of each head are copied, and the weights that
    read them are divided among the copies: the grown states are the old ones, `width` times side
    by side, whatever the input. A layer is followed by `depth` - 1 that add nothing; their norms,
    which a post-norm layer cannot do without, are set to change least what the norm before makes
    of standard normal states, so that depth is preserved nearly (all-MiniLM-L6-v2 with twice the
    layers: vectors of cosine 0.9).

    Args:
        model: left as it is.
        width: at least 1.
        depth: at least 1.
        seed: of the shares.

    Raises:
        ConfigError: a factor below 1.

    Source: Chen, Goodfellow and Shlens, "Net2Net" (1511.05641), section 2.2; Chen et al.,
    "bert2BERT" (2110.07143), section 3.2. Deviations: shares are drawn, and new layers begin as
    near identities.
    """
    for name, factor in (("width", width), ("depth", depth)):
        if factor < 1:
            raise ConfigError(describe(name, "grow_encoder", "at least 1", factor))
    config = model.config.replace(
        hidden_size=width * model.config.hidden_size,
        intermediate_size=width * model.config.intermediate_size,
        num_layers=depth * model.config.num_layers,
    )
    grown = Encoder(config)
    grown.tokenizer, grown.bundle = model.tokenizer, model.bundle
    copies = _Copies(model, width, seed)
    with torch.no_grad():
        for part in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
            old, new = (getattr(each.embeddings, part) for each in (model, grown))
            new.weight.copy_(old.weight.repeat(1, width))
        copies.norm(grown.embeddings.LayerNorm, model.embeddings.LayerNorm)
        for number, layer in enumerate(grown.encoder.layer):
            small: Any = model.encoder.layer[number // depth]
            copies.layer(layer, small)
            if number % depth:
                _pass_on(layer, small.output.LayerNorm)
        if model.pooler is not None and grown.pooler is not None:
            copies.linear(_linear(grown.pooler), _linear(model.pooler))
        if model.classifier is not None and grown.classifier is not None:
            copies.linear(grown.classifier, model.classifier, outputs="as they are")
    return grown.to(model.device, model.dtype).train(model.training)


class _Copies:
    """Writes the weights of a smaller encoder's modules into those of a larger one."""

    def __init__(self, model: Encoder, width: int, seed: int) -> None:
        self._width, self._heads = width, model.config.num_heads
        self._draw = torch.Generator().manual_seed(seed)

    def layer(self, new: Any, old: Any) -> None:
        """Copy a layer; heads keep their number, and each has its channels `width` times."""
        own, their = new.attention["self"], old.attention["self"]
        for name in ("query", "key", "value"):
            self.linear(getattr(own, name), getattr(their, name), outputs="by heads")
        # scores are sums over `width` times the channels, and are divided by the root of those
        for parameter in own.query.parameters():
            parameter.mul_(self._width**-0.5)
        out, their_out = new.attention["output"], old.attention["output"]
        self.linear(out.dense, their_out.dense, inputs="by heads")
        self.norm(out.LayerNorm, their_out.LayerNorm)
        self.linear(_linear(new.intermediate), _linear(old.intermediate))
        self.linear(new.output.dense, old.output.dense)
        self.norm(new.output.LayerNorm, old.output.LayerNorm)

    def norm(self, new: nn.LayerNorm, old: nn.LayerNorm) -> None:
        """Copy a norm."""
        new.weight.copy_(old.weight.repeat(self._width))
        new.bias.copy_(old.bias.repeat(self._width))

    def linear(
        self, new: nn.Linear, old: nn.Linear, *, inputs: str = "whole", outputs: str = "whole"
    ) -> None:
        """Copy a product whose inputs, and whose outputs, are copied in a certain order."""
        rows, columns = self._order(old.out_features, outputs), self._order(old.in_features, inputs)
        shares = torch.rand(self._width, *old.weight.shape, generator=self._draw)
        shares = 1 + SPREAD * (2 * shares - 1)
        shares = (shares / shares.sum(0)).to(old.weight)
        places = self._order_of_copies(old.in_features, inputs)
        # every copy of an output divides the weight alike: what reads it tells the copies apart
        new.weight.copy_((old.weight[:, columns] * shares[places, :, columns].T)[rows])
        new.bias.copy_(old.bias[rows])

    def _order(self, count: int, how: str) -> Tensor:
        """Return the old place of each new channel."""
        if how == "as they are":
            return torch.arange(count)
        groups = self._heads if how == "by heads" else 1
        return torch.arange(count).view(groups, 1, -1).expand(-1, self._width, -1).reshape(-1)

    def _order_of_copies(self, count: int, how: str) -> Tensor:
        """Return which copy of its old channel each new one is."""
        groups = self._heads if how == "by heads" else 1
        copies = torch.arange(self._width).view(1, -1, 1)
        return copies.expand(groups, -1, count // groups).reshape(-1)


def _linear(block: nn.ModuleDict) -> nn.Linear:
    dense = block["dense"]
    assert isinstance(dense, nn.Linear)
    return dense


def _pass_on(layer: Any, before: nn.LayerNorm) -> None:
    """Make a layer give back what it gets from a norm, nearly."""
    mean = before.bias.mean()
    deviation = (before.weight.square().mean() + (before.bias - mean).square().mean()).sqrt()
    for block in (layer.attention["output"], layer.output):
        block.dense.weight.zero_()
        block.dense.bias.zero_()
        block.LayerNorm.weight.fill_(deviation.item())
        block.LayerNorm.bias.fill_(mean.item())
