"""Activation checkpoints that wait on the host come back as they were, and nothing else leaves."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from lomo_ds.zero3 import activation_offload
from lomo_ds.zero3.activation_offload import checkpoints_on_host

CPU = torch.device("cpu")


def layers() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))


def loss_of(model: torch.nn.Sequential, hidden: torch.Tensor) -> torch.Tensor:
    for layer in model:
        hidden = checkpoint(layer, hidden * 1.0, use_reentrant=True)
    return hidden.square().sum()


def gradients(offloaded: bool) -> list[torch.Tensor]:
    model = layers()
    hidden = torch.ones(2, 3, 4, requires_grad=True)
    if offloaded:
        with checkpoints_on_host(CPU):
            loss = loss_of(model, hidden)
    else:
        loss = loss_of(model, hidden)
    loss.backward()
    return [hidden.grad, *(param.grad for param in model.parameters())]


def test_gradients_are_the_same() -> None:
    for ours, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(ours, expected)


def test_hidden_states_move_and_weights_stay(monkeypatch) -> None:
    moved = []
    real = activation_offload._to_host
    monkeypatch.setattr(activation_offload, "_to_host", lambda one: (moved.append(one.shape), real(one))[1])
    gradients(True)
    assert moved and all(shape == (2, 3, 4) for shape in moved)
