"""The model that others learn from: its predictions as a loss, and the text that it writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from deepseek.data import Document, Tokenizer
from deepseek.errors import ConfigError, describe
from deepseek.generate import Sampling, generate
from deepseek.models import Decoder, Encoder
from deepseek.ops.cross_entropy import IGNORED, linear_cross_entropy
from deepseek.ops.distillation import linear_divergence

_ROWS = 32
"""Most texts that are written at once."""
_TEXT_TOKENS = 480
"""Longest answer or free text."""
_QUESTION_TOKENS = 120
_SAMPLING = Sampling(temperature=1.0, top_p=0.95)
"""Wide enough to be varied; the last twentieth is where text falls apart."""


def taught_loss(
    model: Decoder, teacher: Decoder, tokens: Tensor, counted: Tensor, is_taught: Tensor
) -> Tensor:
    """Return the sum of the losses of the counted tokens, in nats: KL(teacher || model) in rows
    that are taught, cross-entropy in the others.

    Args:
        model: with a whole head, not one in low rank.
        teacher: of the same vocabulary.
        tokens: int64 [B, T].
        counted: bool [B, T], the tokens to be predicted.
        is_taught: bool [B].
    """
    states = model.final_states(tokens)[:, :-1]
    counted = counted[:, 1:]
    labels = torch.where(counted, tokens[:, 1:], IGNORED)
    total = states.new_zeros((), dtype=torch.float32)
    weight = model.lm_head.weight
    own = ~is_taught
    if bool(own.any()):
        total = total + linear_cross_entropy(
            states[own].flatten(0, 1), weight, labels[own].flatten()
        )
    if bool(is_taught.any()):
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            taught = teacher.final_states(tokens[is_taught])[:, :-1]
        total = total + linear_divergence(
            states[is_taught].flatten(0, 1),
            weight,
            taught.flatten(0, 1),
            teacher.lm_head.weight.detach(),
            counted[is_taught].flatten(),
        )
    return total


def check_teacher(model: Decoder | Encoder, teacher: Decoder | Encoder) -> None:
    """Refuse a teacher that speaks of other tokens.

    Raises:
        ConfigError: vocabulary or tokenizer differ.
    """
    ours, theirs = model.tokenizer, teacher.tokenizer
    is_same = model.config.vocab_size == teacher.config.vocab_size
    if ours is not None and theirs is not None:
        is_same = is_same and ours.backend.to_str() == theirs.backend.to_str()
    if not is_same:
        must = "of the model's tokenizer"
        raise ConfigError(describe("teacher", "the run", must, "one of another"))


def write_texts(
    teacher: Decoder | None,
    path: Path,
    *,
    num_tokens: int,
    seed: int,
    goes_on: Callable[[], None],
    report: Callable[[str, float], None],
) -> Iterator[Document]:
    """Let a teacher write, and yield its texts; what a file holds already is not written again.

    Half of the texts are conversations where there is a chat template: the model is given the
    opening of a user's turn, writes the turn, and answers it (Xu et al., "Magpie" (2406.08464),
    section 2.1). The others begin behind the token that ends a text. All of each is to be learned.

    Args:
        teacher: with a tokenizer; None where all is written.
        path: a file of lines, one a batch of texts, appended to.
        num_tokens: stop when there are so many.
        seed: of the sampling; each batch has its own.
        goes_on: called between batches; raises where the work is to stop.
        report: told what is done, and the share.
    """
    written, batch = 0, 0
    for texts in _kept(path):
        batch += 1
        written += sum(len(text) for text in texts)
        yield from (Document(text) for text in texts)
    if written >= num_tokens:
        return
    if teacher is None:
        must = "there until its text is written"
        raise ConfigError(describe("teacher", "the run", must, None, "Train first"))
    rows = max(1, min(_ROWS, num_tokens // _TEXT_TOKENS))
    writer = _Writer(teacher, seed, rows)
    while written < num_tokens:
        goes_on()
        report(f"the teacher writes, {written} of {num_tokens} tokens", written / num_tokens)
        texts = writer.write(batch)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(texts) + "\n")
        batch += 1
        written += sum(len(text) for text in texts)
        yield from (Document(text) for text in texts)


def _kept(path: Path) -> list[list[list[int]]]:
    """Return the batches of a file, and cut off one that was not written to its end."""
    if not path.is_file():
        return []
    found = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        path.write_text("".join(whole), encoding="utf-8")
    found += [json.loads(line) for line in whole]
    return found


class _Writer:
    def __init__(self, teacher: Decoder, seed: int, rows: int) -> None:
        tokenizer = teacher.tokenizer
        if tokenizer is None:
            raise ConfigError(describe("tokenizer", "the teacher", "there", None))
        self._teacher, self._tokenizer, self._seed = teacher, tokenizer, seed
        self._rows = rows
        self._opening = _user_opening(tokenizer)

    def write(self, batch: int) -> list[list[int]]:
        """Return the tokens of some texts: free ones, and in every other batch conversations."""
        sampling = _SAMPLING.replace(seed=(self._seed << 20) + 2 * batch * _ROWS)
        if self._opening is None or batch % 2:
            return self._write_free(sampling)
        return self._write_conversations(self._opening, sampling)

    def _write_free(self, sampling: Sampling) -> list[list[int]]:
        start = self._begin()
        found = self._write([[start]] * self._rows, _TEXT_TOKENS, sampling)
        return [[start, *text] for text in found if text]

    def _write_conversations(self, opening: list[int], sampling: Sampling) -> list[list[int]]:
        turns = self._write([opening] * self._rows, _QUESTION_TOKENS, sampling)
        questions = [self._tokenizer.decode(turn).strip() for turn in turns]
        prompts = [
            self._tokenizer.encode(
                self._tokenizer.apply_chat_template([{"role": "user", "content": question}]),
                add_special_tokens=False,
            )
            for question in questions
            if question
        ]
        later = sampling.replace(seed=(sampling.seed or 0) + _ROWS)
        answers = self._write(prompts, _TEXT_TOKENS, later)
        return [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]

    def _write(
        self, prompts: list[list[int]], max_tokens: int, sampling: Sampling
    ) -> list[list[int]]:
        room = self._teacher.config.max_positions - max(map(len, prompts), default=0)
        most = max(1, min(max_tokens, room))
        made = generate(self._teacher, prompts, max_tokens=most, sampling=sampling)
        return [list(each.token_ids) for each in made] if isinstance(made, list) else []

    def _begin(self) -> int:
        """Return the token that a free text follows."""
        for name in ("<|endoftext|>", "</s>"):
            token = self._tokenizer.token_to_id(name)
            if token is not None:
                return token
        tokenizer = self._tokenizer
        for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            if token is not None:
                return token
        must = "one with a token that begins or ends a text"
        raise ConfigError(describe("tokenizer", "the teacher", must, "none of them"))


def _user_opening(tokenizer: Tokenizer) -> list[int] | None:
    """Return what stands before a user's words in a conversation, or None without a template."""
    if tokenizer.chat_template is None:
        return None
    mark = "What the user says."
    text = tokenizer.apply_chat_template([{"role": "user", "content": mark}])
    before, found, _ = text.partition(mark)
    return tokenizer.encode(before, add_special_tokens=False) if found else None
