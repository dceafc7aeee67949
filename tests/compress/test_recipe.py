"""Recipes: what combines, what is refused, and that all shipped ones can be read."""

from __future__ import annotations

import json

import pytest

from bertile.compress import recipe
from bertile.errors import UsageError


def test_later_recipes_and_settings_have_the_last_word(tmp_path):
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"prune": {"sparsity": 0.7}, "train": {"steps": 9}}))
    combined = recipe.read(["prune-90", str(own), "int8"], ["train.steps=5", "prune.pattern=16x1"])
    assert combined.prune == recipe.Prune(sparsity=0.7, pattern="16x1")
    assert (combined.train.steps, combined.quantize) == (5, recipe.Quantize())
    assert recipe.from_dict(combined.to_dict()) == combined


def test_every_shipped_recipe_can_be_read_and_says_something():
    for name in recipe.names():
        assert recipe.read([name]).to_dict() != {}, name


MISTAKES = {
    "recipe": (["prune-91"], [], "did you mean 'prune-90'"),
    "file": (["./nothing.json"], [], "there is no recipe"),
    "section": ([], ["prun.sparsity=0.5"], "did you mean 'prune'"),
    "key": ([], ["prune.sparsty=0.5"], "did you mean 'sparsity'"),
    "word": ([], ["prune.pattern=4x2"], "did you mean '4x1'"),
    "share": ([], ["prune.end=1.5"], "a share from 0 to 1"),
    "number": ([], ["train.steps=many"], "a whole number"),
    "negative": ([], ["train.rate=-1"], "not negative"),
    "list": ([], ["early_exit.layers=2"], "a list of whole numbers"),
    "form": ([], ["steps=5"], "SECTION.KEY=VALUE"),
    "2:4": ([], ["prune.pattern=2:4"], "is not that of pattern 2:4"),
    "all zeros": ([], ["prune.sparsity=1"], "not between 0 and 1"),
    "order": ([], ["prune.begin=0.9"], "lies behind"),
    "no steps": (["prune-90"], ["train.steps=0"], "needs training"),
    "no depth": ([], ["depth.layers=null"], "the number of layers, or which to keep"),
}


@pytest.mark.parametrize(("recipes", "settings", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(recipes, settings, message):
    with pytest.raises(UsageError, match=message):
        recipe.read(recipes, settings)
