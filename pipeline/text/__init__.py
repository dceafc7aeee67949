"""Answers texts with what a bundle says of them, under the names that people already use.

May import: `loading`, `base`, `families` alone, so that a text is answered with numpy and
tokenizers and nothing else. Public names: `bertile.open`, `bertile.text`.
"""

from bertile.text.answerer import Answerer
from bertile.text.classifier import Classifier
from bertile.text.embedder import Embedder
from bertile.text.featurizer import Featurizer
from bertile.text.filler import Filler
from bertile.text.opening import open
from bertile.text.sparse_vectors import SparseVector
from bertile.text.tagger import Tagger
from bertile.text.text_model import TextModel

__all__ = [
    "Answerer",
    "Classifier",
    "Embedder",
    "Featurizer",
    "Filler",
    "SparseVector",
    "Tagger",
    "TextModel",
    "open",
]
