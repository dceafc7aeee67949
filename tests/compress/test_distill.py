"""Losses of distillation by their formulas, and a student that learns from logits alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import text_models, tiny_training
from torch.nn import functional as F

from bertile.compress import distill
from bertile.compress.recipe import Distill
from bertile.errors import UsageError

MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


def test_soft_targets_are_those_of_the_formula():
    mine, theirs = torch.randn(2, 4), torch.randn(2, 4)
    p, q = (torch.softmax(x / 3.0, -1) for x in (theirs, mine))
    wanted = 9 * (p * (p.log() - q.log())).sum(-1)
    torch.testing.assert_close(distill.soft(mine, theirs, MASK, 3.0), wanted)
    assert float(distill.soft(theirs, theirs, MASK, 3.0).abs().max()) < 1e-6


def test_padding_does_not_count():
    mine, theirs = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    for loss in (
        lambda a, b: distill.soft(a, b, MASK, 1.0),
        lambda a, b: distill.apart(a, b, MASK),
    ):
        before = loss(mine, theirs)
        other = mine.clone()
        other[1, 2] = 100.0
        assert torch.equal(loss(other, theirs), before)
    starts, wanted = torch.randn(2, 3), torch.randn(2, 3)
    before = distill.soft(starts, wanted, MASK, 1.0)
    starts[1, 2] = 50.0
    torch.testing.assert_close(distill.soft(starts, wanted, MASK, 1.0), before)


def test_similarities_see_angles_alone():
    vectors = torch.randn(4, 8)
    turned = vectors @ torch.linalg.qr(torch.randn(8, 8)).Q * 3
    same = distill.similarities(turned, vectors, turned, vectors)
    assert float(same.abs().max()) < 1e-6
    part = distill.similarities(turned[:2], vectors[:2] * -1, turned, vectors)
    mine, theirs = F.normalize(turned, dim=1), F.normalize(vectors, dim=1)
    wanted = (mine[:2] @ mine.T + theirs[:2] @ theirs.T).square().mean(1)
    torch.testing.assert_close(part, wanted)


def test_layers_are_matched_evenly_and_the_last_with_the_last():
    states = list(range(13))  # the embedding's, and those of 12 layers
    assert distill.evenly(states, 13) == states
    assert distill.evenly(states, 7) == [0, 2, 4, 6, 8, 10, 12]
    assert distill.evenly(states, 4) == [0, 4, 8, 12]
    assert distill.evenly(list(range(12)), 4, skip=0) == [2, 5, 8, 11]


def test_student_learns_from_logits_alone(tmp_path, teacher, untrained):
    """Of a random student, by texts without any label; evaluated on labels that it never saw."""
    texts = [text for text, _ in tiny_training.texts(400, seed=5)]
    (tmp_path / "more.txt").write_text("\n".join(texts))
    report = tiny_training.compress(
        tmp_path,
        untrained,
        ("distill",),
        "train.steps=60",
        "distill.hidden=0",
        teacher=str(teacher),
        unlabelled=(str(tmp_path / "more.txt"),),
    )
    assert report["recipe"]["distill"]["labels"] == 0
    assert report["examples"]["unlabelled"] > 100
    assert report["score"] > 0.9


def test_narrower_student_learns_hidden_states_and_maps(tmp_path, teacher):
    narrow = text_models.save(
        tmp_path / "narrow",
        "SequenceClassification",
        labels=tiny_training.LABELS,
        hidden_size=16,
        num_hidden_layers=1,
        intermediate_size=32,
        initializer_range=0.1,
    )
    report = tiny_training.compress(
        tmp_path, narrow, ("distill-tinybert",), "train.steps=80", teacher=str(teacher)
    )
    losses = [
        float(line.split(",")[1])
        for line in (tmp_path / "out" / "steps.csv").read_text().splitlines()[1:]
    ]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    assert report["score"] > 0.8


def test_embeddings_follow_the_teacher(tmp_path):
    whole = text_models.save_sentences(tmp_path)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(dict.fromkeys(t for t in text_models.mixed(300, 3) if t)))
    settings = ("depth.keep=[1]", "train.steps=50", "train.rate=0.003")
    choices = {"task": "embedding", "dataset": str(texts)}
    cut = tiny_training.compress(
        tmp_path / "cut", whole, (), "train.steps=1", settings[0], **choices
    )
    taught = tiny_training.compress(tmp_path / "taught", whole, (), *settings, **choices)
    assert taught["metric"] == "spearman"
    assert taught["cosine"] > cut["cosine"] + 0.2, "of texts that it never saw"
    assert (tmp_path / "taught" / "out" / "modules.json").exists()


def test_teacher_of_other_labels_is_refused(tmp_path, teacher):
    other = text_models.save(tmp_path / "other", "SequenceClassification", labels=("good", "bad"))
    with pytest.raises(UsageError, match="has other labels"):
        tiny_training.compress(tmp_path, teacher, ("distill",), teacher=str(other))
    assert not (tmp_path / "out").exists()


def test_weights_of_losses_add_up():
    outputs = {
        "logits": torch.randn(2, 3),
        "hidden_states": [torch.randn(2, 3, 4) for _ in range(2)],
        "attentions": [torch.softmax(torch.randn(2, 2, 3, 3), -1)],
    }
    theirs = {
        "logits": torch.randn(2, 3),
        "hidden_states": [torch.randn(2, 3, 4) for _ in range(3)],
        "attentions": [torch.softmax(torch.randn(2, 2, 3, 3), -1) for _ in range(2)],
    }

    class Sized:
        class config:
            hidden_size = 4

    def of(**weights: float) -> torch.Tensor:
        chosen = Distill(**{"soft": 0.0, **weights})
        return distill.Distillation(chosen, ("logits",), Sized, Sized)(outputs, theirs, MASK)

    parts = of(soft=1.0) + 2 * of(hidden=1.0) + 3 * of(attention=1.0)
    torch.testing.assert_close(of(soft=1.0, hidden=2.0, attention=3.0), parts)
