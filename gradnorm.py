"""Gradient-norm regularisation ("GradNorm"), its finite-difference twin, and the PGD attack.

    L_GradNorm(x, y) = λ_CE · L(x, y) + λ_GN · (ε/σ) · ‖∇x L(x, y)‖₁,     L = cross-entropy

Source: Rodríguez-Muñoz, Wang, Torralba, "Characterizing Robustness via Natural Input Gradients",
ECCV 2024, arXiv 2409.20139.

Since ‖∇x L‖₁ = max over ‖δ‖∞ ≤ 1 of δᵀ∇x L, the sum L(x) + ε‖∇x L‖₁ is the first-order Taylor expansion of
the adversarial loss L(x + ε · sign ∇x L): GradNorm is adversarial training of the linearised loss.

This file needs torch alone and can be copied into any project. Everywhere, `x` holds images (N, C, H, W), and
`y` their targets: class indices (N,) or class probabilities (N, classes), as mixup makes them. `model` is an
`nn.Module` from images to logits (N, classes). Wrong input raises ValueError; its values are not looked at
inside torch.compile.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad_and_value
from torch.nn.attention import SDPBackend, sdpa_kernel


def gradnorm_loss(model, x, y, *, lambda_ce=0.8, lambda_gn=1.2, eps=4 / 255, sigma=1.0, grad_scale=1.0,
                  return_terms=False):
    """L_GradNorm by double backprop: exact, at the cost of differentiating the backward pass.

    The default λ_CE, λ_GN and ε are those of the paper. `eps` is in pixels of [0, 1]. `sigma` is the divisor of
    the input's normalisation: 1 if `x` holds pixels, the paper's 0.224 if `x` is already (pixels - mean) / 0.224.
    By the chain rule ∇pixel = ∇x / σ, so both give the same penalty.

    A BatchNorm in train mode mixes the examples of a batch: the norm is then that of the gradient of the *summed*
    loss with respect to each image, the other examples' losses included. The paper keeps BatchNorm in eval mode
    throughout.

    Under fp16 autocast the inner gradient needs loss scaling of its own: pass GradScaler's scale divided by N as
    `grad_scale`. It leaves the value as it is; where fp16 overflows, the gradients turn nan, so that GradScaler
    skips the step.

    Returns a scalar to call `.backward()` on; with `return_terms` also its two detached terms, mean L and mean
    (ε/σ)‖∇x L‖₁.
    """
    _check(x, eps)
    losses, gradient = _losses_and_gradients(model, x, y, grad_scale, create_graph=True)
    cross_entropy = losses.mean()
    # ‖·‖₁ is taken per example, over (C, H, W) of the gradient of that example's own loss; then the batch's mean.
    penalty = eps / sigma * gradient.abs().flatten(1).sum(1).mean()
    # |inf| has the finite derivative ±1, which would hide an overflow from GradScaler: inf · (1 + 0 · inf) is nan.
    penalty = penalty * (1 + 0 * penalty.detach())
    loss = lambda_ce * cross_entropy + lambda_gn * penalty
    return (loss, cross_entropy.detach(), penalty.detach()) if return_terms else loss


def gradnorm_loss_finite_difference(model, x, y, *, lambda_ce=0.8, lambda_gn=1.2, eps=4 / 255, sigma=1.0, h=None,
                                    grad_scale=1.0, return_terms=False):
    """L_GradNorm by a finite difference along s = sign ∇x L, held constant: no double backward.

        ‖∇x L‖₁ = sᵀ∇x L ≈ (L(x + h · s) - L(x)) / h

    `h` is in units of `x`. It is a dial between GradNorm (h → 0) and FGSM adversarial training (h = ε/σ); the default
    is half of ε/σ. In bfloat16 a small h drowns in rounding, one near ε does not. Works where no double backward
    exists (flash attention, activation checkpointing), in the memory of natural training, for the time of two
    forward-backward passes. The other arguments and the returned value are those of `gradnorm_loss`.
    """
    _check(x, eps)
    h = eps / sigma / 2 if h is None else h
    if h <= 0:
        raise ValueError(f"h must be positive, not {h}: pass a fraction of eps, such as h=2/255")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # One backward pass at x serves both the direction s (∇x) and the first half of the loss's gradient (∇θ) ...
    losses, gradient, *parameter_gradients = _losses_and_gradients(model, x, y, grad_scale, parameters)
    # ... which joins autograd as the linear function of θ that has this gradient, and the value 0.
    linear = sum((p * g).sum() for p, g in zip(parameters.values(), parameter_gradients)) / len(x)
    cross_entropy = losses.detach().mean() + (linear - linear.detach())
    moved = _cross_entropies(model, x.detach() + h * gradient.sign(), y).mean()
    penalty = eps / sigma * (moved - cross_entropy) / h
    loss = lambda_ce * cross_entropy + lambda_gn * penalty
    return (loss, cross_entropy.detach(), penalty.detach()) if return_terms else loss


def input_gradient(model, x, y):
    """∇x of each example's own loss, (N, C, H, W), detached; `model` and its parameters' `.grad` stay untouched."""
    _check(x)
    return _losses_and_gradients(model, x, y)[1]


def pgd_attack(model, x, y, *, eps=4 / 255, step_size=None, steps=10, random_start=True, start=None, grad_scale=1.0):
    """L∞ projected gradient ascent on the loss (Madry et al., "Towards Deep Learning Models Resistant to
    Adversarial Attacks", ICLR 2018).

    `x` holds pixels in [0, 1]; `eps` and `step_size` are in pixels. `step_size` is by default 2.5 · ε / steps, which is
    the paper's validation attack (PGD-10, ε = 4/255, step 1/255). The first point is drawn uniformly from the ball, or
    it is `x` without `random_start`, or `start`, images (N, C, H, W). The model is attacked in the mode that it is in;
    a BatchNorm in train mode therefore updates its statistics. Parameters' `.grad` stay untouched. `grad_scale` is
    that of `gradnorm_loss`.

    Returns adversarial images (N, C, H, W) within ε of `x` and within [0, 1], detached.
    """
    _check(x, eps)
    if not torch.compiler.is_compiling() and x.numel() and (x.min() < 0 or x.max() > 1):
        raise ValueError(f"x must hold pixels in [0, 1], not [{x.min():.3g}, {x.max():.3g}]: "
                         "put the normalisation into the model")
    if steps < 0:
        raise ValueError(f"steps must not be negative, not {steps}")
    step_size = 2.5 * eps / max(steps, 1) if step_size is None else step_size
    x = x.detach()
    lowest, highest = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    if start is None:
        start = x + torch.empty_like(x).uniform_(-eps, eps) if random_start else x
    adversarial = start.detach().clamp(lowest, highest)
    for _ in range(steps):
        _, gradient = _losses_and_gradients(model, adversarial, y, grad_scale)
        adversarial = (adversarial + step_size * gradient.sign()).clamp(lowest, highest)
    return adversarial


def _losses_and_gradients(model, x, y, grad_scale=1.0, parameters=None, create_graph=False):
    """Losses (N,), the gradient of each with respect to its own image (N, C, H, W), and, of their sum, the gradient
    with respect to each of the named `parameters`.

    The sum makes row i of ∇x the gradient of example i's own loss; a mean would divide it by N. The gradients carry a
    graph only with `create_graph`. Without `parameters`, only the passes that ∇x needs are run.
    """
    parameters = parameters or {}
    # Flash attention has no double backward; the plain formula has.
    with sdpa_kernel(SDPBackend.MATH) if create_graph else contextlib.nullcontext():
        if torch.compiler.is_compiling():  # traces torch.func into the forward graph, not autograd.grad
            def total(x, parameters):
                losses = _cross_entropies(lambda x: functional_call(model, parameters, (x,)), x, y)
                return losses.sum() * grad_scale, losses

            (gradient, named), (_, losses) = grad_and_value(total, argnums=(0, 1), has_aux=True)(x.detach(), parameters)
            gradients = [gradient, *named.values()]
            if not create_graph:
                gradients = [g.detach() for g in gradients]
        else:  # torch.func refuses BatchNorm in train mode
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                losses = _cross_entropies(model, x, y)
                with torch.autocast(x.device.type, enabled=False):  # backward ops choose their own precision
                    gradients = torch.autograd.grad(losses.sum() * grad_scale, [x, *parameters.values()],
                                                    create_graph=create_graph, materialize_grads=True)
    return losses, *(g / grad_scale for g in gradients)


def _cross_entropies(model, x, y):
    """Cross-entropy of each example, (N,), in at least float32."""
    logits = model(x)
    if y.is_floating_point():
        if y.shape != logits.shape:
            raise ValueError(f"y must have shape {tuple(logits.shape)} for class probabilities, not {tuple(y.shape)}")
        wrong = (y < 0) | ((y.sum(1, keepdim=True) - 1).abs() > 1e-3)
    else:
        if y.shape != logits.shape[:1]:
            raise ValueError(f"y must have shape {tuple(logits.shape[:1])} for class indices, not {tuple(y.shape)}")
        wrong = (y < 0) | (y >= logits.shape[1])
    if not torch.compiler.is_compiling() and wrong.any():
        raise ValueError(f"y must hold class indices from 0 to {logits.shape[1] - 1} or class probabilities that sum "
                         f"to 1, not {y[wrong][0].item()}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, y, reduction="none")


def _check(x, eps=0.0):
    if not x.is_floating_point():
        raise ValueError(f"x must be a float tensor, not {x.dtype}: convert it with x.float() / 255")
    if eps < 0:
        raise ValueError(f"eps must not be negative, not {eps}")
