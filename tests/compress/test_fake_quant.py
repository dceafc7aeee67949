"""Training in int8: what is rounded, what learns, and that a compiled model computes the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import text_models, tiny_training
from torch import nn

import bertile
from bertile.compress import data, fake_quant
from bertile.compress.learner import Learner, answers, open_model
from bertile.compress.tasks import TASKS
from bertile.config import Config
from bertile.evaluation import datasets
from bertile.numerics import eight_bit
from bertile.targets import rows

SAME = 1e-3  # largest difference of the logits of what was trained and of what was compiled


def test_roundings_are_those_of_the_compiler():
    chance = torch.Generator().manual_seed(1)
    w = torch.randn(24, 40, generator=chance)
    w[3] = 0
    scale = eight_bit.weight_scales(w.numpy().T)
    integers = eight_bit.quantize_weights(w.numpy().T, scale)
    np.testing.assert_allclose(fake_quant.weight(w).numpy().T, integers * scale, rtol=1e-6)
    x = torch.randn(50, 40, generator=chance) * 3 + 1
    x[7] = 2.5
    wanted = eight_bit.quantize_input(x.numpy()).values()
    np.testing.assert_allclose(fake_quant.per_token(x).numpy(), wanted, atol=1e-5)


def test_gradients_pass_through_roundings():
    for rounding in (fake_quant.weight, fake_quant.per_token, fake_quant.table, fake_quant.bf16):
        x = torch.randn(6, 8, requires_grad=True)
        (rounding(x) * torch.arange(8.0)).sum().backward()
        assert torch.equal(x.grad, torch.arange(8.0).expand(6, 8))


def test_ends_of_a_range_learn_from_what_they_clip():
    learned = fake_quant.LearnedRange(-1.0, 1.0)
    x = torch.tensor([[-3.0, 0.2, 0.5, 2.0, 4.0]], requires_grad=True)
    learned(x).sum().backward()
    assert (float(learned.low.grad), float(learned.high.grad)) == (1.0, 2.0)
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 0.0, 0.0]]
    low, high = learned.ends()
    seen = learned(x).detach()
    assert low <= float(seen.min()) and float(seen.max()) <= high
    zero = learned(torch.zeros(1, 1))
    assert float(zero) == 0.0, "which padding and ReLU need"


def test_attention_is_that_of_eager_up_to_bfloat16(untrained):
    opened = open_model(str(untrained), TASKS["text"], None)
    batch = opened.tokenizer(["good film", "a"], padding=True, return_tensors="pt")
    opened.model.eval()
    with torch.no_grad():
        eager = opened.model(**batch).logits
        opened.model.set_attn_implementation(fake_quant.BF16_ATTENTION)
        rounded = opened.model(**batch).logits
    assert not torch.equal(eager, rounded)
    torch.testing.assert_close(eager, rounded, atol=2e-2, rtol=0)


def test_layers_behind_the_first_token_stay_in_floats(untrained):
    opened = open_model(str(untrained), TASKS["text"], None)
    batch = opened.tokenizer(["good film"], return_tensors="pt")
    layers = fake_quant.of_tokens(opened.model, dict(batch))
    assert len(layers) == 12 and all(".encoder.layer." in name for name in layers)


@pytest.mark.parametrize(
    "recipes",
    [
        pytest.param(("int8",), id="dynamic"),
        pytest.param(("int8-static",), id="static", marks=pytest.mark.slow),
        pytest.param(("distill", "prune-80", "int8"), id="pruned", marks=pytest.mark.slow),
    ],
)
def test_compiled_model_computes_what_was_trained(tmp_path, untrained, stages, recipes):
    """Where attention is in float32, all that is rounded is the same, but for what lies on the edge
    between two integers: sums of another order may round that the other way, in a text or two.
    """
    settings = ("train.steps=12", "quantize.attention=fp32")
    report = tiny_training.compress(tmp_path, untrained, recipes, *settings)
    target = "x86-avx512-vnni" if rows.resolve().bf16 else "native"
    trained, compiled = _both(tmp_path, report, stages, target)
    apart = np.abs(compiled - trained).max(1)
    assert np.quantile(apart, 0.8) <= 1e-5 and apart.max() <= 2 * SAME
    from_floats = np.abs(compiled - _plain_answers(tmp_path / "out")).max(1)
    assert np.median(from_floats) > 1e-4  # far more than what was trained is apart


@pytest.mark.slow
@pytest.mark.isa("x86-avx512-bf16")
def test_attention_in_bfloat16_differs_by_few_roundings(tmp_path, untrained, stages):
    """Sums of another order are rounded the other way now and then: that is all."""
    report = tiny_training.compress(tmp_path, untrained, ("int8",), "train.steps=12")
    assert report["attention"] == "bf16"
    trained, compiled = _both(tmp_path, report, stages, "native")
    apart = np.abs(compiled - trained)
    assert apart.max() <= 5 * SAME and np.median(apart) <= SAME


def _texts():
    return [*(text for text, _ in tiny_training.texts(40, seed=9)), "good", text_models.LONG]


def _both(directory, report, stages, target):
    """The logits of the written model in torch, rounded, and those of its bundle."""
    config = Config(
        precision="int8", cache_dir=stages, tune="none", shipped_log=False, target=target
    )
    bertile.compile(directory / "out", directory / "bundle", config)
    path = directory / "eval.tsv"
    path.write_text("".join(f"{text}\tgood\n" for text in _texts()))
    compiled = datasets.answers(directory / "bundle", datasets.read(path))
    return _rounded_answers(directory / "out", report), compiled


def _plain_answers(directory):
    opened = open_model(str(directory), TASKS["text"], None)
    examples = [data.Example((text,), "good") for text in _texts()]
    results = answers(Learner(opened, ("logits",)), opened, TASKS["text"], examples, 512)
    return np.concatenate([outputs["logits"].numpy() for outputs, _ in results])


def _rounded_answers(directory, report):
    """What torch computes of the written model in 8 bits, with the ranges beside it."""
    opened = open_model(str(directory), TASKS["text"], None)
    batch = dict(opened.tokenizer(_texts()[:2], padding=True, return_tensors="pt"))
    kind = fake_quant.Quantize()
    rounding = fake_quant.Quantization(
        opened.model, kind, [batch], report["attention"] == "bf16", 1
    )
    for name, ends in report["ranges"].items():
        rounding.linears[name].bertile_input = fake_quant.LearnedRange(*ends)
    rounding.at(0)
    examples = [data.Example((text,), "good") for text in _texts()]
    results = answers(Learner(opened, ("logits",)), opened, TASKS["text"], examples, 512)
    return np.concatenate([outputs["logits"].numpy() for outputs, _ in results])


def test_ranges_of_one_input_are_shared(untrained):
    opened = open_model(str(untrained), TASKS["text"], None)
    batch = dict(opened.tokenizer(["good film", "bad"], padding=True, return_tensors="pt"))
    rounding = fake_quant.Quantization(
        opened.model, fake_quant.Quantize(ranges="static"), [batch], False, 10
    )
    attention = "bert.encoder.layer.0.attention.self"
    inputs = [rounding.inputs[f"{attention}.{name}"] for name in ("query", "key", "value")]
    assert inputs[0] is inputs[1] is inputs[2]
    assert isinstance(inputs[0], nn.Module) and len({id(m) for m in rounding.inputs.values()}) == 8
