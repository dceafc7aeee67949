"""Opens a model with the head of a task, as a torch module that is trained, and writes it again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bertile.base.errors import ModelError, UsageError
from bertile.base.quiet import quiet
from bertile.compress.data import Example
from bertile.compress.tasks import Batch, Task, inputs_of
from bertile.export import checkpoints, files
from bertile.export.torch_module import Embedding
from bertile.families import model_config, table
from bertile.families.family import Family

PLAIN = "LABEL_"  # what transformers calls labels that have no names


@dataclass(eq=False)
class Opened:
    """A model with its head and what belongs to it; `directory` is where it was read."""

    model: Any
    tokenizer: Any
    family: Family
    labels: tuple[str, ...]
    directory: Path
    longest: int
    embedding: nn.Module | None = None

    def encode(self, task: Task, examples: Sequence[Example], longest: int) -> Batch:
        """Tensors of some examples."""
        names = {label: index for index, label in enumerate(self.labels)}
        return task.encode(self.tokenizer, examples, names, min(longest, self.longest))


class Learner(nn.Module):
    """What is trained: transformers' model, and what recipes put beside it.

    Called with a batch's inputs it gives the task's outputs by name, and, where asked for,
    "hidden_states", "attentions" and "exits", logits of each early head in turn. Given a teacher's
    answers as `theirs`, "distance" is how far it is from them, (batch,).
    """

    def __init__(self, opened: Opened, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.embedding = opened.model, opened.embedding
        self.outputs = tuple(outputs)
        self.distillation: nn.Module | None = None
        self.exits: nn.ModuleList | None = None

    def forward(
        self,
        inputs: Batch,
        hidden: bool = False,
        attention: bool = False,
        theirs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        if theirs is not None and self.distillation is not None:
            hidden, attention = self.distillation.hidden, self.distillation.attention
        hidden = hidden or self.exits is not None
        results = self.model(
            **inputs, output_hidden_states=hidden, output_attentions=attention, return_dict=True
        )
        if self.embedding is not None:
            vectors = self.embedding(results, inputs["attention_mask"].float())
            answers: dict[str, Any] = {self.outputs[0]: vectors}
        else:
            answers = {name: results[name] for name in self.outputs}
        if hidden:
            answers["hidden_states"] = results["hidden_states"]
        if attention:
            answers["attentions"] = results["attentions"]
        if self.exits is not None:
            states = results["hidden_states"]
            answers["exits"] = [head(states, inputs) for head in self.exits]
        if theirs is not None and self.distillation is not None:
            answers["distance"] = self.distillation(answers, theirs, inputs["attention_mask"])
        return answers


def open_model(
    model: str, task: Task, labels: Sequence[str] | None, dropout: float | None = None
) -> Opened:
    """A model with the head of a task and a tokenizer; a head that it lacks is new, and random.

    `labels` are those of the data; None takes the model's own. Raises ModelError or UsageError
    for a model that cannot be trained so.
    """
    if files.is_onnx(model):
        raise UsageError(
            f"'{model}' is in ONNX, and training needs a Hugging Face directory",
            "give the directory that it was exported from",
        )
    if model.startswith("synthetic:"):
        raise UsageError(f"'{model}' has no tokenizer, and training needs texts")
    directory = files.find_directory(model)
    place = files.transformer_directory(directory)
    config = model_config.read(place)
    family = table.of_type(config["model_type"])
    if family is None:
        raise ModelError(
            f"a model of type '{config['model_type']}' cannot be trained: it has no row that names"
            " its layers",
            "train it by another program; `bertile families` lists the types that have one",
        )
    table.must_have_head(config["model_type"], task.head)
    named = labels is not None and task.head != "embedding" and task.head != "question-answering"
    embedding = None
    if task.head == "embedding":
        checkpoint = checkpoints.load(model, "embedding")
        if checkpoint.chain is None or checkpoint.chain.kind != "dense":
            raise UsageError(f"'{model}' gives no dense vectors, which training needs")
        held, embedding = checkpoint.model, Embedding(checkpoint.chain)
        names: tuple[str, ...] = ()
    elif _has_head(config, task):
        checkpoint = checkpoints.load(model, task.head)
        held, names = checkpoint.model, checkpoint.labels
        names = _must_know(names, labels, model) if named else names
    else:
        names = tuple(labels or ()) if named else ()
        held = _with_new_head(place, config, task, names)
    held.config.return_dict = True
    if dropout is not None:
        for module in held.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
    longest = family.max_length(held)
    return Opened(held, _tokenizer(place, model), family, names, directory, longest, embedding)


def _has_head(config: Mapping[str, Any], task: Task) -> bool:
    endings = checkpoints.HEADS[task.head][1]
    return any(str(name).endswith(endings) for name in config.get("architectures") or ())


def _must_know(names: tuple[str, ...], labels: Sequence[str] | None, model: str) -> tuple[str, ...]:
    """The model's labels as the data calls them: by name, or by number where they have none."""
    wanted = set(labels or ())
    if wanted <= set(names):
        return names
    numbers = tuple(str(index) for index in range(len(names)))
    if wanted <= set(numbers):
        return numbers
    unknown = sorted(wanted - set(names))[0]
    raise UsageError(
        f"'{model}' does not know the label '{unknown}'", f"it knows {', '.join(names)}"
    )


def _with_new_head(
    place: Path, config: Mapping[str, Any], task: Task, labels: Sequence[str]
) -> Any:
    import transformers

    classes = table.of_type(config["model_type"]).auto_classes
    kind = getattr(transformers, classes.get(task.head, checkpoints.HEADS[task.head][0]))
    named = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }
    with quiet():
        return kind.from_pretrained(
            place,
            local_files_only=True,
            dtype=torch.float32,
            attn_implementation="eager",
            **(named if labels else {}),
        )


def _tokenizer(place: Path, model: str) -> Any:
    import transformers

    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=True)
    except Exception as error:  # of a directory without one, of files that are none
        raise ModelError(f"the tokenizer of '{model}' cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"'{model}' has no tokenizer.json", "save its tokenizer with transformers as a fast one"
        )
    return tokenizer


def fold(model: nn.Module) -> None:
    """Make plain parameters of everything that is parametrized, with the values it computes with.

    The outermost last: several on one weight fold together.
    """
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def write(opened: Opened, directory: Path) -> None:
    """Write the model, its tokenizer, and whatever else of its own directory a compile reads."""
    place = directory
    if opened.embedding is not None:
        for path in files.companions(opened.directory):
            target = directory / path.relative_to(opened.directory)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        inner = files.transformer_directory(opened.directory)
        place = directory / inner.relative_to(opened.directory)
    with quiet():
        opened.model.save_pretrained(place)
        opened.tokenizer.save_pretrained(place)
    for path in place.glob("*.safetensors"):  # which save_pretrained lets nobody else read
        path.chmod((place / "config.json").stat().st_mode)
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    config.pop("_attn_implementation_autoset", None)
    (place / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def answers(
    learner: nn.Module, opened: Opened, task: Task, examples: Sequence[Example], longest: int
) -> list[tuple[dict[str, Tensor], Batch]]:
    """What a model answers to some examples, in their order, batch by batch, on the CPU."""
    training, device = learner.training, next(learner.parameters()).device
    learner.eval()
    results = []
    with torch.no_grad():
        for start in range(0, len(examples), 32):
            batch = opened.encode(task, examples[start : start + 32], longest)
            inputs = {name: value.to(device) for name, value in inputs_of(batch).items()}
            outputs = learner(inputs)
            wanted = {name: outputs[name] for name in (*task.outputs, "exits") if name in outputs}
            results.append((_on_cpu(wanted), batch))
    learner.train(training)
    return results


def _on_cpu(value: Any) -> Any:
    """Tensors in lists and dictionaries, on the CPU."""
    if isinstance(value, dict):
        return {name: _on_cpu(inner) for name, inner in value.items()}
    return [_on_cpu(inner) for inner in value] if isinstance(value, list) else value.cpu()
