"""The encoder with a classifier against transformers, there and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from deepseek import hub
from deepseek.errors import ConfigError, FormatError
from deepseek.models import Encoder, EncoderConfig
from deepseek.models.families import build_model, config_from_hf, config_to_hf, state_from_hf
from tests.models.test_encoder import FIELDS, pair
from tests.models.zoo import randomize
from tests.tolerances import assert_logits_equal

NAMES = {0: "zero", 1: "one", 2: "two"}


def classifiers() -> tuple[transformers.BertForSequenceClassification, Encoder]:
    config = transformers.BertConfig(**FIELDS, id2label=NAMES)
    theirs = transformers.BertForSequenceClassification(config).eval()
    randomize(theirs)
    written = theirs.config.to_dict() | {"architectures": ["BertForSequenceClassification"]}
    ours = config_from_hf(written)
    model = build_model(ours)
    model.load_state_dict(state_from_hf(ours, theirs.state_dict()))
    assert isinstance(model, Encoder)
    return theirs, model.eval()


def test_logits_equal_transformers() -> None:
    theirs, model = classifiers()
    assert model.config.labels == ("zero", "one", "two")
    tokens, mask = torch.randint(0, 99, (3, 40)), torch.ones(3, 40, dtype=torch.long)
    mask[1, 17:] = 0
    with torch.no_grad():
        logits = model(tokens, mask).logits
        assert logits is not None
        assert_logits_equal(logits, theirs(tokens, mask).logits)


def test_transformers_reads_what_is_saved(tmp_path: Path) -> None:
    _, model = classifiers()
    hub.save(model, tmp_path / "bundle")
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "bundle", output_loading_info=True
    )
    assert not any(report.values())
    with safe_open(tmp_path / "bundle" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(theirs.state_dict())
    assert theirs.config.id2label == NAMES
    tokens = torch.randint(0, 99, (2, 20))
    again = hub.load(tmp_path / "bundle")
    with torch.no_grad():
        expected = model(tokens).logits
        assert_logits_equal(theirs(tokens).logits, expected)
        assert torch.equal(again(tokens).logits, expected)
    assert again.config == model.config.replace(max_embed_tokens=80)


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    theirs, model = classifiers()
    theirs.save_pretrained(tmp_path)
    found = hub.load(tmp_path)
    assert isinstance(found, Encoder) and found.config.labels == model.config.labels
    tokens = torch.randint(0, 99, (2, 20))
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, model(tokens).logits)


def test_config_goes_there_and_back() -> None:
    _, model = classifiers()
    assert config_from_hf(config_to_hf(model.config)) == model.config
    assert EncoderConfig.from_dict(model.config.to_dict()) == model.config
    plain = config_to_hf(model.config.replace(labels=()))
    assert plain["architectures"] == ["BertModel"] and "id2label" not in plain


def test_labels_of_a_folder_that_names_none() -> None:
    hf = {**FIELDS, "model_type": "bert", "architectures": ["BertForSequenceClassification"]}
    assert config_from_hf(hf).labels == ("LABEL_0", "LABEL_1")
    with pytest.raises(FormatError, match="numbered from 0"):
        config_from_hf(hf | {"id2label": {"0": "a", "2": "b"}})
    with pytest.raises(FormatError, match="labels"):
        config_from_hf(hf | {"id2label": {"0": "a", "1": "a"}})
    with pytest.raises(FormatError, match="problem_type"):
        config_from_hf(hf | {"problem_type": "regression"})


def test_a_fresh_classifier() -> None:
    _, model = pair()
    with pytest.raises(ConfigError, match=r"classifier of Encoder\.classify"):
        model.classify(["text"])
    model.use_labels(["a", "b"])
    assert model.config.labels == ("a", "b")
    logits = model(torch.zeros(3, 5, dtype=torch.long)).logits
    assert logits is not None and logits.shape == (3, 2)
    with pytest.raises(ConfigError, match="at least one"):
        model.use_labels([])
    with pytest.raises(ConfigError, match="all different"):
        model.use_labels(["a", "a"])
    with pytest.raises(ConfigError, match="has_pooler"):
        model.config.replace(has_pooler=False)
