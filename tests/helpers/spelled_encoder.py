"""A small encoder whose parts are spelled as any exporter spells them: TensorFlow's, keras', …"""

import math

import torch
from helpers.foreign_forms import run_quietly
from torch import nn

HIDDEN, HEADS, SIZE, INNER, WORDS, PLACES = 32, 2, 16, 48, 60, 40
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Encoder(nn.Module):
    """BERT of two layers; each part is a method that a spelling replaces."""

    def __init__(self, layers=2, eps=1e-12):
        super().__init__()
        torch.manual_seed(1)
        self.words, self.eps = nn.Parameter(torch.randn(WORDS, HIDDEN)), eps
        self.types, self.places = (nn.Parameter(torch.randn(n, HIDDEN)) for n in (2, PLACES))
        self.first = self.vectors()
        self.layers = nn.ModuleList(Layer(self.vectors) for _ in range(layers))

    def vectors(self):
        return nn.ParameterList([1 + 0.2 * torch.randn(HIDDEN), 0.3 * torch.randn(HIDDEN)])

    def forward(self, ids, mask, types):
        batch, length = ids.shape
        x = self.embedded(ids, types)
        x = self.enter(self.norm(x, *self.first), batch, length)
        added = self.mask(mask, batch, length)
        for layer in self.layers:
            a = self.attend(layer, x, added, batch, length)
            x = self.norm(self.output(layer, a) + x, *layer.norms[0])
            f = self.product(self.gelu(self.product(x, *layer.inner)), *layer.outer)
            x = self.norm(f + x, *layer.norms[1])
        return x.reshape(batch, length, HIDDEN)

    def embedded(self, ids, types):
        places = self.places[: ids.shape[1]]
        return self.words[ids] + self.types[types] + places

    def enter(self, x, batch, length):
        return x

    def norm(self, x, gamma, beta):
        return nn.functional.layer_norm(x, (HIDDEN,), gamma, beta, self.eps)

    def gelu(self, x):
        return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))

    def product(self, x, w, b):
        return x @ w + b

    def output(self, layer, context):
        return self.product(context, *layer.out)

    def mask(self, mask, batch, length):
        return (1.0 - mask[:, None, None, :].float()) * -10000.0

    def heads(self, x, w, b, batch, length):
        return self.product(x, w, b).reshape(batch, length, HEADS, SIZE).permute(0, 2, 1, 3)

    def attend(self, layer, x, added, batch, length):
        q, k, v = (self.heads(x, *part, batch, length) for part in layer.qkv)
        scores = q @ k.transpose(-1, -2) * (1.0 / math.sqrt(SIZE)) + added
        return self.joined(scores.softmax(-1) @ v, batch, length)

    def joined(self, context, batch, length):
        return context.permute(0, 2, 1, 3).reshape(batch, length, HIDDEN)


class Layer(nn.Module):
    def __init__(self, vectors):
        super().__init__()
        self.qkv = nn.ModuleList(linear(HIDDEN, HIDDEN) for _ in range(3))
        self.out, self.inner = linear(HIDDEN, HIDDEN), linear(HIDDEN, INNER)
        self.outer, self.norms = linear(INNER, HIDDEN), nn.ModuleList([vectors(), vectors()])


def linear(inputs, outputs):
    return nn.ParameterList([torch.randn(inputs, outputs) / 6, 0.2 * torch.randn(outputs)])


class Flat(Encoder):
    """google-research/bert through tf2onnx: rows of tokens, one-hot types, folded LayerNorms."""

    def embedded(self, ids, types):
        batch, length = ids.shape
        words = self.words.index_select(0, ids.reshape(-1)).reshape(batch, length, HIDDEN)
        hot = (types.reshape(-1, 1) == torch.arange(2)[None]).float() @ self.types
        return words + hot.reshape(batch, length, HIDDEN) + self.places[:length][None]

    def enter(self, x, batch, length):
        return x.reshape(batch * length, HIDDEN)

    def norm(self, x, gamma, beta):
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) * (x - mean)).mean(-1, keepdim=True)
        scale = torch.rsqrt(variance + self.eps) * gamma
        return x * scale + (beta - mean * scale)

    def product(self, x, w, b):
        return torch.addmm(b, x, w)

    def mask(self, mask, batch, length):
        seen = mask.reshape(batch, 1, length).float() * torch.ones(batch, length, 1)
        return (1.0 - seen[:, None]) * -10000.0

    def joined(self, context, batch, length):
        return context.permute(0, 2, 1, 3).reshape(batch * length, HIDDEN)


class Paddle(Flat):
    """Places counted by a running sum, and the mask made of the ids."""

    def forward(self, ids, mask, types):
        self.padding = ids == 0
        return super().forward(ids, mask, types)

    def embedded(self, ids, types):
        ones = torch.ones_like(ids)
        return self.words[ids] + self.types[types] + self.places[ones.cumsum(1) - ones]

    def mask(self, mask, batch, length):
        return self.padding.float()[:, None, None, :] * -10000.0


class Summed(Flat):
    """Means by sums and divisions, the variance by squares, GELU by powers and a Tanh."""

    def norm(self, x, gamma, beta):
        mean = x.sum(-1, keepdim=True) / HIDDEN
        variance = (x * x).sum(-1, keepdim=True) / HIDDEN - mean * mean
        return (x - mean) * torch.pow(variance + 1e-5, -0.5) * gamma + beta

    def gelu(self, x):
        inner = x * 0.7978845608 * (1.0 + 0.044715 * x * x)
        return x * (0.5 + 0.5 * torch.tanh(inner))

    def product(self, x, w, b):
        return b[None] + x @ w.t().contiguous().t()


class Einsums(Encoder):
    """keras' MultiHeadAttention and EinsumDense: matrices (hidden, heads, size)."""

    def heads(self, x, w, b, batch, length):
        w, b = w.reshape(HIDDEN, HEADS, SIZE), b.reshape(HEADS, SIZE)
        return torch.einsum("abc,cde->abde", x, w) + b

    def attend(self, layer, x, added, batch, length):
        q, k, v = (self.heads(x, *part, batch, length) for part in layer.qkv)
        q = q * (1.0 / math.sqrt(SIZE))
        scores = torch.einsum("aecd,abcd->acbe", k, q) + added
        context = torch.einsum("acbe,aecd->abcd", scores.softmax(-1), v)
        return torch.einsum("abcd,cde->abe", context, layer.out[0].reshape(HEADS, SIZE, HIDDEN))

    def output(self, layer, context):
        return context + layer.out[1]


class Stacked(Encoder):
    """A matrix for each head, stacked; the variance's root as a reciprocal."""

    def heads(self, x, w, b, batch, length):
        w = w.reshape(HIDDEN, HEADS, SIZE).permute(1, 0, 2).contiguous()
        return x[:, None] @ w + b.reshape(HEADS, 1, SIZE)

    def norm(self, x, gamma, beta):
        centred = x - x.mean(-1, keepdim=True)
        root = torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6)
        return gamma * (centred * torch.reciprocal(root)) + beta


class Together(Encoder):
    """Q, K and V of one product, as `cut`(qkv (B, S, 3 · hidden)) → q, k, v in heads."""

    cut = "split"

    def attend(self, layer, x, added, batch, length):
        w = torch.cat([part[0] for part in layer.qkv], 1)
        b = torch.cat([part[1] for part in layer.qkv])
        q, k, v = getattr(self, f"by_{self.cut}")(x @ w + b, batch, length)
        scores = q @ k.transpose(-1, -2) / math.sqrt(SIZE) + added
        return self.joined(scores.softmax(-1) @ v, batch, length)

    def in_heads(self, x, batch, length):
        return x.reshape(batch, length, HEADS, SIZE).transpose(1, 2)

    def by_split(self, qkv, batch, length):
        return [self.in_heads(x, batch, length) for x in qkv.split(HIDDEN, -1)]

    def by_slice(self, qkv, batch, length):
        parts = (qkv[..., place * HIDDEN : (place + 1) * HIDDEN] for place in range(3))
        return [self.in_heads(x, batch, length) for x in parts]

    def by_unbind(self, qkv, batch, length):
        return qkv.reshape(batch, length, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)

    def by_head(self, qkv, batch, length):
        """Each head's q, k and v side by side, as Megatron has them."""
        parts = qkv.reshape(batch, length, HEADS, 3 * SIZE).transpose(1, 2)
        return parts.split(SIZE, -1)


class Batched(Encoder):
    """Products of (batch · heads, length, size), as torch.bmm has them."""

    def attend(self, layer, x, added, batch, length):
        q, k, v = (
            self.heads(x, *part, batch, length).reshape(batch * HEADS, length, SIZE)
            for part in layer.qkv
        )
        added = added.expand(batch, HEADS, length, length).reshape(batch * HEADS, length, length)
        scores = torch.bmm(q, k.transpose(1, 2)) / math.sqrt(SIZE) + added
        context = torch.bmm(scores.softmax(-1), v).reshape(batch, HEADS, length, SIZE)
        return self.joined(context, batch, length)


def write(
    path,
    module,
    opset=13,
    dtype=torch.int64,
    outputs=("last_hidden_state",),
    axes=None,
    dynamic=("batch", "length"),
):
    """Write it with TorchScript, as it is spelled; axes that are not dynamic are 2 and 16."""
    ids = torch.arange(32).reshape(2, 16) + 5
    mask = (torch.arange(16) < torch.tensor([[16], [9]])).to(dtype)
    arrays = (ids.to(dtype), mask, (ids % 2).to(dtype))
    varying = {axis: name for axis, name in enumerate(("batch", "length")) if name in dynamic}
    varying = {name: varying for name in (*INPUTS, *outputs)} | (axes or {})
    options = {"input_names": list(INPUTS), "output_names": list(outputs), "dynamo": False}
    options |= {"dynamic_axes": varying, "opset_version": opset}
    run_quietly(module.eval().requires_grad_(False), arrays, path, options)
    return path
