"""The table of families against transformers, README and the command line; and that all ask it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import family_models
from transformers.pytorch_utils import Conv1D

from bertile.cli import main
from bertile.families.family import BY_ANGLE
from bertile.families.table import FAMILIES, named, of_type, titles

ROOT = Path(__file__).parent.parent.parent
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
# Strings that are a family's name and mean something else.
OTHER_MEANINGS = {
    ("pipeline/bench/peer_models.py", "bert"): "ONNX Runtime's name for its own fusions",
    ("pipeline/bench/llamacpp.py", "bert"): "llama.cpp's name for an architecture, and a tokenizer",
}


def test_names_types_and_synthetic_models_belong_to_one_family():
    for values in (
        [family.name for family in FAMILIES],
        [family.title for family in FAMILIES],
        [model_type for family in FAMILIES for model_type in family.model_types],
        [name for family in FAMILIES for name in family.synthetic()],
    ):
        assert len(values) == len(set(values))


@each_family
def test_row_is_found_by_name_and_by_type(family):
    assert named(family.name) is family
    assert all(of_type(model_type) is family for model_type in family.model_types)


@pytest.mark.parametrize("model_type", ["t5", None, ["bert"], 3])
def test_other_types_have_no_row(model_type):
    assert of_type(model_type) is None


@each_family
def test_types_are_known_to_transformers(family):
    transformers = pytest.importorskip("transformers")
    for model_type in family.model_types:
        assert transformers.AutoConfig.for_model(model_type).model_type == model_type


@each_family
def test_layers_are_linear_and_in_their_order(family):
    layers = family.encoder_layers(family_models.untouched(f"{family.name}-tiny"))
    assert layers
    for layer in layers:
        kinds = (torch.nn.Linear, Conv1D)
        assert all(isinstance(linear, kinds) for linear in layer.values())
        into, out, first, second = (
            [
                tuple(linear.weight.shape[:: 1 if isinstance(linear, Conv1D) else -1])
                for linear in group
            ]
            for group in family.grouped(layer)
        )
        # of heads that share keys fewer in K and V
        assert into in ([(128, 128)] * 3, [(128, 3 * 128)], [(128, 128), *[(128, 64)] * 2])
        assert (out, second) == ([(128, 128)], [(512, 128)])
        # of a gated network two, or both in one
        assert first in ([(128, 512)], [(128, 512)] * 2, [(128, 2 * 512)])
        pairs = zip(layer, family.layers, strict=True)
        assert all(name.endswith(f".{own}") for name, own in pairs)


@each_family
def test_max_length_is_the_longest_that_torch_takes(family):
    model = family_models.untouched(f"{family.name}-tiny")
    longest = family.max_length(model)
    model(input_ids=torch.full((1, longest), 7))
    if family.positions == BY_ANGLE:  # torch takes any number, a model was made for some
        assert longest == model.config.max_position_embeddings
        return
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 7))


@each_family
def test_positions_depend_on_padding_as_the_row_says(family):
    """An id that is the padding id shifts the positions of those behind it, or does not."""
    model = family_models.untouched(f"{family.name}-tiny")
    looked_up = []
    if family.positions == BY_ANGLE:
        tables = [m for m in model.modules() if type(m) is torch.nn.Embedding]
        assert all(table.num_embeddings != model.config.max_position_embeddings for table in tables)
        return
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    rows = model.config.max_position_embeddings
    (table,) = (table for table in tables if table.num_embeddings == rows)
    table.register_forward_pre_hook(lambda _, ids: looked_up.extend(ids[0][0].tolist()))
    padding_id = family.padding_id(model)
    ids = [7, 1 if padding_id is None else padding_id, 7]
    model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, 3))
    after = None if padding_id is None else [padding_id + 1, padding_id, padding_id + 2]
    assert looked_up == (after or [0, 1, 2])


def test_page_of_exports_lists_the_families():
    text = (ROOT / "pipeline" / "export" / "README.md").read_text(encoding="utf-8")
    assert f"**Families:** {titles()}." in " ".join(text.split())


def test_readme_has_every_family():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    titles = {part for family in FAMILIES for part in family.title.split(" / ")}
    assert {title for title in titles if title not in text} == set()


def test_help_lists_the_families(capsys):
    with pytest.raises(SystemExit):
        main.main(["--help"])
    assert f"libraries: {titles()}." in " ".join(capsys.readouterr().out.split())


def test_table_is_read_without_torch_and_numpy():
    heavy = "{'torch', 'transformers', 'numpy'}"
    code = f"import bertile.families.table, sys; print({heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_families_import_errors_alone():
    imported = set()
    for file in (ROOT / "pipeline" / "families").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module)
            elif isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
    ours = {name for name in imported if name.split(".")[0] == "bertile"}
    others = {name for name in ours if not name.startswith("bertile.families")}
    assert others == {"bertile.base.errors", "bertile.base.allowed"}


NAMES = {name for family in FAMILIES for name in (family.name, *family.model_types)}


def test_nothing_outside_the_table_names_a_family():
    """What differs by family is asked of its row, so that a new row is all that a family takes."""
    named_elsewhere = {
        (file.relative_to(ROOT).as_posix(), node.value)
        for file in (ROOT / "pipeline").rglob("*.py")
        if file.parent.name != "families"
        for node in ast.walk(ast.parse(file.read_bytes()))
        if isinstance(node, ast.Constant) and node.value in NAMES
    }
    assert named_elsewhere == set(OTHER_MEANINGS)


def test_tests_list_no_families_of_their_own():
    """Tests may name one family, but a list of several would miss the next row."""
    lists = []
    for file in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_bytes())):
            parts = node.elts if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else []
            parts = node.keys if isinstance(node, ast.Dict) else parts
            values = {part.value for part in parts if isinstance(part, ast.Constant)}
            if len(values & NAMES) > 1:
                lists.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert lists == []


@pytest.mark.parametrize(
    "model_type", [model_type for family in FAMILIES for model_type in family.model_types]
)
def test_heads_of_a_family_are_those_of_transformers(model_type):
    transformers = pytest.importorskip("transformers")
    checkpoints = pytest.importorskip("bertile.export.checkpoints")
    family, config = of_type(model_type), transformers.CONFIG_MAPPING[model_type]
    classes = {head: checkpoints._auto_class(head, model_type) for head in family.heads}
    assert [head for head, kind in classes.items() if config not in kind._model_mapping] == []
    for head in family.lacks:
        assert config not in getattr(transformers, checkpoints.HEADS[head][0])._model_mapping
