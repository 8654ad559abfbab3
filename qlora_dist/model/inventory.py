"""Inventory of a model: how each parameter is kept and why, and which layers are adapted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from qlora_dist.model.adapters import mistaken_for_experts
from qlora_dist.model.experts import QuantizedStack, StackAdapter, expert_stacks
from qlora_dist.model.linear_layers import linear_layers, linear_layers_and_reasons
from qlora_dist.model.nf4 import QuantizedLinear
from qlora_dist.model.parts import ModelParts, lora_layers
from qlora_dist.model.text_reach import left_out_towers
from qlora_dist.runtime.shards import whole_shape

LINEAR = "linear layers"
EXPERTS = "experts"
VECTORS = "norms, biases and other vectors"
OTHERS = "weights of no linear layer"
ADAPTERS = "adapters"


@dataclass
class Share:
    """Parameters that are kept alike."""

    what: str
    """Such as `linear layers` or `embedding`."""
    dtype: str
    """`nf4` or `fp4`, else the type of the parameters."""
    why: str
    """Reason why linear layers are not in 4 bits; empty for the others."""
    num_parameters: int = 0
    """Elements, not stored bytes: the constants of 4-bit matrices count in `num_bytes` alone."""
    num_bytes: int = 0
    """Bytes on all shards together."""
    names: dict[str, int] = field(default_factory=dict)
    """Number of parameters by name, with `*` for the number of a layer."""


@dataclass(frozen=True)
class Inventory:
    """The parameters of an adapted model, whole, and its linear layers by what becomes of them."""

    model: str
    """Class of the base model."""
    num_layers: int
    """Decoder layers."""
    shares: tuple[Share, ...]
    """All parameters, each once: first those of the base, then the adapters."""
    adapted: dict[str, int]
    """Linear layers that carry an adapter: their number by name, with `*` for a layer's number."""
    without_adapter: dict[str, tuple[int, str]]
    """Linear layers that carry none, by such a name: number, and the reason."""
    left_out: tuple[str, ...]
    """Parts of a multimodal wrapper that text does not pass through, and that are not read."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all parameters, on all shards together."""
        return sum(share.num_bytes for share in self.shares)

    @classmethod
    def of(cls, parts: ModelParts) -> Inventory:
        """Take the inventory of an adapted model, which may be on meta or in shards."""
        carrying = {id(layer) for layer in lora_layers(parts.base)}
        reasons = linear_layers_and_reasons(parts.base)
        has_stacks = bool(expert_stacks(parts.base))
        layers = linear_layers(parts.base) if has_stacks else []
        mistaken = mistaken_for_experts(parts.base, layers)
        adapted: Counter[str] = Counter()
        without: Counter[tuple[str, str]] = Counter()
        for name, module in parts.base.named_modules():
            if isinstance(module, StackAdapter):
                adapted[f"{_pattern(name)}.{module.parameter_name}"] += 1
            elif id(module) in carrying:
                adapted[_pattern(name)] += 1
            elif isinstance(module, nn.Linear) and not re.search(r"\.(lora_|base_layer$)", name):
                reason = reasons.get(name) or "not in adapter.target_modules"
                if name in mistaken:
                    reason = "peft takes its name for one of experts"
                without[_pattern(name), reason] += 1
        return cls(
            type(parts.base).__name__,
            len(parts.layers),
            _shares(parts, reasons),
            dict(adapted),
            {name: (number, reason) for (name, reason), number in without.items()}
            | _stacks_without_adapter(parts, adapted),
            tuple(left_out_towers(parts.base)),
        )

    def lines(self) -> list[str]:
        """Return the inventory in two or three lines for a log."""
        base = [share for share in self.shares if share.what != ADAPTERS]
        total = sum(share.num_parameters for share in base)
        kept: dict[str, list[str]] = {}
        for share in sorted(base, key=lambda share: -share.num_parameters):
            why = f" ({share.why})" if share.why else ""
            text = f"{_short(share.num_parameters)} in {share.what}{why}"
            kept.setdefault(share.dtype, []).append(text)
        lines = [
            f"{self.model}: {self.num_layers} layers, {_short(total)} parameters | "
            + " | ".join(f"{dtype}: {', '.join(texts)}" for dtype, texts in kept.items())
        ]
        stacks = any(share.what == EXPERTS for share in base)
        num_adapted = sum(self.adapted.values())
        num_linear = num_adapted + sum(number for number, _ in self.without_adapter.values())
        num_trained = sum(one.num_parameters for one in self.shares if one.what == ADAPTERS)
        kinds = "linear layers and stacks of experts" if stacks else "linear layers"
        text = (
            f"adapters: {_short(num_trained)} parameters on {num_adapted} of {num_linear} {kinds} "
            f"({_leaves(self.adapted)})"
        )
        by_reason: dict[str, list[str]] = {}
        for name, (_, reason) in self.without_adapter.items():
            by_reason.setdefault(reason, []).append(name)
        if by_reason:
            texts = (f"{_leaves(names)} ({reason})" for reason, names in by_reason.items())
            text += f"; none on {', '.join(texts)}"
        lines.append(text)
        if self.left_out:
            lines.append(
                f"left out and not read, since text does not pass through: "
                f"{', '.join(self.left_out)}"
            )
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return the inventory as plain data."""
        plain = asdict(self)
        plain["without_adapter"] = {
            name: {"number": number, "reason": reason}
            for name, (number, reason) in self.without_adapter.items()
        }
        return plain


def _stacks_without_adapter(parts: ModelParts, adapted: Counter[str]) -> dict[str, tuple[int, str]]:
    numbers = Counter(map(_pattern, expert_stacks(parts.base)))
    reason = "not in adapter.target_modules"
    return {name: (number, reason) for name, number in numbers.items() if name not in adapted}


def _shares(parts: ModelParts, reasons: dict[str, str]) -> tuple[Share, ...]:
    """Put each parameter, by its identity, into the share of those that are kept alike."""
    shares: dict[tuple[str, str, str], Share] = {}
    stacks = {id(stack) for stack in expert_stacks(parts.base).values()}
    seen: set[int] = set()
    for module_name, module in parts.base.named_modules():
        for leaf, param in module.named_parameters(recurse=False):
            if id(param) in seen:
                continue
            seen.add(id(param))
            what, dtype, why = _kind(parts, reasons, module_name, module, leaf, param)
            if id(param) in stacks:
                what, why = EXPERTS, "model.quantization is none"
            share = shares.setdefault((what, dtype, why), Share(what, dtype, why))
            numel = whole_shape(param).numel()
            share.num_bytes += numel * param.element_size()
            if isinstance(module, (QuantizedLinear, QuantizedStack)) and leaf != "bias":
                if leaf != "weight":
                    continue  # a constant of the matrix
                numel = _elements(module)
            share.num_parameters += numel
            pattern = _pattern(f"{module_name}.{leaf}")
            share.names[pattern] = share.names.get(pattern, 0) + 1
    return tuple(sorted(shares.values(), key=lambda share: share.what == ADAPTERS))


def _kind(
    parts: ModelParts,
    reasons: dict[str, str],
    name: str,
    module: nn.Module,
    leaf: str,
    param: nn.Parameter,
) -> tuple[str, str, str]:
    """Return what a parameter belongs to, its type, and why it is not in 4 bits."""
    dtype = str(param.dtype).removeprefix("torch.")
    if ".lora_" in name:
        return ADAPTERS, dtype, ""
    if isinstance(module, QuantizedLinear) and leaf != "bias":
        return LINEAR, module.format.quant_type, ""
    if isinstance(module, QuantizedStack):
        return EXPERTS, module.format.quant_type, ""
    if param is parts.embedding.weight:
        is_tied = parts.head is not None and parts.head.weight is param
        return ("embedding (also the output head)" if is_tied else "embedding"), dtype, ""
    if parts.head is not None and param is parts.head.weight:
        return "output head", dtype, ""
    if len(whole_shape(param)) < 2 or leaf.endswith("bias"):
        return VECTORS, dtype, ""
    if isinstance(module, nn.Linear):
        name = name.removesuffix(".base_layer")
        return LINEAR, dtype, reasons.get(name) or "model.quantization is none"
    return ("other embeddings" if isinstance(module, nn.Embedding) else OTHERS), dtype, ""


def _elements(module: QuantizedLinear | QuantizedStack) -> int:
    """Return the elements of a layer's or a stack's matrices."""
    if isinstance(module, QuantizedStack):
        return module.shape.numel()
    return module.in_features * module.out_features


def _pattern(name: str) -> str:
    """Return a name without what peft adds, and with `*` for each number."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name.replace(".base_layer", ""))


def _leaves(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))


def _short(number: int) -> str:
    """Return a count to three digits: `134M` for 134,515,008."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= 0.9995 * size:
            scaled = number / size
            digits = 0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2
            return f"{scaled:.{digits}f}{letter}"
    return str(number)
