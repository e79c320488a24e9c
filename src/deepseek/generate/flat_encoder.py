"""The program of an encoder: its whole pass written out as a flat list of instructions.

It says the same mathematics as `models.encoder`, without its modules. Loads no torch.
"""

from __future__ import annotations

from deepseek.generate.flat import picked
from deepseek.graph import Instruction, Program, ProgramShape
from deepseek.graph.program import LOGITS
from deepseek.models.config import EncoderConfig

EMBEDDING = "embeddings.word_embeddings.weight"
MOST_HEAD_DIM = 256


def why_encoder_not_flat(config: EncoderConfig) -> str | None:
    """Return why an encoder of this config has no flat program, or None if it has one."""
    head_dim = config.hidden_size // config.num_heads
    if head_dim > MOST_HEAD_DIM:
        return f"its heads have {head_dim} channels, and attention has room for {MOST_HEAD_DIM}"
    return None


def encoder_program(config: EncoderConfig) -> Program:
    """Return the program of an encoder for which `why_encoder_not_flat` gives no reason.

    Its output is the last states, or what the classifier makes of them. Every layer keeps keys and
    values in the same pages: nobody reads them behind the layer.
    """
    hidden, heads = config.hidden_size, config.num_heads
    instructions = [
        Instruction(
            op="embed",
            output="states",
            weights=(EMBEDDING,),
            positions="embeddings.position_embeddings.weight",
            types="embeddings.token_type_embeddings.weight",
        ),
        _norm("embeddings.LayerNorm"),
    ]
    for layer in range(config.num_layers):
        instructions += _layer(config, f"encoder.layer.{layer}")
    return Program(
        shape=ProgramShape(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=hidden // heads,
            num_layers=1,
            vocab_size=config.vocab_size,
            norm_eps=config.norm_eps,
            inverse_frequencies=(),
            num_outputs=len(config.labels) or hidden,
            is_causal=False,
        ),
        widths={
            "states": hidden,
            "last": hidden,
            "qkv": 3 * hidden,
            "attended": hidden,
            "hidden": config.intermediate_size,
            "pooled": hidden,
        },
        instructions=(*picked(instructions), *_head(config)),
    )


def _head(config: EncoderConfig) -> list[Instruction]:
    if not config.labels:
        return [Instruction(op="copy", input="last", output=LOGITS, rows="picked", is_head=True)]
    pooler = Instruction(
        op="linear",
        input="last",
        output="pooled",
        weights=("pooler.dense.weight",),
        activation="tanh",
        rows="picked",
        is_head=True,
    )
    classifier = Instruction(
        op="linear",
        input="pooled",
        output=LOGITS,
        weights=("classifier.weight",),
        rows="picked",
        is_exact=True,
    )
    return [pooler, classifier]


def _norm(name: str) -> Instruction:
    return Instruction(
        op="layer_norm",
        input="states",
        output="states",
        norm=f"{name}.weight",
        bias=f"{name}.bias",
    )


def _layer(config: EncoderConfig, prefix: str) -> list[Instruction]:
    attention = f"{prefix}.attention"
    return [
        Instruction(
            op="linear",
            input="states",
            output="qkv",
            weights=tuple(f"{attention}.self.{part}.weight" for part in ("query", "key", "value")),
        ),
        Instruction(op="attend", input="qkv", output="attended"),
        _added("attended", f"{attention}.output.dense.weight"),
        _norm(f"{attention}.output.LayerNorm"),
        Instruction(
            op="linear",
            input="states",
            output="hidden",
            weights=(f"{prefix}.intermediate.dense.weight",),
            activation=config.activation,
        ),
        _added("hidden", f"{prefix}.output.dense.weight"),
        _norm(f"{prefix}.output.LayerNorm"),
    ]


def _added(source: str, weight: str) -> Instruction:
    return Instruction(op="linear", input=source, output="states", weights=(weight,), adds=True)
