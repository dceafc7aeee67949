"""Trains MiniLM to tell the section of a Debian package from its description.

python -m bertile.compress.train -o DIR
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bertile.base.errors import require
from bertile.base.progress import Progress
from bertile.base.quiet import quiet
from bertile.compress import sections
from bertile.compress.sections import Example, Split

SEED = 20
EPOCHS = 3
BATCH = 32
RATE = 2e-4  # MiniLM is small and takes more than BERT's 5e-5
LONGEST = 32  # tokens
THREADS = 2


def train(output: Path, examples: Split, progress: Progress, epochs: int = EPOCHS) -> float:
    """Fine-tune all of MiniLM on the examples, write it to `output`, return its accuracy."""
    torch, transformers = require("export", "torch", "transformers")
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    model, tokenizer = _untrained(transformers, examples.labels)
    score = fit(model, tokenizer, examples, progress, epochs)
    write(output, model, tokenizer)
    sections.write(output / "test.tsv", examples.test)
    return score


def fit(
    model: Any,
    tokenizer: Any,
    examples: Split,
    progress: Progress,
    epochs: int = EPOCHS,
    rate: float = RATE,
) -> float:
    """Train torch's classifier in place; its accuracy on the examples to test with.

    `rate` is AdamW's at the start and falls to zero.
    """
    (torch,) = require("export", "torch")
    steps = epochs * -(-len(examples.train) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    names = model.config.label2id
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for batch in _batches(examples.train, names, tokenizer, random.Random(SEED + epoch)):
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(batch["labels"])
        progress.say(f"epoch {epoch + 1}: loss {total / len(examples.train):.3f}")
    return accuracy(model, tokenizer, examples.test)


def write(output: Path, model: Any, tokenizer: Any) -> None:
    """A Hugging Face directory of both."""
    output.mkdir(parents=True, exist_ok=True)
    with quiet():
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)


def accuracy(model: Any, tokenizer: Any, examples: Sequence[Example]) -> float:
    """The share of examples whose label torch's model finds."""
    (torch,) = require("export", "torch")
    model.eval()
    right = 0
    with torch.inference_mode():
        for batch in _batches(examples, model.config.label2id, tokenizer):
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(1) == labels).sum())
    return right / len(examples)


def _untrained(transformers: Any, labels: Sequence[str]) -> tuple[Any, Any]:
    from bertile.export.files import find_directory, transformer_directory

    directory = transformer_directory(find_directory("minilm"))
    with quiet():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            directory,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            local_files_only=True,
        )
        return model, transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)


def _batches(
    examples: Sequence[Example], names: Mapping[str, int], tokenizer: Any, chance: Any = None
) -> Iterator[dict[str, Any]]:
    """Batches of tensors; in chance order, if there is one, of texts that are about as long."""
    (torch,) = require("export", "torch")
    order = list(examples)
    if chance:
        chance.shuffle(order)
    # padding is computed too: sorting within some batches halves the work
    room = BATCH * 16
    groups = []
    for start in range(0, len(order), room):
        near = sorted(order[start : start + room], key=lambda example: len(example[0]))
        groups += [near[first : first + BATCH] for first in range(0, len(near), BATCH)]
    if chance:
        chance.shuffle(groups)
    for group in groups:
        texts = [text for text, _ in group]
        batch = tokenizer(
            texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        )
        yield {**batch, "labels": torch.tensor([names[label] for _, label in group])}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train on this machine's package index, and say how good the model became."""
    parser = argparse.ArgumentParser(prog="python -m bertile.compress.train")
    parser.add_argument(
        "-o", "--output", metavar="DIR", required=True, help="the directory to write"
    )
    parser.add_argument("--epochs", metavar="N", type=int, default=EPOCHS, help="default: 3")
    options = parser.parse_args(arguments)
    output = Path(options.output)
    score = train(output, sections.split(), Progress(), options.epochs)
    print(f"accuracy {score:.4f} of torch's model on {output / 'test.tsv'}")


if __name__ == "__main__":
    main()
