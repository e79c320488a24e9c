"""The program of a decoder: its whole pass written out as a flat list of instructions.

It says the same mathematics as `models.decoder`, without its modules. It is made from the decoder's
config alone; which weights it wants is in the instructions, by the decoder's own names. Loads no
torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from deepseek.graph import Instruction, Program, ProgramShape
from deepseek.graph.program import LOGITS
from deepseek.models.angles import cosine_factor, rope_angles
from deepseek.models.config import DecoderConfig, ExpertsConfig
from deepseek.ops.scheme import Form

EMBEDDING = "model.embed_tokens.weight"


def why_not_flat(config: DecoderConfig) -> str | None:
    """Return why a decoder of this config has no flat program, or None if it has one."""
    if config.latent is not None:
        return "latent attention has no flat instruction"
    if config.positions != "rope":
        return "ALiBi has no flat instruction"
    if config.pattern is not None:
        return "a static pattern of attention has no flat instruction"
    if config.rope.scaling == "dynamic":
        return "the dynamic rope rule changes its angles while it generates"
    return None


def decoder_program(config: DecoderConfig) -> Program:
    """Return the program of a decoder for which `why_not_flat` gives no reason."""
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    instructions = [Instruction(op="embed", output="states", weights=(EMBEDDING,))]
    for layer in range(config.num_layers):
        instructions += _layer(config, layer)
    instructions = picked(instructions)
    head = EMBEDDING if config.tie_embeddings else "lm_head.weight"
    instructions.append(
        Instruction(
            op="linear",
            input="last",
            output=LOGITS,
            weights=(head,),
            norm="model.norm.weight",
            rows="picked",
            is_head=True,
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
            "last": config.hidden_size,
            "qkv": (heads + 2 * kv_heads) * dim,
            "gates": 0 if config.gates is None else heads,
            "attended": heads * dim,
            "hidden": max(config.intermediate_size, _shared_width(config.experts)),
            "routes": 0 if config.experts is None else config.experts.num_experts,
        },
        instructions=tuple(instructions),
    )


def sharing_weights(program: Program) -> list[tuple[str, ...]]:
    """Return the weights whose products share their prepared inputs, and so must be held in one
    form: query, key and value; gate and up; gate and up of all experts; down of all experts. Every
    other weight stands alone. Whoever chooses bits by weight chooses by these units."""
    units: list[tuple[str, ...]] = []
    for item in program.instructions:
        parts = [item.weights]
        if item.op == "experts":
            downs = item.weights[2::3]
            parts = [tuple(name for name in item.weights if name not in set(downs)), downs]
        units += [part for part in parts if part]
    return list(dict.fromkeys(units))


def why_mixed(program: Program, forms: Mapping[str, Form | None]) -> str | None:
    """Return which weights share inputs and yet have different forms, or which has none; None where
    all can be held.

    Args:
        program: of the decoder.
        forms: of its weights.
    """
    for unit in sharing_weights(program):
        first = forms[unit[0]]
        for name in unit:
            form = forms[name]
            if form is None or first is None:
                return f"the grid of {name} has groups that the engine does not hold"
            if form != first:
                return (
                    f"{unit[0]} is {first.text}, and {name}, which shares its inputs, {form.text}"
                )
    return None


def picked(instructions: list[Instruction]) -> list[Instruction]:
    """Return the instructions with all behind the last attention on those rows alone whose logits
    were asked for: a prompt needs one."""
    start = max(place for place, item in enumerate(instructions) if item.op == "attend") + 1
    copy = Instruction(op="copy", input="states", output="last", rows="pick")

    def on_last(item: Instruction) -> Instruction:
        return dataclasses.replace(
            item,
            input="last" if item.input == "states" else item.input,
            output="last" if item.output == "states" else item.output,
            rows="pick" if item.input == "attended" else "picked",
        )

    return [*instructions[:start], copy, *map(on_last, instructions[start:])]


def _shared_width(experts: ExpertsConfig | None) -> int:
    return 0 if experts is None else experts.num_shared * experts.width


def _layer(config: DecoderConfig, layer: int) -> list[Instruction]:
    prefix = f"model.layers.{layer}"
    norm = f"{prefix}.post_attention_layernorm.weight"
    experts = config.experts
    if experts is None or layer in experts.dense_layers:
        after = _feed_forward(f"{prefix}.mlp", norm)
    else:
        after = _experts(f"{prefix}.mlp", norm, experts)
    return _attention(config, layer, prefix) + after


def _attention(config: DecoderConfig, layer: int, prefix: str) -> list[Instruction]:
    attention = f"{prefix}.self_attn"
    norm = f"{prefix}.input_layernorm.weight"
    slides = config.window is not None and layer in config.window_layers
    return [
        Instruction(
            op="linear",
            input="states",
            output="qkv",
            weights=tuple(f"{attention}.{part}_proj.weight" for part in "qkv"),
            norm=norm,
        ),
        *_gates(config, attention, norm),
        Instruction(
            op="attend",
            input="qkv",
            output="attended",
            layer=layer,
            q_norm=f"{attention}.q_norm.weight" if config.qk_norm else None,
            k_norm=f"{attention}.k_norm.weight" if config.qk_norm else None,
            window=config.window if slides else None,
            gates=None if config.gates is None else "gates",
        ),
        Instruction(
            op="linear",
            input="attended",
            output="states",
            weights=(f"{attention}.o_proj.weight",),
            adds=True,
        ),
    ]


def _gates(config: DecoderConfig, attention: str, norm: str) -> list[Instruction]:
    if config.gates is None:
        return []
    gates = Instruction(
        op="linear",
        input="states",
        output="gates",
        weights=(f"{attention}.head_gate.weight",),
        norm=norm,
        is_exact=True,
        closes_below=config.gates.threshold,
    )
    return [gates]


def _feed_forward(mlp: str, norm: str) -> list[Instruction]:
    return [
        Instruction(
            op="swiglu",
            input="states",
            output="hidden",
            weights=(f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"),
            norm=norm,
        ),
        Instruction(
            op="linear",
            input="hidden",
            output="states",
            weights=(f"{mlp}.down_proj.weight",),
            adds=True,
        ),
    ]


def _experts(mlp: str, norm: str, experts: ExpertsConfig) -> list[Instruction]:
    """The routed experts change the states after the shared ones have read them."""
    router = f"{mlp}.gate"
    routing = Instruction(
        op="linear",
        input="states",
        output="routes",
        weights=(f"{router}.weight",),
        norm=norm,
        is_exact=True,
    )
    routed = Instruction(
        op="experts",
        input="states",
        routes="routes",
        output="states",
        adds=True,
        weights=tuple(
            f"{mlp}.experts.{index}.{part}_proj.weight"
            for index in range(experts.num_experts)
            for part in ("gate", "up", "down")
        ),
        norm=norm,
        balance=f"{router}.e_score_correction_bias" if experts.score == "sigmoid" else None,
        num_active=experts.num_active,
        num_groups=experts.num_groups,
        num_active_groups=experts.num_active_groups,
        normalizes=experts.normalize,
        scale=experts.scale,
    )
    shared = _feed_forward(f"{mlp}.shared_experts", norm) if experts.num_shared else []
    return [routing, *shared[:1], routed, *shared[1:]]
