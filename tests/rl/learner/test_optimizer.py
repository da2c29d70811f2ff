"""The optimiser: AdamW by its formula, in bfloat16 too, and its state on disk."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rl.algorithm.presets import AlgorithmConfig
from rl.learner.optimizer import Optimizer

RATE, DECAY, NORM, WARM = 0.02, 0.1, 2.0, 3


def make_module(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(4, 3).to(dtype)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    return module


def make_optimizer(module):
    return Optimizer(module, AlgorithmConfig(weight_decay=DECAY, max_grad_norm=NORM), RATE, WARM)


def gradients(step):
    """Return gradients of the weight and the bias; every second one is longer than the norm allows."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(*shape, generator=generator) * (3.0, 0.2)[step % 2] for shape in ((3, 4), (3,))]


def train(module, optimizer, steps):
    """The norms that the updates return."""
    norms = []
    for step in steps:
        for parameter, gradient in zip(module.parameters(), gradients(step), strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        norms.append(optimizer.update())
        assert all(parameter.grad is None for parameter in module.parameters())
    return norms


def by_the_formula(weights, steps):
    """Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2, with betas .9 and .95, in float64."""
    weights = [w.double() for w in weights]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    norms = []
    for t, step in enumerate(steps, start=1):
        grads = [g.double() for g in gradients(step)]
        norms.append(sum(float((g * g).sum()) for g in grads) ** 0.5)
        rate = RATE * min(1, t / WARM)
        for i, g in enumerate(grads):
            g = g * min(1, NORM / norms[-1])
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.95 * second[i] + 0.05 * g * g
            adam = (first[i] / (1 - 0.9**t)) / ((second[i] / (1 - 0.95**t)).sqrt() + 1e-8)
            weights[i] = weights[i] - rate * DECAY * weights[i] - rate * adam
    return weights, norms


def test_updates_are_those_of_the_formula_clipped_and_warmed_up():
    module = make_module()
    expected, norms = by_the_formula([p.detach() for p in module.parameters()], range(6))
    assert train(module, make_optimizer(module), range(6)) == pytest.approx(norms, rel=1e-5)
    for parameter, weight in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.double(), weight, atol=1e-5, rtol=1e-5)


def test_bfloat16_weights_are_those_of_float32_rounded_once():
    whole, half = make_module(torch.bfloat16).float(), make_module(torch.bfloat16)
    for parameter in whole.parameters():
        parameter.data = parameter.data.clone()
    train(whole, make_optimizer(whole), [1] * 40)  # whose gradients are rounded alike
    train(half, make_optimizer(half), [1] * 40)
    for one, other in zip(whole.parameters(), half.parameters(), strict=True):
        torch.testing.assert_close(other, one.bfloat16(), atol=0.01, rtol=0.01)


def test_updates_smaller_than_the_distance_of_bfloat16_numbers_add_up():
    module = nn.Linear(4, 3).to(torch.bfloat16)
    module.weight.data.fill_(1.0)  # below it, numbers are 2^-8 apart
    optimizer = Optimizer(module, AlgorithmConfig(), 1e-4)
    for _ in range(100):
        module.weight.grad = torch.ones_like(module.weight)
        optimizer.update()
    assert module.weight.float().mean().item() == pytest.approx(0.99, abs=0.003)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_state_survives_the_disk(tmp_path, dtype):
    whole, module = make_module(dtype), make_module(dtype)
    train(whole, make_optimizer(whole), range(6))
    first = make_optimizer(module)
    train(module, first, range(2))
    save_file(first.state(), tmp_path / "state.safetensors")
    second = make_optimizer(module)
    train(module, second, [9])  # what it has seen is forgotten
    module.load_state_dict(_after(dtype, 2))
    second.load_state(load_file(tmp_path / "state.safetensors"))
    train(module, second, range(2, 6))
    for one, other in zip(whole.parameters(), module.parameters(), strict=True):
        assert torch.equal(one, other)


def _after(dtype, steps):
    module = make_module(dtype)
    train(module, make_optimizer(module), range(steps))
    return module.state_dict()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(value):
    spoiled, module = make_module(), make_module()
    optimizers = [make_optimizer(each) for each in (spoiled, module)]
    train(spoiled, optimizers[0], [0])
    train(module, optimizers[1], [0])
    for parameter in spoiled.parameters():
        parameter.grad = torch.full_like(parameter, value)
    assert not torch.isfinite(torch.tensor(optimizers[0].update()))
    train(spoiled, optimizers[0], [1, 2])  # neither the moments nor the warm-up know of it
    train(module, optimizers[1], [1, 2])
    assert all(torch.equal(a, b) for a, b in zip(spoiled.parameters(), module.parameters(), strict=True))


def test_frozen_weights_are_left_alone():
    module = make_module()
    module.bias.requires_grad_(False)
    before = module.bias.clone()
    optimizer = make_optimizer(module)
    module.weight.grad = torch.ones_like(module.weight)
    optimizer.update()
    assert torch.equal(module.bias, before) and not any("bias" in name for name in optimizer.state())
