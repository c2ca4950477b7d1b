"""Tests: the mathematics of gradnorm.py against closed forms, numerical derivatives and independent formulas, and what
breaks in practice in train.py, evaluate.py and visualize.py.

    pytest
"""

import argparse
import contextlib
import copy
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import weakref
from functools import partial
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

import evaluate
import gradnorm
import train
import visualize
from gradnorm import gradnorm_loss, gradnorm_loss_finite_difference, input_gradient, pgd_attack
from results import benchmark, tables

pytestmark = pytest.mark.filterwarnings("error")  # a new one of torch is not overlooked
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # CUDA_VISIBLE_DEVICES=0 pytest tries a GPU
torch.set_num_threads(1)  # the tensors are small
HERE = Path(__file__).parent
LOSSES = [gradnorm_loss, gradnorm_loss_finite_difference]


@pytest.fixture(autouse=True)
def fixed_state():
    torch.manual_seed(0)


def linear_model(classes=3, pixels=12):
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes)).double().eval()


def smooth_model(classes=4):
    """Convolution, normalisation, smooth activation: all that the default model is made of, in float64."""
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(1, 6), nn.GELU(), nn.Conv2d(6, 6, 3), nn.SiLU(),
                         nn.Flatten(), nn.Linear(6 * 4 * 4, classes)).double().eval()


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
        return train.parse_args()
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


@pytest.mark.parametrize("sigma", [0.224, [0.229, 0.224, 0.225]])
@pytest.mark.parametrize("loss", LOSSES)
def test_normalised_inputs_with_sigma_equal_pixels(loss, sigma):
    model, (x, y) = smooth_model(), batch()
    std = torch.tensor(sigma, dtype=torch.float64).view(-1, 1, 1).expand(3, 1, 1)
    on_pixels = nn.Sequential(train.Normalize([0.45] * 3, [1.0] * 3), model).double()
    on_pixels[0].std.copy_(std)
    a, b = loss(on_pixels, x, y, eps=0.1), loss(model, on_pixels[0](x), y, eps=0.1, sigma=sigma)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(a, model), gradients(b, model), rtol=1e-8, atol=1e-12)


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


def test_finite_difference_is_the_weighted_sum_of_its_docstring():
    model, (x, y) = smooth_model(), batch()
    sign = input_gradient(model, x, y).sign()
    loss = gradnorm_loss_finite_difference(model, x, y)
    expected = -1.6 * F.cross_entropy(model(x), y) + 2.4 * F.cross_entropy(model(x + 2 / 255 * sign), y)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(loss, model), gradients(expected, model), rtol=1e-8, atol=1e-12)


def test_frozen_parameters_are_left_alone():
    model, (x, y) = smooth_model(), batch()
    model.requires_grad_(False)
    values = [loss(model, x, y, eps=0.1).item() for loss in LOSSES]
    model[0].requires_grad_()
    for loss, value in zip(LOSSES, values):
        result = loss(model, x, y, eps=0.1)
        result.backward()
        assert result.item() == pytest.approx(value) and all(p.grad is None for p in model[3].parameters())
    assert model[0].weight.grad.abs().sum() > 0


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


def test_pgd_starts_at_random_in_the_ball():
    model, (x, y) = smooth_model(), batch(50)
    x = 0.1 + 0.8 * x
    for start in (pgd_attack(model, x, y, eps=0.1, steps=0),
                  evaluate.pgd(model, x, y, eps=0.1, seeds=torch.arange(50), steps=0)):
        noise = start - x
        assert noise.abs().max() <= 0.1 and noise.abs().mean().item() == pytest.approx(0.05, rel=0.05)
        assert abs(noise.mean()) < 0.005 and len(noise.flatten(1)[:, 0].unique()) == 50


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


class Layer(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


PUBLIC = [*LOSSES, pgd_attack, evaluate.autoattack, evaluate.pgd_accuracy]


@pytest.mark.parametrize("call", PUBLIC)
@pytest.mark.parametrize("wrong, words", [
    ({"x": torch.zeros(5, 3, 8, 8, dtype=torch.uint8)}, "float32 images"),
    ({"x": torch.zeros(5, 3, 8, 8, dtype=torch.bfloat16)}, "float32 images"),  # in which x + δ would be rounded
    ({"x": torch.zeros(5, 192, dtype=torch.double)}, r"images.*\(5, 192\)"),
    ({"y": torch.tensor([0, 1])}, "batch_size|size of tensor|must match"),
    ({"model": lambda x: smooth_model()(x.detach())}, "no gradient|not require grad"),
    ({"model": torch.no_grad()(lambda x: smooth_model()(x))}, "no gradient|not require grad"),
    ({"model": lambda x: smooth_model()(x).half()}, "float16 loses"),
    ({"model": lambda x: smooth_model()(x)[:, :1], "y": torch.zeros(5, dtype=torch.long)}, r"logits .*\(5, 1\)"),
    ({"model": lambda x: x, "y": torch.zeros(5, 8, 8, dtype=torch.long)}, r"logits|shape|size|dimension"),
    *(({"eps": eps}, f"eps is in pixels of .* not {eps}") for eps in (-0.1, math.nan, 8)),  # 8/255 was meant
])
def test_no_wrong_input_gives_a_number(call, wrong, words):
    x, y = batch()
    model = Layer(wrong["model"]).eval() if "model" in wrong else smooth_model()
    with pytest.raises((ValueError, RuntimeError, IndexError), match=words):
        call(model, wrong.get("x", x), wrong.get("y", y), eps=wrong.get("eps", 0.1))


@pytest.mark.parametrize("call", [pgd_attack, evaluate.autoattack, evaluate.pgd_accuracy])
def test_images_that_are_no_pixels_are_refused(call):
    model, (x, y) = smooth_model(), batch()
    with pytest.raises(ValueError, match="h is in pixels .* not 2"):
        gradnorm_loss_finite_difference(model, x, y, h=2)
    with pytest.raises(ValueError, match="step_size is in pixels .* not 2"):
        pgd_attack(model, x, y, step_size=2)
    with pytest.raises(RuntimeError, match="expand"):  # would be three penalties
        gradnorm_loss(Layer(lambda grey: model(grey.expand(-1, 3, -1, -1))), x[:, :1], y, sigma=[0.2, 0.2, 0.2])
    for wrong in (x - 0.5, x + 0.5, 255 * x, x * math.nan):
        with pytest.raises(ValueError, match="x must hold pixels"):
            call(model, wrong, y, eps=0.1)
    x = x.float().round()
    rounded = x + 2.4e-7 * (2 * x - 1)  # as of an image that was resized, on both sides
    assert rounded.min() < 0 and rounded.max() > 1
    torch.manual_seed(1)
    attacked = call(model.float(), rounded, y, eps=0.1)
    torch.manual_seed(1)
    torch.testing.assert_close(attacked, call(model, x, y, eps=0.1), rtol=0, atol=0)  # ε counts from the clamped image


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_agrees_with_float32(loss):
    model = train.build_model("convnet", 3, 10)
    x, y = torch.rand(16, 3, 32, 32), torch.randint(10, (16,))
    reference = loss(model, x, y, eps=0.1)
    expected = gradients(reference, model)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(model, x, y, eps=0.1)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, reference, rtol=1e-2, atol=0)
    assert F.cosine_similarity(gradients(value, model), expected, dim=0) > 0.99
    with pytest.raises(ValueError, match="float16 loses"), torch.autocast("cpu", torch.float16):
        loss(model, x, y)


class Island(nn.Linear):
    """A layer that computes in float32 whatever autocast says."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.flatten(1).float())


def test_autocast_leaves_the_backward_pass_of_a_float32_layer_alone():
    """Of which the products would be cast to bfloat16, for double backprop to differentiate."""
    model, x, y = Island(12, 3), torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    with torch.autocast("cpu", torch.bfloat16):
        values = [loss(model, x, y) for loss in LOSSES] + [input_gradient(model, x, y)]
    for value, expected in zip(values, [loss(model, x, y) for loss in LOSSES] + [input_gradient(model, x, y)]):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)


def test_the_finite_difference_has_no_second_derivative_and_says_so():
    model, (x, y) = smooth_model(), batch()
    loss = gradnorm_loss_finite_difference(model, x, y)
    with pytest.raises(RuntimeError, match="twice: take gradnorm_loss"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    loss.backward()


def test_the_finite_difference_keeps_no_gradients_after_its_backward_pass():
    """A sum of the losses for the log is held for an epoch; the model's gradients are not."""
    model, (x, y), kept = smooth_model(), batch(), []
    known = gradnorm.losses_and_gradients

    def noted(*arguments):
        result = known(*arguments)
        kept.extend(weakref.ref(g) for g in result[2:])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradnorm, "losses_and_gradients", noted)
        loss = gradnorm_loss_finite_difference(model, x, y)
    assert len(kept) == 8 and all(reference() is not None for reference in kept)
    loss.backward()
    assert all(reference() is None for reference in kept) and loss.isfinite()


def test_ignored_labels_count_in_both_forms_alike():
    model, (x, y) = smooth_model(), batch()
    y[:2] = -100
    exact, near = gradnorm_loss(model, x, y), gradnorm_loss_finite_difference(model, x, y, h=1e-6)
    torch.testing.assert_close(near, exact, rtol=1e-5, atol=0)


def test_a_gradient_of_nan_is_no_failed_attack():
    """A black image has no contrast to divide by: its loss is finite, its input gradient is nan."""
    contrast = Layer(lambda x: x / (1 + x.pow(2).mean((1, 2, 3), keepdim=True).sqrt()))
    model, (x, y) = nn.Sequential(contrast, smooth_model()), batch()
    x[0] = 0
    adversarial = pgd_attack(model, x, y, random_start=False)
    assert adversarial[0].isnan().all() and adversarial[1:].isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_what_no_gradient_reaches_stays_as_it_is(loss):
    """An unused head has no gradient, and not one of zero, on which AdamW's decay acts. Targets are constants."""
    model, (x, y) = smooth_model(), batch(soft=True)
    model.register_module("unused", nn.Identity())
    model.unused.weight = nn.Parameter(torch.ones(3, dtype=torch.double))
    y.requires_grad_()
    loss(model, x, y).backward()
    assert model.unused.weight.grad is None and y.grad is None and model[0].weight.grad.abs().sum() > 0


class CountWaits(TorchDispatchMode):
    """Counts what a GPU has to be waited for: tensors that become Python numbers."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket == torch.ops.aten._local_scalar_dense
        return function(*args, **(kwargs or {}))


# Attention


@pytest.mark.parametrize("name", ["vit", "swin_t"])
def test_attention_models_make_a_step(name):
    if name == "vit":
        network = torchvision.models.VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2,
                                                       hidden_dim=32, mlp_dim=64, num_classes=5)
        nn.init.normal_(network.heads.head.weight)  # torchvision starts it from zero
        model = nn.Sequential(train.Normalize([0.5] * 3, [0.25] * 3), network)
    else:
        model = train.build_model("swin_t", 3, 5)
    loss = gradnorm_loss(model, torch.rand(2, 3, 32, 32), torch.randint(5, (2,)), lambda_ce=0)
    loss.backward()
    assert loss > 0 and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name, kind", [("squeezenet1_1", nn.Dropout), ("swin_t", torchvision.ops.StochasticDepth)])
def test_dropout_and_drop_path_are_off(name, kind):
    assert {module.p for module in torchvision.models.get_model(name).modules() if isinstance(module, kind)} != {0.0}
    assert {module.p for module in train.build_model(name, 3, 5).modules() if isinstance(module, kind)} == {0.0}


# Several processes


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
            "--batch-size", "16", "--epochs", "2", "--warmup-epochs", "1", "--lr", "2e-3",
            "--eval-images", "12", "--eps", "8/255", "--output-dir", str(output_dir)]


def run(*flags, script=train):
    """The main of a script in this process."""
    old, sys.argv = sys.argv, [f"{script.__name__}.py", *map(str, flags)]
    try:
        script.main()
    finally:
        sys.argv = old


@pytest.fixture
def on_cpu(monkeypatch):
    """For what is compared with the CPU number by number: a GPU has TF32, and random numbers of its own."""
    monkeypatch.setattr(train, "start_process", lambda: torch.device("cpu"))


def mistake(*flags, script=train):
    """What a script says of a user's mistake."""
    with pytest.raises((ValueError, RuntimeError, LookupError, OSError, SystemExit)) as error, \
            contextlib.redirect_stderr(io.StringIO()) as errors:
        run(*flags, script=script)
    return errors.getvalue() + str(error.value)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


def start(*flags, launcher=(), script="train.py"):
    """A script in a process of its own."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    return subprocess.Popen([sys.executable, *launcher, str(HERE / script), *map(str, flags)], env=environment,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def saved(output_dir, key="model"):
    return torch.load(Path(output_dir) / "checkpoint.pt", map_location="cpu", weights_only=True)[key]


def metrics(output_dir):
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_promises(folder, out, capsys, on_cpu):
    run(*flags_for(folder, out), "--ema-decay", "0.4", "--activation", "silu", "--h", "4/255")
    lines = metrics(out)
    assert [line["epoch"] for line in lines] == [1, 2]
    assert len(capsys.readouterr().out.splitlines()) == 3

    model, config = train.load_checkpoint(out / "checkpoint.pt")
    assert not model.training and config["classes"] == ["blue", "green", "red"] and config["eps"] == 8 / 255
    kinds = {type(module) for module in model.modules()}
    assert nn.SiLU in kinds and nn.GELU not in kinds
    held_out = train.load_dataset(argparse.Namespace(**config), "test")
    images, labels = torch.stack([image for image, _ in held_out]), torch.tensor(held_out.targets)
    pixels = images.float() / 255
    accuracy = (model(pixels).argmax(1) == labels).double().mean().item()
    assert lines[1]["clean_accuracy"] == pytest.approx(100 * accuracy)
    norm = input_gradient(model, pixels, labels).abs().sum((1, 2, 3)).mean().item()
    assert lines[1]["gradient_norm"] == pytest.approx(norm, rel=1e-4)

    kept = torch.load(out / "gradients/0002.pt", weights_only=True)
    assert len(set(kept["labels"].tolist())) == 3  # four images of three classes: they take turns
    assert kept["images"].untyped_storage().nbytes() == kept["images"].nbytes  # these alone, of all that were evaluated
    expected = input_gradient(model, kept["images"].float() / 255, kept["labels"])
    torch.testing.assert_close(kept["gradients"].float(), expected, rtol=1e-2, atol=1e-8)


def test_training_step_is_the_equation(folder, out, on_cpu):
    """Two epochs of SGD, rewritten in a few lines with none of train.py's loop."""
    run(*flags_for(folder, out), "--optimizer", "sgd", "--lr", "0.1", "--gradnorm-every", "2",
        "--weight-decay", "0.01", "--ema-decay", "0.4", "--lambda-gn", "0.6", "--seed", "3")
    torch.manual_seed(3)
    model = train.build_model("convnet", 3, 3)
    data = train.load_dataset(argparse.Namespace(**saved(out, "config")), "train")
    sampler, order = torch.utils.data.DistributedSampler(data, 1, 0, seed=3), []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        order += list(sampler)
    velocity, average, losses, clipped = [0] * len(list(model.parameters())), None, [], 0
    for step in range(6):  # three of warm-up, three of cosine
        rise, fall = min(1, step / 3), (1 + math.cos(math.pi * max(step - 3, 0) / 3)) / 2
        chosen = order[16 * step:16 * step + 16]
        x, y = torch.stack([data[i][0] for i in chosen]).float() / 255, torch.tensor([data[i][1] for i in chosen])
        if step % 2:
            loss = 0.8 * F.cross_entropy(model(x), y)
        else:  # twice the weight, times the ramp
            loss = gradnorm_loss(model, x, y, lambda_gn=2 * 0.6 * rise, eps=8 / 255)
        losses.append(loss.item())
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.cat([g.flatten() for g in gradient]).norm()
        clipped += norm > 1
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(model.parameters(), gradient)):
                velocity[i] = 0.9 * velocity[i] + g * min(1, 1 / norm) + 0.01 * p * (p.ndim > 1)
                p -= (1e-5 + (0.1 - 1e-5) * rise * fall) * velocity[i]
            weights = nn.utils.parameters_to_vector(model.parameters())
            average = weights if average is None else 0.4 * average + 0.6 * weights
    assert 0 < clipped < 6
    trained = torch.cat([w.flatten() for name, w in saved(out).items() if name not in ("0.mean", "0.std")])
    torch.testing.assert_close(trained, weights, rtol=1e-4, atol=1e-6)
    for epoch, line in enumerate(metrics(out)):
        assert line["loss"] == pytest.approx(sum(losses[3 * epoch:3 * epoch + 3]) / 3, rel=1e-4)
    averaged, _ = train.load_checkpoint(out / "checkpoint.pt")
    torch.testing.assert_close(nn.utils.parameters_to_vector(averaged.parameters()), average, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("flags, size", [([], 2 / 3), (["--steps", "1"], 1.25), (["--step-size", "2/255"], 0.25)])
def test_training_attack_takes_its_step_size(monkeypatch, flags, size):
    """2ε/N, 1.25ε for one step, or what is asked for, times the ramp."""
    model, (x, y), seen = smooth_model(), batch(), {}
    monkeypatch.setattr(train, "pgd_attack", lambda model, x, y, **arguments: seen.update(arguments) or x)
    args = settings("--method", "adversarial", "--eps", "8/255", *flags)
    loss = train.Objective(model, args)(x, y, 0.5)
    assert seen == {"eps": 8 / 255, "steps": args.steps, "step_size": pytest.approx(0.5 * size * 8 / 255)}
    torch.testing.assert_close(loss, F.cross_entropy(model(x), y), check_dtype=False)


def test_each_epoch_draws_its_own_noise_and_strong_augmentation_mixes_targets(folder, out, monkeypatch):
    def noted(model, x, y, **weights):
        seen.append((torch.initial_seed(), y))
        return gradnorm_loss(model, x, y, **weights)

    seen = []
    monkeypatch.setattr(train, "gradnorm_loss", noted)
    for seed, smoothing in ("0", 0.0), ("1", 0.1):
        run(*flags_for(folder, out / seed), "--batch-size", "48", "--augment", "strong", "--seed", seed,
            "--label-smoothing", str(smoothing))
    seeds, mixed = zip(*seen)
    assert len({*seeds}) == len(seeds) == 4
    for targets, smoothing in zip(mixed, (0.0, 0.0, 0.1, 0.1), strict=True):
        torch.testing.assert_close(targets.sum(1), torch.ones(48))
        assert targets.min() == pytest.approx(smoothing / 3) and ((0.04 < targets) & (targets < 0.9)).any()


@pytest.mark.parametrize("method", ["natural", "gradnorm", "adversarial"])
def test_smoothed_targets_give_the_cross_entropy_of_label_smoothing(folder, out, monkeypatch, method):
    def noted(objective, x, y, *arguments, **options):
        seen.append(y)
        return F.cross_entropy(objective.model(x), y)

    seen = []
    monkeypatch.setattr(train.Objective, "forward", noted)
    run(*flags_for(folder, out), "--method", method, "--batch-size", "48", "--epochs", "1", "--label-smoothing", "0.1")
    targets, = seen
    logits = torch.randn(48, 3)
    torch.testing.assert_close(F.cross_entropy(logits, targets),
                               F.cross_entropy(logits, targets.argmax(1), label_smoothing=0.1))
    assert targets.unique().tolist() == pytest.approx([0.1 / 3, 0.9 + 0.1 / 3])


def test_validation_counts_what_stays_right_under_pgd10_from_the_same_points(monkeypatch):
    def turned(model, x, y, **arguments):  # which makes the third image right
        seen.append((arguments, torch.rand(()).item()))
        return torch.where(y[:, None, None, None] == 0, 1 - x, x)

    seen, model = [], Layer(lambda x: x.mean((2, 3)) @ torch.tensor([[-1.0, 1.0]]) + torch.tensor([1.0, 0.0]))
    monkeypatch.setattr(train, "pgd_attack", turned)
    images, labels = torch.tensor([0, 255, 255]).byte().view(3, 1, 1, 1), torch.tensor([0, 1, 0])
    for seed in (5, 6):
        torch.manual_seed(seed)
        found = train.validate(model, images, labels, 0.1, 2, "cpu")
        assert [found[name] for name in ("clean_accuracy", "pgd10_accuracy")] == pytest.approx([200 / 3, 100 / 3])
    assert seen[:2] == seen[2:] and all(arguments == {"eps": 0.1, "steps": 10} for arguments, _ in seen)


def test_two_processes_train_as_one(folder, tmp_path, on_cpu):
    """Each has a disk of its own, and only that of rank 0 gets a checkpoint. The first time it ends in epoch 2."""
    common = ["--optimizer", "sgd", "--lr", "0.1"]
    run(*flags_for(folder, tmp_path / "one"), *common)
    script, disks = tmp_path / "apart.py", [tmp_path / "disk0", tmp_path / "disk1"]
    for disk in disks:
        disk.mkdir()
    script.write_text(f"import os, torch, train\nos.chdir('{tmp_path}/disk' + os.environ['RANK'])\n"
                      "loss, seeds = train.gradnorm_loss, open('../seeds', 'a', buffering=1)\n"
                      "def noted(*args, **weights):\n    print(torch.initial_seed(), file=seeds)\n"
                      "    return loss(*args, **weights)\ntrain.gradnorm_loss = noted\n"
                      "validate, calls = train.validate, []\n"
                      "def ended(*args):\n    calls.append(0)\n    assert len(calls) < 2, 'no power'\n"
                      "    return validate(*args)\n"
                      f"if not os.path.exists('{disks[0]}/two'):\n    train.validate = ended\ntrain.main()\n")
    for ends in (True, False):
        began = time.time()
        two = start(*flags_for(folder, "two"), *common, "--batch-size", "8", "--resume", launcher=TORCHRUN,
                    script=script)
        output, errors = two.communicate(timeout=120)
        assert (two.returncode, "no power" in errors) == (ends, ends), errors
        assert time.time() - began < 60 and len(output.splitlines()) == 2  # rank 0 alone speaks
    assert len(set((tmp_path / "seeds").read_text().split())) == 4  # each process and epoch has noise of its own
    torch.testing.assert_close(saved(disks[0] / "two"), saved(tmp_path / "one"), rtol=1e-4, atol=1e-6)
    for a, b in zip(metrics(disks[0] / "two"), metrics(tmp_path / "one"), strict=True):
        for name in ("loss", "clean_accuracy", "pgd10_accuracy", "gradient_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    assert not any(disks[1].iterdir())


def test_init_starts_from_the_weights_of_another_run(folder, tmp_path):
    for seed in ("0", "1"):
        run(*flags_for(folder, tmp_path / f"natural-{seed}"), "--method", "natural", "--activation", "silu",
            "--ema-decay", "0.4", "--seed", seed)
        run(*flags_for(folder, tmp_path / f"robust-{seed}"), "--init", tmp_path / f"natural-{seed}/checkpoint.pt",
            "--seed", seed, "--lr", "1e-9", "--weight-decay", "0")
    parent, config = train.load_checkpoint(tmp_path / "natural-0/checkpoint.pt")
    child, child_config = train.load_checkpoint(tmp_path / "robust-0/checkpoint.pt")
    for a, b in zip(parent.parameters(), child.parameters()):  # the averaged weights, head and all
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert child_config["activation"] == "silu" and child_config["parent"]["method"] == "natural"
    assert "natural-0" not in json.dumps(child_config["parent"])
    configs = [train.experiment(saved(tmp_path / f"robust-{seed}", "config")) for seed in ("0", "1")]
    assert configs[0] == configs[1] != train.experiment(config)
    flags = [*flags_for(folder, tmp_path / "robust-0"), "--lr", "1e-9", "--weight-decay", "0", "--resume"]
    assert "parent" in mistake(*flags, "--init", tmp_path / "robust-1")
    run(*flags, "--init", tmp_path / "natural-0")


def test_images_held_out_are_those_that_the_parent_has_not_seen(folder, tmp_path):
    """It has the same classes. A folder that has grown or shrunk holds out others."""
    def flags(data, name, count, *more):
        return [*flags_for(data, tmp_path / name), "--epochs", "1", "--val-images", count, *more]

    run(*flags(folder, "parent", 12))
    shutil.copytree(folder, tmp_path / "grown")
    shutil.copy(folder / "train/red/0.jpg", tmp_path / "grown/train/red/new.jpg")
    for data, count in ((folder, 13), (tmp_path / "grown", 12), (tmp_path / "grown", 13)):
        assert "some of these images" in mistake(*flags(data, "other", count, "--init", tmp_path / "parent"))
    for part in ("train", "val"):
        (tmp_path / "other-images" / part).mkdir(parents=True)
        for name in ("red", "green"):
            shutil.copytree(folder / part / name, tmp_path / "other-images" / part / f"dark {name}")
    run(*flags(folder, "child", 12, "--init", tmp_path / "parent"))
    run(*flags(tmp_path / "other-images", "stranger", 6, "--eval-images", "6", "--init", tmp_path / "parent"))
    rewrite(tmp_path / "parent/checkpoint.pt", model="resnet18", pretrained=True)  # on ImageNet
    assert "include the test images" in mistake(*flags(folder, "other", 0, "--init", tmp_path / "parent"), "--dataset",
                                                "imagenette")


def test_a_class_is_not_held_out_whole(folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    for i in range(2, 16):
        (data / f"train/green/{i}.jpg").unlink()
    assert "holds out all images of green" in mistake(*flags_for(data, tmp_path / "run"), "--val-images", "6")
    run(*flags_for(data, tmp_path / "run"), "--val-images", "3", "--eval-images", "3", "--epochs", "1")


def test_init_of_an_unfinished_run_is_told_in_training_and_evaluation(folder, tmp_path, capsys):
    run(*flags_for(folder, tmp_path / "parent"))
    whole = torch.load(tmp_path / "parent/checkpoint.pt", weights_only=True)
    torch.save(whole | {"epoch": 1}, tmp_path / "parent/checkpoint.pt")
    run(*flags_for(folder, tmp_path / "run"), "--init", tmp_path / "parent", "--epochs", "1")
    assert f"from epoch 1 of 2 of {tmp_path / 'parent'}" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="its --init was trained for 1 of 2 epochs"):
        run(tmp_path / "run", "--num-images", "12", "--attack", "clean", script=evaluate)


def test_paths_have_a_home(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run(*flags_for(folder, "~/parent"), "--epochs", "1")
    run(*flags_for(folder, "~/run"), "--init", "~/parent", "--epochs", "1")
    run("~/run", "--num-images", "12", "--attack", "clean", script=evaluate)
    assert (tmp_path / "run/clean-12.json").exists() and not Path("~").exists()


def test_init_with_other_classes_has_a_fresh_head(folder, tmp_path):
    run(*flags_for(folder, tmp_path / "three"), "--epochs", "1")
    (tmp_path / "two/train").mkdir(parents=True)
    (tmp_path / "two/val").mkdir()
    for part, name in itertools.product(("train", "val"), ("blue", "red")):
        (tmp_path / "two" / part / name).symlink_to(folder / part / name)
    run(*flags_for(tmp_path / "two", tmp_path / "run"), "--init", tmp_path / "three/checkpoint.pt", "--lr", "1e-9",
        "--weight-decay", "0", "--eval-images", "8")
    run(*flags_for(folder, tmp_path / "larger"), "--image-size", "64", "--init", tmp_path / "three", "--epochs", "1",
        "--warmup-epochs", "0")
    assert train.load_checkpoint(tmp_path / "larger")[1]["pixels"] == 16  # of the network, whatever the images
    with pytest.raises(RuntimeError, match="size mismatch for 0.weight"):  # a layer that is no head
        train.load_matching(nn.Sequential(nn.Linear(5, 3)), nn.Sequential(nn.Linear(4, 2)).state_dict())
    args = settings("--dataset", "imagefolder", "--init", str(tmp_path / "three"))
    assert args.image_size == 16 and settings("--dataset", "imagefolder").image_size == 224
    before, after = saved(tmp_path / "three"), saved(tmp_path / "run")
    assert after["1.head.weight"].shape == (2, 64) and train.load_checkpoint(tmp_path / "run/checkpoint.pt")
    for name in before.keys() - {"1.head.weight", "1.head.bias"}:
        torch.testing.assert_close(before[name], after[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["vit_b_16", "swin_t", "convnext_tiny", "resnet18", "convnet"])
def test_weight_decay_is_for_the_weights_of_layers(name):
    """Of linear layers and convolutions: not for norms, biases, tokens, embeddings, bias tables and layer scales."""
    model = train.build_model(name, 3, 10)
    decayed, exempt = train.build_optimizer(model, settings("--model", name)).param_groups
    layers = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
    expected = {id(p) for m in model.modules() if isinstance(m, layers)
                for key, p in m.named_parameters(recurse=False) if key in ("weight", "in_proj_weight")}
    assert {id(p) for p in decayed["params"]} == expected and len(expected) > 3
    assert len(decayed["params"]) + len(exempt["params"]) == len(list(model.parameters()))
    assert decayed["weight_decay"] == 0.05 and exempt["weight_decay"] == 0


def test_killed_and_resumed_equals_undisturbed(folder, tmp_path, on_cpu):
    # All that has state: EMA, AdamW, worker processes, every source of randomness.
    extra = ["--epochs", "4", "--amp", "bf16", "--ema-decay", "0.6", "--augment", "strong", "--workers", "1",
             "--gradnorm-every", "2"]
    run(*flags_for(folder, tmp_path / "undisturbed"), *extra)
    script = tmp_path / "killed.py"  # in epoch 3, in the middle of its checkpoint, with its workers
    script.write_text("import os, torch, train\nsave, calls = torch.save, []\n"
                      "def half(value, file):\n    calls.append(0)\n    save(value, file)\n"
                      "    if len(calls) == 6:\n        file.truncate(5000)\n        os.killpg(0, 9)\n"
                      "torch.save = half\ntrain.main()\n")
    process = start(*flags_for(folder, tmp_path / "killed"), *extra, script=script)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL and saved(tmp_path / "killed", "epoch") == 2, errors
    run(*flags_for(folder, tmp_path / "killed"), *extra, "--resume")
    for key in ("model", "ema", "optimizer"):
        killed, undisturbed = saved(tmp_path / "killed", key), saved(tmp_path / "undisturbed", key)
        torch.testing.assert_close(killed, undisturbed, rtol=0, atol=0)
    for a, b in zip(metrics(tmp_path / "killed"), metrics(tmp_path / "undisturbed"), strict=True):
        assert all(a[name] == b[name] for name in a if name != "seconds")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), train.atomic_write(path) as file:
        file.write(b"half of the n")
        raise RuntimeError
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]  # a full disk gets its room back
    with open(path, "rb") as reader:
        with train.atomic_write(path) as file:
            file.write(b"new")
            assert str(os.getpid()) in file.name  # another process that writes the same file has another
        assert reader.read() == b"old"  # the old file is left as it was, to whoever has it open
    assert path.read_bytes() == b"new"


def test_two_processes_evaluate_what_is_saved_and_stop_together_at_a_nan(folder, tmp_path):
    """BatchNorm's statistics differ between ranks. The nan is in the loss of rank 1 alone, in step 3 of 2 x 2."""
    script = tmp_path / "nan.py"
    script.write_text("import train\noriginal, calls = train.Objective.forward, []\n"
                      "def poisoned(*args, **kwargs):\n    calls.append(0)\n"
                      "    nan = float('nan') if train.RANK == 1 and len(calls) == 3 else 1\n"
                      "    return original(*args, **kwargs) * nan\n"
                      "train.Objective.forward = poisoned\ntrain.main()\n")
    process = start(*flags_for(folder, tmp_path / "run"), "--batch-size", "12", "--model", "resnet18", "--image-size",
                    "32", "--method", "natural", "--warmup-epochs", "0", launcher=TORCHRUN, script=script)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "FloatingPointError: loss " in errors and "or take --h" in errors, errors
    (line,), (model, config) = metrics(tmp_path / "run"), train.load_checkpoint(tmp_path / "run")
    x, y = train.evaluation_images(train.load_dataset(argparse.Namespace(**config), "test"), 12)
    norm = input_gradient(model, x / 255, y).abs().sum((1, 2, 3)).mean().item()
    assert line["gradient_norm"] == pytest.approx(norm, rel=3e-5)


def publish(network, monkeypatch):
    """Makes its weights those that torchvision gives, without a download."""
    build = torchvision.models.get_model
    monkeypatch.setattr(torchvision.models, "get_model",
                        lambda name, weights=None, **others: network if weights else build(name, **others))


@pytest.mark.parametrize("start", ["--init", "--pretrained"])
def test_batchnorm_is_frozen_in_a_run_that_starts_from_trained_weights(folder, tmp_path, monkeypatch, start):
    def flags(name):
        return [*flags_for(folder, tmp_path / name), "--image-size", "32", "--batch-size", "16", "--eval-images", "1",
                "--epochs", "1", "--warmup-epochs", "0"]

    run(*flags("natural"), "--method", "natural", "--model", "resnet18")
    natural = saved(tmp_path / "natural")
    weights = {name.removeprefix("1."): value for name, value in natural.items() if name.startswith("1.")}
    published = torchvision.models.get_model("resnet18", num_classes=3)
    published.load_state_dict(weights)
    publish(published, monkeypatch)
    run(*flags("robust"), *([start, tmp_path / "natural"] if start == "--init" else [start, "--model", "resnet18"]))
    robust = saved(tmp_path / "robust")
    statistics = [name for name in natural if "running" in name or "num_batches" in name]
    assert all(torch.equal(natural[name], robust[name]) for name in statistics)
    assert natural["1.bn1.num_batches_tracked"] == 3 and not torch.equal(natural["1.fc.bias"], robust["1.fc.bias"])


@pytest.mark.parametrize("method, waits", [("natural", 1), ("gradnorm", 1), ("adversarial", 3)])
def test_a_training_step_waits_for_the_gpu_to_check_the_gradient_and_the_pixels(method, waits):
    args, model = settings("--method", method, "--optimizer", "sgd"), train.build_model("convnet", 3, 10)
    objective, optimizer = train.Objective(model, args), train.build_optimizer(model, args)
    with CountWaits() as counter:
        train.training_step(objective, optimizer, args, torch.rand(4, 3, 8, 8), torch.arange(4))
    assert counter.count == waits


def test_mixed_precision_is_of_the_forward_pass(folder, out, monkeypatch):
    def noted(model, x, y, **weights):
        device = x.device.type
        seen.append(torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device))
        return gradnorm_loss(model, x, y, **weights)

    seen = []
    monkeypatch.setattr(train, "gradnorm_loss", noted)
    run(*flags_for(folder, out), "--amp", "bf16", "--epochs", "8", "--lr", "0.01")
    first, *_, last = metrics(out)
    assert seen == 24 * [torch.bfloat16]
    assert last["loss"] < 0.7 * first["loss"] and last["clean_accuracy"] > 90


def test_attacks_wait_for_the_gpu_a_few_times_per_iteration():
    model, x, y = Steadfast(), batch(4)[0], torch.zeros(4, dtype=torch.long)  # which no attack breaks
    for attack, iterations, waits in ((partial(evaluate.apgd, seeds=torch.arange(4), steps=20), 21, 1),
                                      (partial(evaluate.fab, target=y + 1, steps=20), 20, 3),
                                      (partial(evaluate.square, seeds=torch.arange(4), queries=20), 21, 1)):
        with CountWaits() as counter:
            attack(model, x, y, eps=0.1)
        assert counter.count <= waits * iterations


@pytest.mark.parametrize("name", ["GradNorm, finite difference, every 2nd step", "PGD-3"])
def test_a_step_of_the_benchmark_is_one_of_the_loop(folder, out, name, on_cpu):
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in benchmark.METHODS[name][0].items()]
    flags += ["--batch-size", "48", "--epochs", "1", "--warmup-epochs", "0", "--seed", "3"]
    run(*flags_for(folder, out), *flags)
    config = argparse.Namespace(**saved(out, "config"))
    data = train.load_dataset(config, "train")
    order = list(torch.utils.data.DistributedSampler(data, 1, 0, seed=3))
    x, y = torch.stack([data[i][0] for i in order]).float() / 255, torch.tensor([data[i][1] for i in order])
    torch.manual_seed(3)
    model = train.build_model("convnet", 3, 3)
    step = benchmark.make_step(model, train.build_optimizer(model, config), config, x, y)
    torch.manual_seed(int(np.random.SeedSequence([3, 0, 0]).generate_state(1)[0]))
    torch.empty((), dtype=torch.int64).random_()  # which the loader draws
    step(0)
    torch.testing.assert_close(model.state_dict(), saved(out), rtol=1e-4, atol=1e-6)


def test_two_runs_that_start_at_once_into_one_folder_are_stopped(folder, out, monkeypatch):
    load = train.load_data
    monkeypatch.setattr(train, "load_data", lambda *args, **kwargs: [(out / "gradients").mkdir(parents=True),
                                                                     load(*args, **kwargs)][1])
    with pytest.raises(FileExistsError):
        run(*flags_for(folder, out))


def test_erasing_gives_normal_noise_in_one_rectangle_per_image():
    image, seen, rectangles = torch.full((3, 40, 40), 115, dtype=torch.uint8), [], set()
    for _ in range(300):
        erased = train.erase(image)
        changed = (erased != image).any(0)
        if changed.any():
            rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
            assert changed.double().sum() > 0.9 * len(rows) * len(columns)  # a whole rectangle
            rectangles.add((rows.min().item(), columns.min().item(), len(rows), len(columns)))
            seen.append(erased[:, changed].flatten())
    assert 40 < len(seen) < 120 and len(rectangles) > 0.9 * len(seen)  # a quarter of the images, drawn for each
    noise = torch.cat(seen).double() / 255
    assert noise.mean().item() == pytest.approx(0.45, abs=0.01) and noise.std().item() == pytest.approx(0.22, abs=0.01)


def test_strong_augmentation_is_rand_m9_and_erasing():
    """Of a grey image, which crop and flip leave alone. Half of RandAugment's operations change it; two are drawn, and
    each is applied to every second image."""
    transform = train.train_transform(settings("--augment", "strong"), 16, None, None)
    grey = torch.full((3, 16, 16), 115)
    images = [transform(grey.byte()) for _ in range(300)]
    erased = [image for image in images if len(image.unique()) > 20]
    assert 40 < len(erased) < 120 and 80 < sum(bool((image == 115).all()) for image in images) < 150
    assert any((image == 140).all() for image in images)  # solarised, at a threshold of 25: level 9 of 10


@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_is_augmented_by_itself(channels):
    for augment in ("basic", "strong"):
        args = settings("--augment", augment)
        transform = train.train_transform(args, 16, v2.RandomCrop(16, padding=2), None)
        data = train.Images(torch.randint(256, (1, channels, 16, 16), dtype=torch.uint8).expand(32, -1, -1, -1),
                            torch.zeros(32, dtype=torch.long), ["one"], transform)
        images = torch.stack([image for image, _ in data])
        assert images.dtype == torch.uint8 and images.shape == (32, channels, 16, 16)
        assert len(images.flatten(1).unique(dim=0)) > 16


def test_held_out_subset_is_balanced_and_fixed():
    targets = torch.randint(10, (1000,)).tolist()
    subset = train.balanced_subset(targets, 50)
    assert (torch.tensor(targets)[subset].bincount(minlength=10) == 5).all() and len(subset.unique()) == 50
    assert torch.equal(subset[:20], train.balanced_subset(targets, 20))
    assert sorted(train.balanced_subset(targets, 5000).tolist()) == list(range(1000))
    few = torch.arange(1000)[train.balanced_subset(range(1000), 50)]  # of more classes than images: any of them
    assert len(few.unique()) == 50 and 300 < few.double().mean() < 700


def test_shapes_are_drawn_from_the_seed():
    images, targets, classes = train.draw_shapes(200, seed=3)
    again, _, _ = train.draw_shapes(200, seed=3)
    other, _, _ = train.draw_shapes(200, seed=4)
    assert torch.equal(images, again) and not torch.equal(images, other)
    assert images.shape == (200, 3, 32, 32) and images.dtype == torch.uint8
    assert (targets.bincount() == 20).all() and len(classes) == 10


def test_a_tenth_of_the_training_labels_of_shapes_is_random_and_all_others_are_true():
    def labels(part, *flags):
        data = train.load_dataset(settings(*flags), part)
        return torch.stack([data[i][0] for i in range(0, len(data), 7)]), torch.tensor([y for _, y in data])

    (images, drawn), (same, true) = labels("train"), labels("train", "--dataset", "shapes-clean")
    assert torch.equal(images, same) and torch.equal(drawn, labels("train")[1])
    assert torch.equal(true, train.draw_shapes(10_000, seed=0)[1])
    wrong = drawn != true
    assert 0.08 < wrong.double().mean() < 0.1  # nine of ten random labels are wrong
    assert all(0.06 < wrong[true == k].double().mean() < 0.12 and 0.06 < (drawn == k)[wrong].double().mean() < 0.14
               for k in range(10))
    assert torch.equal(labels("test")[1], train.draw_shapes(2_000, seed=1)[1])
    held, of_held = labels("test", "--val-images", "500")  # some of the training images, with their true labels
    _, of_rest = labels("train", "--val-images", "500")
    _, true_of_held = labels("test", "--val-images", "500", "--dataset", "shapes-clean")
    assert torch.equal(of_held, true_of_held) and (of_held.bincount() == 50).all()
    _, true_of_rest = labels("train", "--val-images", "500", "--dataset", "shapes-clean")
    assert len(of_rest) == 9500 and 0.08 < (of_rest != true_of_rest).double().mean() < 0.1


@pytest.mark.parametrize("name, source, shape, channels", [
    ("fashion-mnist", "FashionMNIST", (7, 28, 28), 1), ("cifar10", "CIFAR10", (7, 32, 32, 3), 3)])
def test_data_sets_of_torchvision(tmp_path, monkeypatch, name, source, shape, channels):
    pixels = torch.randint(256, shape, dtype=torch.uint8).repeat(2, *[1] * (len(shape) - 1))  # each class twice
    monkeypatch.setattr(torchvision.datasets, source, lambda root, train, download: argparse.Namespace(
        data=pixels if channels == 1 else pixels.numpy(), targets=2 * list(range(7)), classes=list("abcdefg")))
    args = settings("--dataset", name, "--val-images", "2")
    seen, held_out = (train.load_dataset(args, part) for part in ("train", "test"))
    assert len(held_out) == 2
    assert sorted([*seen.targets.tolist(), *held_out.targets.tolist()]) == sorted(2 * list(range(7)))
    for image, target in [*seen, *held_out]:
        assert torch.equal(image, pixels[target].permute(2, 0, 1) if channels == 3 else pixels[target][None])

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, source, offline)
    with pytest.raises(OSError, match="no network"):
        train.load_dataset(args, "train")


def test_imagenette_is_complete_and_decoded_a_little_larger_than_its_crops(tmp_path, monkeypatch):
    for part, name, i in itertools.product(("train", "val"), ("n01440764", "n03888257"), range(3)):
        (tmp_path / "imagenette2-160" / part / name).mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (3, 40, 60), dtype=torch.uint8)
        to_pil_image(pixels).save(tmp_path / "imagenette2-160" / part / name / f"{i}.JPEG")
    args = settings("--dataset", "imagenette", "--data-dir", str(tmp_path), "--image-size", "16", "--augment", "basic")
    with pytest.raises(ValueError, match="imagenette2-160/train has 6 images, not 9469: remove"):
        train.load_dataset(args, "train")  # half of it, as an extraction that was cut short leaves it
    monkeypatch.setattr(train, "IMAGENETTE", {"train": 6, "val": 6})
    seen, held_out = (train.load_dataset(args, part) for part in ("train", "test"))
    assert seen.images.shape == (6, 3, 18, 18) and held_out[0][0].shape == (3, 16, 16)
    assert held_out.classes == ["tench", "parachute"] and held_out.targets.tolist() == [0, 0, 0, 1, 1, 1]
    with Image.open(tmp_path / "imagenette2-160/val/n01440764/0.JPEG") as image:
        small = torch.from_numpy(np.array(image.resize((27, 18), Image.Resampling.BILINEAR))).permute(2, 0, 1)
    assert (held_out[0][0].int() - small[:, 1:17, 5:21].int()).abs().max() <= 2
    windows = {(row, column, flip): seen.images[0].flip([2] if flip else [])[:, row:row + 16, column:column + 16]
               for row, column, flip in itertools.product(range(3), range(3), (False, True))}
    crops = [seen[0][0] for _ in range(300)]
    found = {next(key for key, window in windows.items() if torch.equal(crop, window)) for crop in crops}
    assert found == set(windows)
    assert settings("--dataset", "imagenette").image_size == 64


@pytest.mark.parametrize("size, width, side", [(16, 64, 4), (28, 64, 7), (32, 64, 8), (64, 128, 8), (224, 512, 7)])
def test_convnet_halves_the_resolution_until_about_8x8(size, width, side):
    model = train.build_model("convnet", 3, 10, image_size=size)
    assert model[1].layers(torch.rand(1, 3, size, size)).shape == (1, width, side, side)


def test_validation_images_are_training_files_that_training_never_sees(folder, out, capsys):
    flags = [*flags_for(folder, out), "--val-images", "12", "--augment", "basic", "--epochs", "1"]
    args = settings(*flags)
    seen, held_out = (train.load_dataset(args, part) for part in ("train", "test"))
    files = [part.dataset.samples[i][0] for part in (seen, held_out) for i in part.indices]
    assert len(set(files)) == 48 and all("/train/" in path for path in files)
    assert held_out.targets.bincount().tolist() == [4, 4, 4]
    for part in (seen, held_out):
        assert part.targets.tolist() == [label for _, label in part]
    torch.manual_seed(0)  # held-out images are not augmented
    assert torch.equal(held_out[0][0], held_out[0][0]) and not torch.equal(seen[0][0], seen[0][0])

    run(*flags)
    assert "36 images" in capsys.readouterr().out
    with pytest.warns(match="--val-images 12"):
        run(out / "checkpoint.pt", "--attack", "clean", "--num-images", "12", script=evaluate)
    output, _ = capsys.readouterr()
    x, y = torch.stack([image for image, _ in held_out]).float() / 255, held_out.targets
    model, _ = train.load_checkpoint(out / "checkpoint.pt")
    assert f"| {100 * (model(x).argmax(1) == y).float().mean():.2f} |" in output


def test_image_folders_are_cropped_as_for_torchvisions_weights(folder, out):
    test_set = train.load_dataset(settings(*flags_for(folder, out), "--image-size", "224"), "test")
    normalise = train.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    whole = v2.functional.pil_to_tensor(test_set.loader(test_set.samples[0][0]))
    expected = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()(whole)
    one_byte = 1.01 / 255 / 0.224
    torch.testing.assert_close(normalise(test_set[0][0] / 255), expected, rtol=0, atol=one_byte)


def test_images_are_normalised_as_the_weights_expect(monkeypatch):
    monkeypatch.setattr(torchvision.models, "get_model", lambda *args, **kwargs: nn.Identity())
    for name, mean, std in (("resnet18", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
                            ("efficientnet_v2_l", [0.5, 0.5, 0.5], [0.5, 0.5, 0.5])):
        normalise = train.build_model(name, 3, 10)[0]
        torch.testing.assert_close(normalise.mean.flatten(), torch.tensor(mean))
        torch.testing.assert_close(normalise.std.flatten(), torch.tensor(std))


def test_grey_images_reach_torchvision_models():
    model = train.build_model("resnet18", 1, 10).eval()
    grey = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(model(grey), model(grey.expand(-1, 3, -1, -1)))


# Bad input


@pytest.mark.parametrize("flags, words", [
    (["--method", "magic"], ["magic", "natural", "gradnorm", "adversarial"]),
    (["--model", "resnet19"], ["resnet19"]),
    (["--eps", "four"], ["--eps", "four"]),
    (["--eps", "8"], ["--eps", "8 is not within [0, 1]", "4/255"]),
    (["--h", "2"], ["--h", "2 is not within"]),
    (["--step-size=-1/255"], ["--step-size", "-1/255 is not within"]),
    (["--data-dir", "/nonexistent/data"], ["/nonexistent/data/train"]),
    (["--model", "mobilenet_v2", "--activation", "gelu", "--image-size", "32"], ["mobilenet_v2", "--activation"]),
    (["--init", "/nonexistent/x.pt"], ["/nonexistent/x.pt"]),
    (["--init", "x", "--model", "resnet18"], ["--init", "leave out --model"]),
    (["--init", "x", "--activation", "relu"], ["--init", "--activation"]),
    (["--init", "x", "--pretrained"], ["--init", "--pretrained"]),
    (["--pretrained"], ["convnet has no ImageNet weights"]),
    (["--dataset", "imagenette", "--model", "resnet18", "--pretrained"], ["training images include the test images"]),
    (["--batch-size", "49"], ["--batch-size 49", "48 images"]),
    (["--ema-decay", "0.9998"], ["0.9998: at the end the first weights would still be 100% of the average"]),
    (["--dataset", "shapes"], ["--data-dir", "shapes are drawn"]),
    (["--init", ""], ["--init", "empty"]),  # of an unset variable
    (["--data-dir", ""], ["--data-dir", "empty"]),
    (["--output-dir", ""], ["--output-dir", "empty"]),
    *((["--" + flag, "-1"], [f"--{flag}", "-1 is less than 1"])
      for flag in ("epochs", "steps", "batch-size", "image-size", "eval-images", "gradnorm-every", "val-images",
                   "warmup-epochs", "seed", "workers")),
    (["--steps", "0"], ["0 is less than 1"]),
    (["--epochs", "1.5"], ["--epochs"]),
    (["--no-such-flag"], ["--no-such-flag"]),
])
def test_bad_input_is_told(folder, tmp_path, flags, words):
    message = mistake(*flags_for(folder, tmp_path / "run"), *flags)
    assert all(word in message for word in words), message


def test_a_run_is_never_overwritten_nor_resumed_by_another(folder, out, tmp_path, capsys, on_cpu):
    flags = [*flags_for(folder, out), "--epochs", "1"]
    run(*flags)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert "--resume" in mistake(*flags)
    other = tmp_path / "other"
    for part in ("train", "val"):
        for name in ("a", "b"):
            (other / part / name).mkdir(parents=True)
            for i in range(8):
                to_pil_image(torch.zeros(3, 20, 20, dtype=torch.uint8)).save(other / part / name / f"{i}.jpg")
    for changed in (["--method", "natural"], ["--model", "resnet18"], ["--lr", "0.5"], ["--data-dir", other]):
        assert mistake(*flags, "--resume", *changed).startswith("--resume: ")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "WORLD_SIZE", 2)
        patch.setattr(train.dist, "barrier", lambda: None)
        patch.setattr(train, "from_rank_zero", lambda read: read())
        patch.setattr(train, "DistributedDataParallel", lambda objective, device_ids: objective)
        assert "world_size is 2, it was 1" in mistake(*flags, "--resume")
    assert all(path.read_bytes() == content for path, content in before.items())
    run(*flags, "--resume")
    assert "1 of 1 epochs done" in capsys.readouterr().out


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("content", ["png", "empty", "truncated", "code"])
def test_a_file_that_is_no_whole_checkpoint_is_named_and_left_as_it_is(folder, tmp_path, content):
    path = tmp_path / "run/checkpoint.pt"
    path.parent.mkdir()
    code = Code(str(tmp_path / "run by the checkpoint"))
    torch.save({"config": code if content == "code" else torch.zeros(999)}, path)
    if content in ("empty", "truncated"):
        path.write_bytes(path.read_bytes()[:2000 if content == "truncated" else 0])
    elif content == "png":
        Image.new("RGB", (8, 8)).save(path, format="png")
    kept = path.read_bytes()
    for words in (mistake(*flags_for(folder, path.parent), "--resume"), mistake(path, script=evaluate),
                  mistake(*flags_for(folder, tmp_path / "other"), "--init", path)):
        assert words == f"{path} is no checkpoint of train.py, or no whole one"
    assert path.read_bytes() == kept and not (tmp_path / "run by the checkpoint").exists()


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small"])
def test_pretrained_weights_are_taken_but_for_a_head_of_other_classes(monkeypatch, name):
    published = torchvision.models.get_model(name)
    weights = {key: value.clone() for key, value in published.state_dict().items()}
    publish(published, monkeypatch)
    kept = train.build_model(name, 3, 1000, pretrained=True)[1]
    assert all(torch.equal(value, weights[key]) for key, value in kept.state_dict().items())
    model = train.build_model(name, 3, 7, pretrained=True).eval()
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 7)
    changed = [key for key, value in model[1].state_dict().items() if not torch.equal(value, weights[key])]
    assert len(changed) == 2  # the head's weight and bias


def test_a_vision_transformer_is_built_again_for_its_image_size(folder, tmp_path, monkeypatch):
    def small(name, **arguments):
        return torchvision.models.VisionTransformer(patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32,
                                                    **{"image_size": 224} | arguments)

    monkeypatch.setattr(torchvision.models, "get_model", small)
    run(*flags_for(folder, tmp_path / "run"), "--model", "vit_b_16", "--epochs", "1")
    model, config = train.load_checkpoint(tmp_path / "run")
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 3) and config["pixels"] == 16


def test_one_class_is_refused(folder, tmp_path):
    (tmp_path / "data/train").mkdir(parents=True)
    (tmp_path / "data/val").mkdir()
    for part in ("train", "val"):
        (tmp_path / "data" / part / "all").symlink_to(folder / part)  # a folder too high
    assert "one class, ['all']" in mistake(*flags_for(tmp_path / "data", tmp_path / "run"))


def test_train_and_val_must_have_the_same_classes(folder, tmp_path):
    bad = tmp_path / "data"
    bad.mkdir()
    (bad / "train").symlink_to(folder / "train")
    (bad / "val/blue").mkdir(parents=True)
    (bad / "val/blue/0.jpg").symlink_to(folder / "val/blue/0.jpg")
    assert "['green', 'red']" in mistake(*flags_for(bad, tmp_path / "run"))


# The claim


def test_natural_training_collapses_under_pgd_where_gradnorm_holds(tmp_path):
    """On `shapes`, at the paper's ε, in the paper's way: GradNorm starts from the naturally trained network."""
    run("--method", "natural", "--epochs", "3", "--output-dir", tmp_path / "natural")
    run("--init", tmp_path / "natural", "--epochs", "1", "--warmup-epochs", "0", "--output-dir", tmp_path / "gradnorm")
    natural, gradnorm = metrics(tmp_path / "natural")[-1], metrics(tmp_path / "gradnorm")[-1]
    assert natural["clean_accuracy"] > 90 and natural["pgd10_accuracy"] < 15
    assert gradnorm["clean_accuracy"] > 90 and gradnorm["pgd10_accuracy"] > 60


# The attacks of the evaluation


def widest(model, x, y, eps):
    """Smallest margin over the classes, (N,), that a linear model has left within ε and [0, 1]: in closed form, since
    each pixel's best move is its own."""
    weight, bias, pixels = model[1].weight, model[1].bias, x.flatten(1)[:, None]
    eps = torch.as_tensor(eps).view(-1, 1, 1)
    normal = weight[y][:, None] - weight
    worst = torch.where(normal > 0, (pixels - eps).clamp(min=0), (pixels + eps).clamp(max=1))
    margins = (normal * worst).sum(2) + bias[y][:, None] - bias
    return margins.scatter(1, y[:, None], math.inf).amin(1)


def linear_task(n=60, classes=5):
    """A linear model of 3x4x4 pixels, a fifth of them black or white, and images that it classifies well."""
    model = linear_model(classes, 48).requires_grad_(False)
    x = torch.rand(n, 3, 4, 4, dtype=torch.float64)
    x = torch.where(torch.rand_like(x) < 0.2, x.round(), x)
    return model, x, model(x).argmax(1)


RADII = [0.01, 0.03, 0.1, 0.3]


@pytest.fixture
def short_square(monkeypatch):
    """Square with 100 queries. It is tested by itself with all 5000."""
    monkeypatch.setitem(evaluate.ATTACKS, "Square", partial(evaluate.square, queries=100))


@pytest.fixture
def short_attacks(monkeypatch, short_square):
    """For what is not about their strength."""
    for name, attack in (("APGD-CE", evaluate.apgd), ("APGD-T", evaluate.apgd), ("FAB-T", evaluate.fab)):
        monkeypatch.setitem(evaluate.ATTACKS, name, partial(attack, steps=5))


@pytest.mark.parametrize("classes", [2, 3])
def test_autoattack_finds_the_exact_robustness_of_a_linear_model(classes, short_square):
    model, x, y = linear_task(classes=classes)
    for eps in RADII:
        adversarial = evaluate.autoattack(model, x, y, eps=eps)
        robust = model(adversarial).argmax(1) == y
        assert torch.equal(robust, widest(model, x, y, eps) > 0) and (adversarial[robust] == x[robust]).all()
        assert (adversarial - x).abs().max() <= eps and 0 <= adversarial.min() and adversarial.max() <= 1


class Steadfast(nn.Module):
    """Six bounded, crooked logits of 3x8x8 pixels, of which the first always wins: no attack on class 0 ever ends."""

    def __init__(self):
        super().__init__()
        self.model, self.first = smooth_model(6), 5 * F.one_hot(torch.tensor(0), 6)

    def forward(self, x):
        return 2 * torch.tanh(20 * self.model(5 * x)) + self.first


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

        noise = 2 * evaluate.uniform(torch.tensor([i]), (3, 8, 8))[0].double() - 1
        w, xs = [0, 22, 41, 57, 70, 80, 87, 93, 99], [projected(x[i] + eps * noise / noise.abs().max())]
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
    assert evaluate.apgd_checkpoints(1) == [1] and evaluate.apgd_checkpoints(10) == [2, 3, 4, 5, 6, 7, 8, 9, 10]


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
    towards = normal.sign() * height.sign().view(-1, 1, 1, 1)
    room = torch.where(towards > 0, 1 - x, x)

    def reach(size):
        return (normal.abs() * torch.minimum(room, size.view(-1, 1, 1, 1))).sum((1, 2, 3))

    low, high = torch.zeros_like(height), torch.ones_like(height)
    feasible = reach(high) > height.abs()
    for _ in range(60):
        middle = (low + high) / 2
        enough = reach(middle) >= height.abs()
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    torch.testing.assert_close(d.abs().amax((1, 2, 3))[feasible], high[feasible], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close((normal * d).sum((1, 2, 3))[feasible], height[feasible], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(d[~feasible], (towards * room)[~feasible])  # no such point: as far as the box goes
    assert 20 < (~feasible).sum() < 200


def test_fab_finds_the_distance_to_the_boundary():
    model, x, y = linear_task(n=40, classes=2)
    found = evaluate.fab(model, x, y, eps=0, target=1 - y)
    radius = evaluate.proved_radius(model, x, y, found)
    low, high = torch.zeros(40, dtype=torch.float64), torch.ones(40, dtype=torch.float64)
    for _ in range(40):
        middle = (low + high) / 2
        held = widest(model, x, y, middle) > 0
        low, high = torch.where(held, middle, low), torch.where(held, high, middle)
    reachable = high < 1
    assert reachable.sum() > 20 and (radius >= high)[reachable].all()
    torch.testing.assert_close(radius[reachable], high[reachable], rtol=1e-2, atol=0)
    assert radius[~reachable].isinf().all()


def test_fab_is_algorithm_1_of_its_paper_and_returns_the_closest_that_it_met(monkeypatch):
    smooth, x, _ = task()
    model = Layer(lambda x: 20 * smooth(x) + (20 * smooth(x)) ** 3)  # so bent that α reaches its cap
    y = model(x).argmax(1)
    predict, seen, target, capped = evaluate.predict, [], model(x).argsort(dim=1)[:, -2], 0
    monkeypatch.setattr(evaluate, "predict", lambda model, x, size: (seen.append(x), predict(model, x, size))[1])
    found = evaluate.fab(model, x, y, eps=0, target=target)
    assert len(seen) == 100
    start = x
    for moved in seen[:20]:
        start = start.detach().requires_grad_()
        gap = model(start).gather(1, torch.stack([target, y], 1)) @ torch.tensor([1.0, -1.0]).to(x)
        normal, = torch.autograd.grad(gap.sum(), start)
        d = evaluate.project(start, normal, -gap)
        d_original = evaluate.project(x, normal, (normal * (start - x)).flatten(1).sum(1) - gap)
        near, far = (v.abs().amax((1, 2, 3), keepdim=True) for v in (d, d_original))
        capped += ((near < far) & (near / (near + far) > 0.11)).sum()
        alpha = (near / (near + far)).clamp(max=0.1)
        torch.testing.assert_close(
            moved, ((1 - alpha) * (start + 1.05 * d) + alpha * (x + 1.05 * d_original)).clamp(0, 1))
        crossed = (model(moved).argmax(1) != y)[:, None, None, None]
        start = torch.where(crossed, x + 0.9 * (moved - x), moved)
    assert capped > 0
    radii = torch.stack([evaluate.proved_radius(model, x, y, images) for images in list(seen)])
    torch.testing.assert_close(evaluate.proved_radius(model, x, y, found), radii.amin(0))
    assert (radii[-1] > 1.001 * radii.amin(0)).any()  # which is not the last


@pytest.mark.parametrize("eps", [0.01, 0.05])
def test_square_is_the_published_random_search(eps):
    """Its queries of one image against the same random numbers taken one by one: a square of the published side, each
    channel of it at a wall of the ball, stays where it lowers the margin."""
    x, _ = batch(1, size=16)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    y, seen = model(x).argmax(1), []
    hook = model.register_forward_hook(lambda model, inputs, output: seen.append(inputs[0][0].clone()))
    found = evaluate.square(model, x, y, eps=eps, seeds=torch.tensor([4]))
    hook.remove()
    (lowest,), (highest,) = evaluate.ball(x, eps)

    def margin(image):
        z = model(image[None])[0]
        return (z[y] - z[[c for c in range(3) if c != y]].max()).item()

    numbers = evaluate.uniform(torch.tensor([4]), (3 * 16 + 5000 * 5,))[0].double()
    best = torch.where(numbers[:48].view(3, 1, 16) < 0.5, highest, lowest)  # vertical stripes
    asked, least, sides, accepted = [best], margin(best), set(), 0
    for query, (row, column, *signs) in enumerate(numbers[48:].view(5000, 5).tolist()):
        if least < 0:
            break
        halvings = sum(query > k for k in (10, 50, 200, 500, 1000, 2000, 4000))
        side = max(round((0.8 / 2**halvings * 256) ** 0.5), 1)
        top, left = int(row * (17 - side)), int(column * (17 - side))
        proposal = best.clone()
        for channel, sign in enumerate(signs):
            area = (channel, slice(top, top + side), slice(left, left + side))
            proposal[area] = (highest if sign < 0.5 else lowest)[area]
        asked.append(proposal)
        sides.add(side)
        if margin(proposal) < least:
            best, least, accepted = proposal, margin(proposal), accepted + 1
    assert len(seen) == len(asked) and all(map(torch.equal, seen, asked)) and accepted > 5
    assert (least < 0) == (eps > 0.01) and torch.equal(found[0], best if least < 0 else x[0])
    assert least < 0 or sides == {14, 10, 7, 5, 4, 3, 2, 1}


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


def evaluated(stages, model, x, y, **arguments):
    """The radii and the images after some stages."""
    logits, images = model(x), x
    radius = evaluate.first_radius(logits, y)
    for stage in stages:
        radius, images = evaluate.run_stage(stage, model, x, y, evaluate.likeliest_others(logits), radius, images,
                                            **arguments)
    return radius, images


def test_stages_are_those_of_standard_autoattack():
    model, x, y = linear_task(classes=12)
    targets = evaluate.likeliest_others(model(x))
    assert torch.equal(targets, model(x).sort(dim=1, descending=True).indices[:, 1:10])  # nine of eleven
    nine = range(9)
    assert evaluate.standard_stages([0.2, 0, 0.1], 9) == [
        ("APGD-CE", 0.1, 0), ("APGD-CE", 0.2, 0),
        *(("APGD-T", 0.1, i) for i in nine), *(("APGD-T", 0.2, i) for i in nine), *(("FAB-T", 0.1, i) for i in nine),
        ("Square", 0.1, 0), ("Square", 0.2, 0)]
    assert evaluate.pgd_stages([0.2, 0, 0.1], 2) == [("PGD", 0.1, 0), ("PGD", 0.1, 1), ("PGD", 0.2, 0), ("PGD", 0.2, 1)]


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_targeted_dlr_is_its_formula(classes):
    z, y = torch.randn(20, classes, dtype=torch.float64), torch.randint(classes, (20,))
    target, i, (z1, _, *others) = (y + 1) % classes, torch.arange(20), z.sort(dim=1, descending=True).values.T
    scale = z1 - sum(others[:2]) / len(others[:2]) if others else 1
    torch.testing.assert_close(evaluate.targeted_dlr(z, y, target), (z[i, target] - z[i, y]) / scale)


def test_one_run_of_fab_serves_larger_radii():
    model, x, y = linear_task(classes=2)
    radius, images = evaluated([("FAB-T", 1e-4, 0)], model, x, y)
    found = radius.isfinite()
    assert found.sum() > 20 and (radius[found] > 1e-4).all()
    torch.testing.assert_close(evaluate.linf(images, x)[found], radius[found])


def test_an_images_verdict_does_not_depend_on_its_batch(short_square):
    model, x, y = task()
    for stages in ([("PGD", 0.02, 3)], [("APGD-CE", 0.02, 0)],
                   [("APGD-T", 0.02, 1), ("FAB-T", 0.01, 0), ("Square", 0.01, 0)]):
        radius, images = evaluated(stages, model, x, y)
        some_radius, some_images = evaluated(stages, model, x[:20], y[:20], batch_size=1)
        assert 0 < radius[:20].isfinite().sum()
        torch.testing.assert_close(some_radius, radius[:20])
        torch.testing.assert_close(some_images, images[:20])
        torch.testing.assert_close(evaluate.proved_radius(model, x, y, images), radius)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, eps", [("natural-0", 2 / 255), ("gradnorm-0", 8 / 255)])
def test_verdicts_are_those_of_torchattacks(name, eps):
    """Where it is installed; takes a minute."""
    torchattacks = pytest.importorskip("torchattacks")
    model, config = train.load_checkpoint(HERE / "results/shapes" / name)
    images, y = train.evaluation_images(train.load_evaluation_set(config), 24)
    theirs = torchattacks.AutoAttack(model, eps=eps, n_classes=10, version="standard", seed=0)
    ours, theirs = (model(attacked).argmax(1) == y for attacked in (
        evaluate.autoattack(model, images / 255, y, eps=eps), theirs(images / 255, y)))
    assert torch.equal(ours, theirs) and 0 < ours.sum() < 24


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


def test_pgd_makes_its_steps_and_starts_anew_for_each_restart(monkeypatch):
    (model, x, y), seen = task(), []
    monkeypatch.setitem(evaluate.ATTACKS, "PGD", lambda model, x, y, **arguments: seen.append(arguments) or x)
    evaluate.pgd_accuracy(model, x, y, eps=0.1, steps=7, restarts=2)
    assert [arguments["steps"] for arguments in seen] == [7, 7]
    assert len(torch.cat([arguments["seeds"] for arguments in seen]).unique(dim=0)) == 2 * len(x)


def test_a_tie_goes_to_the_lowest_class_everywhere(short_square):
    """As argmax has it. With more than 16 classes argsort has it otherwise."""
    model = Layer(lambda x: (40 * x.flatten(1)).clamp(max=2)).eval()
    x = 0.03 + 0.3 * torch.rand(50, 1, 4, 5)
    y = model(x).argmax(1)
    assert (evaluate.likeliest_others(model(x)) != y[:, None]).all()
    with pytest.warns(UserWarning, match="images is zero"):
        adversarial = evaluate.autoattack(model, x, y, eps=0.1)
        assert evaluate.pgd_accuracy(model, x, y, eps=0) == 100
    assert 0.3 < (model(adversarial).argmax(1) != y).double().mean() < 0.6


def test_square_takes_a_tie_that_argmax_gives_away():
    def logits(x):  # rounded: class 1 wins, or ties with class 0
        v = (x.mean((1, 2, 3)) > 0.5).to(x)
        return torch.stack([0 * v, v, v - 1, v - 2], 1)

    x, y = 0.53 + 0.1 * torch.rand(16, 1, 8, 8), torch.ones(16, dtype=torch.long)
    found = evaluate.square(logits, x, y, eps=0.2, seeds=torch.arange(16))
    assert (evaluate.proved_radius(logits, x, y, found) <= 0.2).all()


def test_fallen_images_are_attacked_no_more():
    """The passes through the model: all images at the start, and of those that fall at once no more than a few."""
    (model, x, y), seen = linear_task(classes=2), []
    model.register_forward_hook(lambda model, inputs, output: seen.append(len(inputs[0])))
    assert (evaluate.autoattack(model, x, y, eps=0.9) != x).flatten(1).any(1).all()
    assert sum(seen) <= 7 * len(x)


def test_signs_of_untrustworthy_robustness_are_told(short_attacks):
    _, x, y = linear_task(classes=12)
    model = linear_model(12, 48)
    flat = nn.Sequential(nn.Flatten(), nn.Threshold(1e9, 1.0), nn.Linear(48, 12)).double()

    class Nan(nn.Module):
        def forward(self, x):
            return model(x) * torch.where(x[:, :1, 0, 0] < x[0, 0, 0, 0], math.nan, 1.0)

    evaluate.pgd_accuracy(model, x, y, eps=0.01)  # and nothing is told
    evaluate.autoattack(model, x, y, eps=0.01)
    for doubtful, words in (
            (copy.deepcopy(model).train(), "train mode"),
            (nn.Sequential(model, Layer(lambda z: z + torch.rand_like(z))), "twice"),
            (nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False).double(), model), "mixes the images"),
            (nn.Sequential(model, nn.Softmax(1)), "probabilities"),
            (nn.Sequential(model, nn.Sigmoid()), "probabilities"), (flat, f"{len(x)} of {len(x)} images is zero"),
            (nn.Sequential(Layer(lambda x: torch.where(x > 0.1, x.sqrt(), x)), model), "images is zero or nan"),
            (Nan(), "logits are nan on .* of 60 images")):
        for attack in (evaluate.autoattack, evaluate.pgd_accuracy):
            doubtful.train(words == "train mode")
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                attack(doubtful, x, y, eps=0.01)
            assert any(re.search(words, str(warning.message)) for warning in told), words
    nan = Nan()(x).isnan().any(1).double().mean().item()
    assert 0 < nan < 1
    with pytest.warns(UserWarning):  # argmax would call it class 0
        accuracy = evaluate.pgd_accuracy(Nan().eval(), x, Nan()(x).argmax(1), eps=0)
    assert accuracy == pytest.approx(100 * (1 - nan))


def test_each_model_of_a_loop_is_doubted(recwarn):
    """Python's own filter shows a warning once per line."""
    warnings.simplefilter("default")
    _, x, y = linear_task()
    for _ in range(3):
        evaluate.pgd_accuracy(nn.Sequential(linear_model(5, 48), nn.Softmax(1)).eval(), x, y, eps=0.01)
    assert [str(warning.message)[:43] for warning in recwarn] == 3 * ["the model's outputs look like probabilities"]


def result(path, name):
    return json.loads((path / name).read_text())


@pytest.fixture(scope="session")
def gallery(folder, tmp_path_factory):
    """Runs of the three methods, side by side, with the results that the pictures need."""
    root = tmp_path_factory.mktemp("gallery")
    for method in ("natural", "gradnorm", "adversarial"):
        run(*flags_for(folder, root / method), "--method", method, "--lr", "0.01", "--epochs", "3")
        for flags in (["--sweep", "4", "--steps", "2"], ["--eps", "8/255"], ["--eps", "16/255"]):
            run(root / method / "checkpoint.pt", *flags, "--num-images", "12", script=evaluate)
    return root


@pytest.fixture
def checkpoint(gallery, tmp_path):
    """A checkpoint of three classes, half-way robust at 40/255, in a folder of its own, beside which results go."""
    (tmp_path / "run").mkdir()
    return Path(shutil.copy(gallery / "gradnorm/checkpoint.pt", tmp_path / "run"))


def rewrite(path, to=None, bias=0.0, **config):
    """Save a checkpoint with other settings, and with `bias` added to those of its last layer."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    checkpoint["config"] |= config
    checkpoint["model"]["1.head.bias"] += torch.tensor(bias)
    torch.save(checkpoint, to or path)


def test_evaluate_prints_a_table_and_writes_json(checkpoint, capsys):
    torch.set_float32_matmul_precision("medium")
    run(checkpoint, "--eps", "0", "48/255", "1", "--num-images", "12", script=evaluate)
    assert torch.get_float32_matmul_precision() == "highest"  # rounding decides no verdict
    header, rule, row = capsys.readouterr().out.splitlines()
    clean, zero, some, all_of_it = map(float, row.split("|")[2:-1])
    assert clean == zero > some > all_of_it
    assert header.count("|") == rule.count("|") == row.count("|") == 6 and "PGD-10, 12 images" in header
    written = result(checkpoint.parent, "pgd10-12-eps0-48-255.json")
    assert [clean, zero, some, all_of_it] == pytest.approx(
        [written["clean_accuracy"], *written["robust_accuracy"]], abs=0.01)
    assert written["config"]["method"] == "gradnorm" and written["radii"] == [0, 48 / 255, 1]
    for standing, robust in zip(written["standing"], written["robust_accuracy"]):
        assert len(standing) == 12 and {*standing} <= {*"01"}
        assert 100 * standing.count("1") / 12 == pytest.approx(robust)
    run(checkpoint.parent, "--attack", "clean", "--num-images", "12", script=evaluate)  # of a folder: checkpoint.pt
    assert result(checkpoint.parent, "clean-12.json")["clean_accuracy"] == written["clean_accuracy"]
    capsys.readouterr()
    run(checkpoint, "--sweep", "2", "--steps", "5", "--restarts", "2", "--num-images", "12", script=evaluate)
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + 1 + 3 and [row.split()[1] for row in rows[3:]] == [f"eps={k}/255" for k in range(3)]
    assert result(checkpoint.parent, "pgd5x2-12-sweep2.json")["radii"] == [0, 1 / 255, 2 / 255]
    assert len(list(checkpoint.parent.iterdir())) == 4  # with the checkpoint


def test_seeds_of_one_setting_have_a_row_of_mean_and_standard_deviation(checkpoint, folder, tmp_path, capsys):
    paths = [checkpoint.parent / f"{name}.pt" for name in ("fast-0", "fast-1", "slow-0")]
    for path, seed, lr in zip(paths, (0, 1, 0), (0.01, 0.01, 0.001)):
        rewrite(checkpoint, path, bias=[0.0, -1000.0 * seed, 0.0], seed=seed, lr=lr, output_dir=path.stem)
    run(*paths, "--eps", "48/255", "--num-images", "12", script=evaluate)
    rows = [row.strip("| ").split(" | ") for row in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == [*map(str, paths), f"{checkpoint.parent}/fast-*, 2 seeds"]
    run(checkpoint, shutil.copy(checkpoint, checkpoint.with_name("best.pt")), "--num-images", "12", script=evaluate)
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2  # two checkpoints of one run are not two seeds
    torch.save(torch.load(paths[0], weights_only=True) | {"epoch": 1}, paths[0])
    with pytest.warns(UserWarning, match="fast-0.pt: trained for 1 of 3 epochs"):
        run(*paths[:2], "--num-images", "12", script=evaluate)
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2  # nor are two lengths
    high, low = (result(checkpoint.parent, f"fast-{seed}-pgd10-12-eps48.json")["clean_accuracy"] for seed in (0, 1))
    shutil.copytree(folder, tmp_path / "other")
    shutil.copy(tmp_path / "other/val/red/0.jpg", tmp_path / "other/val/red/1.jpg")
    rewrite(paths[1], data_dir=str(tmp_path / "other"))
    torch.save(torch.load(paths[0], weights_only=True) | {"epoch": 3}, paths[0])
    capsys.readouterr()
    run(*paths[:2], "--eps", "1/255", "--num-images", "12", script=evaluate)
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2  # nor are two sets of images
    assert high > low and rows[3][1] == f"{(high + low) / 2:.2f} ± {(high - low) / 2 ** 0.5:.2f}"


def stages_of(*flags, limit=None):
    """The stages, PGD's with --steps, that an evaluation runs to their end. The one after `limit` of them is
    interrupted at its end."""
    run_stage, stages = evaluate.run_stage, []

    def noted(stage, *args, **kwargs):
        result = run_stage(stage, *args, **kwargs)
        if len(stages) == limit:
            raise KeyboardInterrupt
        stages.append((*stage, kwargs.get("steps")))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "run_stage", noted)
        try:
            run(*flags, script=evaluate)
        except KeyboardInterrupt:
            assert len(stages) == limit
    return stages


def test_interrupted_evaluation_goes_on_and_a_finished_one_is_not_repeated(checkpoint, short_attacks, capsys):
    rewrite(checkpoint, checkpoint.with_name("a.pt"), seed=5)
    flags = [checkpoint, "--attack", "autoattack", "--eps", "40/255", "--num-images", "6"]
    path = checkpoint.with_name("autoattack-6-eps40.json")
    stages, undisturbed, table = stages_of(*flags), result(path.parent, path.name), capsys.readouterr().out
    assert len(stages) == 6 and stages_of(*flags) == []
    said, again = capsys.readouterr().out.split("\n", 1)
    assert again == table and "autoattack-6-eps40.json" in said and "remove it" in said
    assert result(path.parent, path.name) == undisturbed
    assert len(stages_of(checkpoint.with_name("a.pt"), *flags)) == 6  # of a alone
    path.unlink()
    assert stages_of(*flags, limit=4) == stages[:4] and "robust_accuracy" not in result(path.parent, path.name)
    left = path.read_bytes()
    path.with_suffix(".json.1.tmp").write_bytes(left[:50])  # as a kill leaves it
    assert stages_of(*flags, "--steps", "3") == stages[4:]  # which AutoAttack has not
    assert result(path.parent, path.name) == undisturbed

    rewrite(checkpoint, seed=1)
    path.write_bytes(left)  # of another checkpoint now
    assert stages_of(*flags) == stages
    assert result(path.parent, path.name)["after"] == undisturbed["after"]
    assert stages_of(checkpoint, "--eps", "40/255", "--steps", "3", "--num-images", "6") == [("PGD", 40 / 255, 0, 3)]


def test_a_folder_that_cannot_be_written_to_is_told_before_the_first_attack(checkpoint, monkeypatch):
    def refused(path, value):
        raise PermissionError(path)

    monkeypatch.setattr(evaluate, "write_json", refused)
    monkeypatch.setattr(evaluate, "run_stage", None)
    assert "pgd10-12-eps1-2-4.json" in mistake(checkpoint, "--num-images", "12", script=evaluate)


def test_two_processes_go_on_as_one(checkpoint, capsys):
    rewrite(checkpoint, val_images=12, images=36)
    flags = [checkpoint, "--eps", "48/255", "56/255", "1", "--restarts", "2", "--num-images", "12"]
    path = checkpoint.with_name("pgd10x2-12-eps48-56-255.json")
    warnings.simplefilter("ignore")  # the images are not test images
    assert len(stages_of(*flags)) == 6
    one, table = result(path.parent, path.name), capsys.readouterr().out
    assert one["clean_accuracy"] > one["robust_accuracy"][0] > one["robust_accuracy"][1]
    path.unlink()
    stages_of(*flags, limit=1)
    two = start(*flags, launcher=TORCHRUN, script="evaluate.py")
    output, errors = two.communicate(timeout=120)
    assert two.returncode == 0 and output == table, errors
    assert result(path.parent, path.name) == one
    assert errors.count("not on test images") == 1  # rank 0 alone speaks


def test_square_breaking_what_the_gradient_could_not_is_told(checkpoint, short_attacks, recwarn, monkeypatch):
    class Steps(nn.Sequential):  # its gradient is zero, and random search alone breaks it
        def forward(self, x):
            return super().forward((x * 8).round() / 8)

    model, config = train.load_checkpoint(checkpoint)
    monkeypatch.setattr(train, "load_checkpoint", lambda path, device: (Steps(model).eval().to(device), config))
    run(checkpoint, "--attack", "autoattack", "--eps", "64/255", "--num-images", "12", script=evaluate)
    written = result(checkpoint.parent, "autoattack-12-eps64.json")["warnings"]
    assert [str(warning.message) for warning in recwarn] == [f"{checkpoint}: {line}" for line in written]
    assert "input gradient of 12 of 12 images is zero" in written[0] and len(written) == 2
    assert "Square, which follows no gradient, broke" in written[1]


def test_bad_input_of_the_evaluation_is_told(checkpoint, folder, tmp_path):
    (tmp_path / "renamed/val").mkdir(parents=True)
    for name in ("blue", "green", "yellow"):
        (tmp_path / "renamed/val" / name).symlink_to(folder / "val/red")
    for flags, words in [
        ([tmp_path / "none.pt"], "none.pt"), ([], "CHECKPOINT"), ([checkpoint, "--eps", "4/x"], "4/x"),
        ([checkpoint, "--eps", "2", "--num-images", "12"], "eps"), ([checkpoint, "--num-images", "13"], "12 images"),
        ([checkpoint, "--eps", "4/255", "--sweep", "2"], "not allowed with"), ([checkpoint, "--data-dir", ""], "empty"),
        *(([checkpoint, flag, "-1"], f"{flag}: -1") for flag in ("--num-images", "--sweep", "--steps", "--restarts")),
        ([checkpoint, "--num-images", "12", "--data-dir", tmp_path / "renamed"], "yellow"),
        ([checkpoint, "--num-images", "12", "--data-dir", "/nonexistent"], "/nonexistent/val"),
    ]:
        assert words in mistake(*flags, script=evaluate)
        assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint.pt"]


def test_a_result_is_of_the_images_that_it_names(checkpoint, folder, tmp_path):
    """Test images are replaced; training images are added, so that other images would be held out."""
    run(checkpoint, "--num-images", "12", script=evaluate)
    before = result(checkpoint.parent, "pgd10-12-eps1-2-4.json")
    shutil.copytree(folder, tmp_path / "grown")
    shutil.copy(tmp_path / "grown/val/red/0.jpg", tmp_path / "grown/val/red/1.jpg")
    flags = [checkpoint, "--num-images", "12", "--data-dir", tmp_path / "grown"]
    assert "is of other images: move it away" in mistake(*flags, script=evaluate)
    assert result(checkpoint.parent, "pgd10-12-eps1-2-4.json") == before
    rewrite(checkpoint, val_images=12, images=36)
    shutil.copy(tmp_path / "grown/val/red/0.jpg", tmp_path / "grown/train/red/new.jpg")
    assert "training images have changed" in mistake(*flags, script=evaluate)


def test_each_checkpoint_meets_its_own_images(checkpoint, tmp_path, capsys):
    rewrite(checkpoint, checkpoint.with_name("held.pt"), val_images=12, images=36)
    paths = [checkpoint, shutil.copy(checkpoint, checkpoint.with_suffix(".bak")), checkpoint.with_name("held.pt")]
    with pytest.warns(UserWarning, match="--val-images 12 held out, not on test images"):
        run(*paths, "--num-images", "12", script=evaluate)
    first, backup, second = (result(checkpoint.parent, f"{stem}pgd10-12-eps1-2-4.json")
                             for stem in ("", "checkpoint.bak-", "held-"))
    assert first["checkpoint"] == str(checkpoint) and backup["checkpoint"].endswith(".bak")
    assert first["images_sha256"] != second["images_sha256"] and first["warnings"] == []


@pytest.mark.parametrize("path", sorted(HERE.glob("results/*/*/checkpoint.pt")),
                         ids=lambda path: f"{path.parent.parent.name}-{path.parent.name}")
def test_published_checkpoints_are_those_of_the_results_beside_them(path):
    published = visualize.load_run(path)
    assert len(published.results) == len([*path.parent.glob("*.json")]) > 0 and published.metrics
    model, config = train.load_checkpoint(path)
    if config["dataset"].startswith("shapes"):
        images, labels = train.evaluation_images(train.load_evaluation_set(config), 1000)
        clean = 100 * (model(images / 255).argmax(1) == labels).double().mean().item()
        assert clean == pytest.approx(published.results[0]["clean_accuracy"], abs=0.2)
    assert "--resume" in mistake("--output-dir", path.parent)


def test_published_tables_are_those_of_the_json(monkeypatch, capsys):
    pictures = []
    monkeypatch.setattr(visualize, "save", lambda figure, path: pictures.append(path.name))
    tables.main()
    published = (HERE / "results/README.md").read_text().splitlines()
    printed = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line]
    for name, *cells in printed:
        found = [row for row in published if row.startswith(f"| {name}") and all(f" {c} " in row for c in cells)]
        assert found or name == "---", (name, cells)
    assert len(printed) > 30 and pictures == ["how_far.png"]
    ours, theirs = np.array([[100, 0, 100, 100], [100, 0, 0, 100]]), np.array([[0, 0, 100, 100], [0, 0, 100, 100]])
    assert tables.mean(ours) == "62.5 ± 17.7"  # seeds of 75 and 50
    assert tables.difference(ours, theirs) == "+12.5 (31.5)"  # images of 100, 0, -50 and 0


# The pictures


@pytest.fixture
def runs(gallery, tmp_path):
    """A copy of them."""
    shutil.copytree(gallery, tmp_path / "runs")
    return [tmp_path / "runs" / method for method in ("natural", "gradnorm", "adversarial")]


def drawable(paths):
    return visualize.tell_apart([visualize.load_run(path) for path in paths])


def curves(figure):
    """label -> (x, y) of each line, as it is drawn."""
    return {(line.get_label(), line.get_linestyle(), line.get_color()): (line.get_xdata(), line.get_ydata())
            for ax in figure.axes for line in ax.get_lines()}


def rows(figure, count):
    """Each of the rows of a captioned grid: its title, its images (N, C, H, W), and its captions."""
    width = len(figure.axes) // count
    for i in range(count):
        axes = figure.axes[i * width:(i + 1) * width]
        images = [torch.as_tensor(np.array(ax.get_images()[0].get_array())).permute(2, 0, 1) for ax in axes]
        yield axes[0].get_ylabel(), torch.stack(images), [ax.get_xlabel() for ax in axes]


def classified_rightly(loaded):
    """The models of the runs, and the first three held-out images that all of them classify rightly, with labels."""
    data = train.load_dataset(argparse.Namespace(**loaded[0].config), "test")
    images, labels = train.evaluation_images(data, 12)
    models = [train.load_checkpoint(run.path / "checkpoint.pt")[0] for run in loaded]
    right = [i for i in range(12) if all(m(images[i:i + 1] / 255).argmax() == labels[i] for m in models)][:3]
    return models, images[right] / 255, labels[right]


def test_gradients_shows_the_input_gradient_of_each_model(runs):
    rewrite(runs[2] / "checkpoint.pt", bias=[0.0, -1000.0, 0.0])  # green is not classified rightly
    loaded = drawable(runs)
    models, x, labels = classified_rightly(loaded)
    assert sorted(labels.tolist()) in ([0, 0, 2], [0, 2, 2])
    every, of_every = train.evaluation_images(train.load_evaluation_set(loaded[0].config), 12)
    (title, images, captions), *shown = rows(visualize.gradients(loaded, count=3), 4)
    assert title == "image" and torch.equal(images, x) and captions == [["blue", "green", "red"][i] for i in labels]
    for (title, tiles, _), each, model in zip(shown, loaded, models, strict=True):
        norm = input_gradient(model, every / 255, of_every).abs().sum() / 12
        assert title == f"{each.style['label']}\nmean norm {norm:.3g}"
        for tile, image, label in zip(tiles, x, labels):
            g = input_gradient(model, image[None], label[None])[0]
            q = torch.tensor(sorted(g.abs().flatten().tolist())).quantile(0.99)
            torch.testing.assert_close(tile, (0.5 + 0.5 * g / q).clamp(0, 1))
    grey = visualize.gradient_tiles(torch.stack([torch.zeros(1, 4, 4), torch.arange(16.0).view(1, 4, 4) - 8]))
    assert (grey[0] == 0.5).all() and grey[1].min() == 0 and grey[1].flatten()[8] == 0.5
    (_, images, _), = rows(visualize.captioned_grid([grey], ["a"], [["b", "c"]]), 1)
    assert torch.equal(images, grey.expand(2, 3, 4, 4))


def test_attack_shows_pgd_and_what_the_models_say(runs):
    loaded = drawable(runs[:2])
    models, x, labels = classified_rightly(loaded)
    names, fooled = ["blue", "green", "red"], 0
    for each, k in zip(loaded, (16, 64)):
        each.config["eps"] = k / 255
    (_, images, above), *shown = rows(visualize.attack(loaded, count=3), 5)
    odds = [model(x).softmax(1).max(1).values for model in models]
    assert torch.equal(images, x)
    assert above == [f"{names[i]}\nnatural: {a:.0%}\ndouble backprop: {b:.0%}" for i, a, b in zip(labels, *odds)]
    for model, each, k, changes, sums in zip(models, loaded, (16, 64), shown[::2], shown[1::2], strict=True):
        eps = k / 255
        torch.manual_seed(0)
        attacked = pgd_attack(model, x, labels, eps=eps, steps=20)
        torch.testing.assert_close(sums[1], attacked, rtol=0, atol=1e-6)
        change = (2 * changes[1] - 1) * eps
        torch.testing.assert_close(change, attacked - x, rtol=0, atol=1e-6)
        assert 0.9 * eps < change.abs().max() < eps + 1e-6
        assert changes[0] == f"{each.style['label']}:\n{255 / 2 / k:.0f} × the change"
        assert sums[0] == f"{each.style['label']},\nattacked: ε = {k}/255"
        odds = model(sums[1]).exp() / model(sums[1]).exp().sum(1, keepdim=True)
        assert sums[2] == [f"{'✗✓'[int(row.argmax() == i)]} {names[row.argmax()]}: {row.max():.0%}"
                           for row, i in zip(odds, labels)] and changes[2] == [""] * 3
        fooled += (model(attacked).argmax(1) != labels).sum()
    assert fooled > 0


def test_loss_is_that_of_images_moved_along_the_sign_of_its_gradient(runs, monkeypatch):
    loaded = drawable(runs[:2])
    for each in loaded:
        each.config["eps"] = 32 / 255
    images, labels = train.evaluation_images(train.load_evaluation_set(loaded[0].config), 12)
    images[:, :, :8], images[:, :, 12:] = 0, 255  # at the walls
    monkeypatch.setattr(train, "evaluation_images", lambda *_: (images, labels))
    drawn = list(curves(visualize.loss(loaded, count=12)).items())
    for each, lines in zip(loaded, (drawn[:3], drawn[3:6])):
        (curve, tangent, star), model = lines, train.load_checkpoint(each.path)[0].double()
        assert [key[1] for key, _ in lines[:2]] == ["-", ":"] and {key[2] for key, _ in lines} == {curve[0][2]}
        x = images.double() / 255
        x.requires_grad_()
        F.cross_entropy(model(x), labels, reduction="sum").backward()
        for t, of_curve, of_tangent in zip(curve[1][0], curve[1][1], tangent[1][1], strict=True):
            moved = F.cross_entropy(model((x + t / 255 * x.grad.sign()).clamp(0, 1)), labels).item()
            assert of_curve == pytest.approx(moved, abs=1e-5)
            free = ((x > 0) | (x.grad > 0)) & ((x < 1) | (x.grad < 0))  # at a wall a pixel cannot move outwards
            linear = F.cross_entropy(model(x), labels).item() + t / 255 * (x.grad.abs() * free).sum().item() / 12
            assert of_tangent == pytest.approx(linear, abs=1e-5)
        assert curve[1][0][0] == 0 and curve[1][0][-1] == pytest.approx(64) and curve[1][0][8] == pytest.approx(32)
        assert star[1][0] == [pytest.approx(32)] and curve[1][1][0] < star[1][1][0]


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
                label = each.style["label"] if style == "-" else "_"
                x, y = drawn[label, style, each.style["color"]]
                assert list(x) == [1, 2, 3] and list(y) == [line[name] for line in metrics(path)]
    assert len({each.style["color"] for each in loaded}) == 3


def test_each_eps_has_a_result_of_its_own_and_older_names_are_found(runs):
    for i, path in enumerate(runs):  # every accuracy becomes a number that tells its run, its file and its ε
        for name, value in ("pgd10-12-eps8.json", 0), ("pgd10-12-eps16.json", 10), ("pgd2-12-sweep4.json", 20):
            written = result(path, name)
            written["robust_accuracy"] = [30 * i + value + 255 * eps for eps in written["radii"]]
            (path / name).write_text(json.dumps(written))

    def cost(k):
        loaded = drawable(runs)
        loaded[0].config["eps"] = k / 255
        figure = visualize.cost(loaded)
        points = {label: (x, y) for (label, *_), ((x,), (y,)) in curves(figure).items()}
        minutes = [sum(line["seconds"] for line in metrics(path)) / 60 for path in runs]
        assert [points[each.style["label"]][0] for each in loaded] == minutes
        return figure.axes[0].get_ylabel(), *(points[each.style["label"]][1] for each in loaded)

    def check():
        assert cost(8) == ("PGD-10 accuracy (%), ε = 8/255", 8, 38, 68)
        assert cost(16) == ("PGD-10 accuracy (%), ε = 16/255", 26, 56, 86)
        assert cost(4) == ("PGD-2 accuracy (%), ε = 4/255", 24, 54, 84)
        *swept, (training, _) = curves(visualize.sweep(drawable(runs))).values()
        for i, (x, y) in enumerate(swept):
            assert list(x) == [0, 1, 2, 3, 4] and list(y) == [30 * i + 20 + k for k in x]
        assert len(swept) == 3 and list(training) == [8, 8]

    check()
    for path in runs:
        (path / "pgd10-12-eps8.json").rename(path / "pgd10-12.json")
        (path / "pgd2-12-sweep4.json").rename(path / "pgd2-sweep-12.json")
    check()
    larger = result(runs[0], "pgd10-12-eps16.json") | {"num_images": 500, "robust_accuracy": [99.0]}
    (runs[0] / "pgd10-500-eps16.json").write_text(json.dumps(larger))  # which the others lack
    for path in runs:  # AutoAttack counts once all have it
        check()
        written = result(path, "pgd10-12-eps16.json") | {"attack": "autoattack", "restarts": 2}
        (path / "autoattack-12-eps16.json").write_text(json.dumps(written))
    assert cost(16)[0] == "AutoAttack accuracy (%), ε = 16/255"
    (path / "autoattack-12-eps16.json").write_text(json.dumps(written | {"images_sha256": "of others"}))
    assert cost(16)[0] == "PGD-10 accuracy (%), ε = 16/255"


def test_results_of_another_checkpoint_are_left_out(runs):
    shutil.copy(runs[1] / "checkpoint.pt", runs[0] / "best.pt")
    best = visualize.load_run(runs[0] / "best.pt")
    assert best.results == [] and best.config["method"] == "gradnorm" and best.checkpoint.name == "best.pt"
    (model,), *_ = visualize.models_and_images([best], 1)
    torch.testing.assert_close(model.state_dict(), saved(runs[1]), rtol=0, atol=0)
    assert len(visualize.load_run(runs[0]).results) == 3
    run(runs[0] / "best.pt", "--eps", "8/255", "--num-images", "12", script=evaluate)
    assert "PGD-10" in visualize.cost(drawable([runs[0] / "best.pt", runs[1]])).axes[0].get_ylabel()
    assert [run.style["label"] for run in drawable([runs[0] / "best.pt", runs[1]])] == ["natural/best.pt", "gradnorm"]
    with pytest.raises(FileNotFoundError, match="bset.pt"):
        visualize.load_run(runs[0] / "bset.pt")


def test_legends_say_what_differs_and_what_is_unfinished(runs):
    """Of runs of different methods: ε and the number of epochs, but for natural training."""
    rewrite(runs[1] / "checkpoint.pt", epochs=5)
    rewrite(runs[2] / "checkpoint.pt", eps=16 / 255)
    labels = [run.style["label"].replace("\n", " ") for run in drawable(runs)]
    assert labels == ["natural", "double backprop, eps 8/255, epochs 5, 3 of 5 epochs",
                      "PGD-3, eps 16/255, epochs 3"]
    shutil.copytree(runs[1], runs[1].with_name("difference"))
    rewrite(runs[1] / "checkpoint.pt", epochs=3, lambda_gn=1.2)
    rewrite(runs[1].with_name("difference") / "checkpoint.pt", epochs=3, lambda_gn=0.9, h=2 / 255)
    labels = [run.style["label"].replace("\n", " ") for run in drawable([runs[1], runs[1].with_name("difference")])]
    assert labels == ["double backprop, lambda-gn 1.2", "finite difference, lambda-gn 0.9"]


def test_strips_are_the_kept_gradients(runs):
    figure = visualize.epochs(drawable(runs[:1]))
    strip = torch.from_numpy(figure.axes[0].get_images()[0].get_array().data)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["image", "1", "2", "3"]
    child, parent = drawable(runs[:1]), {"epochs": 30, "parent": {"epochs": 5, "epoch": 2}}
    child[0].config["parent"] = parent  # --init of a run that itself began from one of two epochs
    continued = visualize.epochs(child)
    assert [label.get_text() for label in continued.axes[0].get_xticklabels()] == ["image", "33", "34", "35"]
    assert list(continued.axes[1].get_lines()[0].get_xdata()) == [33, 34, 35]
    tiles = [strip[1:17, 1 + 17 * i:17 + 17 * i].permute(2, 0, 1) for i in range(4)]
    for epoch in (1, 2, 3):
        kept = torch.load(runs[0] / f"gradients/{epoch:04d}.pt", weights_only=True)
        expected = visualize.gradient_tiles(kept["gradients"].float()[:1])[0].double()
        torch.testing.assert_close(tiles[epoch], expected, check_dtype=False)
        torch.testing.assert_close(tiles[0], kept["images"][0] / 255, check_dtype=False)


def test_all_draws_what_it_can_and_says_what_it_cannot(runs, tmp_path, capsys):
    run("all", tmp_path / "runs", script=visualize)
    output = capsys.readouterr().out
    for name in ("gradients", "epochs", "accuracy", "sweep", "loss", "cost", "attack"):
        with Image.open(tmp_path / f"runs/{name}.png") as picture:
            assert picture.format == "PNG" and min(picture.size) > 300
        assert f"{name}.png" in output
    (runs[0] / "pgd2-12-sweep4.json").unlink()
    for path in runs:
        (path / "checkpoint.pt").unlink()
    run("all", tmp_path / "runs", "--output", tmp_path / "kept", script=visualize)
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"epochs.png", "accuracy.png", "cost.png"}
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no ")]
    for line, name, words in zip(said, ("gradients", "sweep", "loss", "attack"),
                                 ("No such file", "sweep", "No such file", "No such file"), strict=True):
        assert line.startswith(f"no {name}.png of ") and words in line


def test_runs_of_one_method_are_told_apart_whatever_their_names(runs, tmp_path):
    names = ["_first", "$", "$$$"]  # matplotlib hides the first and parses the others
    copies = [Path(shutil.copytree(runs[1], tmp_path / "odd" / name)) for name in names]
    figure = visualize.accuracy(drawable(copies))
    visualize.save(figure, tmp_path / "odd.png")
    legend, = figure.legends
    assert {text.get_text().strip() for text in legend.get_texts()} >= {*names}
    for path in copies[:2]:
        rewrite(path / "checkpoint.pt", classes=["$", "$$", "$$$"])
    folder = tmp_path / "classes"
    for part, (name, source) in itertools.product(("train", "val"), zip(("$", "$$", "$$$"), ("blue", "green", "red"))):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / name).symlink_to(Path(visualize.load_run(copies[2]).config["data_dir"]) / part / source)
    run("gradients", *copies[:2], "--data-dir", folder, "--output", tmp_path / "classes.png", script=visualize)
    shutil.copytree(runs[1], tmp_path / "more/gradnorm")
    several = drawable([runs[1], tmp_path / "more/gradnorm", runs[0]])
    assert several[2].style["label"] == "natural"
    first, second, _ = (run.style for run in several)
    assert first["marker"] != second["marker"] and first["color"] != second["color"]
    assert [run.style["label"] for run in several[:2]] == ["runs/gradnorm", "more/gradnorm"]
    for changes, names in ((({}, {"gradnorm_every": 2}), ("gradnorm-every 1", "gradnorm-every 2")),
                           (({"h": 0.5 / 255}, {"h": 2 / 255}), ("h 0.5/255", "h 2/255")),
                           (({}, {"seed": 1, "lambda_gn": 0.9}), ("lambda-gn 1.2, seed 0", "lambda-gn 0.9, seed 1")),
                           (({}, {"parent": {"method": "natural"}}), ("from scratch", "from natural"))):
        method = "finite difference" if "h" in changes[0] else "double backprop"
        for path, change in zip((runs[1], tmp_path / "more/gradnorm"), changes):
            same = {"gradnorm_every": 1, "h": None, "seed": 0, "lambda_gn": 1.2, "parent": None}
            rewrite(path / "checkpoint.pt", **same | change)
        several = drawable([runs[1], tmp_path / "more/gradnorm"])
        assert [run.style["label"].replace("\n", " ") for run in several] == [f"{method}, {name}" for name in names]


def test_each_method_has_its_own_colour_and_no_caption_overlaps_another(runs, tmp_path):
    colours = ["blue", "green", "red"]
    longest = {name: f"{name}, a class whose name is long enough to run into its neighbours" for name in colours}
    for part, name in itertools.product(("train", "val"), longest):
        (tmp_path / part).mkdir(exist_ok=True)
        (tmp_path / part / longest[name]).symlink_to(Path(visualize.load_run(runs[0]).config["data_dir"]) / part / name)
    forms = {"natural": (0, {}), "double backprop": (1, {}), "finite difference": (1, {"h": 2 / 255}),
             "PGD-3": (2, {"steps": 3}), "single-step": (2, {"steps": 1})}
    for name, (i, change) in forms.items():
        shutil.copytree(runs[i], tmp_path / name)
        rewrite(tmp_path / name / "checkpoint.pt", classes=[*longest.values()], data_dir=str(tmp_path), **change)
    loaded = drawable([tmp_path / name for name in forms])
    assert [run.style["label"] for run in loaded] == [*forms] and len({run.style["color"] for run in loaded}) == 5
    for draw, count in (visualize.attack, 11), (visualize.gradients, 6):
        figure = draw(loaded, count=3)
        figure.draw_without_rendering()
        texts = [text for ax in figure.axes for text in (ax.xaxis.label, ax.yaxis.label) if text.get_text()]
        boxes = [text.get_window_extent() for text in texts] + [ax.get_window_extent() for ax in figure.axes]
        overlapping = [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]
        assert len(figure.axes) == 3 * count and len(texts) >= 3 + count and not overlapping


def test_pictures_of_what_is_not_there_are_told(runs, tmp_path, capsys):
    shutil.rmtree(runs[0] / "gradients")
    (runs[0] / "pgd10-12-eps8.json").unlink()
    for path, bias in (runs[0], [-1000.0, -1000.0, 0.0]), (runs[1], [0.0, 0.0, -1000.0]):
        rewrite(path / "checkpoint.pt", bias=bias)
    shutil.copytree(runs[2], tmp_path / "more/run")
    for name, change in (("strange", {"val_images": 12}), ("fewer", {"eval_images": 6}), ("large", {"image_size": 32})):
        shutil.copytree(runs[2], tmp_path / name)
        rewrite(tmp_path / name / "checkpoint.pt", **change)
    for flags, words in [
        (["accuracy", tmp_path / "none"], "none"), (["epochs", runs[0]], "gradients/0001.pt"),
        (["cost", runs[0]], "with eps 8/255"), (["portrait", runs[0]], "portrait"),
        (["gradients", *runs], "no image is classified rightly"), (["attack", *runs], "no image is classified rightly"),
        (["gradients", runs[2], tmp_path / "strange"], "differ in val_images"),
        (["accuracy", runs[2], tmp_path / "fewer"], "differ in eval_images"),
        (["accuracy", runs[2], tmp_path / "large"], "differ in image_size"),
        (["epochs", runs[2], tmp_path / "fewer"], "differ in eval_images"),
        (["all", tmp_path / "runs", tmp_path / "more", "--output", tmp_path], "take each other's place"),
        (["all", runs[1] / "gradients"], "no runs in"),
    ]:
        assert words in mistake(*flags, script=visualize)
    assert not [*tmp_path.rglob("*.png")]
    written = result(runs[2], "pgd10-12-eps8.json")
    (runs[2] / "pgd10-12-eps8.json").write_text(json.dumps(written | {"sha256": "of an earlier epoch"}))
    (runs[2] / "checkpoint.pt").unlink()
    assert "are of different checkpoints" in mistake("cost", runs[2], script=visualize)
    (runs[1] / "checkpoint.pt").write_bytes(b"half a file")
    run("all", tmp_path / "runs", script=visualize)
    assert f"{runs[1]} is left out: " in capsys.readouterr().out and (tmp_path / "runs/accuracy.png").exists()


def test_the_readmes_script_is_the_method(capsys):
    """At two thirds of its length."""
    script, *_ = readme_python()
    exercises = " ".join((HERE / "results/exercises.md").read_text().split())
    changes = re.findall("change `(.*?)` to `", exercises)
    assert len(changes) == 3 and all(change in script for change in changes)
    names = {}
    exec(script.replace("eps, epochs = 4 / 255, 3", "eps, epochs = 4 / 255, 2"), names)
    assert names["epochs"] == 2
    (natural, attacked), (clean, robust) = (map(float, re.findall(r"([\d.]+)%", line))
                                            for line in capsys.readouterr().out.splitlines())
    assert min(natural, clean) > 80 and robust > attacked + 10
    model, x, y = names["model"], names["test_images"][:8] / 255, names["test_labels"][:8]
    losses, gradient = names["losses_and_gradient"](model, x, y)
    loss = 0.8 * losses.mean() + 1.2 * 4 / 255 * gradient.abs().flatten(1).sum(1).mean()
    torch.testing.assert_close(loss, gradnorm_loss(model, x, y))


def readme_python():
    return re.findall("```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)


def test_the_readmes_python_runs(gallery, short_attacks, tmp_path, monkeypatch):
    """Block after block but for the script, with a stand-in for torchattacks."""
    class PGD:
        def __init__(self, model, eps, alpha, steps):
            self.attack = partial(pgd_attack, model, eps=eps, step_size=alpha, steps=steps)

        def __call__(self, x, y):
            return self.attack(x, y)

    monkeypatch.setitem(sys.modules, "torchattacks", argparse.Namespace(PGD=PGD))
    (tmp_path / "runs").symlink_to(gallery)
    monkeypatch.chdir(tmp_path)
    model, _ = train.load_checkpoint("runs/natural/checkpoint.pt")
    names = {"model": model, "x": (x := torch.rand(3, 3, 16, 16)), "y": torch.arange(3)}
    _, *blocks = readme_python()
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
        assert (names["adversarial"] - x).abs().max() <= 8.001 / 255
    assert 0 <= names["accuracy"] <= 100
