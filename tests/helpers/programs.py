"""Writes small graphs that the passes match, and some that they do not."""

from __future__ import annotations

import numpy as np
import onnx

from bertile.onnx.exported import ExportedModel, InputSpec
from bertile.onnx.samples import sample


def request_of(exported, lengths, padded=None):
    arrays = sample(exported.inputs, len(lengths), padded or max(lengths), 0, seed=len(lengths))
    mask = np.arange(padded or max(lengths)) < np.array(lengths)[:, None]
    return {**arrays, "attention_mask": mask.astype("int64")}


FRAME = """
<ir_version: 9, opset_import: ["" : 20]>
small (int64[batch,length] input_ids, int64[batch,length] attention_mask)
    => (float[batch,length,8] y) {{
  embedded = Gather(words, input_ids)
  sum = Add(embedded, embedded)
  x = LayerNormalization<axis = -1>(sum, gamma, beta)
  {body}
}}
"""

WEIGHTS = {
    "words": (100, 8),
    "gamma": (8,),
    "beta": (8,),
    "w1": (8, 32),
    "b1": (32,),
    "w2": (32, 8),
    "b2": (8,),
    "w3": (8, 8),
    "g3": (8,),
    "slopes": (1, 2, 1, 1),
}

INTEGERS = {"split": [0, 0, 2, 4], "merge": [0, 0, 8], "one": [1], "one_two": [1, 2]}

NUMBERS = {"unit": 1.0, "low": -10000.0, "tiny": 1e-5}

MASK = """
  float_mask = Cast<to = 1>(attention_mask) wide_mask = Unsqueeze(float_mask, one_two)
  inverse = Sub(unit, wide_mask) mask = Mul(inverse, low)
"""

ATTENTION = """
  heads = Reshape(x, split)
  q = Transpose<perm = [0, 2, 1, 3]>(heads) k = Transpose<perm = [0, 2, 3, 1]>(heads)
  raw = MatMul(q, k) masked = Add(raw, {mask}) weights = Softmax<axis = -1>(masked)
  context = MatMul(weights, q) back = Transpose<perm = [0, 2, 1, 3]>(context)
  y = Reshape(back, merge)
"""

UNMATCHED = {
    "a sine instead of GELU": (
        """
        h = MatMul(x, w1) a = Add(h, b1) s = Sin(a) g = Mul(a, s)
        z = MatMul(g, w2) y = Add(z, b2)
        """,
        {"sin", "multiply"},
    ),
    "heads permuted in reverse": (
        """
        heads = Reshape(x, split) turned = Transpose(heads) p = Softmax<axis = 1>(turned)
        back = Transpose(p) y = Reshape(back, merge)
        """,
        {"permute_dims", "nn.softmax"},
    ),
    "LayerNorm over the tokens": (
        """
        mean = ReduceMean(x, one) d = Sub(x, mean) squared = Mul(d, d)
        variance = ReduceMean(squared, one) more = Add(variance, tiny) root = Sqrt(more)
        ratio = Div(d, root) scaled = Mul(ratio, gamma) y = Add(scaled, beta)
        """,
        {"mean", "sqrt", "divide"},
    ),
    "a bias per head and key": (
        MASK + "sloped = Mul(mask, slopes)" + ATTENTION.format(mask="sloped"),
        {"nn.softmax", "matmul"},
    ),
    "a mask per query alone": (
        MASK + "up = Transpose<perm = [0, 1, 3, 2]>(mask)" + ATTENTION.format(mask="up"),
        {"nn.softmax", "matmul"},
    ),
    "a weight that no pass computes": (
        "scale = Exp(g3) w = Mul(w3, scale) y = MatMul(x, w)",
        {"matmul"},
    ),
    "a sum over the tokens": ("total = ReduceSum(x, one) y = Mul(x, total)", {"sum"}),
    "an activation without a product": ("y = Gelu(x)", {"nn.gelu"}),
}

MATCHED = {
    "attention": MASK + ATTENTION.format(mask="mask"),
    "scale and shift as constants": """
        g = Constant<value = float[8] {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}>()
        b = Constant<value = float[8] {8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0}>()
        y = LayerNormalization<axis = -1>(x, g, b)
    """,
    "a weight that is read twice": "h = MatMul(x, w3) z = MatMul(h, w3) y = Add(z, h)",
    "a product without a bias": "y = MatMul(x, w3)",
    "the input as residual": "h = MatMul(x, w1) a = Relu(h) z = MatMul(a, w2) y = Add(z, x)",
    "nothing behind the embedding": "y = Identity(x)",
}


def exported_of(body: str, directory, batch=None, length=None) -> ExportedModel:
    """The frame with these nodes in it."""
    text = FRAME.format(body=body)
    for name, extent in (("batch", batch), ("length", length)):
        text = text.replace(name, str(extent)) if extent else text
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    values = {n: rng.standard_normal(s).astype("float32") * 0.5 for n, s in WEIGHTS.items()}
    values.update({n: np.array(v, "int64") for n, v in INTEGERS.items()})
    values.update({n: np.array(v, "float32") for n, v in NUMBERS.items()})
    read_names = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(v, n) for n, v in values.items() if n in read_names
    )
    onnx.save(model, directory / "model.onnx")
    inputs = (InputSpec("input_ids", below=100), InputSpec("attention_mask", below=2))
    fields = ("onnx text", "", "unknown", "unknown", None)
    return ExportedModel(directory, *fields, inputs, ("y",), batch=batch, length=length)
