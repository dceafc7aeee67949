"""Computes a torch model as the compiler's int8 does, so that it can be trained in that.

Weights: symmetric per output channel. Inputs of linear layers: asymmetric, 8 bits, per token from
its own smallest and largest value, or between ends that are learned. Attention multiplies in
bfloat16 where the target does; GELU is the polynomial of int8 kernels; tables of embeddings are
stored in float16. Gradients pass through roundings as if there were none (Bengio et al. 2013); ends
of ranges learn from what they clip (Choi et al. 2018).

`bertile.numerics.eight_bit` and `schedules/cpu/attention.py` have the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AttentionInterface, AttentionMaskInterface, activations
from transformers.masking_utils import eager_mask

from bertile.compress.recipe import Quantize
from bertile.compress.watching import watch_inputs
from bertile.numerics.eight_bit import LIMIT
from bertile.schedules.reference import LEVELS

BF16_ATTENTION = "bertile_bf16"
GELU = (nn.GELU, activations.GELUActivation)
Ends = tuple[float, float]


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def straight(x: Tensor, rounded: Tensor) -> Tensor:
    """The rounded values to the last bit, with the gradient of those that were rounded."""
    return _Straight.apply(x, rounded)


def weight(w: Tensor) -> Tensor:
    """w (outputs, inputs) as its 8-bit integers stand for it."""
    scale = w.detach().abs().amax(1, keepdim=True) / LIMIT
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    rounded = torch.clamp(torch.round(w.detach() / scale), -LIMIT, LIMIT) * scale
    return straight(w, rounded)


def per_token(x: Tensor) -> Tensor:
    """x (…, inputs) as 8 bits between each token's own ends stand for it."""
    held = x.detach()
    low, high = held.amin(-1, keepdim=True), held.amax(-1, keepdim=True)
    spread = torch.clamp(high - low, min=1e-30)
    levels = torch.round((held - low) * (LEVELS / spread))
    return straight(x, low + levels * (spread / LEVELS))


def grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The scale, and the integer that stands for zero, of a range that holds zero."""
    low, high = torch.clamp(low, max=0.0), torch.clamp(high, min=0.0)
    scale = torch.clamp(high - low, min=1e-6) / LEVELS
    return scale, torch.clamp(torch.round(-low / scale), 0, LEVELS)


class Switch:
    """Whether a model is rounded, for all its parts."""

    def __init__(self) -> None:
        self.on = False


class Rounded(nn.Module):
    """A weight in 8 bits, or a table in float16, as a parametrization."""

    def __init__(self, switch: Switch, rounding: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.switch, self.rounding = switch, rounding

    def forward(self, w: Tensor) -> Tensor:
        return self.rounding(w) if self.switch.on else w


def table(rows: Tensor) -> Tensor:
    """The rows of an embedding in float16."""
    return straight(rows, rows.detach().half().float())


class LearnedRange(nn.Module):
    """The ends of a layer's input, in 8 bits for all tokens."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.tensor(float(low)))
        self.high = nn.Parameter(torch.tensor(float(high)))

    def forward(self, x: Tensor) -> Tensor:
        scale, zero = grid(self.low.detach(), self.high.detach())
        inside = torch.minimum(torch.maximum(x, self.low), self.high)  # what learns the ends
        levels = torch.clamp(torch.round(x.detach() / scale) + zero, 0, LEVELS)
        return straight(inside, (levels - zero) * scale)

    def ends(self) -> Ends:
        """The ends of the grid, on which zero lies."""
        scale, zero = grid(self.low.detach(), self.high.detach())
        return float(-zero * scale), float((LEVELS - zero) * scale)


class PerToken(nn.Module):
    """Each token between its own ends."""

    def forward(self, x: Tensor) -> Tensor:
        return per_token(x)


def of_tokens(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, nn.Linear]:
    """The linear layers that see every token, which the compiler computes in 8 bits: those behind
    the first token alone have too little work to gain.
    """
    seen: set[nn.Module] = set()

    def note(linear: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments[0].dim() == 3:
            seen.add(linear)

    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    hooks = [linear.register_forward_pre_hook(note) for linear in linears.values()]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: linear for name, linear in linears.items() if linear in seen}


class Quantization:
    """Makes a model compute in 8 bits from a step on.

    `model` is transformers' own; `observed` are some batches, by which learned ranges begin.
    """

    def __init__(
        self,
        model: nn.Module,
        quantize: Quantize,
        observed: list[Mapping[str, Tensor]],
        bf16: bool,
        total: int,
    ) -> None:
        self.begin = round(quantize.begin * total)
        self.model, self.bf16, self.switch = model, bf16, Switch()
        self.linears = of_tokens(model, observed[0])
        self.inputs: dict[str, nn.Module] = {name: PerToken() for name in self.linears}
        if quantize.ranges == "static":
            self.inputs = _shared_ranges(observe(model, self.linears, observed))
        for name, linear in self.linears.items():
            linear.bertile_input = self.inputs[name]  # a submodule, so that it trains and is saved
            linear.register_forward_pre_hook(self._round_input)
            parametrize.register_parametrization(linear, "weight", Rounded(self.switch, weight))
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                parametrize.register_parametrization(module, "weight", Rounded(self.switch, table))
            elif isinstance(module, GELU):
                module.register_forward_hook(self._coarse_gelu)

    def at(self, step: int) -> None:
        """Round from the step on where it is time."""
        if step >= self.begin and not self.switch.on:
            self.switch.on = True
            if self.bf16:
                self.model.set_attn_implementation(BF16_ATTENTION)

    def _round_input(self, linear: nn.Module, arguments: tuple[Any, ...]) -> Any:
        return _round_input(linear, arguments) if self.switch.on else None

    def _coarse_gelu(self, gelu: nn.Module, arguments: tuple[Any, ...], exact: Tensor) -> Any:
        """That of layers in 8 bits, of which none works on the first token alone."""
        x = arguments[0]
        coarse = self.switch.on and x.dim() == 3
        return straight(exact, gelu_int8(x.detach())) if coarse else None

    def ends(self) -> dict[str, Ends]:
        """The ends of each layer's input that were learned, by the layer's name."""
        return {
            name: module.ends()
            for name, module in self.inputs.items()
            if isinstance(module, LearnedRange)
        }

    def remove(self) -> None:
        """Leave plain layers; their parametrizations are the caller's to fold."""
        for linear in self.linears.values():
            linear._forward_pre_hooks.clear()
            del linear.bertile_input
        for module in self.model.modules():
            if isinstance(module, GELU):
                module._forward_hooks.clear()
        self.model.set_attn_implementation("eager")


def _shared_ranges(ends: Mapping[str, Ends]) -> dict[str, nn.Module]:
    """A range for each layer; those that read one tensor, as Q, K and V, have one together."""
    shared: dict[tuple[str, Ends], LearnedRange] = {}
    return {
        name: shared.setdefault((name.rpartition(".")[0], both), LearnedRange(*both))
        for name, both in ends.items()
    }


def observe(
    model: nn.Module, linears: Mapping[str, nn.Linear], batches: list[Mapping[str, Tensor]]
) -> dict[str, Ends]:
    """The smallest and the largest value that comes into each layer at a real token."""
    ends: dict[str, Ends] = {}

    def see(name: str, x: Tensor) -> None:
        low, high = ends.get(name, (0.0, 0.0))
        ends[name] = min(low, float(x.min())), max(high, float(x.max()))

    watch_inputs(model, linears, batches, see)
    return ends


def _round_input(linear: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (linear.bertile_input(arguments[0]), *arguments[1:])


def bf16(x: Tensor) -> Tensor:
    """The nearest bfloat16."""
    return straight(x, x.detach().bfloat16().float())


def gelu_int8(x: Tensor) -> Tensor:
    """`vector_math.gelu_int8`: what int8 layers have for GELU, before it is rounded to 8 bits."""
    inside = x.clamp(-3.2, 3.2)
    square = inside * inside
    polynomial = torch.full_like(x, 1.50231353e-05)
    for coefficient in (-0.000521167007, 0.0075681163, -0.0624809936, 0.396795034):
        polynomial = polynomial * square + coefficient
    return x * (inside * polynomial + 0.5)


def _coarse_exp(x: Tensor) -> Tensor:
    """e**x for x ≤ 0 as `vector_math.exp2_coarse` has it, with the gradient of e**x."""
    exact = torch.exp(x)
    doubled = torch.clamp(x.detach() * 1.4426950408889634, min=-125.0)
    whole = torch.round(doubled)
    rest = doubled - whole
    polynomial = torch.full_like(rest, 0.0551715516)
    for coefficient in (0.242611357, 0.693261019, 0.99992806):
        polynomial = polynomial * rest + coefficient
    return straight(exact, torch.ldexp(polynomial, whole.int()))


def attention_in_bf16(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """transformers' eager attention, whose products are of bfloat16 and sum in float32."""
    scale = query.size(-1) ** -0.5 if scaling is None else scaling
    scores = torch.matmul(bf16(query), bf16(key).transpose(2, 3)) * scale
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = _coarse_exp(scores - scores.detach().amax(-1, keepdim=True))
    total = weights.sum(-1, keepdim=True)
    dropped = nn.functional.dropout(weights, p=dropout, training=module.training)
    context = torch.matmul(bf16(dropped), bf16(value)) / total
    return context.transpose(1, 2).contiguous(), weights / total


AttentionInterface.register(BF16_ATTENTION, attention_in_bf16)
AttentionMaskInterface.register(BF16_ATTENTION, eager_mask)
