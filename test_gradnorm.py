"""Tests: the mathematics of gradnorm.py against closed forms, numerical derivatives and independent formulas, and what
breaks in practice in train.py, evaluate.py and visualize.py.

    pytest
"""

import argparse
import functools
import gzip
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

import evaluate
import train
import visualize
from gradnorm import (
    gradnorm_loss,
    gradnorm_loss_finite_difference,
    input_gradient,
    pgd_attack,
)

HERE = Path(__file__).parent
LOSSES = [gradnorm_loss, gradnorm_loss_finite_difference]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def linear_model(classes=3, pixels=12):
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes)).double()


def smooth_model(classes=4):
    """Convolution, normalisation, smooth activation: all that the default model is made of, in float64."""
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(1, 6), nn.GELU(), nn.Conv2d(6, 6, 3), nn.SiLU(),
                         nn.Flatten(), nn.Linear(6 * 4 * 4, classes)).double()


def batch(n=5, classes=4, size=8, soft=False):
    x = torch.rand(n, 3, size, size, dtype=torch.float64)
    y = torch.rand(n, classes, dtype=torch.float64).softmax(1) if soft else torch.randint(classes, (n,))
    return x, y


def gradients(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def settings(*flags):
    """The settings of train.py for these flags."""
    old, sys.argv = sys.argv, ["train.py", "--output-dir", "/nonexistent", *flags]
    try:
        return train.parse_args()[0]
    finally:
        sys.argv = old


# The loss


@pytest.mark.parametrize("soft", [False, True])
def test_loss_and_gradient_of_a_linear_model_have_a_closed_form(soft):
    model, (x, y) = linear_model(4, 3 * 8 * 8), batch(soft=soft)
    loss = gradnorm_loss(model, x, y, lambda_ce=0.7, lambda_gn=1.3, eps=0.1)
    loss.backward()

    weight, bias = model[1].weight.detach(), model[1].bias.detach()
    target = y if soft else F.one_hot(y, 4).double()
    value, weight_gradient, bias_gradient = 0, torch.zeros_like(weight), torch.zeros_like(bias)
    for xi, ti in zip(x.flatten(1), target):
        p = torch.softmax(weight @ xi + bias, 0)
        residual = p - ti  # dL/dlogits
        gradient = weight.T @ residual  # ∇x L
        jacobian = torch.diag(p) - torch.outer(p, p)  # dresidual/dlogits
        s = gradient.sign()
        through_logits = 0.7 * residual + 1.3 * 0.1 * jacobian @ weight @ s
        value += 0.7 * -(ti * p.log()).sum() + 1.3 * 0.1 * gradient.abs().sum()
        weight_gradient += torch.outer(through_logits, xi) + 1.3 * 0.1 * torch.outer(residual, s)
        bias_gradient += through_logits
    torch.testing.assert_close(loss, value / 5, rtol=1e-12, atol=0)
    torch.testing.assert_close(model[1].weight.grad, weight_gradient / 5, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(model[1].bias.grad, bias_gradient / 5, rtol=1e-10, atol=1e-14)


@torch.no_grad()
def test_loss_equals_numerical_differentiation_example_by_example():
    """∇x of each example alone by central differences: no autograd at all."""
    model, (x, y) = smooth_model(), batch()
    steps = 1e-5 * torch.eye(x[0].numel(), dtype=torch.float64).view(-1, *x[0].shape)
    total = 0
    for xi, yi in zip(x, y):
        ahead, behind = (F.cross_entropy(model(xi + d), yi.expand(len(d)), reduction="none") for d in (steps, -steps))
        norm = ((ahead - behind) / 2e-5).abs().sum()
        total += 0.8 * F.cross_entropy(model(xi[None]), yi[None]) + 1.2 * 4 / 255 * norm
    torch.testing.assert_close(gradnorm_loss(model, x, y), total / len(x), rtol=1e-8, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_parameter_gradient_equals_numerical_differentiation(loss):
    model, (x, y) = smooth_model(), batch()
    parameters = nn.utils.parameters_to_vector(model.parameters()).detach()
    analytic = gradients(loss(model, x, y, lambda_gn=20.0), model)

    def value(vector):
        nn.utils.vector_to_parameters(vector, model.parameters())
        return loss(model, x, y, lambda_gn=20.0).item()

    for _ in range(10):
        direction = F.normalize(torch.randn_like(parameters), dim=0)
        # The kinks of |∇x L| make the loss piecewise smooth: the step must not cross one. A much smaller one drowns the
        # difference in rounding, which is another on every processor.
        numerical = (value(parameters + 1e-6 * direction) - value(parameters - 1e-6 * direction)) / 2e-6
        assert numerical == pytest.approx((analytic @ direction).item(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_normalised_inputs_with_sigma_equal_pixels(loss):
    model, (x, y) = smooth_model(), batch()
    mean, sigma = 0.45, 0.224
    on_pixels = nn.Sequential(train.Normalize([mean] * 3, [sigma] * 3), model).double()
    normalised = (x - on_pixels[0].mean) / on_pixels[0].std
    a, b = loss(on_pixels, x, y, eps=0.1), loss(model, normalised, y, eps=0.1, sigma=on_pixels[0].std[0].item())
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(a, model), gradients(b, model), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_one_hot_targets_equal_class_indices(loss):
    model, (x, y) = smooth_model(), batch()
    a, b = loss(model, x, y), loss(model, x, F.one_hot(y, 4).double())
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(a, model), gradients(b, model), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_batch_loss_is_the_mean_of_its_examples_losses(loss):
    model, (x, y) = smooth_model(), batch()
    alone = torch.stack([loss(model, x[i:i + 1], y[i:i + 1]) for i in range(5)]).mean()
    together = loss(model, x, y)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(together, model), gradients(alone, model), rtol=1e-9, atol=1e-14)


def test_finite_difference_converges_to_double_backprop():
    model, (x, y) = smooth_model(), batch()
    exact = gradnorm_loss(model, x, y, eps=0.1)
    exact_gradient = gradients(exact, model)
    errors = []
    for h in (1e-3, 1e-4, 1e-5):
        loss = gradnorm_loss_finite_difference(model, x, y, eps=0.1, h=h)
        errors.append((abs(loss - exact).item(), (gradients(loss, model) - exact_gradient).norm().item()))
    for coarse, fine in itertools.pairwise(errors):  # first order: a tenth of h, a tenth of the error
        assert fine == pytest.approx((coarse[0] / 10, coarse[1] / 10), rel=0.1)


def test_finite_difference_at_h_eps_is_fgsm_adversarial_training():
    model, (x, y) = smooth_model(), batch()
    loss = gradnorm_loss_finite_difference(model, x, y, lambda_ce=1, lambda_gn=1, eps=0.1, h=0.1)
    fgsm = F.cross_entropy(model(x + 0.1 * input_gradient(model, x, y).sign()), y)
    torch.testing.assert_close(loss, fgsm, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(loss, model), gradients(fgsm, model), rtol=1e-8, atol=1e-12)


def test_terms_add_up_to_the_loss():
    model, (x, y) = smooth_model(), batch()
    for loss in LOSSES:
        total, cross_entropy, penalty = loss(model, x, y, lambda_ce=0.3, lambda_gn=2.0, return_terms=True)
        torch.testing.assert_close(total, 0.3 * cross_entropy + 2.0 * penalty)
        torch.testing.assert_close(cross_entropy, F.cross_entropy(model(x), y).detach())
    torch.testing.assert_close(gradnorm_loss(model, x, y, lambda_ce=1, eps=0), F.cross_entropy(model(x), y))


def test_batchnorm_in_train_mode_is_differentiated_through_the_whole_batch():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.GELU(), nn.Flatten(), nn.Linear(6 * 36, 4)).double()
    x, y = batch()
    leaf = x.clone().requires_grad_()
    whole, = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    torch.testing.assert_close(input_gradient(model, x, y), whole)
    gradnorm_loss(model, x, y).backward()
    model.eval()
    before = [b.clone() for b in model.buffers()]
    alone = torch.cat([input_gradient(model, x[i:i + 1], y[i:i + 1]) for i in range(5)])
    torch.testing.assert_close(input_gradient(model, x, y), alone)
    assert all(map(torch.equal, before, model.buffers()))


def test_input_gradient_is_that_of_each_examples_own_loss():
    model, (x, y) = smooth_model(), batch(soft=True)
    gradient = input_gradient(model, x, y)
    for i in range(5):
        leaf = x[i:i + 1].clone().requires_grad_()
        expected, = torch.autograd.grad(F.cross_entropy(model(leaf), y[i:i + 1]), leaf)
        torch.testing.assert_close(gradient[i:i + 1], expected)
    assert not gradient.requires_grad and all(p.grad is None for p in model.parameters())


class CountMatrixProducts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return function(*args, **(kwargs or {}))


def test_passes_cost_what_the_docstrings_say():
    """In passes through each layer: natural 3, GradNorm 6, finite difference 6, PGD-k training 2k + 3. Only the first
    layer has an input gradient more or less."""
    layers = 30
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), *[nn.Linear(8, 8) for _ in range(layers - 1)]).double()
    x, y = torch.rand(8, 3, 2, 2, dtype=torch.float64), torch.randint(8, (8,))

    def passes(loss):
        with CountMatrixProducts() as counter:
            loss().backward()
        return counter.count / layers

    assert passes(lambda: F.cross_entropy(model(x), y)) == pytest.approx(3, abs=1 / layers)
    assert passes(lambda: gradnorm_loss(model, x, y)) == pytest.approx(6, abs=2 / layers)
    assert passes(lambda: gradnorm_loss_finite_difference(model, x, y)) == pytest.approx(6, abs=1 / layers)
    attacked = passes(lambda: F.cross_entropy(model(pgd_attack(model, x, y, steps=3)), y))
    assert attacked == pytest.approx(2 * 3 + 3, abs=1 / layers)


# The attack


def test_pgd_finds_the_exact_worst_case_of_a_linear_model():
    """With two classes the loss is monotone in each pixel: the worst case is a corner of the box."""
    model = linear_model(2)
    x, y = torch.rand(50, 3, 2, 2, dtype=torch.float64), torch.randint(2, (50,))
    towards = (model[1].weight[1 - y] - model[1].weight[y]).sign().view_as(x)
    worst = (x + 0.3 * towards).clamp(0, 1)  # ε is large: the box of pixels cuts many corners off
    for random_start in (True, False):
        attacked = pgd_attack(model, x, y, eps=0.3, steps=10, random_start=random_start)
        torch.testing.assert_close(attacked, worst)


@pytest.mark.parametrize("random_start", [True, False])
@pytest.mark.parametrize("step_size", [None, 0.5])
def test_pgd_stays_in_the_ball_and_in_the_box(random_start, step_size):
    model, (x, y) = smooth_model(), batch(50)
    x[:10] = x[:10].round()  # black and white pixels
    for eps, steps in itertools.product((0, 1 / 255, 0.1, 1), (0, 4)):
        attacked = pgd_attack(model, x, y, eps=eps, steps=steps, step_size=step_size, random_start=random_start)
        assert attacked.min() >= 0 and attacked.max() <= 1
        assert (attacked - x).abs().max() <= eps + 1e-15
        assert not attacked.requires_grad


def test_pgd_is_stronger_with_larger_eps_and_than_noise():
    model, (x, y) = smooth_model(), batch(50)
    attacked = [pgd_attack(model, x, y, eps=eps, steps=10) for eps in (0, 0.01, 0.03, 0.1, 0.3)]
    losses = [F.cross_entropy(model(images), y).item() for images in attacked]
    noise = F.cross_entropy(model(pgd_attack(model, x, y, eps=0.3, steps=0)), y)
    assert torch.equal(attacked[0], x) and losses == sorted(losses) and noise < losses[-1]


def test_pgd_takes_madrys_step_and_soft_targets():
    model, (x, y) = smooth_model(), batch(soft=True)
    x = 0.25 + x / 2
    moved = pgd_attack(model, x, y, eps=4 / 255, steps=10, random_start=False, step_size=None)
    once = pgd_attack(model, x, y, eps=0.1, steps=1, step_size=0.01, random_start=False)
    torch.testing.assert_close(once, x + 0.01 * input_gradient(model, x, y).sign())
    twice = x
    for _ in range(10):  # 2.5 ε / steps is the paper's 1/255
        twice = (twice + input_gradient(model, twice, y).sign() / 255).clamp(x - 4 / 255, x + 4 / 255)
    torch.testing.assert_close(moved, twice)


def test_pgd_starts_where_it_is_told():
    model, (x, y) = smooth_model(), batch()
    start = x + torch.empty_like(x).uniform_(-0.2, 0.2)  # the ball and the box cut it
    attacked = pgd_attack(model, x, y, eps=0.1, steps=1, step_size=0.01, start=start)
    start = torch.minimum(torch.maximum(start, x - 0.1), x + 0.1).clamp(0, 1)
    moved = start + 0.01 * input_gradient(model, start, y).sign()
    torch.testing.assert_close(attacked, torch.minimum(torch.maximum(moved, x - 0.1), x + 0.1).clamp(0, 1))


def test_pgd_leaves_the_model_as_it_was():
    model, (x, y) = nn.Sequential(smooth_model(), nn.Dropout()), batch()
    model[0][0].weight.grad = torch.ones_like(model[0][0].weight)
    with torch.no_grad():
        pgd_attack(model, x, y, steps=2)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert (model[0][0].weight.grad == 1).all() and model[0][0].bias.grad is None


# Wrong input from Python


@pytest.mark.parametrize("call", [*LOSSES, pgd_attack])
@pytest.mark.parametrize("wrong, words", [
    ({"x": torch.zeros(5, 3, 8, 8, dtype=torch.uint8)}, "uint8"),
    ({"y": torch.tensor([0, 1, 2, 3, 4])}, "not 4"),
    ({"y": torch.tensor([0, 1, 2, 3, -100])}, "not -100"),
    ({"y": torch.tensor([0, 1])}, r"\(5,\).*\(2,\)"),
    ({"y": torch.zeros(5, 3, dtype=torch.float64)}, r"\(5, 4\).*\(5, 3\)"),
    ({"y": torch.full((5, 4), 0.5, dtype=torch.float64)}, "sum"),
    ({"eps": -0.1}, "eps.*-0.1"),
])
def test_wrong_input_raises(call, wrong, words):
    x, y = batch()
    with pytest.raises(ValueError, match=words):
        call(smooth_model(), wrong.get("x", x), wrong.get("y", y), eps=wrong.get("eps", 0.1))


def test_wrong_input_of_one_function_raises():
    model, (x, y) = smooth_model(), batch()
    for wrong in (x - 0.5, x + 0.5):
        with pytest.raises(ValueError, match="pixels in"):
            pgd_attack(model, wrong, y)
    with pytest.raises(ValueError, match="steps"):
        pgd_attack(model, x, y, steps=-1)
    with pytest.raises(ValueError, match="h must be positive, not -1"):
        gradnorm_loss_finite_difference(model, x, y, h=-1)
    with pytest.raises(ValueError, match="uint8"):
        input_gradient(model, x.to(torch.uint8), y)


# Precision, compilation, attention


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_agrees_with_float32(loss, dtype):
    model = train.build_model("convnet", 3, 10)
    x, y = torch.rand(16, 3, 32, 32), torch.randint(10, (16,))
    reference = loss(model, x, y, eps=0.1)
    expected = gradients(reference, model)
    with torch.autocast("cpu", dtype):
        value = loss(model, x, y, eps=0.1, grad_scale=torch.tensor(64.0))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, reference, rtol=1e-2, atol=0)
    assert F.cosine_similarity(gradients(value, model), expected, dim=0) > 0.99


def test_fp16_inner_gradient_does_not_underflow_with_its_scale():
    linear = nn.Linear(12, 3)
    nn.init.constant_(linear.weight, 1e-5)
    with torch.no_grad():
        linear.weight[0] = -1e-5
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), linear)
    nn.init.constant_(model[1].weight, 1e-4)
    x, y = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    exact = input_gradient(model, x, y).abs().sum()
    assert 0 < exact / x.numel() < 6e-8  # below the smallest number of float16
    values = []
    for scale in (1.0, 2.0**16):
        with torch.autocast("cpu", torch.float16):
            values.append(gradnorm_loss(model, x, y, lambda_ce=0, lambda_gn=1, eps=1, grad_scale=scale))
    assert abs(values[0] * 4 / exact - 1) > 0.1  # without a scale it does
    assert abs(values[1] * 4 / exact - 1) < 0.01


@pytest.mark.parametrize("call", [*LOSSES, pgd_attack])
def test_fp16_overflow_reaches_gradscaler(call):
    model = train.build_model("convnet", 3, 10)
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    x, y = torch.rand(4, 3, 32, 32), torch.randint(10, (4,))
    with torch.autocast("cpu", torch.float16):
        if call is pgd_attack:
            loss = F.cross_entropy(model(pgd_attack(model, x, y, grad_scale=2.0**40)).float(), y)
        else:
            loss = call(model, x, y, grad_scale=2.0**40)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert all(map(torch.equal, before, model.parameters()))


def test_overflow_is_not_hidden_by_the_absolute_value():
    """∇x overflows in float16, and nothing else does: the derivative ±1 of |±inf| would make every gradient finite."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1000.0, -1000.0, 0.0])[:, None].expand(3, 12))
    x, y = torch.zeros(4, 3, 2, 2), torch.zeros(4, dtype=torch.long)
    for scale, overflow in ((1, False), (100, True)):
        with torch.autocast("cpu", torch.float16):
            loss = gradnorm_loss(model, x, y, grad_scale=scale)
        assert loss.isfinite() != overflow and gradients(loss, model).isnan().any() == overflow


@pytest.mark.parametrize("loss", LOSSES)
def test_cross_entropy_of_a_bfloat16_model_is_float32(loss):
    x, y = batch()
    assert loss(smooth_model().bfloat16(), x.bfloat16(), y).dtype == torch.float32


def test_halves_of_the_alternating_penalty_are_the_finite_difference():
    """With no step of the optimiser in between, their losses, terms and gradients add up to it."""
    model, (x, y) = smooth_model(), batch()
    flags = ["--lambda-ce", "0.9", "--lambda-gn", "0.2", "--gradnorm-every", "3", "--eps", "0.1", "--h", "0.15"]
    objective = train.Objective(model, settings(*flags, "--penalty", "alternating"))
    x.requires_grad_()
    ramp = torch.tensor(0.7).double()
    first = objective(x, y, "first half", ramp)
    first[0].backward()
    moved = x.detach() + 0.15 * x.grad.sign()
    second = objective(moved, y, "second half", ramp)
    second[0].backward()
    expected = gradnorm_loss_finite_difference(model, x.detach(), y, lambda_ce=0.9, lambda_gn=0.7 * 3 * 0.2, eps=0.1,
                                               h=0.15, return_terms=True)
    halves = torch.stack([a + b for a, b in zip(first, second)])
    torch.testing.assert_close(halves, torch.stack(expected), check_dtype=False)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradient, gradients(expected[0], model), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("flags", [[], ["--penalty", "finite-difference"], ["--method", "adversarial"]])
def test_compiled_objective_equals_eager(flags):
    model = torchvision.models.VisionTransformer(image_size=16, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16,
                                                 mlp_dim=32, num_classes=4)
    nn.init.normal_(model.heads.head.weight)
    x, y = torch.rand(4, 3, 16, 16), torch.randint(4, (4,))
    eager = train.Objective(model, settings(*flags))
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)  # capture and differentiation; no C++ compiler
    for ramp in (torch.tensor(0.0), torch.tensor(1.0)):
        results = []
        for objective in (eager, compiled):
            torch.manual_seed(1)  # of PGD's random start
            loss, *terms = objective(x, y, eager.args.method, ramp)
            results.append((loss.detach(), *terms, gradients(loss, model)))
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["vit_b_16", "swin_t"])
def test_attention_models_make_a_step(name):
    model = train.build_model(name, 3, 5)
    assert not any(m.p for m in model.modules() if isinstance(m, (nn.Dropout, torchvision.ops.StochasticDepth)))
    nn.init.normal_(list(model.modules())[-1].weight, std=0.1)  # torchvision starts vit's head from zero
    x, y = torch.rand(1, 3, 224, 224), torch.randint(5, (1,))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, penalty = gradnorm_loss(model, x, y, return_terms=True)
    loss.backward()
    assert penalty > 0 and loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Several processes


def ddp_gradients(rank, store, penalty):
    """Each of two ranks takes every second example; saves the averaged gradient."""
    torch.distributed.init_process_group("gloo", f"file://{store}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, (x, y) = smooth_model(), batch(8)
    objective = train.Objective(model, settings("--penalty", penalty, "--eps", "0.1"))
    objective = nn.parallel.DistributedDataParallel(objective)
    objective(x[rank::2], y[rank::2], "gradnorm", torch.tensor(1.0).double())[0].backward()
    torch.save([p.grad for p in model.parameters()], f"{store}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("penalty", ["double-backprop", "finite-difference"])
def test_two_processes_have_the_gradient_of_one(tmp_path, penalty):
    torch.multiprocessing.spawn(ddp_gradients, (str(tmp_path), penalty), nprocs=2)
    torch.manual_seed(0)
    model, (x, y) = smooth_model(), batch(8)
    objective = train.Objective(model, settings("--penalty", penalty, "--eps", "0.1"))
    objective(x, y, "gradnorm", torch.tensor(1.0).double())[0].backward()
    for rank in (0, 1):
        for gradient, p in zip(torch.load(tmp_path / f"{rank}.pt"), model.parameters()):
            torch.testing.assert_close(gradient, p.grad, rtol=1e-12, atol=1e-16)


# Training


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """An image folder of three classes, 48 training and 12 held-out JPEGs, not square, noise of three colours."""
    root = tmp_path_factory.mktemp("images")
    rng = torch.Generator().manual_seed(0)
    for part, count in (("train", 16), ("val", 4)):
        for colour, name in enumerate(["blue", "green", "red"]):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                image = torch.randint(160, (3, 20, 24), generator=rng)
                image[2 - colour] += 90
                to_pil_image(image.to(torch.uint8)).save(root / part / name / f"{i}.jpg")
    return root


def flags_for(folder, output_dir):
    return ["--dataset", "imagefolder", "--data-dir", str(folder), "--image-size", "16", "--workers", "0",
            "--device", "cpu", "--batch-size", "16", "--epochs", "2", "--warmup-epochs", "1", "--lr", "2e-3",
            "--eval-images", "12", "--eps", "8/255", "--output-dir", str(output_dir)]


def run(*flags, script=train):
    """train.py or evaluate.py in this process."""
    old, sys.argv = sys.argv, [f"{script.__name__}.py", *map(str, flags)]
    try:
        script.main()
    finally:
        sys.argv = old


def start(*flags, launcher=(), script="train.py"):
    """train.py in a process of its own."""
    threads = 1 if launcher else torch.get_num_threads()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(HERE)}
    return subprocess.Popen([sys.executable, *launcher, str(HERE / script), *map(str, flags)], env=environment,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def saved(output_dir, key="model"):
    return torch.load(Path(output_dir) / "checkpoint.pt", weights_only=True)[key]


def metrics(output_dir):
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_promises(folder, tmp_path, capsys):
    run(*flags_for(folder, tmp_path), "--ema-decay", "0.5", "--activation", "silu", "--penalty", "finite-difference")
    lines = metrics(tmp_path)
    assert [line["epoch"] for line in lines] == [1, 2]
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert lines[1]["loss"] == pytest.approx(0.8 * lines[1]["cross_entropy"] + 1.2 * lines[1]["penalty"], rel=1e-5)

    model, config = train.load_checkpoint(tmp_path / "checkpoint.pt")
    assert not model.training and config["classes"] == ["blue", "green", "red"] and config["eps"] == 8 / 255
    kinds = {type(module) for module in model.modules()}
    assert nn.SiLU in kinds and nn.GELU not in kinds
    held_out = train.load_dataset(argparse.Namespace(**config), train=False)
    images, labels = torch.stack([image for image, _ in held_out]), torch.tensor(held_out.targets)
    pixels = images.float() / 255
    accuracy = (model(pixels).argmax(1) == labels).double().mean().item()
    assert lines[1]["ema_clean_accuracy"] == pytest.approx(100 * accuracy)
    norm = input_gradient(model, pixels, labels).abs().sum((1, 2, 3)).mean().item()
    assert lines[1]["ema_gradient_norm"] == pytest.approx(norm, rel=1e-4)

    kept = torch.load(tmp_path / "gradients/0002.pt", weights_only=True)
    assert len(set(kept["labels"].tolist())) == 3  # four images of three classes: they take turns
    expected = input_gradient(model, kept["images"].float() / 255, kept["labels"])
    torch.testing.assert_close(kept["gradients"].float(), expected, rtol=1e-2, atol=1e-8)


@pytest.mark.parametrize("penalty,natural_epochs", [("double-backprop", 0), ("double-backprop", 1), ("alternating", 0)])
def test_training_step_is_the_equation(folder, tmp_path, penalty, natural_epochs):
    """Two epochs of SGD, rewritten in a few lines with none of train.py's loop."""
    run(*flags_for(folder, tmp_path), "--optimizer", "sgd", "--lr", "0.1", "--clip-grad-norm", "0.5",
        "--gradnorm-every", "2", "--weight-decay", "0.01", "--ema-decay", "0.8", "--natural-epochs", natural_epochs,
        "--penalty", penalty, "--lambda-gn", "0.3", "--h", "8/255")
    torch.manual_seed(0)
    model = train.build_model("convnet", 3, 3)
    data = train.load_dataset(argparse.Namespace(**saved(tmp_path, "config")), train=True)
    sampler, order = torch.utils.data.DistributedSampler(data, 1, 0), []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        order += list(sampler)
    velocity, average, losses = [0] * len(list(model.parameters())), None, [0] * 6
    for step in range(6):  # three of warm-up, three of cosine
        rise, fall = min(1, step / 3), (1 + math.cos(math.pi * max(step - 3, 0) / 3)) / 2
        chosen = order[16 * step:16 * step + 16]
        x, y = torch.stack([data[i][0] for i in chosen]).float() / 255, torch.tensor([data[i][1] for i in chosen])

        def descend(loss):
            losses[step] += loss.item()
            gradient = torch.autograd.grad(loss, list(model.parameters()))
            norm = torch.cat([g.flatten() for g in gradient]).norm()
            with torch.no_grad():
                for i, (p, g) in enumerate(zip(model.parameters(), gradient)):
                    velocity[i] = 0.9 * velocity[i] + g * min(1, 0.5 / norm) + 0.01 * p * (p.ndim > 1)
                    p -= (1e-5 + (0.1 - 1e-5) * rise * fall) * velocity[i]

        lambda_gn = 2 * 0.3 * rise  # twice the weight, times the ramp
        if step < 3 * natural_epochs or step % 2:
            descend(0.8 * F.cross_entropy(model(x), y))
        elif penalty == "double-backprop":
            descend(gradnorm_loss(model, x, y, lambda_gn=lambda_gn, eps=8 / 255))
        else:
            sign = input_gradient(model, x, y).sign()
            descend((0.8 - lambda_gn) * F.cross_entropy(model(x), y))  # h = ε
            descend(lambda_gn * F.cross_entropy(model(x + 8 / 255 * sign), y))
        with torch.no_grad():
            weights = nn.utils.parameters_to_vector(model.parameters())
            average = weights if average is None else 0.8 * average + 0.2 * weights
    trained = torch.cat([w.flatten() for name, w in saved(tmp_path).items() if name not in ("0.mean", "0.std")])
    torch.testing.assert_close(trained, weights, rtol=1e-4, atol=1e-6)
    for epoch, line in enumerate(metrics(tmp_path)):
        assert line["loss"] == pytest.approx(sum(losses[3 * epoch:3 * epoch + 3]) / 3, rel=1e-4)
    averaged, _ = train.load_checkpoint(tmp_path / "checkpoint.pt")
    torch.testing.assert_close(nn.utils.parameters_to_vector(averaged.parameters()), average, rtol=1e-4, atol=1e-6)


def test_natural_epochs_are_those_of_natural_training(folder, tmp_path):
    run(*flags_for(folder, tmp_path / "natural"), "--method", "natural")
    expected = metrics(tmp_path / "natural")
    for method in ("gradnorm", "adversarial"):
        run(*flags_for(folder, tmp_path / method), "--method", method, "--natural-epochs", "1", "--lambda-ce", "1")
        first, second = metrics(tmp_path / method)
        for name in ("loss", "penalty", "clean_accuracy", "pgd10_accuracy", "gradient_norm"):
            assert first[name] == expected[0][name], name
        assert second["loss"] > expected[1]["loss"] and (second["penalty"] is not None) == (method == "gradnorm")


@pytest.mark.parametrize("penalty", ["double-backprop", "alternating"])
def test_two_processes_or_two_accumulated_batches_train_as_one(folder, tmp_path, penalty):
    common = ["--optimizer", "sgd", "--lr", "0.1", "--penalty", penalty, "--lambda-gn", "0.4", "--h", "8/255"]
    run(*flags_for(folder, tmp_path / "one"), *common)
    run(*flags_for(folder, tmp_path / "accumulated"), *common, "--batch-size", "8", "--accumulate", "2")
    two = start(*flags_for(folder, tmp_path / "two"), *common, "--batch-size", "8", launcher=TORCHRUN)
    output, errors = two.communicate(timeout=120)
    assert two.returncode == 0, errors
    assert len(output.splitlines()) == 3  # rank 0 alone speaks
    for other in ("accumulated", "two"):
        torch.testing.assert_close(saved(tmp_path / other), saved(tmp_path / "one"), rtol=1e-4, atol=1e-6)
        for a, b in zip(metrics(tmp_path / other), metrics(tmp_path / "one")):
            for name in ("loss", "cross_entropy", "penalty", "clean_accuracy", "gradient_norm"):
                assert a[name] == pytest.approx(b[name], rel=1e-4), name


def test_killed_and_resumed_equals_undisturbed(folder, tmp_path):
    # All that has state: GradScaler, EMA, AdamW, worker processes, every source of randomness.
    extra = ["--epochs", "5", "--amp", "fp16", "--ema-decay", "0.9", "--augment", "strong", "--workers", "1",
             "--gradnorm-every", "2"]
    run(*flags_for(folder, tmp_path / "undisturbed"), *extra)
    for epochs in (1, 3):
        process = start(*flags_for(folder, tmp_path / "killed"), *extra, "--resume")
        deadline = time.monotonic() + 120
        while not ((tmp_path / "killed/metrics.jsonl").exists() and len(metrics(tmp_path / "killed")) >= epochs):
            assert time.monotonic() < deadline and process.poll() is None, process.communicate()
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert saved(tmp_path / "killed", "epoch") < 5
    run("--resume", "--output-dir", tmp_path / "killed")  # the settings come from the checkpoint
    for key in ("model", "ema", "optimizer", "scaler"):
        killed, undisturbed = saved(tmp_path / "killed", key), saved(tmp_path / "undisturbed", key)
        torch.testing.assert_close(killed, undisturbed, rtol=0, atol=0)
    for a, b in zip(metrics(tmp_path / "killed"), metrics(tmp_path / "undisturbed"), strict=True):
        assert all(a[name] == b[name] for name in a if name not in ("seconds", "images_per_second"))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), train.replace(path) as file:
        file.write(b"half of the n")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    with open(path, "rb") as reader:
        with train.replace(path) as file:
            file.write(b"new")
        assert reader.read() == b"old"  # the old file is left as it was, to whoever has it open
    assert path.read_bytes() == b"new"


def test_nan_stops_all_ranks_and_keeps_the_last_checkpoint(folder, tmp_path):
    """A nan in the loss of rank 1 alone, in step 3 of 2 x 2."""
    script = tmp_path / "nan.py"
    script.write_text("import train\noriginal, calls = train.gradnorm_loss, []\n"
                      "def poisoned(*args, **kwargs):\n    calls.append(0)\n"
                      "    loss, *terms = original(*args, **kwargs)\n"
                      "    return (loss * (float('nan') if train.RANK == 1 and len(calls) == 3 else 1), *terms)\n"
                      "train.gradnorm_loss = poisoned\ntrain.main()\n")
    process = start(*flags_for(folder, tmp_path / "run"), "--batch-size", "12", launcher=TORCHRUN, script=script)
    _, errors = process.communicate(timeout=120)
    lines = [line for line in errors.splitlines() if "nan.py: error" in line]
    assert process.returncode == 1 and len(lines) == 1 and "epoch 2, step 3" in lines[0]
    assert saved(tmp_path / "run", "epoch") == 1


def test_interrupt_ends_in_one_line(folder, tmp_path):
    # A shell's "&" ignores SIGINT, which children inherit; a handler they do not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(*flags_for(folder, tmp_path / "run"), "--epochs", "100000")
    while not (tmp_path / "run/metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and len(errors.splitlines()) == 1 and "--resume" in errors


@pytest.mark.parametrize("flags, updates", [
    (["--epochs", "1"], 12),
    (["--epochs", "1", "--freeze-bn"], 0),
    (["--epochs", "2", "--freeze-bn", "--natural-epochs", "1"], 12),
])
def test_frozen_batchnorm_keeps_its_statistics(folder, tmp_path, flags, updates):
    run(*flags_for(folder, tmp_path), "--model", "resnet18", "--image-size", "32", "--batch-size", "4",
        "--eval-images", "1", *flags)
    weights = saved(tmp_path)
    assert {int(v) for name, v in weights.items() if name.endswith("num_batches_tracked")} == {updates}
    means = torch.cat([v for name, v in weights.items() if name.endswith("running_mean")])
    assert (means == 0).all() == (updates == 0)


@pytest.mark.parametrize("flags", [["--method", "natural"], ["--method", "gradnorm"], ["--method", "adversarial"],
                                   ["--penalty", "alternating", "--lambda-gn", "0.4", "--h", "8/255"]])
@pytest.mark.parametrize("amp", ["fp16", "bf16"])
def test_each_method_trains_in_mixed_precision(folder, tmp_path, flags, amp):
    run(*flags_for(folder, tmp_path), *flags, "--amp", amp, "--epochs", "8", "--lr", "0.01")
    first, *_, last = metrics(tmp_path)
    assert last["loss"] < 0.7 * first["loss"] and last["clean_accuracy"] > 90
    if amp == "fp16":
        assert saved(tmp_path, "scaler")["scale"] >= 1


def test_fp16_clips_the_unscaled_gradient(folder, tmp_path):
    """SGD, unlike AdamW, sees the size of the gradient."""
    torch.manual_seed(0)
    start = nn.utils.parameters_to_vector(train.build_model("convnet", 3, 3).parameters())
    moves = []
    for amp in ("off", "fp16"):
        flags = ["--optimizer", "sgd", "--lr", "0.1", "--clip-grad-norm", "0.5"]
        run(*flags_for(folder, tmp_path / amp), *flags, "--amp", amp)
        model, _ = train.load_checkpoint(tmp_path / amp / "checkpoint.pt")
        moves.append(nn.utils.parameters_to_vector(model.parameters()) - start)
    assert (moves[0] - moves[1]).norm() < 0.1 * moves[0].norm()


@pytest.mark.parametrize("penalty", ["double-backprop", "alternating"])
def test_compiled_training_equals_eager(folder, tmp_path, monkeypatch, penalty):
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend="aot_eager"))
    for name, extra in (("eager", []), ("compiled", ["--compile"])):
        run(*flags_for(folder, tmp_path / name), *extra, "--gradnorm-every", "2", "--optimizer", "sgd",
            "--penalty", penalty, "--lambda-gn", "0.3", "--h", "8/255")
    torch.testing.assert_close(saved(tmp_path / "compiled"), saved(tmp_path / "eager"), rtol=1e-4, atol=1e-6)


def test_benchmark_measures_what_the_cost_model_predicts(folder, tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_bytes(b"a run's, which stays")
    run(*flags_for(folder, tmp_path), "--benchmark", "3", "--gradnorm-every", "2", "--steps", "2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmark.json", "checkpoint.pt"]
    output = capsys.readouterr().out
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    # F for a forward pass, F for an input gradient, F for a weight gradient; 3F is natural training (and the first
    # layer's input gradient, which natural training does not need, makes the ratios a little larger).
    predicted = {"natural": 1, "GradNorm, double backprop": 6 / 3, "GradNorm, finite difference": 6 / 3,
                 "GradNorm, alternating": 6 / 3, "GradNorm, double backprop, every 2 steps": (6 + 3) / 2 / 3,
                 "GradNorm, finite difference, every 2 steps": (6 + 3) / 2 / 3,
                 "GradNorm, alternating, every 2 steps": (6 + 3) / 2 / 3, "adversarial, PGD-2": (2 * 2 + 3) / 3}
    assert list(rows) == list(predicted)
    for name, row in rows.items():
        assert row["flops_to_natural"] == pytest.approx(predicted[name], rel=0.03), name
        assert 0 < row["to_natural"][1] <= row["to_natural"][0] <= row["to_natural"][2]
        assert f"| {name} | {1e3 * row['seconds']:.1f} |" in output
        assert row["peak_memory"] > 0
    assert rows["natural"]["to_natural"] == rows["adversarial, PGD-2"]["to_adversarial"] == [1, 1, 1]


def test_peak_memory_is_that_of_the_steps_alone():
    """The graph of double backprop holds about twice the activations; whatever this process holds does not count."""
    ballast = torch.ones(2**28)
    grown = []
    for method in ("natural", "gradnorm"):
        with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
            grown.append(pool.apply(train.grown_memory, (settings("--method", method), (256, 3, 32, 32), 10)))
    assert 2**25 < grown[0] < 2**28 and 1.5 * grown[0] < grown[1] < 4 * grown[0] < 4 * ballast.nbytes, grown


def test_learning_rate_rises_and_falls():
    rates = [train.learning_rate(step, 10, 110, 1e-3) for step in range(111)]
    assert rates[0] == 1e-5 and rates[10] == 1e-3 and rates[60] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates[110] == pytest.approx(1e-5) and rates[5] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_strong_augmentation_gives_class_probabilities():
    augment, x, y = train.mixup_or_cutmix(5), torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    seen = set()
    for _ in range(20):
        mixed, targets = augment(x, y)
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        assert targets.min() == pytest.approx(0.02) and mixed.shape == x.shape
        # An image's second target weighs as much as the share of the other image in it.
        own = (targets[1, 1] - 0.02) / 0.9
        seen.add(bool(torch.isclose(mixed[1], own * x[1] + (1 - own) * x[0], atol=1e-5).all()))
    assert seen == {True, False}  # mixup and cutmix


@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_is_augmented_by_itself(channels):
    for augment in ("basic", "strong"):
        args = settings("--augment", augment)
        transform = train.train_transform(args, 16, v2.RandomCrop(16, padding=2))
        data = train.Images(torch.randint(256, (1, channels, 16, 16), dtype=torch.uint8).expand(32, -1, -1, -1),
                            torch.zeros(32, dtype=torch.long), ["one"], transform)
        images, _ = data.__getitems__(list(range(32)))
        assert images.dtype == torch.uint8 and images.shape == (32, channels, 16, 16)
        assert len(images.flatten(1).unique(dim=0)) > 16


def test_held_out_subset_is_balanced_and_fixed():
    targets = torch.randint(10, (1000,)).tolist()
    subset = train.balanced_subset(targets, 50)
    assert (torch.tensor(targets)[subset].bincount(minlength=10) == 5).all() and len(subset.unique()) == 50
    assert torch.equal(subset[:20], train.balanced_subset(targets, 20))
    assert sorted(train.balanced_subset(targets, 5000).tolist()) == list(range(1000))


def test_shapes_are_drawn_from_the_seed():
    images, targets, classes = train.draw_shapes(200, seed=3)
    again, _, _ = train.draw_shapes(200, seed=3)
    other, _, _ = train.draw_shapes(200, seed=4)
    assert torch.equal(images, again) and not torch.equal(images, other)
    assert images.shape == (200, 3, 32, 32) and images.dtype == torch.uint8
    assert (targets.bincount() == 20).all() and len(classes) == 10


def test_fashion_mnist_is_read_from_idx_files(tmp_path):
    for part, count in (("train", 7), ("t10k", 3)):
        with gzip.open(tmp_path / f"{part}-images-idx3-ubyte.gz", "wb") as file:
            file.write(bytes(16) + bytes(i % 251 for i in range(count * 784)))
        with gzip.open(tmp_path / f"{part}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(bytes(8) + bytes(range(count)))
    args = settings("--dataset", "fashion-mnist", "--data-dir", str(tmp_path))
    data = train.load_dataset(args, train=True)
    assert data.images.shape == (7, 1, 28, 28) and data.targets.tolist() == list(range(7))
    assert data.images.flatten()[:300].tolist() == [i % 251 for i in range(300)]
    assert len(train.load_dataset(args, train=False)) == 3

    args.val_images = 2  # of the training images, none of which is in both parts
    seen, held_out = (train.load_dataset(args, train=part) for part in (True, False))
    assert len(held_out) == 2 and sorted([*seen.targets.tolist(), *held_out.targets.tolist()]) == list(range(7))
    for part in (seen, held_out):
        assert torch.equal(part.images, data.images[part.targets])


def test_validation_images_are_training_files_that_training_never_sees(folder, tmp_path, capsys):
    flags = [*flags_for(folder, tmp_path), "--val-images", "12", "--augment", "basic", "--epochs", "1"]
    args = settings(*flags)
    seen, held_out = (train.load_dataset(args, train=part) for part in (True, False))
    files = [path for path, _ in seen.samples + held_out.samples]
    assert len(set(files)) == 48 and all("/train/" in path for path in files)
    assert torch.tensor(held_out.targets).bincount().tolist() == [4, 4, 4]
    for part in (seen, held_out):
        assert part.targets == [part.class_to_idx[Path(path).parent.name] for path, _ in part.samples]
    torch.manual_seed(0)  # held-out images are not augmented
    assert torch.equal(held_out[0][0], held_out[0][0]) and not torch.equal(seen[0][0], seen[0][0])

    run(*flags)
    assert "36 images" in capsys.readouterr().out
    run(tmp_path / "checkpoint.pt", "--attack", "clean", "--num-images", "12", "--device", "cpu", script=evaluate)
    output, warning = capsys.readouterr()
    assert "--val-images 12" in warning
    x, y = torch.stack([image for image, _ in held_out]).float() / 255, torch.tensor(held_out.targets)
    model, _ = train.load_checkpoint(tmp_path / "checkpoint.pt")
    assert f"| {100 * (model(x).argmax(1) == y).float().mean():.2f} |" in output


def test_grey_images_reach_torchvision_models():
    model = train.build_model("resnet18", 1, 10).eval()
    grey = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(model(grey), model(grey.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small"])
def test_pretrained_head_is_replaced_for_other_classes_alone(monkeypatch, name):
    pretrained = torchvision.models.get_model(name)
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: pretrained)
    weights = {key: value.clone() for key, value in pretrained.state_dict().items()}
    kept = train.build_model(name, 3, 1000, pretrained=True)[1]
    assert all(torch.equal(value, weights[key]) for key, value in kept.state_dict().items())
    model = train.build_model(name, 3, 7, pretrained=True).eval()
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 7)
    changed = [key for key, value in model[1].state_dict().items() if not torch.equal(value, weights[key])]
    assert len(changed) == 2  # the head's weight and bias


# Bad input


@pytest.mark.parametrize("flags, words", [
    (["--method", "magic"], ["magic", "natural", "gradnorm", "adversarial"]),
    (["--dataset", "mnist"], ["mnist", "fashion-mnist"]),
    (["--model", "resnet19"], ["resnet19", "resnet18", "convnet"]),
    (["--activation", "tanh"], ["tanh", "gelu", "silu", "relu"]),
    (["--eps", "four"], ["--eps", "four"]),
    (["--eps", "4/0"], ["--eps", "4/0"]),
    (["--eps", "0"], ["--eps", "above 0"]),
    (["--eps", "255/4"], ["--eps", "255/4", "above 0 up to 1"]),
    (["--eps", "nan"], ["--eps", "nan"]),
    (["--lr", "inf"], ["--lr", "inf"]),
    (["--steps", "-1"], ["--steps", "-1"]),
    (["--epochs", "-5"], ["--epochs", "-5"]),
    (["--epochs", "1.5"], ["--epochs", "1.5"]),
    (["--natural-epochs", "2"], ["--natural-epochs 2", "2 epochs"]),
    (["--penalty", "alternating"], ["--penalty alternating", "-1.6", "--lambda-gn", "--h"]),
    (["--penalty", "alternating", "--lambda-gn", "0.4"], ["K·ε/h = 0,", "must be positive"]),
    (["--batch-size", "49"], ["--batch-size 49", "48 training images"]),
    (["--batch-size", "25", "--accumulate", "2"], ["--accumulate 2", "48 training images"]),
    (["--val-images", "48"], ["--val-images 48", "48 training images"]),
    (["--data-dir", "/nonexistent/data"], ["/nonexistent/data/train", "--data-dir"]),
    (["--model", "vit_b_16"], ["vit_b_16", "16, 16"]),
    (["--model", "mobilenet_v2", "--activation", "gelu", "--image-size", "32"], ["mobilenet_v2", "--activation"]),
    (["--model", "resnet18", "--compile"], ["--compile", "--freeze-bn"]),
    (["--output-dir", "/dev/null/run"], ["/dev/null/run", "--output-dir"]),
    (["--pretrained"], ["--pretrained", "--model"]),
    (["--no-such-flag"], ["--no-such-flag"]),
    (["--device", "cuda"], ["cuda", "--device cpu"]),
    (["--benchmark", "0"], ["--benchmark", "from 1"]),
    (["--benchmark", "--output-dir", "/dev/null/run"], ["/dev/null/run", "--output-dir"]),
])
def test_bad_input_ends_in_one_line(folder, tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as stop:
        run(*flags_for(folder, tmp_path / "run"), *flags)
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and errors.count("\n") == 1 and all(word in errors for word in words), errors
    assert not (tmp_path / "run").exists()


def fails(capsys, *flags, script=train):
    with pytest.raises(SystemExit) as stop:
        run(*flags, script=script)
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and errors.count("\n") == 1, errors
    return errors


def test_a_run_is_never_overwritten_nor_resumed_by_another(folder, tmp_path, capsys):
    flags = flags_for(folder, tmp_path)
    run(*flags, "--epochs", "1")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert "--resume" in fails(capsys, *flags)
    assert "--method natural" in fails(capsys, *flags, "--epochs", "1", "--resume", "--method", "natural")
    assert "--model resnet18" in fails(capsys, *flags, "--epochs", "1", "--resume", "--model", "resnet18")
    assert "--lr 0.5" in fails(capsys, "--output-dir", tmp_path, "--resume", "--lr", "0.5")
    other = tmp_path / "other"
    for part in ("train", "val"):
        for name in ("a", "b"):
            (other / part / name).mkdir(parents=True)
            to_pil_image(torch.zeros(3, 20, 20, dtype=torch.uint8)).save(other / part / name / "0.jpg")
    assert "2 classes, not the 3" in fails(capsys, "--output-dir", tmp_path, "--resume", "--data-dir", other)
    assert all(path.read_bytes() == content for path, content in before.items())
    run("--output-dir", tmp_path, "--resume")
    assert "finished" in capsys.readouterr().out


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "foreign", "code", "truncated"])
def test_a_corrupt_or_foreign_checkpoint_is_refused(folder, tmp_path, capsys, content):
    path = tmp_path / "checkpoint.pt"
    if content == "foreign":
        torch.save({"state_dict": {}}, path)
    elif content == "code":
        torch.save({"config": Code(str(tmp_path / "run by the checkpoint"))}, path)
    elif content == "truncated":
        torch.save({"config": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:2000])
    else:
        path.write_bytes(content)
    kept = path.read_bytes()
    errors = fails(capsys, *flags_for(folder, tmp_path), "--resume")
    assert str(path) in errors and path.read_bytes() == kept and not (tmp_path / "run by the checkpoint").exists()
    with pytest.raises(ValueError, match="not a checkpoint"):
        train.load_checkpoint(path)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(folder, tmp_path, capsys, workers):
    bad = tmp_path / "data"
    for part in ("train", "val"):
        for path in (folder / part).rglob("*.jpg"):
            (bad / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (bad / path.relative_to(folder)).write_bytes(path.read_bytes())
    (bad / "train/red/7.jpg").write_bytes((folder / "train/red/7.jpg").read_bytes()[:300])
    errors = fails(capsys, *flags_for(bad, tmp_path / "run"), "--workers", workers)
    assert str(bad / "train/red/7.jpg") in errors


def test_data_that_cannot_be_had_are_explained(tmp_path, capsys, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    errors = fails(capsys, "--dataset", "cifar10", "--data-dir", tmp_path / "data", "--output-dir", tmp_path / "run")
    assert str(tmp_path / "data") in errors and "no network" in errors and "--data-dir" in errors

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", offline)
    offline.classes = []
    monkeypatch.setattr(train, "DEBIAN", tmp_path / "debian")
    errors = fails(capsys, "--dataset", "fashion-mnist", "--output-dir", tmp_path / "run")
    assert "apt-get install dataset-fashion-mnist" in errors and "no network" in errors


def test_train_and_val_must_have_the_same_classes(folder, tmp_path, capsys):
    bad = tmp_path / "data"
    bad.mkdir()
    (bad / "train").symlink_to(folder / "train")
    (bad / "val/blue").mkdir(parents=True)
    (bad / "val/blue/0.jpg").symlink_to(folder / "val/blue/0.jpg")
    assert "['blue']" in fails(capsys, *flags_for(bad, tmp_path / "run"))


# The claim


def test_natural_training_collapses_under_pgd_where_gradnorm_holds(tmp_path):
    """On `shapes`, at the paper's ε, with the cheapest penalty in the place of the default's twice as long training."""
    for method in ("natural", "gradnorm"):
        run("--method", method, "--penalty", "finite-difference", "--gradnorm-every", "2", "--epochs", "5",
            "--eval-images", "500", "--device", "cpu", "--output-dir", tmp_path / method)
    natural, gradnorm = metrics(tmp_path / "natural")[-1], metrics(tmp_path / "gradnorm")[-1]
    assert natural["clean_accuracy"] > 95 and natural["pgd10_accuracy"] < 20
    assert gradnorm["clean_accuracy"] > 95 and gradnorm["pgd10_accuracy"] > 75


# The attacks of the evaluation


def widest(model, x, y, eps):
    """Smallest margin over the classes, (N,), that a linear model has left within ε and [0, 1]: in closed form, since
    each pixel's best move is its own."""
    weight, bias, pixels = model[1].weight, model[1].bias, x.flatten(1)
    margins = []
    for target in range(len(bias)):
        normal = weight[y] - weight[target]
        worst = torch.where(normal > 0, (pixels - eps).clamp(min=0), (pixels + eps).clamp(max=1))
        margin = (normal * worst).sum(1) + bias[y] - bias[target]
        margins.append(torch.where(y == target, math.inf, margin))
    return torch.stack(margins).amin(0)


def linear_task(n=60, classes=5):
    """A linear model of 3x4x4 pixels, a fifth of them black or white, and images that it classifies well."""
    model = linear_model(classes, 48).requires_grad_(False)
    x = torch.rand(n, 3, 4, 4, dtype=torch.float64)
    x = torch.where(torch.rand_like(x) < 0.2, x.round(), x)
    return model, x, model(x).argmax(1)


RADII = [0.01, 0.03, 0.1, 0.3]


@pytest.mark.parametrize("classes", [2, 3, 5, 12])
def test_autoattack_finds_the_exact_robustness_of_a_linear_model(classes):
    model, x, y = linear_task(classes=classes)
    for eps in RADII:
        adversarial = evaluate.autoattack(model, x, y, eps=eps)
        robust = model(adversarial).argmax(1) == y
        assert torch.equal(robust, widest(model, x, y, eps) > 0) and (adversarial[robust] == x[robust]).all()
        assert (adversarial - x).abs().max() <= eps and 0 <= adversarial.min() and adversarial.max() <= 1


def test_no_attack_alone_beats_the_closed_form_and_the_targeted_ones_reach_it():
    model, x, y = linear_task(n=100)
    seeds, others = torch.arange(100), model(x).argsort(dim=1, descending=True)[:, 1:]
    for eps in RADII:
        exact = widest(model, x, y, eps) > 0
        assert 0 < exact.sum() or eps > 0.1

        def broken(images):
            return evaluate.proved_radius(model, x, y, images) <= eps

        pgd = broken(evaluate.pgd(model, x, y, eps=eps, seeds=seeds))
        square = broken(evaluate.square(model, x, y, eps=eps, seeds=seeds, queries=500))
        apgd = broken(evaluate.apgd(model, x, y, eps=eps, seeds=seeds))
        targeted = [broken(evaluate.apgd(model, x, y, eps=eps, seeds=seeds, target=target)) for target in others.T]
        fab = [broken(evaluate.fab(model, x, y, eps=eps, target=target)) for target in others.T]
        assert not any((found & exact).any() for found in (pgd, square, apgd))
        assert torch.equal(torch.stack(targeted).any(0), ~exact)
        within = widest(model, x, y, eps / 1.01) <= 0  # FAB steps over the boundary by 5 %, and comes back to 1 %
        assert (torch.stack(fab).any(0) >= within).all() and not (torch.stack(fab).any(0) & exact).any()
    model, x, y = linear_task(n=100, classes=2)  # of more classes, cross-entropy can be drawn to two at once
    for eps in RADII:
        found = evaluate.proved_radius(model, x, y, evaluate.apgd(model, x, y, eps=eps, seeds=seeds)) <= eps
        assert torch.equal(found, widest(model, x, y, eps) <= 0)


def test_apgd_halves_its_step_after_the_published_checkpoints():
    assert evaluate.apgd_checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert evaluate.apgd_checkpoints(1) == [1] and evaluate.apgd_checkpoints(10)[0] == 2


class Steadfast(nn.Module):
    """Six bounded, crooked logits of 3x8x8 pixels, of which the first always wins: no attack on class 0 ever ends."""

    def __init__(self):
        super().__init__()
        self.model = smooth_model(6)

    def forward(self, x):
        return 2 * torch.tanh(20 * self.model(5 * x)) + 5 * F.one_hot(torch.tensor(0), 6)


@pytest.mark.parametrize("targeted", [False, True])
def test_apgd_is_algorithm_1_of_its_paper(targeted):
    """Its iterates, one image at a time, against the algorithm as it is printed, in the notation of the paper."""
    model, (x, _) = Steadfast(), batch(8)
    y, target = torch.zeros(8, dtype=torch.long), torch.arange(8) % 5 + 1 if targeted else None
    eps, seen = 0.2, []
    hook = model.register_forward_hook(lambda model, inputs, output: seen.append(inputs[0].detach()))
    evaluate.apgd(model, x, y, eps=eps, seeds=torch.arange(8), target=target)
    hook.remove()
    assert len(seen) == 101 and all(len(images) == 8 for images in seen)
    halvings, returns = 0, 0
    for i in range(8):
        def f(image):
            z = model(image[None])
            if not targeted:
                return F.cross_entropy(z, y[i:i + 1])
            z1, _, z3, z4 = z[0].sort(descending=True).values[:4]
            return -(z[0, y[i]] - z[0, target[i]]) / (z1 - (z3 + z4) / 2)

        def gradient(image):
            return torch.autograd.functional.jacobian(f, image)

        def projected(image):
            return image.clamp(x[i] - eps, x[i] + eps).clamp(0, 1)

        w, xs = [0, 22, 41, 57, 70, 80, 87, 93, 99], [seen[0][i]]
        assert (xs[0] - x[i]).abs().max() <= eps
        current = previous = x_max = xs[0]
        step, halved, losses = 2 * eps, True, [f(current)]
        f_max = f_max_at_last = losses[0]
        for k in range(100):
            z = projected(current + step * gradient(current).sign())
            following = projected(current + 0.75 * (z - current) + 0.25 * (current - previous)) if k > 0 else z
            previous, current = current, following
            xs.append(current)
            losses.append(f(current))
            if losses[-1] > f_max:
                f_max, x_max = losses[-1], current
            if k + 1 in w:
                j = w.index(k + 1)
                grown = sum(losses[m + 1] > losses[m] for m in range(w[j - 1], w[j]))
                halved = grown <= 0.75 * (w[j] - w[j - 1]) or (not halved and f_max_at_last == f_max)
                f_max_at_last = f_max
                if halved:
                    halvings, returns = halvings + 1, returns + (current is not x_max)
                    step, current = step / 2, x_max
        for k, image in enumerate(xs):
            torch.testing.assert_close(seen[k][i], image, rtol=0, atol=1e-9)
    assert halvings > 8 and returns > 8


def test_targeted_dlr_is_invariant_to_scale_and_shift():
    z, y, target = torch.randn(20, 6, dtype=torch.float64), torch.randint(6, (20,)), torch.randint(6, (20,))
    expected = []
    for logits, true, other in zip(z, y, target):
        ordered = sorted(logits.tolist())
        expected.append(-(logits[true] - logits[other]) / (ordered[-1] - (ordered[-3] + ordered[-4]) / 2))
    torch.testing.assert_close(evaluate.targeted_dlr(z, y, target), torch.stack(expected))
    torch.testing.assert_close(evaluate.targeted_dlr(7 * z - 3, y, target), torch.stack(expected))


def test_fabs_projection_is_the_nearest_point():
    """Against bisection: the reach of a step λ grows with λ, so the smallest λ that reaches the plane is the norm."""
    x = torch.rand(400, 3, 4, 4, dtype=torch.float64)
    x[::3] = x[::3].round()
    normal = torch.randn_like(x) * (torch.rand_like(x) < 0.7)
    normal[5] = 0
    height = torch.randn(400, dtype=torch.float64) * torch.tensor([0.1, 1, 10, 100]).double().repeat(100)
    height[7] = 0
    d = evaluate.project(x, normal, height)
    assert (x + d).min() >= 0 and (x + d).max() <= 1
    infeasible = 0
    for xi, w, h, di in zip(x, normal, height, d):
        towards = w.sign() * h.sign()
        room = torch.where(towards > 0, 1 - xi, xi)

        def reach(size):
            return (w.abs() * room.clamp(max=size)).sum()

        if reach(1) <= abs(h):  # no such point: as far as the box goes
            torch.testing.assert_close(di, towards * room)
            infeasible += 1
            continue
        low, high = 0.0, 1.0
        for _ in range(60):
            low, high = (low, (low + high) / 2) if reach((low + high) / 2) >= abs(h) else ((low + high) / 2, high)
        assert di.abs().max().item() == pytest.approx(high, rel=1e-9, abs=1e-12)
        assert (w * di).sum().item() == pytest.approx(h.item(), rel=1e-9, abs=1e-12)
    assert 20 < infeasible < 200


def test_fab_finds_the_distance_to_the_boundary():
    model, x, y = linear_task(n=40, classes=2)
    found = evaluate.fab(model, x, y, eps=0, target=1 - y)
    radius = evaluate.proved_radius(model, x, y, found)
    low, high = torch.zeros(40, dtype=torch.float64), torch.ones(40, dtype=torch.float64)
    for _ in range(40):
        middle = (low + high) / 2
        held = torch.tensor([widest(model, x[i:i + 1], y[i:i + 1], middle[i])[0] > 0 for i in range(40)])
        low, high = torch.where(held, middle, low), torch.where(held, high, middle)
    reachable = high < 1
    assert reachable.sum() > 20 and (radius >= high)[reachable].all()
    torch.testing.assert_close(radius[reachable], high[reachable], rtol=1e-2, atol=0)
    assert radius[~reachable].isinf().all()


def test_fab_returns_the_closest_that_it_met(monkeypatch):
    model, x, y = task()
    predict, seen = evaluate.predict, []
    monkeypatch.setattr(evaluate, "predict", lambda model, x, size: (seen.append(x), predict(model, x, size))[1])
    found = evaluate.fab(model, x, y, eps=0, target=model(x).argsort(dim=1)[:, -2])
    radii = torch.stack([evaluate.proved_radius(model, x, y, images) for images in list(seen)])
    torch.testing.assert_close(evaluate.proved_radius(model, x, y, found), radii.amin(0))
    assert (radii[-1] > 1.001 * radii.amin(0)).any()  # which is not the last


def test_square_keeps_only_what_lowers_the_margin():
    """Every query that it makes of one image is the best image so far but for one square of the published side, each
    channel of it at a wall of the ball; and none is made twice."""
    model = smooth_model(3)
    x, _ = batch(1)
    y, eps, seen = model(x).argmax(1), 0.01, []
    hook = model.register_forward_hook(lambda model, inputs, output: seen.append(inputs[0][0].clone()))
    found = evaluate.square(model, x, y, eps=eps, seeds=torch.tensor([4]), queries=600)
    hook.remove()
    lowest, highest = evaluate.ball(x, eps)

    def margin(image):
        z = model(image[None])[0]
        return (z[y] - z[[c for c in range(3) if c != y]].max()).item()

    best, refused, accepted = seen[0], [], 0
    assert ((best == highest[0]) | (best == lowest[0])).all()
    assert ((best > x[0]) == (best > x[0])[:, :1]).all()  # vertical stripes
    for image in seen[1:]:
        changed = (image != best).any(0).nonzero()
        height, width = (changed.amax(0) - changed.amin(0) + 1).tolist()
        assert 1 <= max(height, width) <= 7  # p = 0.8 of 8x8 pixels
        assert ((image == highest[0]) | (image == lowest[0])).all()
        assert not any(torch.equal(image, other) for other in refused[-20:])
        if margin(image) < margin(best):
            best, refused, accepted = image, [], accepted + 1
        else:
            refused.append(image)
    assert accepted > 5 and 50 < len(seen) < 600
    assert torch.equal(found, x) or torch.equal(found[0], best)

    # The same random numbers, asked one by one, all of them.
    numbers = evaluate.uniform(torch.tensor([4]), (3 * 8 + 600 * 5,))[0]
    naive = torch.where(numbers[:24].view(3, 1, 8) < 0.5, highest[0], lowest[0])
    for query, (row, column, *signs) in enumerate(numbers[24:].view(600, 5)):
        if margin(naive) < 0:
            break
        halvings = sum(query > k for k in (10, 50, 200, 500))
        side = max(round((0.8 / 2**halvings * 64) ** 0.5), 1)
        top, left = int(row * (9 - side)), int(column * (9 - side))
        proposal = naive.clone()
        for channel, sign in enumerate(signs):
            area = (channel, slice(top, top + side), slice(left, left + side))
            proposal[area] = (highest if sign < 0.5 else lowest)[0][area]
        if margin(proposal) < margin(naive):
            naive = proposal
    assert torch.equal(naive, best)


def test_squares_shrink_as_published():
    model, seen = smooth_model(3), []
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    y = model(x).argmax(1)
    model.register_forward_hook(lambda model, inputs, output: seen.append(inputs[0].clone()))
    evaluate.square(model, x, y, eps=1e-6, seeds=torch.tensor([0]), queries=5000)
    last = seen[-50:]
    assert all((a != b).any(1).sum() <= 2 for a, b in zip(last, last[1:]))  # side 1: one pixel back, one forth


def test_pgd_starts_at_random_in_the_ball():
    model, x, y = task()
    noise = evaluate.pgd(model, x, y, eps=0.1, seeds=torch.arange(len(x)), steps=0) - x
    free = noise[(x > 0.1) & (x < 0.9)]
    assert free.abs().max() <= 0.1 and free.abs().mean().item() == pytest.approx(0.05, rel=0.05)
    assert abs(free.mean()) < 0.005 and len(noise.flatten(1)[:, 0].unique()) == len(x)


def test_ball_is_exact():
    x = torch.cat([torch.rand(1000), torch.tensor([0.0, 1.0])]).view(-1, 1, 1, 1)
    for eps in (1 / 255, 4 / 255, 16 / 255, 0.1):
        lowest, highest = evaluate.ball(x, eps)
        assert (evaluate.linf(lowest, x) <= eps).all() and (evaluate.linf(highest, x) <= eps).all()
        inside = lowest > 0
        assert (evaluate.linf(lowest.nextafter(x - 1), x) > eps)[inside.flatten()].all()
        assert lowest.min() == 0 and highest.max() == 1


# The evaluation


def task():
    model, (x, _) = smooth_model(), batch(40)
    return model.requires_grad_(False), x, model(x).argmax(1)


def evaluated(turns, model, x, y, **arguments):
    state = evaluate.begin(model, x, y)
    for turn in turns(state):
        evaluate.take_turn(turn, model, x, y, state, **arguments)
    return state


def test_autoattack_is_at_most_pgd_at_most_clean_and_all_fall_with_eps():
    model, x, y = task()
    y[:4] = (y[:4] + 1) % 4  # misclassified
    radii = [0, 0.005, 0.02, 0.04]
    together = evaluated(lambda state: evaluate.standard_turns(radii, state), model, x, y)
    auto = [evaluate.accuracy(together, eps) for eps in radii]
    pgd = [evaluate.pgd_accuracy(model, x, y, eps=eps, steps=20, restarts=2) for eps in radii]
    assert auto[0] == pgd[0] == 90 and all(a <= p for a, p in zip(auto, pgd))
    assert auto == sorted(auto, reverse=True) and auto[0] > auto[1] > auto[2] > auto[3]
    for eps in radii[1:]:  # all together break no fewer than each alone
        alone = model(evaluate.autoattack(model, x, y, eps=eps)).argmax(1) != y
        assert (alone <= (together["radius"] <= eps)).all()


def test_turns_are_those_of_standard_autoattack():
    model, x, y = linear_task(classes=12)
    state = evaluate.begin(model, x, y)
    assert torch.equal(state["targets"], model(x).sort(dim=1, descending=True).indices[:, 1:10])
    nine = range(9)
    assert evaluate.standard_turns([0.2, 0, 0.1], state) == [
        ("APGD-CE", 0.1, 0), ("APGD-CE", 0.2, 0),
        *(("APGD-T", 0.1, i) for i in nine), *(("APGD-T", 0.2, i) for i in nine), *(("FAB-T", 0.1, i) for i in nine),
        ("Square", 0.1, 0), ("Square", 0.2, 0)]


def test_an_images_verdict_does_not_depend_on_its_batch(monkeypatch):
    model, x, y = task()
    monkeypatch.setitem(evaluate.ATTACKS, "Square", functools.partial(evaluate.square, queries=50))
    for turns in ([("PGD", 0.02, 3)], [("APGD-CE", 0.02, 0)],
                  [("APGD-T", 0.02, 1), ("FAB-T", 0.01, 0), ("Square", 0.01, 0)]):
        whole = evaluated(lambda state: turns, model, x, y)
        some = evaluated(lambda state: turns, model, x[:20], y[:20], batch_size=1)
        assert 0 < whole["radius"][:20].isfinite().sum()
        torch.testing.assert_close(some["radius"], whole["radius"][:20])
        torch.testing.assert_close(some["images"], whole["images"][:20])
        torch.testing.assert_close(evaluate.proved_radius(model, x, y, whole["images"]), whole["radius"])


def test_only_what_is_proved_counts(monkeypatch):
    model, x, y = task()
    outside, nan = x.clone(), x.clone()
    outside[:, 0, 0, 0] = 1.5
    nan[:, 0, 0, 0] = math.nan
    wrong = (y + 1) % 4
    for images, labels, broken in ((outside, wrong, False), (nan, y, False), (x, y, False), (x, wrong, True)):
        assert (evaluate.proved_radius(model, x, labels, images).isfinite() == broken).all()
    monkeypatch.setitem(evaluate.ATTACKS, "PGD", lambda model, x, y, **_: outside)
    assert evaluate.pgd_accuracy(model, x, y, eps=0.1) == 100


def test_fallen_images_are_attacked_no_more():
    """The passes through the model: all images at the start, and of those that fall at once no more than a few."""
    model, x, y = linear_task(classes=2)
    count = 0

    def hook(model, inputs, output):
        nonlocal count
        count += len(inputs[0])

    model.register_forward_hook(hook)
    assert (evaluate.autoattack(model, x, y, eps=0.9) != x).flatten(1).any(1).all()
    assert count <= 4 * len(x)


def test_signs_of_untrustworthy_robustness_are_told():
    _, x, y = linear_task(classes=12)
    model = linear_model(12, 48)
    assert evaluate.doubts(model, x, y, "autoattack") == []
    assert "twice" in evaluate.doubts(nn.Sequential(model, nn.Dropout()), x, y, "pgd")[0]
    assert "probabilities" in evaluate.doubts(nn.Sequential(model, nn.Softmax(1)), x, y, "pgd")[0]
    flat = nn.Sequential(nn.Flatten(), nn.Threshold(1e9, 1.0), nn.Linear(48, 12)).double()
    assert f"{len(x)} of {len(x)} images is zero" in evaluate.doubts(flat, x, y, "pgd")[0]
    few, = evaluate.doubts(linear_model(3, 48), x, y % 3, "autoattack")
    assert "3 classes" in few and "2 targets" in few and "fewer logits" in few


def result(path, name):
    return json.loads((Path(path) / name).read_text())


@pytest.fixture(scope="session")
def trained(folder, tmp_path_factory):
    """A checkpoint of the image folder, of three classes, half-way robust at 40/255."""
    path = tmp_path_factory.mktemp("trained")
    run(*flags_for(folder, path), "--epochs", "8", "--lr", "0.01")
    return path / "checkpoint.pt"


@pytest.fixture
def checkpoint(trained, tmp_path):
    """A copy of it in a folder of its own, beside which results go."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint.pt").write_bytes(trained.read_bytes())
    return tmp_path / "run/checkpoint.pt"


AUTOATTACK = ["--attack", "autoattack", "--eps", "40/255", "64/255", "--num-images", "12", "--device", "cpu"]


def test_evaluate_prints_a_table_and_writes_json(checkpoint, tmp_path, capsys):
    run(checkpoint, "--eps", "0", "48/255", "1", "--num-images", "12", "--device", "cpu", "--save-adversarial",
        tmp_path / "adversarial.pt", script=evaluate)
    header, rule, row = capsys.readouterr().out.splitlines()
    clean, zero, some, all_of_it = map(float, row.split("|")[2:-1])
    assert clean == zero > some > all_of_it
    assert header.count("|") == rule.count("|") == row.count("|") == 6 and "PGD-10, 12 images" in header
    written = result(checkpoint.parent, "pgd10-12.json")
    assert [clean, zero, some, all_of_it] == pytest.approx(
        [written["clean_accuracy"], *written["robust_accuracy"]], abs=0.01)
    assert written["config"]["method"] == "gradnorm" and written["eps"] == ["0", "48/255", "1"]
    assert [path.name for path in checkpoint.parent.iterdir() if "state" in path.name] == []

    kept = torch.load(tmp_path / "adversarial.pt", weights_only=True)
    model, _ = train.load_checkpoint(checkpoint)
    found = kept[str(checkpoint)]
    wrong = model(found["adversarial"]).argmax(1) != kept["labels"]
    assert torch.equal(wrong, found["radius"].isfinite()) and found["adversarial"].dtype == torch.float32
    distance = (found["adversarial"].double() - kept["images"].double()).abs().amax((1, 2, 3))
    assert torch.equal(distance[wrong], found["radius"][wrong]) and 100 * (~wrong).double().mean() == all_of_it


def test_seeds_of_one_setting_have_a_row_of_mean_and_standard_deviation(checkpoint, capsys):
    saved = torch.load(checkpoint, weights_only=True)
    paths = []
    for name, seed, lr, keep in ("fast-0", 0, 0.01, 1), ("fast-1", 1, 0.01, 0), ("slow-0", 0, 0.001, 1):
        paths.append(checkpoint.parent / f"{name}.pt")
        model = {key: value * keep for key, value in saved["model"].items()}  # weights of 0 know one class of three
        config = saved["config"] | {"seed": seed, "lr": lr, "output_dir": name}
        torch.save(saved | {"model": model, "config": config}, paths[-1])
    run(*paths, "--eps", "48/255", "--num-images", "12", "--device", "cpu", script=evaluate)
    rows = [row.strip("| ").split(" | ") for row in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == [*map(str, paths), f"{checkpoint.parent}/fast-*, 2 seeds"]
    high, low = (result(checkpoint.parent, f"fast-{seed}-pgd10-12.json")["clean_accuracy"] for seed in (0, 1))
    assert high > low and rows[3][1] == f"{(high + low) / 2:.2f} ± {(high - low) / 2 ** 0.5:.2f}"


def test_a_sweep_has_a_row_an_eps_and_never_rises(checkpoint, capsys, monkeypatch):
    take_turn, turns = evaluate.take_turn, []
    monkeypatch.setattr(evaluate, "take_turn", lambda turn, *args, **kwargs: (
        turns.append(turn), take_turn(turn, *args, **kwargs)))
    run(checkpoint, "--sweep", "64", "--steps", "5", "--restarts", "2", "--num-images", "12", "--device", "cpu",
        script=evaluate)
    lines = capsys.readouterr().out.splitlines()
    written = result(checkpoint.parent, "pgd5x2-sweep-12.json")
    robust = written["robust_accuracy"]
    assert turns == [("PGD", k / 255, restart) for k in range(1, 65) for restart in (0, 1)]
    assert len(lines) == 2 + 1 + 65 and len(robust) == 65 and written["radii"][32] == 32 / 255
    assert robust[0] == written["clean_accuracy"] > robust[64] and robust == sorted(robust, reverse=True)


def test_progress_is_shown_and_changes_nothing(checkpoint, capsys, monkeypatch):
    flags = [checkpoint, "--eps", "48/255", "--num-images", "12", "--device", "cpu"]
    run(*flags, script=evaluate)
    quiet = capsys.readouterr().out
    monkeypatch.setattr(evaluate, "tqdm", lambda **settings: tqdm(**settings | {"disable": False, "mininterval": 0}))
    run(*flags, script=evaluate)
    output, errors = capsys.readouterr()
    assert output == quiet and "100.00 % left for PGD at 48/255" in errors


def test_two_processes_evaluate_as_one(checkpoint, capsys):
    run(checkpoint, *AUTOATTACK, script=evaluate)
    table = capsys.readouterr().out
    one = result(checkpoint.parent, "autoattack-12.json")
    assert one["clean_accuracy"] > one["robust_accuracy"][0] > one["robust_accuracy"][1]
    two = start(checkpoint, *AUTOATTACK, launcher=TORCHRUN, script="evaluate.py")
    output, errors = two.communicate(timeout=120)
    assert two.returncode == 0 and output == table, errors
    assert errors.count("2 targets, not 9") == 1  # rank 0 alone speaks
    two = result(checkpoint.parent, "autoattack-12.json")
    assert {**one, "seconds": 0} == {**two, "seconds": 0}


def test_interrupted_and_resumed_evaluation_equals_undisturbed(checkpoint, capsys, monkeypatch):
    run(checkpoint, *AUTOATTACK, script=evaluate)
    undisturbed = result(checkpoint.parent, "autoattack-12.json")
    (checkpoint.parent / "autoattack-12.json").unlink()
    capsys.readouterr()

    take_turn, turns = evaluate.take_turn, []

    def interrupted(turn, *args, **kwargs):
        if len(turns) == 4:
            raise KeyboardInterrupt
        turns.append(turn)
        take_turn(turn, *args, **kwargs)

    monkeypatch.setattr(evaluate, "take_turn", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(checkpoint, *AUTOATTACK, script=evaluate)
    output, errors = capsys.readouterr()
    assert stop.value.code == 130 and "--resume" in errors and "PARTIAL: 4 of 10 attacks" in output
    assert not (checkpoint.parent / "autoattack-12.json").exists()

    for flags, words in (([], "--resume"), (["--resume", "--eps", "40/255"], "eps")):
        assert words in fails(capsys, checkpoint, *AUTOATTACK, *flags, script=evaluate)
    monkeypatch.setattr(evaluate, "take_turn", lambda turn, *args, **kwargs: (
        turns.append(turn), take_turn(turn, *args, **kwargs)))
    run(checkpoint, *AUTOATTACK, "--resume", script=evaluate)
    assert len(turns) == len(set(turns)) == 10  # none was taken twice
    resumed = result(checkpoint.parent, "autoattack-12.json")
    assert {**undisturbed, "seconds": 0} == {**resumed, "seconds": 0}
    assert not list(checkpoint.parent.glob("*state*"))


def test_square_breaking_what_the_gradient_could_not_is_told(checkpoint, capsys, monkeypatch):
    """A model with steps: its gradient is zero, and random search alone breaks it."""
    class Steps(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model((x * 8).round() / 8)

    model, config = train.load_checkpoint(checkpoint)
    monkeypatch.setattr(train, "load_checkpoint", lambda path, device: (Steps(model), config))
    run(checkpoint, *AUTOATTACK, script=evaluate)
    errors = capsys.readouterr().err
    assert "input gradient of 12 of 12 images is zero" in errors and "Square, which follows no gradient" in errors
    assert len(result(checkpoint.parent, "autoattack-12.json")["warnings"]) == 3


def test_evaluation_in_bfloat16(checkpoint):
    run(checkpoint, "--amp", "bf16", "--num-images", "12", "--device", "cpu", script=evaluate)
    assert 0 < result(checkpoint.parent, "pgd10-12.json")["robust_accuracy"][0] <= 100


def test_bad_input_of_the_evaluation_ends_in_one_line(checkpoint, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (tmp_path / "renamed/val").mkdir(parents=True)
    for name in ("blue", "green", "yellow"):
        (tmp_path / "renamed/val" / name).symlink_to(folder / "val/red")
    for flags, words in [
        ([tmp_path / "none.pt"], "no checkpoint at"), ([__file__], "not a checkpoint"),
        ([checkpoint, "--eps", "2"], "from 0 up to 1"), ([checkpoint, "--eps", "4/x"], "4/x"),
        ([checkpoint, "--num-images", "13"], "12 held-out"), ([checkpoint, "--steps", "0"], "--steps"),
        ([checkpoint, "--attack", "fgsm"], "autoattack"), ([checkpoint, "--sweep", "0"], "--sweep"),
        ([checkpoint, "--num-images", "12", "--device", "cuda"], "cuda"), ([], "CHECKPOINT"),
        ([checkpoint, "--num-images", "12", "--data-dir", tmp_path / "renamed"], "yellow"),
        ([checkpoint, "--num-images", "12", "--data-dir", "/nonexistent"], "/nonexistent/val"),
        ([checkpoint, "--save-adversarial", checkpoint], "exists already"),
        ([checkpoint, "--save-adversarial", "/dev/null/x.pt"], "/dev/null"),
    ]:
        before = {path: path.read_bytes() for path in checkpoint.parent.iterdir()}
        device = [] if "--device" in flags else ["--device", "cpu"]
        assert words in fails(capsys, *flags, *device, script=evaluate)
        assert before == {path: path.read_bytes() for path in checkpoint.parent.iterdir()}
    other = torch.load(checkpoint, weights_only=True)
    other["config"]["val_images"] = 12
    torch.save(other, tmp_path / "other.pt")
    errors = fails(capsys, checkpoint, tmp_path / "other.pt", "--num-images", "12", "--device", "cpu", script=evaluate)
    assert "--val-images 12" in errors and "one by one" in errors
    (checkpoint.parent / "pgd10-12.state.pt").write_bytes(b"something else")
    errors = fails(capsys, checkpoint, "--num-images", "12", "--device", "cpu", "--resume", script=evaluate)
    assert "not the state" in errors and "pgd10-12.state.pt" in errors


# The pictures


@pytest.fixture(scope="session")
def gallery(folder, tmp_path_factory):
    """Runs of the three methods, side by side, with the results that the pictures need."""
    root = tmp_path_factory.mktemp("gallery")
    for method in ("natural", "gradnorm", "adversarial"):
        run(*flags_for(folder, root / method), "--method", method, "--lr", "0.01", "--epochs", "3")
        for flags in (["--sweep", "4", "--steps", "2"], ["--eps", "8/255", "16/255"]):
            run(root / method / "checkpoint.pt", *flags, "--num-images", "12", "--device", "cpu", script=evaluate)
    return root


@pytest.fixture
def runs(gallery, tmp_path):
    """A copy of them."""
    shutil.copytree(gallery, tmp_path / "runs")
    return [tmp_path / "runs" / method for method in ("natural", "gradnorm", "adversarial")]


def drawable(paths):
    return visualize.told_apart([visualize.load_run(path) for path in paths])


def curves(figure):
    """label -> (x, y) of each line, as it is drawn."""
    return {(line.get_label(), line.get_linestyle(), line.get_color()): (line.get_xdata(), line.get_ydata())
            for ax in figure.axes for line in ax.get_lines()}


def test_gradient_tiles_hold_the_input_gradient(runs):
    loaded = drawable(runs)
    picture = visualize.gradients(loaded, count=3)
    scale = round(150 / 16)
    side, gap, caption, header = 16 * scale, 10, 26, 34
    assert picture.mode == "RGB" and picture.size == (4 * (side + 2 * gap), header + 3 * (side + caption + gap))
    pixels = torch.from_numpy(np.array(picture))
    shown = [[pixels[header + i * (side + caption + gap):, j * (side + 2 * gap) + gap:][:side:scale, :side:scale]
              for j in range(4)] for i in range(3)]
    data = train.load_dataset(argparse.Namespace(**loaded[0]["config"]), train=False)
    images, labels = train.held_out(data, 12)
    models = [train.load_checkpoint(path / "checkpoint.pt")[0] for path in runs]
    right = [i for i in range(12) if all(m(images[i:i + 1] / 255).argmax() == labels[i] for m in models)][:3]
    assert len(set(labels[right].tolist())) == 3
    for row, i in zip(shown, right):
        assert torch.equal(row[0], images[i].permute(1, 2, 0))
        for tile, model in zip(row[1:], models):
            g = input_gradient(model, images[i:i + 1] / 255, labels[i:i + 1])[0]
            q = torch.tensor(sorted(g.abs().flatten().tolist())).quantile(0.99)
            expected = (255 * (0.5 + 0.5 * g / q).clamp(0, 1)).permute(1, 2, 0)
            torch.testing.assert_close(tile.float(), expected, rtol=0, atol=1)


def test_grey_tiles_and_a_gradient_of_zero():
    tiles = visualize.gradient_tiles(torch.stack([torch.zeros(1, 4, 4), torch.arange(16.0).view(1, 4, 4) - 8]))
    assert (tiles[0] == 0.5).all() and tiles[1].min() == 0 and tiles[1].flatten()[8] == 0.5
    picture = visualize.captioned_grid([tiles, tiles], ["a", "b"], [["c", "d"], ["e", "f"]])
    red, green, blue = map(np.array, picture.split())
    assert (red == green).all() and (red == blue).all()


def test_curves_hold_the_numbers_of_the_runs(runs):
    for i, path in enumerate(runs):  # these tiny runs are as good under attack: tell the two curves apart
        lines = [line | {"pgd10_accuracy": 10 * line["epoch"] + i} for line in metrics(path)]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loaded = drawable(runs)
    for picture, names in ((visualize.accuracy, ("clean_accuracy", "pgd10_accuracy")),
                           (visualize.epochs, ("gradient_norm",))):
        drawn = curves(picture(loaded))
        for each, path in zip(loaded, runs):
            for name, style in zip(names, ("-", "--")):
                label = each["label"] if style == "-" else "_"
                x, y = drawn[label, style, each["colour"]]
                assert list(x) == [1, 2, 3] and list(y) == [line[name] for line in metrics(path)]
    drawn = curves(visualize.sweep(loaded))
    for each, path in zip(loaded, runs):
        x, y = drawn[each["label"], "-", each["colour"]]
        assert list(x) == pytest.approx([0, 1, 2, 3, 4])
        assert list(y) == result(path, "pgd2-sweep-12.json")["robust_accuracy"]
    assert list(drawn["training ε", ":", "0.4"][0]) == pytest.approx([8, 8])
    drawn = curves(visualize.cost(loaded))
    for each, path in zip(loaded, runs):
        x, y = drawn[each["label"], "None", each["colour"]]
        assert list(y) == result(path, "pgd10-12.json")["robust_accuracy"][:1]
        assert list(x) == [sum(line["seconds"] for line in metrics(path)) / 60]
    assert len({each["colour"] for each in loaded}) == 3


@pytest.fixture
def make(runs):
    """Makes a run of such accuracies and seconds an epoch, its configuration changed, and without a checkpoint."""
    def make(name, accuracy, seconds=(1, 1, 1), **changes):
        path = runs[1].parent / name
        shutil.copytree(runs[1], path)
        (path / "checkpoint.pt").unlink()
        found = result(path, "pgd10-12.json")
        found |= {"clean_accuracy": accuracy, "robust_accuracy": [accuracy / 2, 0.0],
                  "config": found["config"] | changes}
        (path / "pgd10-12.json").write_text(json.dumps(found))
        lines = [{"epoch": epoch, "seconds": each} for epoch, each in enumerate(seconds, 1)]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return make


def test_cost_is_the_mean_of_its_seeds(make):
    several = [make("fast-0", 80.0, seconds=(30, 30, 150)), make("fast-1", 60.0, seconds=(30, 60, 60), seed=1),
               make("slow", 90.0, seconds=(60, 60), gradnorm_every=1, epochs=2), make("at", 90.0, method="adversarial")]
    figure = visualize.cost(drawable(several))
    drawn = {label: (list(x), list(y)) for (label, *_), (x, y) in curves(figure).items()}
    assert drawn == {"fast, 2 seeds": ([3.0], [35.0]), "slow": ([2.0], [45.0]), "adversarial": ([0.05], [45.0])}
    bars = [segment.tolist() for bar in figure.axes[0].collections for segment in bar.get_segments()]
    assert bars == [[[3.0, pytest.approx(35 - 50 ** 0.5)], [3.0, pytest.approx(35 + 50 ** 0.5)]]]  # of 40 and 30
    top, = figure.axes[0].child_axes
    figure.draw_without_rendering()
    minutes, percent = figure.axes[0].get_xlim()[1], top.get_xlim()[1]
    assert top.get_xlabel().startswith("of adversarial") and percent == pytest.approx(minutes / 0.05 * 100)


def test_accuracy_against_the_weight_is_the_mean_of_its_seeds(runs, make, capsys):
    several = [make("a", 90.0, lambda_gn=2.0, lambda_ce=0.5), make("b", 80.0, lambda_gn=1.0, lambda_ce=0.5),
               make("c", 60.0, lambda_gn=1.0, lambda_ce=0.5, seed=7), make("d", 40.0, method="natural"),
               make("e", 30.0, method="adversarial")]
    drawn = curves(visualize.weights(drawable(several)))
    for style, hidden, share in ("-", "", 1), ("--", "_", 0.5):
        x, y = drawn[hidden + "GradNorm", style, visualize.COLOURS["gradnorm"]]
        assert list(x) == [0, 2, 4] and list(y) == [40 * share, 70 * share, 90 * share]
        assert set(drawn[hidden + "adversarial", style, visualize.COLOURS["adversarial"]][1]) == {30 * share}
    for changes, words in (({"h": 0.01, "lambda_gn": 1.0}, "differ in h, lambda_gn"), ({}, "differ in nothing"),
                           ({"lambda_ce": 0.0}, "differ in lambda_ce")):
        path = make(str(len(words)), 50.0, **changes)
        assert words in fails(capsys, "weights", runs[1], path, script=visualize)


def test_strips_are_the_kept_gradients(runs):
    figure = visualize.epochs(drawable(runs[:1]))
    strip = torch.from_numpy(figure.axes[0].get_images()[0].get_array().data)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["image", "1", "2", "3"]
    tiles = [strip[1:17, 1 + 17 * i:17 + 17 * i].permute(2, 0, 1) for i in range(4)]
    for epoch in (1, 2, 3):
        kept = torch.load(runs[0] / f"gradients/{epoch:04d}.pt", weights_only=True)
        expected = visualize.gradient_tiles(kept["gradients"].float()[:1])[0].double()
        torch.testing.assert_close(tiles[epoch], expected, check_dtype=False)
        torch.testing.assert_close(tiles[0], kept["images"][0] / 255, check_dtype=False)


def test_all_draws_what_it_can_and_says_what_it_cannot(runs, tmp_path, capsys):
    run("all", tmp_path, script=visualize)
    output, errors = capsys.readouterr()
    for name in ("gradients", "epochs", "accuracy", "sweep", "cost"):
        with Image.open(tmp_path / f"runs/{name}.png") as picture:
            assert picture.format == "PNG" and min(picture.size) > 300
        assert f"{name}.png" in output
    assert errors.count("\n") == 1 and "weights.png: it takes GradNorm runs" in errors
    (runs[0] / "pgd2-sweep-12.json").write_text("{")
    (tmp_path / "runs/damaged").mkdir()
    (tmp_path / "runs/damaged/checkpoint.pt").write_bytes(b"half a file")
    (tmp_path / "runs/damaged/metrics.jsonl").touch()
    with open(runs[1] / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 4, "loss"\n')
    run("all", tmp_path, "--output", tmp_path / "pictures", script=visualize)
    errors = capsys.readouterr().err.splitlines()
    assert len(list((tmp_path / "pictures").iterdir())) == 4 and len(errors) == 5
    assert "left out" in errors[0] and "damaged" in errors[0] and "metrics.jsonl, line 4" in errors[1]
    assert "pgd2-sweep-12.json is not" in errors[2] and "no " in errors[3] and "--sweep 32" in errors[3]
    for path in runs:
        (path / "checkpoint.pt").unlink()
    run("all", tmp_path, "--output", tmp_path / "kept", script=visualize)
    assert {path.stem for path in (tmp_path / "kept").iterdir()} == {"epochs", "accuracy", "cost"}
    assert "gradients.png: no checkpoint at" in capsys.readouterr().err


def test_runs_of_one_method_are_told_apart(runs):
    several = drawable([runs[1], runs[1], runs[0]])
    assert several[2]["label"] == "natural"
    assert several[0]["marker"] != several[1]["marker"] and several[0]["colour"] == several[1]["colour"]
    assert several[0]["label"] == several[1]["label"] == "runs/gradnorm"
    many = drawable(runs + runs * 3)
    assert visualize.accuracy(many).axes and visualize.gradients(many[:10]).size[0] > 1000


def test_pictures_of_what_is_not_there_end_in_one_line(runs, tmp_path, capsys, monkeypatch):
    (runs[0] / "metrics.jsonl").unlink()
    shutil.rmtree(runs[0] / "gradients")
    (tmp_path / "empty").mkdir()
    for flags, words in [
        (["accuracy", tmp_path / "none"], "no checkpoint at"), (["accuracy", tmp_path / "empty"], "no checkpoint at"),
        (["accuracy", runs[0]], "no clean_accuracy"), (["epochs", runs[0]], "gradients is empty"),
        (["portrait", runs[0]], "portrait"), (["all", tmp_path / "empty"], "no runs in"),
        (["gradients", runs[1], "--output", "/dev/null/x.png"], "/dev/null"),
    ]:
        assert words in fails(capsys, *flags, script=visualize)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in fails(capsys, "accuracy", runs[1], script=visualize)
    run("gradients", *runs, script=visualize)  # needs none
    assert (tmp_path / "runs/gradients.png").exists()
