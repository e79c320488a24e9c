"""The static memory plan: what is read is what was written, and room is not wasted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deepseek.generate.flat import decoder_program
from deepseek.graph import Instruction, plan_memory
from deepseek.models import DecoderConfig

NAMES = [f"b{place}" for place in range(6)]


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[Instruction], dict[str, int]]:
    """Return instructions that read what was written, and widths."""
    instructions = [Instruction(op="embed", output="b0")]
    for _ in range(draw(st.integers(1, 15))):
        written = [item.output for item in instructions]
        instructions.append(
            Instruction(
                op="linear",
                input=draw(st.sampled_from(written)),
                output=draw(st.sampled_from(NAMES)),
            )
        )
    return instructions, {name: draw(st.integers(1, 100)) for name in NAMES}


@given(programs())
def test_what_is_read_is_what_was_written(
    drawn: tuple[list[Instruction], dict[str, int]],
) -> None:
    instructions, widths = drawn
    offsets, total = plan_memory(instructions, widths)
    assert total == max(offsets[name] + widths[name] for name in offsets)
    assert total <= sum(widths[name] for name in offsets)
    # run it: every buffer holds the number of the instruction that set it last
    memory: list[tuple[str, int] | None] = [None] * total
    held: dict[str, int] = {}
    for place, item in enumerate(instructions):
        if item.input is not None:
            start = offsets[item.input]
            kept = memory[start : start + widths[item.input]]
            assert kept == [(item.input, held[item.input])] * widths[item.input]
        start = offsets[item.output]
        memory[start : start + widths[item.output]] = [(item.output, place)] * widths[item.output]
        held[item.output] = place


def test_a_decoder_shares_the_memory_of_attention_and_feed_forward() -> None:
    config = DecoderConfig(
        vocab_size=100,
        hidden_size=64,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=256,
        tie_embeddings=True,
    )
    program = decoder_program(config)
    _, total = plan_memory(program.instructions, program.widths)
    assert total == 64 + 64 + 256, "states and the picked rows of the last, beside the widest"
    lines = program.text().splitlines()
    assert len(lines) == 3 + 5 * 3
    assert lines[3].endswith("states += linear(attended; model.layers.0.self_attn.o_proj.weight)")
    assert "last = copy(states; )" in lines[13]
    assert "norm(last)" in lines[-1]
