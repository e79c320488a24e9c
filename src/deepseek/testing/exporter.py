"""`check_exporter`: a format's files are whole or not there, and compute what their source
computes."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from deepseek.errors import ConfigError, DeepseekError, FormatError, VerifyError, describe
from deepseek.export import Exported, Format, export, open_exported
from deepseek.export.formats import Progress, kind_of
from deepseek.export.manifest import MANIFEST
from deepseek.hub import Bundle, save
from deepseek.models import Decoder, DecoderConfig, Encoder, EncoderConfig
from deepseek.models.config import ExpertsConfig, GateConfig, LatentConfig, Pattern, RopeConfig
from deepseek.testing.reading import ReaderTrial

_PLAIN = DecoderConfig(
    vocab_size=96,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=48,
    max_positions=64,
    tie_embeddings=True,
)
_OWN = _PLAIN.replace(family="deepseek_stack")
_ENCODER = EncoderConfig(
    vocab_size=96,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    intermediate_size=48,
    max_positions=64,
)
_LATENT = LatentConfig(kv_rank=16, nope_dim=8, rope_dim=4, value_dim=6)
MODELS: dict[str, DecoderConfig | EncoderConfig] = {
    "decoder": _PLAIN,
    "encoder": _ENCODER,
    "classifier": _ENCODER.replace(labels=("no", "yes", "perhaps")),
    "biases": _PLAIN.replace(family="qwen2", qkv_bias=True, tie_embeddings=False),
    "norms of queries and keys": _PLAIN.replace(family="qwen3", qk_norm=True),
    "a window": _PLAIN.replace(family="mistral", window=9, window_layers=(0, 1)),
    "scaled rope": _PLAIN.replace(rope=RopeConfig(scaling="linear", factor=2.0)),
    "dynamic rope": _PLAIN.replace(rope=RopeConfig(scaling="dynamic", factor=2.0)),
    "ALiBi": _OWN.replace(positions="alibi"),
    "gates": _OWN.replace(gates=GateConfig(threshold=0.8)),
    "latent attention": _OWN.replace(latent=_LATENT),
    "experts": _OWN.replace(experts=ExpertsConfig(num_experts=4, num_active=2, width=24)),
    "a pattern": _OWN.replace(pattern=Pattern(recent=1, first=0, block_size=16)),
}
"""By what is special about them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExporterProof:
    """What was found of a format; everything that must hold held."""

    format: str
    served: tuple[str, ...]
    """Models that were written and, where it has a reader, answered as their source."""
    refused: tuple[str, ...]
    """Models that were refused by a ConfigError, with nothing left behind."""
    is_read: bool
    """It has a reader: what was written was run."""
    has_cache: bool
    """Texts can be read in pieces."""
    has_layers: bool
    """States behind each layer can be had."""
    largest_error: float
    """Of answers, states and steps: the largest difference from the source."""

    @property
    def text(self) -> str:
        """The proof as a person reads it."""
        read = f"largest difference {self.largest_error:.2g}" if self.is_read else "not run"
        parts = [f"{len(self.served)} models written, {len(self.refused)} refused", read]
        parts += ["with steps"] if self.has_cache else []
        parts += ["with layers"] if self.has_layers else []
        return f"{self.format}: {', '.join(parts)}"


def check_exporter(
    format: Format, *, models: Sequence[str] = tuple(MODELS), atol: float = 1e-4, **options: object
) -> ExporterProof:
    """Hold a format's writer and reader to their contract, and return what was found.

    Small random models go through `export`: each is refused by a ConfigError with nothing left
    behind, or written. What is written lies in its folder alone, leaves the source as it was and
    does not need it any more; a second export takes the place of the first, and one that is
    interrupted leaves it. Read back, it answers as the source: one token, long texts, several rows,
    padding on either side and on both; texts read in pieces, with states that do not change; states
    behind layers, where it has them. What is too long is refused. A file that is cut or gone is a
    FormatError.

    Args:
        format: to be judged; it need not be registered. Without a reader it is only written.
        models: which of `MODELS` to try, those of other kinds than the format's apart; the first is
            tried most.
        atol: largest difference allowed of an answer of about 1.
        options: for the writer.

    Raises:
        VerifyError: names the first model for which something does not hold, and what was got.
    """
    served, refused, found = [], [], []
    for name in models:
        with tempfile.TemporaryDirectory() as place:
            trial = _Trial(format, name, Path(place), options)
            if trial.kind not in format.kinds:
                trial.refuse()
            elif not trial.write():
                refused.append(name)
            else:
                if not served:
                    trial.prove_whole()
                served.append(name)
                if format.reader is not None:
                    found.append(trial.read(atol))
    if not served:
        must = "able to hold one of the models tried"
        raise VerifyError(describe("writer", format.name, must, f"{refused} refused"))
    return ExporterProof(
        format=format.name,
        served=tuple(served),
        refused=tuple(refused),
        is_read=format.reader is not None,
        has_cache=any(each.has_cache for each in found),
        has_layers=any(each.has_layers for each in found),
        largest_error=max((each.largest_error for each in found), default=0.0),
    )


class _Trial:
    """A format with one model."""

    def __init__(self, format: Format, name: str, place: Path, options: dict[str, object]) -> None:
        self.format, self.name, self.options = format, name, options
        self.model = _model(MODELS[name])
        self.source, self.target = place / "source", place / "made"
        save(self.model, self.source)
        self.bundle = Bundle.open(self.source)
        self.kind, self.before = kind_of(self.bundle), _contents(self.source)

    def fail(self, name: str, must: str, got: object, cause: BaseException | None = None) -> None:
        owner = f"{self.format.name!r} for {self.name}"
        raise VerifyError(describe(name, owner, must, got)) from cause

    def export(self, progress: Progress | None = None) -> Exported:
        return export(self.bundle, self.format, self.target, progress=progress, **self.options)

    def refuse(self) -> None:
        """Fail unless a kind that the format does not name is refused."""
        try:
            self.export()
        except ConfigError:
            return self._nothing_left()
        return self.fail("model", "refused by a ConfigError", "written")

    def write(self) -> bool:
        """Return whether the model was written, which it was wholly and in its place."""
        try:
            made = self.export()
        except ConfigError:
            self._nothing_left()
            return False
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
            self.fail("writing", "done, or refused by a ConfigError", got, error)
            raise
        self._in_place(made)
        return True

    def _in_place(self, made: Exported) -> None:
        if not made.files:
            self.fail("files", "named, one at least", "none")
        for path in made.files:
            if not path.resolve().is_relative_to(self.target.resolve()):
                self.fail("file", "in the folder that was given", str(path))
            if not path.is_file() or path.is_symlink() or not path.stat().st_size:
                self.fail("file", "there, and not empty or a link", path.name)
        if made.format != self.format.name:
            self.fail("format", f"named {self.format.name!r} in what it made", made.format)
        self._only(self.source, self.target)
        if _contents(self.source) != self.before:
            self.fail("source", "left as it was", "other files")

    def _nothing_left(self) -> None:
        self._only(self.source)

    def _only(self, *paths: Path) -> None:
        left = {each.name for each in self.source.parent.iterdir()} - {path.name for path in paths}
        if left:
            self.fail("folder beside it", "left alone", sorted(left))

    def prove_whole(self) -> None:
        """Fail unless an export takes another's place at once or not at all, and damage is seen."""
        before = _contents(self.target)
        if self.format.reports:
            self._interrupt(before)
        (self.target / "left over").write_text("of an earlier export")
        self.export()
        if set(_contents(self.target)) != set(before):
            self.fail("second export", "of the same files", sorted(_contents(self.target)))
        if self.format.reader is not None:
            for name in before:
                self._damage(name)

    def _interrupt(self, before: dict[str, bytes]) -> None:
        def stop(words: str, share: float | None) -> None:
            raise KeyboardInterrupt

        try:
            self.export(progress=stop)
        except KeyboardInterrupt:
            if _contents(self.target) != before:
                self.fail("earlier export", "left as it was by an interrupted one", "other files")
            return self._only(self.source, self.target)
        return self.fail("progress", "called, as `reports` says", "not called")

    def _damage(self, name: str) -> None:
        path = self.target / name
        content = path.read_bytes()
        cuts: tuple[Callable[[], object], ...] = (
            lambda: path.write_bytes(content[: len(content) // 2]),
            path.unlink,
        )
        for cut in cuts:
            cut()
            try:
                open_exported(self.target, self.format)
            except FormatError:
                path.write_bytes(content)
                continue
            except Exception as error:
                self.fail(f"{name}, damaged", "a FormatError", f"{type(error).__name__}: {error}")
            if name != MANIFEST or path.exists():  # without a manifest there is nothing to go by
                self.fail(f"{name}, damaged", "a FormatError", "no error")
            path.write_bytes(content)

    def read(self, atol: float) -> ReaderTrial:
        """Return what was found of the reader; the source is gone when it reads."""
        self.source.rename(self.source.with_name("moved"))
        try:
            reader = open_exported(self.target, self.format)
        except DeepseekError as error:
            self.fail("reading", "done, without the source", str(error), error)
            raise
        if reader.kind != self.kind:
            self.fail("kind", f"{self.kind}, as the source's", reader.kind)
        trial = ReaderTrial(reader, self.model, f"{self.format.name!r} for {self.name}", atol)
        trial.prove()
        return trial


def _model(config: DecoderConfig | EncoderConfig) -> Decoder | Encoder:
    """Return a model with random weights, norms and biases, the same each time."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = Decoder(config) if isinstance(config, DecoderConfig) else Encoder(config)
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name.lower() and name.endswith("weight")
            torch.nn.init.normal_(parameter, 1.0 if is_norm else 0.0, 0.2)
    return model.eval().requires_grad_(False)


def _contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
