# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""What watches a training: router numbers, gradient norms, the layer where numbers break, loss-free balancing.

Letters: L sparse layers, E experts.
"""

import logging
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import ProgressCallback, TrainerCallback

from .routing_moevlm import MoeVlmRouter
from .summary_moevlm import is_router, part_of, sparse_layers

logger = logging.getLogger(__name__)

# What a model hands on of its routers: minus infinity there means a masked expert, or no token at all.
MARKED = ("router_logits", "max_router_logit")
# Sums over a long run's window stay exact in float64, which MPS lacks.
WIDEST = {"mps": torch.float32}


def widest(values: Tensor) -> Tensor:
    """Values without gradient in the widest floating dtype of their device."""
    return values.detach().to(WIDEST.get(values.device.type, torch.float64))


def in_places(values: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """A tensor for each of the L layers; zeros for the first ones where a batch without pictures has none."""
    missing = len(sizes) - len(values)
    return [values[0].new_zeros(size) for size in sizes[:missing]] + values


class RouterWindow:
    """What the routers report over the steps since the last log, on all ranks.

    Args:
        layers: What `sparse_layers` gives.
    """

    def __init__(self, layers: dict[str, int]):
        self.layers = layers
        self.sums: Tensor | None = None
        self.peaks: Tensor | None = None

    def add(self, outputs: Mapping[str, Any]) -> None:
        """Add one micro-batch.

        Args:
            outputs: `aux_loss` and `z_loss`; of each layer `chosen_counts` `(E,)`, and in tensors `(L,)`
                `router_entropy`, `max_router_logit`, `experts_per_token` and `dropped_tokens`.
        """
        counts = outputs["chosen_counts"]
        wanted = torch.stack([each.sum() for each in counts])  # (L,)
        dropped = wanted * outputs["dropped_tokens"]
        served, width = wanted - dropped, outputs["experts_per_token"]
        tokens = (served / width.clamp(min=torch.finfo(width.dtype).tiny)).round()
        numbers = torch.stack([tokens * outputs["router_entropy"], served, dropped, tokens], dim=1)  # (L, 4)
        rows = [torch.cat(pair) for pair in zip(counts, numbers, strict=True)]
        losses = torch.stack([outputs["aux_loss"], outputs["z_loss"], outputs["aux_loss"].new_ones(())])
        sums = widest(torch.cat([losses, *in_places(rows, [experts + 4 for experts in self.layers.values()])]))
        self.sums = sums if self.sums is None else self.sums + sums
        peaks = outputs["max_router_logit"].detach().float()
        peaks = nn.functional.pad(peaks, (len(self.layers) - len(counts), 0), value=float("-inf"))  # (L,)
        self.peaks = peaks if self.peaks is None else torch.maximum(self.peaks, peaks)

    def take(self, accelerator) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Scalars for the log and the load of each layer's experts; the window is empty afterwards.

        `aux_loss` and `z_loss` are means over the micro-batches; all else is of the window's tokens taken together.

        Of each layer: entropy of the router in nats, its largest logit, largest share of an expert, experts that nobody
        chose, visits of a token that took place, share of the chosen visits that were dropped for want of capacity.
        Loads are those of the choices: a capacity would hide the largest ones.
        """
        if self.sums is None:
            return {}, {}
        sums = accelerator.reduce(self.sums, reduction="sum").cpu()
        peaks = accelerator.gather(self.peaks.unsqueeze(0)).amax(0).cpu()  # (ranks, L) -> (L,)
        self.sums = self.peaks = None
        scalars = {"aux_loss": (sums[0] / sums[2]).item(), "z_loss": (sums[1] / sums[2]).item()}
        loads = {}
        rows = sums[3:].split([experts + 4 for experts in self.layers.values()])
        for name, row, peak in zip(self.layers, rows, peaks, strict=True):
            counts, (entropy, served, dropped, tokens) = row[:-4], row[-4:]
            if tokens == 0:
                continue
            load = counts / counts.sum()
            scalars[f"router_entropy_{name}"] = (entropy / tokens).item()
            scalars[f"max_router_logit_{name}"] = peak.item()
            scalars[f"max_load_{name}"] = load.max().item()
            scalars[f"dead_experts_{name}"] = float((load == 0).sum())
            scalars[f"experts_per_token_{name}"] = (served / tokens).item()
            scalars[f"dropped_tokens_{name}"] = (dropped / counts.sum()).item()
            loads[name] = [round(share, 5) for share in load.tolist()]
        return scalars, loads


class DroppedVisits:
    """Counts what capacities drop in every forward from now on, where nobody sees the outputs: in generation.

    Args:
        model: Any; without a capacity there is nothing to count.
    """

    def __init__(self, model: nn.Module):
        routers = routers_of(model)
        names = sparse_layers(model.config) if routers else ()
        self.counts: dict[str, Tensor] = {}
        for name, router in zip(names, routers, strict=True):
            if router.capacity.factor is not None:
                self.counts[name] = torch.zeros(2, dtype=torch.long, device=model.device)
                router.capacity.register_forward_hook(partial(self.add, name))

    def add(self, name: str, capacity: nn.Module, args: tuple, served: Tensor) -> None:
        """A forward hook: visits `(N, K)` wanted, the first of `args`, and served."""
        self.counts[name] += torch.stack([(each < capacity.num_experts).sum() for each in (args[0], served)])

    def take(self) -> dict[str, float]:
        """Each layer's share of visits dropped on all ranks, 0..1; the count is empty afterwards."""
        shares = {}
        for name, counts in self.counts.items():
            wanted, served = reduce(counts.clone(), reduction="sum").tolist()
            shares[name] = (wanted - served) / max(wanted, 1)
            counts.zero_()
        return shares


class LoadBalancer(TrainerCallback):
    """Loss-free balancing: after each optimizer step, one move of each router's selection bias toward even load.

    The counts are the choices of the whole global batch, all micro-batches, all ranks, before a capacity dropped any:
    what it lets through may look even whatever is chosen. Whole numbers add up the same in any order, so the biases
    agree bit for bit over ranks. A bias moves while its router learns: a frozen router keeps it.

    Args:
        model: A MoeVlm, under PEFT or not.
        rate: Size of one move; 0 switches the callback off.

    Source: Wang et al. 2024 (arXiv:2408.15664), algorithm 1.
    """

    def __init__(self, model: nn.Module, rate: float):
        self.rate = rate
        self.sizes = list(sparse_layers(model.config).values())
        routers = routers_of(model)
        moving = [has_bias(router) and router.weight.requires_grad for router in routers]
        self.routers = [router if moves and rate else None for router, moves in zip(routers, moving, strict=True)]
        self.counts: Tensor | None = None

    @property
    def active(self) -> bool:
        """Whether any bias moves."""
        return any(router is not None for router in self.routers)

    def add(self, outputs: Mapping[str, Any]) -> None:
        """Add one micro-batch: `chosen_counts`, L tensors `(E,)`: how often each expert was chosen, without padding."""
        if self.active:
            counts = torch.cat(in_places(list(outputs["chosen_counts"]), self.sizes)).long()
            self.counts = counts if self.counts is None else self.counts + counts

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.counts is not None:
            counts = reduce(self.counts, reduction="sum").split(self.sizes)
            self.counts = None
            for router, visits in zip(self.routers, counts, strict=True):
                if router is not None and visits.any():
                    router.update_bias(visits, self.rate)


class QuietProgress(ProgressCallback):
    """The progress bar with the last loss beside it, instead of a line for every log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None:
            shown = {name: logs[name] for name in ("loss", "eval_score") if name in (logs or {})}
            self.shown = {**getattr(self, "shown", {}), **shown}
            self.training_bar.set_postfix(self.shown)


class EvaluateLastStep(TrainerCallback):
    """Evaluates at the last step too, though no multiple of `eval_steps`: else an older best would win unopposed."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.eval_strategy == "steps" and state.global_step >= state.max_steps:
            control.should_evaluate = True


def has_bias(router: nn.Module) -> bool:
    """Whether a router has a selection bias."""
    return router.e_score_correction_bias is not None


def routers_of(model: nn.Module) -> list[MoeVlmRouter]:
    """The routers in use, in the order in which the model reports its sparse layers."""
    # PEFT keeps the untrained copy of a module that it saves whole.
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, MoeVlmRouter)]
    return [module for name, module in found if not name.endswith(".original_module")]


def warn_of_unreached_routers(model: nn.Module) -> None:
    """Warn of routers that learn though the loss of the answers has no gradient for them.

    With one expert a token and `norm_topk_prob`, the weight of the visit is 1 whatever the router says.
    """
    names = [
        name
        for name, router in zip(sparse_layers(model.config), routers_of(model), strict=True)
        if router.weight.requires_grad and router.selection.norm_topk_prob and router.selection.top_k == 1
    ]
    if names:
        logger.warning(
            "num_experts_per_tok=1 with norm_topk_prob=True makes every weight 1: the routers of %s learn nothing from "
            "the answers; set norm_topk_prob=False or a larger num_experts_per_tok there, or freeze_router",
            ", ".join(names),
        )


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """L2 norm of the gradients of "vision", "connector", "language" and "router", where a part has any.

    Their root of the sum of squares is the norm of all gradients. Sharded gradients count whole.
    """
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            part = "router" if is_router(name) else part_of(name)
            gradients.setdefault(part, []).append(parameter.grad)
    norms = {part: get_total_norm(tensors) for part, tensors in gradients.items()}
    return {part: norm.full_tensor() if isinstance(norm, DTensor) else norm for part, norm in norms.items()}


@torch.no_grad()
def first_non_finite(model: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    """Where a forward pass breaks: the input, or the first layer whose output is not finite, in words; None if nowhere.

    The forward is run once more, with hooks. Inner layers finish before the ones that hold them, so the first found
    is also the innermost.

    Args:
        model: As in training; dropout and jitter draw anew.
        inputs: Of the forward.
    """
    for name, value in inputs.items():
        if isinstance(value, Tensor) and not is_finite(value):
            return f"the input {name} is not finite"
    found: list[str] = []

    def look(name: str):
        def hook(module, args, output):
            # Routers may mark experts that a token may not visit by minus infinity; models hand these marks on.
            allowed = float("-inf") if name.endswith(".gate") else None
            if isinstance(output, Mapping):
                output = [value for key, value in output.items() if key not in MARKED]
            if not found and not all(is_finite(value, allowed) for value in tensors(output)):
                broken = [short for short, value in module.named_parameters() if not is_finite(value)]
                why = f"whose own {broken[0]} is not finite" if broken else "whose weights are finite"
                found.append(f"the first output that is not finite is that of {name} ({type(module).__name__}), {why}")

        return hook

    # A router is one layer: what is inside it has no weights of its own.
    layers = [(name, module) for name, module in model.named_modules() if name and not is_router(name)]
    handles = [module.register_forward_hook(look(name)) for name, module in layers]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def is_finite(tensor: Tensor, allowed: float | None = None) -> bool:
    """Whether every number here is finite, or equals `allowed`; whole numbers always are."""
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not tensor.is_floating_point():
        return True
    finite = torch.isfinite(tensor) if allowed is None else torch.isfinite(tensor) | (tensor == allowed)
    return bool(finite.all())


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in the nested output of a module."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from tensors(inner)
