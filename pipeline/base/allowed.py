"""Lists the words that choices of a command may be, for those who check them and for help texts.

Nothing is imported here: `bertile --help` names them all.
"""

from __future__ import annotations

TUNE_EFFORTS = ("auto", "none", "quick", "full")
RUNTIMES = ("none", "include")
RUNNERS = ("local", "mca")
LIBCS = ("glibc", "musl")
RANGES = ("dynamic", "minmax", "percentile", "mse")
ROUNDINGS = ("nearest", "gptq")
HEADS = (
    "encoder",
    "embedding",
    "sequence-classification",
    "token-classification",
    "question-answering",
    "masked-lm",
    "next-sentence",
    "multiple-choice",
    "causal-lm",
    "pretraining",
)
AGGREGATIONS = ("none", "simple", "first", "average", "max")
TRAINED_TASKS = ("text", "pair", "tokens", "answers", "embedding")
