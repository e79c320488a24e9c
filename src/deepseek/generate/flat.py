"""The program of a decoder: its whole pass written out as a flat list of instructions.

It says the same mathematics as `models.decoder`, without its modules. It is made from the decoder's
config alone; which weights it wants is in the instructions, by the decoder's own names. Loads no
torch.
"""

from __future__ import annotations

from deepseek.graph import Instruction, Program, ProgramShape
from deepseek.graph.program import LOGITS
from deepseek.models.angles import cosine_factor, rope_angles
from deepseek.models.config import DecoderConfig

EMBEDDING = "model.embed_tokens.weight"


def why_not_flat(config: DecoderConfig) -> str | None:
    """Return why a decoder of this config has no flat program, or None if it has one."""
    if config.latent is not None:
        return "latent attention has no flat instruction"
    if config.positions != "rope":
        return "ALiBi has no flat instruction"
    if config.experts is not None:
        return "experts have no flat instruction"
    if config.rope.scaling == "dynamic":
        return "the dynamic rope rule changes its angles while it generates"
    return None


def decoder_program(config: DecoderConfig) -> Program:
    """Return the program of a decoder for which `why_not_flat` gives no reason."""
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    instructions = [Instruction(op="embed", output="states", weights=(EMBEDDING,))]
    for layer in range(config.num_layers):
        instructions += _layer(config, layer)
    head = EMBEDDING if config.tie_embeddings else "lm_head.weight"
    instructions.append(
        Instruction(
            op="linear",
            input="states",
            output=LOGITS,
            weights=(head,),
            norm="model.norm.weight",
            selected=True,
        )
    )
    angles = rope_angles(config.rope, dim, config.max_positions)
    return Program(
        shape=ProgramShape(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim,
            num_layers=config.num_layers,
            vocab_size=config.vocab_size,
            norm_eps=config.norm_eps,
            inverse_frequencies=tuple(angles.tolist()),
            rope_factor=cosine_factor(config.rope),
        ),
        widths={
            "states": config.hidden_size,
            "qkv": (heads + 2 * kv_heads) * dim,
            "attended": heads * dim,
            "hidden": config.intermediate_size,
        },
        instructions=tuple(instructions),
    )


def _layer(config: DecoderConfig, layer: int) -> list[Instruction]:
    prefix = f"model.layers.{layer}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    slides = config.window is not None and layer in config.window_layers
    return [
        Instruction(
            op="linear",
            input="states",
            output="qkv",
            weights=tuple(f"{attention}.{part}_proj.weight" for part in "qkv"),
            norm=f"{prefix}.input_layernorm.weight",
        ),
        Instruction(
            op="attend",
            input="qkv",
            output="attended",
            layer=layer,
            q_norm=f"{attention}.q_norm.weight" if config.qk_norm else None,
            k_norm=f"{attention}.k_norm.weight" if config.qk_norm else None,
            window=config.window if slides else None,
        ),
        Instruction(
            op="linear",
            input="attended",
            output="states",
            weights=(f"{attention}.o_proj.weight",),
            adds=True,
        ),
        Instruction(
            op="swiglu",
            input="states",
            output="hidden",
            weights=(f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"),
            norm=f"{prefix}.post_attention_layernorm.weight",
        ),
        Instruction(
            op="linear",
            input="hidden",
            output="states",
            weights=(f"{mlp}.down_proj.weight",),
            adds=True,
        ),
    ]
