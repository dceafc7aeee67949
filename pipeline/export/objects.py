"""Finds the transformers model in what a script holds, and refuses weights that are no floats."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertile.base.errors import ModelError, UsageError, require
from bertile.base.quiet import quiet
from bertile.export.foreign import explained

# Where a module keeps the module that it wraps: torch.compile; DataParallel and its likes;
# sentence-transformers' Transformer.
WRAPPED = ("_orig_mod", "module", "auto_model")
ADAPTERS = ("peft", "adapters", "loralib")  # packages whose modules compute a layer and more
QUANTIZED = ("torch.ao.nn", "torch.nn.quantized", "bitsandbytes", "torchao", "optimum.quanto")
IN_FLOATS = "give the model in floats, and quantize it with --precision int8"


@dataclass(frozen=True)
class ModelObject:
    """A transformers model as a script holds it; nothing of it is copied or changed yet.

    name        the class that the script made, which is the MODEL of messages
    directory   what a sentence-transformers object saves beside its weights; None for any other
    """

    model: Any
    name: str
    directory: Path | None = None
    _kept: Any = None  # removes the directory when nobody needs it any more

    def __str__(self) -> str:
        return f"{self.name}: {self.model}"


def opened(held: Any) -> ModelObject:
    """Unwrap a PreTrainedModel, torch.compile's and DataParallel's modules, a SentenceTransformer.

    Raises UsageError for anything else, ModelError where weights are no plain tensors of floats.
    """
    if isinstance(held, ModelObject):
        return held
    torch, transformers = require("export", "torch", "transformers")
    outer = _unwrapped(torch, transformers, held)
    name, kept = type(outer).__name__, None
    model = outer
    if _is_sentence_model(torch, outer):
        _must_be_plain(torch, outer, name)
        kept = _saved(outer, name)
        model = _unwrapped(torch, transformers, getattr(outer[0], "auto_model", outer[0]))
    if not isinstance(model, transformers.PreTrainedModel):
        inside = _place_of_model(torch, transformers, model)
        raise UsageError(
            f"cannot compile a {name}" + (f", which holds a model at '{inside}'" if inside else ""),
            f"give its object.{inside}"
            if inside
            else "give a path, a name, or a transformers PreTrainedModel",
        )
    _must_be_plain(torch, model, name)
    return ModelObject(model, name, Path(kept.name) / name if kept else None, kept)


def digest(hashed: Any, held: ModelObject) -> None:
    """Add to a hash what the export of a model depends on.

    A program's own code cannot be hashed: with some in it, no two hashes are equal.
    """
    model = held.model
    with explained(f"'{held.name}' cannot be read"):
        hashed.update(f"{held}{model.config.to_json_string(use_diff=False)}".encode())
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            hashed.update(name.encode())
            hashed.update(tensor.detach().cpu().float().contiguous().numpy())
    if any(_has_own_code(module) for module in model.modules()):
        hashed.update(os.urandom(16))


def _has_own_code(module: Any) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    foreign = not _is_of(type(module).__module__, ("torch", "transformers"))
    return foreign or "forward" in vars(module) or any(hooks)


def copied(model: Any) -> Any:
    """A copy in float32 on the CPU, without wrappers around its modules; weights that a rule makes
    of others, as pruning and weight norms do, are plain ones in it.
    """
    torch, transformers = require("export", "torch", "transformers")
    # What is computed has gradients and cannot be copied; that of the copy is computed anew.
    computed = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    ]
    own = copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
    for parent in list(own.modules()):
        for name, child in list(parent.named_children()):
            setattr(parent, name, _unwrapped(torch, transformers, child))
    for module in list(own.modules()):
        _settle(module)
    return own.float().cpu().eval()


def _settle(module: Any) -> None:
    names = ("torch", "torch.nn.utils.parametrize", "torch.nn.utils.prune")
    torch, parametrize, prune = require("export", *names)
    if parametrize.is_parametrized(module):
        # Not remove_parametrizations, which changes the class, and that is the original's too.
        weights = {name: getattr(module, name).detach() for name in module.parametrizations}
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        for name, weight in weights.items():
            module.register_parameter(name, torch.nn.Parameter(weight))
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)


def _unwrapped(torch: Any, transformers: Any, held: Any) -> Any:
    while isinstance(held, torch.nn.Module) and not isinstance(held, transformers.PreTrainedModel):
        if _is_sentence_model(torch, held):
            break
        inner = next((getattr(held, name) for name in WRAPPED if name in _names(held)), None)
        if not isinstance(inner, torch.nn.Module):
            break
        held = inner
    return held


def _names(module: Any) -> set[str]:
    """Its children, and what its class computes of them."""
    return {name for name, _ in module.named_children()} | set(dir(type(module)))


def _is_sentence_model(torch: Any, held: Any) -> bool:
    packages = {kind.__module__.partition(".")[0] for kind in type(held).__mro__}
    return isinstance(held, torch.nn.Sequential) and "sentence_transformers" in packages


def _saved(held: Any, name: str) -> tempfile.TemporaryDirectory[str]:
    """Let a sentence-transformers object write its settings and its tokenizer."""
    place = tempfile.TemporaryDirectory(prefix="bertile-")
    with explained(f"'{name}' cannot be saved"), quiet():
        held.save(str(Path(place.name) / name), create_model_card=False)
    return place


def _place_of_model(torch: Any, transformers: Any, held: Any) -> str:
    """The name of the attribute where an object has a transformers model; "" without one."""
    if isinstance(held, torch.nn.Module):
        parts: Iterable[tuple[str, Any]] = held.named_modules()
    else:
        parts = getattr(held, "__dict__", {}).items()
    models = (name for name, value in parts if isinstance(value, transformers.PreTrainedModel))
    return next(models, "")


def _must_be_plain(torch: Any, model: Any, name: str) -> None:
    """Refuse adapters, and weights that are no plain tensors of floats, by the module's name."""
    for place, module in model.named_modules():
        package, kind = type(module).__module__, module._get_name()
        at = f"{kind} at '{place}'" if place else kind
        if _is_of(package, ADAPTERS):
            raise ModelError(
                f"'{name}' has an adapter inside ({at}), which is unsupported",
                "merge it into the weights first, as merge_and_unload of PEFT does",
            )
        if _is_of(package, QUANTIZED):
            raise ModelError(f"'{name}' is quantized ({at}), which is unsupported", IN_FLOATS)
    # Parameters first: of what a module has, they tell most.
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if fault := _fault(torch, tensor):
            what, remedy = fault
            raise ModelError(f"'{name}' has {what} at '{key}', which is unsupported", remedy)


def _is_of(package: str, packages: tuple[str, ...]) -> bool:
    return f"{package}.".startswith(tuple(f"{known}." for known in packages))


def _fault(torch: Any, tensor: Any) -> tuple[str, str] | None:
    """What keeps a parameter or a buffer from being exported, and what to do."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__} in the place of a plain tensor", IN_FLOATS
    if tensor.is_meta:
        return "a tensor without values (on the device 'meta')", "load its weights first"
    if tensor.layout != torch.strided:
        return f"a tensor of the layout {tensor.layout}", "make it dense first (to_dense)"
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    # Buffers also hold positions and flags.
    beside = () if isinstance(tensor, torch.nn.Parameter) else (torch.int64, torch.bool)
    if tensor.dtype not in (*floats, *beside):
        return f"weights of {str(tensor.dtype).removeprefix('torch.')}", IN_FLOATS
    return None
