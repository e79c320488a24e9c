"""A fresh model of fewer layers and narrower ones, cut out of its teacher."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

import torch
from torch import Tensor

from deepseek.compress.stage import Stage
from deepseek.compress.work import Outcome, Work
from deepseek.errors import ConfigError, describe
from deepseek.models import Decoder, DecoderConfig, Encoder, EncoderConfig
from deepseek.records import Measurement

_LAYER = re.compile(r"^((?:model\.layers|encoder\.layer)\.)(\d+)\.(.+)$")
_AXES: dict[str, tuple[str, ...]] = {
    r"(embed_tokens|lm_head|(word|position|token_type)_embeddings)\.weight": ("", "hidden"),
    r"self_attn\.[qk]_norm\.weight": ("",),
    r"(norm|layernorm|embeddings\.LayerNorm|output\.LayerNorm)\.(weight|bias)": ("hidden",),
    r"self_attn\.q_proj\.(weight|bias)": ("heads", "hidden"),
    r"self_attn\.[kv]_proj\.(weight|bias)": ("kv_heads", "hidden"),
    r"self_attn\.o_proj\.(weight|bias)": ("hidden", "heads"),
    r"self_attn\.head_gate\.(weight|bias)": ("gates", "hidden"),
    r"mlp\.(gate|up)_proj\.(weight|bias)": ("inner", "hidden"),
    r"mlp\.down_proj\.(weight|bias)": ("hidden", "inner"),
    r"attention\.self\.(query|key|value)\.(weight|bias)": ("heads", "hidden"),
    r"attention\.output\.dense\.(weight|bias)": ("hidden", "heads"),
    r"intermediate\.dense\.(weight|bias)": ("inner", "hidden"),
    r"output\.dense\.(weight|bias)": ("hidden", "inner"),
    r"pooler\.dense\.(weight|bias)": ("hidden", "hidden"),
}
"""What the axes of a parameter count, by the end of its name; a bias has the first of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Student(Stage):
    """Puts a smaller model of the same kind in the place of the model: with its tokenizer, and with
    weights cut out of it. It must be trained before it is of use.

    Layers and heads are picked evenly; channels of the states and of the feed-forwards are those
    of the largest weights.
    """

    kind: Literal["student"] = "student"
    num_layers: int | None = None
    """This, and all below: None for as many as the model has."""
    hidden_size: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    """Of a decoder."""
    intermediate_size: int | None = None

    def __post_init__(self) -> None:
        if not self.changes():
            raise ConfigError(describe("sizes", "Student", "given for at least one", "none"))
        for name, value in self.changes().items():
            if value < 1:
                raise ConfigError(describe(name, "Student", "at least 1", value))

    def changes(self) -> dict[str, int]:
        """Return the sizes that are given."""
        names = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "intermediate_size")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


def make_student(stage: Student, work: Work) -> Outcome:
    """Put the student in the place of the model of `work`; return the share of weights it has.

    Raises:
        ConfigError: a size is larger than the model's, sizes do not fit together, or the model has
            experts or latent attention.
    """
    teacher = work.model
    student = student_of(teacher, stage)
    kept = _num_weights(student) / _num_weights(teacher)
    work.model = student
    sizes: dict[str, object] = dict(stage.changes())
    return (Measurement(name="kept_weights", value=kept, unit="1", conditions=sizes),)


def student_of(teacher: Decoder | Encoder, stage: Student) -> Decoder | Encoder:
    """Return the smaller model in float32, in evaluation mode.

    Args:
        teacher: stays as it is; its tokenizer and bundle are handed on.
        stage: the sizes.

    Raises:
        ConfigError: as `make_student`.
    """
    config = _smaller(teacher.config, stage)
    cut = _Cut(teacher, config)
    if isinstance(config, DecoderConfig):
        student: Decoder | Encoder = Decoder(config)
    else:
        student = Encoder(config)
    theirs = dict(teacher.named_parameters())
    with torch.no_grad():
        for name, value in student.named_parameters():
            origin = cut.origin(name)
            value.copy_(cut.taken(origin, theirs[origin]))
    student.tokenizer, student.bundle = teacher.tokenizer, teacher.bundle
    return student.eval()


def _smaller(
    config: DecoderConfig | EncoderConfig, stage: Student
) -> DecoderConfig | EncoderConfig:
    changes = stage.changes()
    for name, value in changes.items():
        most = getattr(config, name, None)
        if most is None:
            raise ConfigError(describe(name, "Student", "left out for an encoder", value))
        if value > most:
            raise ConfigError(describe(name, "Student", f"at most the model's {most}", value))
    if isinstance(config, EncoderConfig):
        return config.replace(**changes)
    if config.experts is not None or config.latent is not None:
        must, got = "one without experts and latent attention", config.family
        raise ConfigError(describe("model", "Student", must, got))
    picked = _even(config.num_layers, stage.num_layers or config.num_layers).tolist()
    windows = tuple(place for place, layer in enumerate(picked) if layer in config.window_layers)
    return config.replace(**changes, window_layers=windows)


class _Cut:
    """Which layers and channels of a teacher a student has."""

    def __init__(self, teacher: Decoder | Encoder, config: DecoderConfig | EncoderConfig) -> None:
        theirs = teacher.config
        self._layers = _even(theirs.num_layers, config.num_layers).tolist()
        self._values = {name: value.detach().float() for name, value in teacher.named_parameters()}
        self._kept = {
            "hidden": _largest(self._norms("hidden"), config.hidden_size),
            "heads": _even_heads(theirs, config, "heads"),
        }
        if isinstance(config, DecoderConfig) and isinstance(theirs, DecoderConfig):
            self._kept["kv_heads"] = _even_heads(theirs, config, "kv_heads")
            self._kept["gates"] = _even_queries(theirs, config)
        for layer in self._layers:
            norms = self._norms("inner", layer)
            self._kept[f"inner {layer}"] = _largest(norms, config.intermediate_size)

    def origin(self, name: str) -> str:
        """Return the teacher's name of a student's parameter."""
        found = _LAYER.match(name)
        if found is None:
            return name
        return f"{found[1]}{self._layers[int(found[2])]}.{found[3]}"

    def taken(self, origin: str, value: Tensor) -> Tensor:
        """Return what a student has of a teacher's parameter."""
        found = _LAYER.match(origin)
        for axis, meaning in enumerate(_axes_of(origin)[: value.ndim]):
            key = f"inner {found[2]}" if meaning == "inner" and found else meaning
            if key:
                value = value.index_select(axis, self._kept[key])
        return value

    def _norms(self, meaning: str, layer: int | None = None) -> Tensor:
        """Return the squares of all weights of each channel, of one layer or of all; a matrix that
        reads the channel counts as one that writes it."""
        total = torch.zeros(())
        for name, value in self._values.items():
            found = _LAYER.match(name)
            if value.ndim < 2 or (layer is not None and (not found or int(found[2]) != layer)):
                continue
            for axis, of_axis in enumerate(_axes_of(name)):
                if of_axis == meaning:
                    total = total + value.square().sum(1 - axis)
        return total


def _axes_of(name: str) -> tuple[str, ...]:
    for pattern, axes in _AXES.items():
        if re.search(rf"(?:^|[._]){pattern}$", name):
            return axes
    raise ConfigError(describe("model", "Student", "made of known parts", name))


def _even(count: int, kept: int) -> Tensor:
    """Return which of some things are kept, in order: as far from one another as can be, and of two
    or more the first and the last."""
    if kept == 1:
        return torch.tensor([count - 1])
    return torch.tensor([round(each * (count - 1) / (kept - 1)) for each in range(kept)])


def _largest(norms: Tensor, kept: int) -> Tensor:
    return norms.topk(kept).indices.sort().values


def _even_heads(
    theirs: DecoderConfig | EncoderConfig, ours: DecoderConfig | EncoderConfig, kind: str
) -> Tensor:
    """Return the channels of the heads that are kept; of a narrower head evenly picked ones."""
    if isinstance(theirs, EncoderConfig) or isinstance(ours, EncoderConfig):
        width, kept = (each.hidden_size // each.num_heads for each in (theirs, ours))
        if kept > width:
            must = f"at most {width} channels a head"
            raise ConfigError(describe("num_heads", "Student", must, kept))
        heads, channels = _even(theirs.num_heads, ours.num_heads), _even(width, kept)
    else:
        width, channels = theirs.head_dim, torch.arange(theirs.head_dim)
        heads = (
            _even(theirs.num_kv_heads, ours.num_kv_heads)
            if kind == "kv_heads"
            else _even_queries(theirs, ours)
        )
    return (heads[:, None] * width + channels).flatten()


def _even_queries(theirs: DecoderConfig, ours: DecoderConfig) -> Tensor:
    """Return the query heads that are kept: of each key's group evenly picked ones."""
    groups = _even(theirs.num_kv_heads, ours.num_kv_heads)
    size, kept = (each.num_heads // each.num_kv_heads for each in (theirs, ours))
    if kept > size:
        must = f"at most {size} for each of the key heads"
        raise ConfigError(describe("num_heads", "Student", must, kept))
    return (groups[:, None] * size + _even(size, kept)).flatten()


def _num_weights(model: Decoder | Encoder) -> int:
    return sum(value.numel() for value in model.parameters())
