# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""What the dumb loops over tokens and experts share, and what they are compared by."""

import torch
from torch.nn import functional as F


def swiglu(token, gate, up, down):
    return down @ (F.silu(gate @ token) * (up @ token))


def output_and_gradients(block, forward, tokens):
    """The output, then the gradients of the tokens and of every parameter, named; None where there is none."""
    block.zero_grad()
    tokens = tokens.clone().requires_grad_()
    output = forward(tokens)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)  # no symmetric sum that hides a swap
    if output.requires_grad:  # that of a loop over no token does not
        (output.float() * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
    return {"output": output, "tokens": tokens.grad, **gradients}
