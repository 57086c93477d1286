"""Losses and the dual-path step, against formulas written out."""

import pytest
import torch
from torch import nn

from cbn_ext import CompoundBatchNorm1d
from train.config import LossConfig
from train.dual_path import dual_path_loss
from train.losses import balanced_softmax, consistency


def softmax_with_prior(logits, counts):
    """n_k exp(z_k) / Σ_j n_j exp(z_j), the form in which the balanced softmax is defined."""
    weighted = counts * logits.exp()
    return weighted / weighted.sum(dim=1, keepdim=True)


def cosine(a, b):
    return (a * b).sum(dim=1) / (a.square().sum(dim=1).sqrt() * b.square().sum(dim=1).sqrt())


def test_balanced_softmax():
    logits = torch.randn(7, 5, dtype=torch.float64)
    labels, counts = torch.randint(5, (7,)), torch.tensor([100, 30, 10, 3, 1])
    expected = -softmax_with_prior(logits, counts)[torch.arange(7), labels].log().mean()
    torch.testing.assert_close(balanced_softmax(logits, labels, counts), expected, rtol=1e-12, atol=0)


def test_balanced_softmax_with_equal_counts_is_cross_entropy():
    logits, labels = torch.randn(7, 5), torch.randint(5, (7,))
    expected = nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(balanced_softmax(logits, labels, torch.full((5,), 17)), expected)


def test_consistency():
    z_s, u_s, z_w, u_w = torch.randn(4, 6, 10, dtype=torch.float64)
    expected = -0.5 * (cosine(z_s, u_w) + cosine(u_s, z_w)).mean()
    torch.testing.assert_close(consistency((z_s, u_s), (z_w, u_w)), expected, rtol=1e-12, atol=0)
    assert consistency((z_s, u_s), (3 * u_s, 2 * z_s)).item() == pytest.approx(-1)


def test_consistency_gives_no_gradient_to_the_weak_views():
    logits = [torch.randn(6, 10, requires_grad=True) for _ in range(4)]
    consistency((logits[0], logits[1]), (logits[2], logits[3])).backward()
    assert logits[0].grad.abs().sum() > 0 and logits[1].grad.abs().sum() > 0
    assert logits[2].grad is None and logits[3].grad is None


def batch(classes=4, images=12, features=5):
    strong, weak = torch.randn(2, images, features, dtype=torch.float64)
    return strong, weak, torch.arange(images) % classes, torch.tensor([50, 20, 5, 2])


@pytest.mark.parametrize("weights", [LossConfig(), LossConfig(0.3, 2.0, 0.7), LossConfig(1, 0, 0)])
def test_gradient_of_a_linear_model(weights):
    """Without split both paths are one: d/dW of the terms, by hand, for z = W x."""
    strong, weak, labels, counts = batch()
    model = nn.Linear(5, 4, bias=False).double()
    step = dual_path_loss(model, strong, weak, labels, counts, None, weights)
    step.total.backward()

    z, w = (strong @ model.weight.T).detach(), (weak @ model.weight.T).detach()
    classification = softmax_with_prior(z, counts) - nn.functional.one_hot(labels, 4)
    unit_z, unit_w = z / z.norm(dim=1, keepdim=True), w / w.norm(dim=1, keepdim=True)
    # d cos(z, w) / dz = (ŵ - cos ẑ) / |z|; the two halves of the consistency term are equal here.
    agreement = -(unit_w - cosine(z, w)[:, None] * unit_z) / z.norm(dim=1, keepdim=True)
    by_logits = (weights.first + weights.second) * classification + weights.consistency * agreement
    torch.testing.assert_close(model.weight.grad, by_logits.T @ strong / len(labels), rtol=1e-10, atol=1e-12)


def test_split_path_value_and_gradient():
    """Second path = each group standardised by itself, with its own γ and β."""
    strong, weak, labels, counts = batch()
    groups = labels // 2
    # momentum 0: the passes do not move the running statistics, on which the responsibilities depend.
    norm = CompoundBatchNorm1d(5, 2, momentum=0.0, affine_init="unit").double()
    with torch.no_grad():
        norm.weight.add_(0.1 * torch.randn_like(norm.weight))
        norm.bias.add_(0.1 * torch.randn_like(norm.bias))
    model = nn.Sequential(norm, nn.Linear(5, 4).double())
    weights = LossConfig(0.5, 1.5, 0.8)
    step = dual_path_loss(model, strong, weak, labels, counts, groups, weights)
    gradients = torch.autograd.grad(step.total, list(model.parameters()))

    def split(x):
        y = torch.zeros_like(x)
        for m in range(2):
            own = x[groups == m]
            standard = (own - own.mean(dim=0)) / (own.var(dim=0, unbiased=False) + norm.eps).sqrt()
            y[groups == m] = standard * norm.weight[m] + norm.bias[m]
        return model[1](y)

    z_s, u_s, z_w, u_w = model(strong), split(strong), model(weak).detach(), split(weak).detach()
    first = -softmax_with_prior(z_s, counts)[torch.arange(12), labels].log().mean()
    second = -softmax_with_prior(u_s, counts)[torch.arange(12), labels].log().mean()
    agreement = -0.5 * (cosine(z_s, u_w) + cosine(u_s, z_w)).mean()
    total = 0.5 * first + 1.5 * second + 0.8 * agreement
    expected = torch.autograd.grad(total, list(model.parameters()))

    torch.testing.assert_close(
        (step.total, step.first, step.second, step.consistency), (total, first, second, agreement)
    )
    torch.testing.assert_close(step.logits, z_s)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-11)


def test_weak_passes_keep_no_graph():
    strong, weak, labels, counts = batch()
    model = nn.Linear(5, 4).double()
    passes = []
    model.register_forward_hook(lambda _, args, out: passes.append((args[0] is weak, out.requires_grad)))
    weak.requires_grad_()
    dual_path_loss(model, strong, weak, labels, counts, None, LossConfig()).total.backward()
    assert sorted(passes) == [(False, True), (False, True), (True, False), (True, False)]
    assert weak.grad is None
