"""Answers of a given form: every path a random model can take stays inside, bad grammars end
quickly."""

from __future__ import annotations

import json
import re
import time

import numpy as np
import pytest

from deepseek.errors import ConfigError
from deepseek.serve.generation import Grammar
from deepseek.serve.runtime.grammar import MAX_GRAMMARS, Grammars
from tests.generate.conftest import byte_tokenizer

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"enum": ["ann", "bob"]}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)
TOKENIZER = byte_tokenizer(eos_token="<end>")
END = TOKENIZER.eos_token_ids[0]
VOCAB = 300
"""More than the tokenizer has, as models' logits mostly are."""


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKENIZER, VOCAB)


def draw(grammars: Grammars, grammar: Grammar, seed: int, most: int = 200) -> str:
    """Return a text that random logits write within a grammar."""
    rng, matcher = np.random.default_rng(seed), grammars.matcher(grammar)
    tokens: list[int] = []
    while not matcher.is_complete and len(tokens) < most:
        logits = rng.normal(0, 1, VOCAB).astype(np.float32)
        matcher.mask(logits)
        assert np.isneginf(logits[TOKENIZER.vocab_size :]).all()
        token = int(logits.argmax())
        matcher.take(token)
        if token == END:
            break
        tokens.append(token)
    return TOKENIZER.decode(tokens)


@pytest.mark.parametrize("seed", range(10))
def test_a_schema_holds(grammars: Grammars, seed: int) -> None:
    text = draw(grammars, Grammar(kind="json_schema", text=SCHEMA), seed, 2000)
    found = json.loads(text)
    assert text == json.dumps(found)  # without further white space
    assert set(found) == {"name", "age"} and found["name"] in ("ann", "bob")
    assert isinstance(found["age"], int) and found["age"] <= 99


@pytest.mark.parametrize("seed", range(10))
def test_a_regex_holds(grammars: Grammars, seed: int) -> None:
    pattern = r"(yes|no), [0-9]{2,4}!"
    assert re.fullmatch(pattern, draw(grammars, Grammar(kind="regex", text=pattern), seed))


def test_a_lark_grammar_holds(grammars: Grammars) -> None:
    grammar = Grammar(kind="lark", text='start: "a"+ "b"')
    assert re.fullmatch("a+b", draw(grammars, grammar, 0))


def test_json_objects_begin_with_a_brace(grammars: Grammars) -> None:
    assert draw(grammars, Grammar(kind="json_object", text=""), 0).lstrip().startswith("{")


def test_two_answers_of_one_grammar_do_not_share_their_place(grammars: Grammars) -> None:
    grammar = Grammar(kind="regex", text="abc")
    first, second = grammars.matcher(grammar), grammars.matcher(grammar)
    first.take(TOKENIZER.encode("a")[0])
    logits = np.zeros(VOCAB, np.float32)
    second.mask(logits)
    assert np.flatnonzero(np.isfinite(logits)).tolist() == TOKENIZER.encode("a")


BAD = {
    "not JSON": Grammar(kind="json_schema", text="{"),
    "no schema": Grammar(kind="json_schema", text='{"type": "foo"}'),
    "empty lark": Grammar(kind="lark", text=""),
    "broken lark": Grammar(kind="lark", text="start: ("),
    "look-ahead": Grammar(kind="regex", text="(?=a)b"),
    "back reference": Grammar(kind="regex", text=r"(a)\1"),
    "60,000 groups": Grammar(kind="regex", text="(" * 60_000 + "a" + ")" * 60_000),
    "50,000 values": Grammar(
        kind="json_schema", text=json.dumps({"enum": [f"v{i}" for i in range(50_000)]})
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_attack_11_and_13_a_bad_grammar_is_refused_in_one_line(
    grammars: Grammars, case: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        grammars.matcher(BAD[case])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


COSTLY = {
    "redos": Grammar(kind="regex", text="(a+)+b"),
    "redos of dots": Grammar(kind="regex", text="(.*a){30}"),
    "counted thrice": Grammar(kind="regex", text="((a{0,100}){0,100}){0,100}"),
    "a million": Grammar(kind="regex", text="[0-9]{1000000}"),
    "2,000 alternatives": Grammar(kind="regex", text="|".join(f"x{i}.*y" for i in range(2000))),
    "a billion items": Grammar(
        kind="json_schema",
        text=json.dumps({"type": "array", "items": {"type": "integer"}, "minItems": 10**9}),
    ),
    "a schema of itself": Grammar(kind="json_schema", text='{"$ref": "#"}'),
}


@pytest.mark.parametrize("case", list(COSTLY))
def test_attack_11_a_costly_grammar_costs_little(grammars: Grammars, case: str) -> None:
    """It is followed, refused or given up, within seconds on a busy machine."""
    start_s = time.process_time()
    try:
        draw(grammars, COSTLY[case], 0)
    except Exception as error:
        assert type(error).__name__ in ("ConfigError", "CapacityError")
    assert time.process_time() - start_s < 5


def test_only_the_last_grammars_are_kept(grammars: Grammars) -> None:
    for number in range(MAX_GRAMMARS + 5):
        grammars.matcher(Grammar(kind="regex", text=f"a{{{number + 1}}}"))
    assert len(grammars._compiled) == MAX_GRAMMARS
