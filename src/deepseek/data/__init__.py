"""Text in and out: tokenizers, chat templates and incremental decoding; corpora of tokens and the
order in which training reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek.data.incremental import IncrementalDecoder
from deepseek.data.tokenizer import Tokenizer
from deepseek.registry import lazy_names

if TYPE_CHECKING:
    from deepseek.data.conversations import conversation
    from deepseek.data.corpus import Document, TokenCorpus, write_corpus
    from deepseek.data.labelled import LabelledText, label_names, read_labelled
    from deepseek.data.order import SampleOrder
    from deepseek.data.packing import one_a_row, packed
    from deepseek.data.texts import read_texts, text_files, tokenized
    from deepseek.data.windows import Samples, Windows

__all__ = [
    "Document",
    "IncrementalDecoder",
    "LabelledText",
    "SampleOrder",
    "Samples",
    "TokenCorpus",
    "Tokenizer",
    "Windows",
    "conversation",
    "label_names",
    "one_a_row",
    "packed",
    "read_labelled",
    "read_texts",
    "text_files",
    "tokenized",
    "write_corpus",
]

# numpy is not loaded for a tokenizer alone
_HOMES = {
    "Document": "corpus",
    "LabelledText": "labelled",
    "SampleOrder": "order",
    "Samples": "windows",
    "TokenCorpus": "corpus",
    "Windows": "windows",
    "conversation": "conversations",
    "label_names": "labelled",
    "one_a_row": "packing",
    "packed": "packing",
    "read_labelled": "labelled",
    "read_texts": "texts",
    "text_files": "texts",
    "tokenized": "texts",
    "write_corpus": "corpus",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
