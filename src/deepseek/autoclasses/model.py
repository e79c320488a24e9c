"""Our own family in the shape that transformers' Auto classes expect."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from deepseek.autoclasses.config import DeepseekStackConfig
from deepseek.errors import ConfigError, describe
from deepseek.models import Decoder
from deepseek.models.families import config_from_hf


class DeepseekStackForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder of our own family as a transformers model: same weights, same names.

    It keeps no cache, so `generate` computes every step anew; load the bundle with `deepseek.load`
    to generate fast.
    """

    config_class = DeepseekStackConfig
    # the loss is the mean of the batch: Trainer must divide by its accumulation steps itself
    accepts_loss_kwargs = False
    base_model_prefix = "model"
    # not a ClassVar: the base class declares it as it stands here
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DeepseekStackConfig) -> None:
        super().__init__(config)
        decoder = Decoder(config_from_hf(config.to_dict()))  # type: ignore[arg-type]
        self.model = decoder.model
        self.lm_head = decoder.lm_head
        # Held in a tuple, so that its weights are not registered a second time under another name.
        self._decoder = (decoder,)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the weights as the decoder drew them."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        past_key_values: object | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Return loss and logits, see `deepseek.models.Decoder.forward`."""
        for name, asked in (
            ("output_attentions", output_attentions),
            ("past_key_values", past_key_values),
        ):
            if asked:
                step = "Load the bundle with deepseek.load to generate with a cache"
                raise ConfigError(describe(name, type(self).__name__, "left out", asked, step))
        decoder = self._decoder[0]
        # transformers and PEFT may have put others in their place
        decoder.model, decoder.lm_head = self.model, self.lm_head
        out = decoder(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            output_hidden_states=bool(output_hidden_states),
        )
        return CausalLMOutputWithPast(
            loss=out.loss,  # type: ignore[arg-type]
            logits=out.logits,  # type: ignore[arg-type]
            hidden_states=out.hidden_states,  # type: ignore[arg-type]
        )

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Tensor | None]:
        """Return the whole sequence, which every step needs without a cache."""
        positions = None
        if attention_mask is not None:
            positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": positions,
        }


def register() -> None:
    """Make `AutoModelForCausalLM` know our family."""
    AutoModelForCausalLM.register(DeepseekStackConfig, DeepseekStackForCausalLM, exist_ok=True)
