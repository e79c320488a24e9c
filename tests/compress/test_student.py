"""Students cut out of teachers: what they keep is what the teacher computed with."""

from __future__ import annotations

import pytest
import torch

from deepseek.compress.distil import Student, student_of
from deepseek.errors import ConfigError
from deepseek.models import Decoder, Encoder, GateConfig, add_gates
from deepseek.models.presets import preset
from tests.compress.learners import decoder, encoder
from tests.tolerances import assert_close


def test_a_student_of_the_same_sizes_is_the_teacher() -> None:
    tokens = torch.randint(0, 258, (2, 9))
    for teacher in (decoder(1), encoder(1)):
        same = student_of(teacher, Student(num_layers=teacher.config.num_layers))
        state = same.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
        assert same.tokenizer is teacher.tokenizer
        assert torch.equal(same(tokens)[1], teacher(tokens)[1])  # type: ignore[index]


def test_channels_that_do_nothing_are_left_out() -> None:
    """A teacher whose other channels are all zero computes what its student does."""
    student = decoder(2, hidden_size=16, num_layers=2, intermediate_size=20)
    teacher = decoder(1, num_layers=2)
    hidden = torch.tensor([1, 2, 4, 5, 8, 9, 12, 15, 16, 17, 20, 21, 25, 28, 30, 31])
    inner = torch.arange(3, 43, 2)
    axes = {"q_proj": (None, hidden), "k_proj": (None, hidden), "v_proj": (None, hidden)}
    axes |= {"o_proj": (hidden, None), "gate_proj": (inner, hidden), "up_proj": (inner, hidden)}
    axes |= {
        "down_proj": (hidden, inner),
        "embed_tokens": (None, hidden),
        "lm_head": (None, hidden),
    }
    theirs = dict(teacher.named_parameters())
    with torch.no_grad():
        for name, value in student.named_parameters():
            kind = name.split(".")[-2]
            target = theirs[name]
            if kind not in axes:
                target[hidden] = value
                continue
            target.zero_()
            rows, columns = axes[kind]
            rows = torch.arange(target.shape[0]) if rows is None else rows
            columns = torch.arange(target.shape[1]) if columns is None else columns
            target[rows[:, None], columns] = value
        # the same norm over twice the channels
        for name, value in teacher.named_parameters():
            if name.endswith("norm.weight"):
                value /= 2**0.5
    found = student_of(teacher, Student(hidden_size=16, intermediate_size=20))
    with torch.no_grad():
        for name, value in found.named_parameters():
            if name.endswith("norm.weight"):
                value *= 2**0.5
    for name, value in student.named_parameters():
        assert_close(found.get_parameter(name), value)


def test_heads_keep_their_groups() -> None:
    teacher = decoder(1, num_heads=8, num_kv_heads=4)
    small = student_of(teacher, Student(num_heads=2, num_kv_heads=2))
    place = "model.layers.0.self_attn"
    theirs, ours = teacher.get_submodule(place), small.get_submodule(place)
    assert isinstance(small, Decoder)

    def heads(layer: torch.nn.Module, name: str, count: int) -> torch.Tensor:
        return layer.get_parameter(f"{name}.weight").view(count, 8, -1)

    # the keys of groups 0 and 3, and of each the last of its two queries
    assert torch.equal(heads(ours, "k_proj", 2), heads(theirs, "k_proj", 4)[[0, 3]])
    assert torch.equal(heads(ours, "v_proj", 2), heads(theirs, "v_proj", 4)[[0, 3]])
    assert torch.equal(heads(ours, "q_proj", 2), heads(theirs, "q_proj", 8)[[1, 7]])
    small(torch.randint(0, 258, (1, 5)))


@pytest.mark.parametrize("tied", [True, False])
def test_every_part_of_a_decoder_is_known(tied: bool) -> None:
    teacher = decoder(
        1, qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True, tie_embeddings=tied
    )
    add_gates(teacher, GateConfig())
    teacher.config = teacher.config.replace(window=8, window_layers=(1,))
    sizes = Student(num_layers=1, hidden_size=20, num_heads=2, num_kv_heads=2, intermediate_size=9)
    student = student_of(teacher, sizes)
    assert isinstance(student, Decoder) and student.config.window_layers == (0,)
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
    student(torch.randint(0, 258, (1, 5)))


def test_a_narrow_encoder_runs() -> None:
    teacher = encoder(1)
    student = student_of(teacher, Student(num_layers=2, hidden_size=12, num_heads=3))
    assert isinstance(student, Encoder)
    assert student.embed(["one", "another one"]).shape == (2, 12)


def test_sizes_that_cannot_be_are_refused() -> None:
    for sizes, name in (
        ({"hidden_size": 64}, "hidden_size"),
        ({"num_heads": 8}, "num_heads"),
        ({"num_kv_heads": 1}, "num_heads"),
        ({"num_heads": 3}, "num_kv_heads"),
    ):
        with pytest.raises(ConfigError, match=name):
            student_of(decoder(1), Student.from_dict(sizes))
    for sizes, name in (
        ({"num_kv_heads": 2}, "num_kv_heads"),
        ({"hidden_size": 30}, "hidden_size"),
        ({"num_heads": 2}, "num_heads"),
    ):
        with pytest.raises(ConfigError, match=name):
            student_of(encoder(1), Student.from_dict(sizes))
    with pytest.raises(ConfigError, match="sizes"):
        Student()
    with pytest.raises(ConfigError, match="num_layers"):
        Student(num_layers=0)
    with pytest.raises(ConfigError, match="experts"):
        student_of(Decoder(preset("r1-67b").sized("tiny")), Student(num_layers=1))
