"""Gradient-norm regularisation ("GradNorm"), its finite difference, and the PGD attack.

    L_GradNorm(x, y) = λ_CE · L(x, y) + λ_GN · (ε/σ) · ‖∇x L(x, y)‖₁,     L = cross-entropy

Source: Rodríguez-Muñoz, Wang, Torralba, "Characterizing Model Robustness via Natural Input Gradients",
ECCV 2024, arXiv 2409.20139.

Since ‖∇x L‖₁ = max over ‖δ‖∞ ≤ 1 of δᵀ∇x L, the sum L(x) + ε‖∇x L‖₁ is the first-order Taylor expansion of
the adversarial loss L(x + ε · sign ∇x L): with λ_CE = λ_GN, GradNorm is adversarial training of the linearised loss.

This file needs only torch and can be copied into any project. Everywhere, `x` holds images (N, C, H, W), and `y` their
class indices (N,) or class probabilities (N, classes), as mixup makes them. Both are detached first: no gradient flows
back to what has produced them. `model` is an `nn.Module` from images to logits (N, classes). For mixed precision, call
a loss under `torch.autocast` with bfloat16; in float16 the small gradients of pixels would be lost.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def gradnorm_loss(model, x, y, *, lambda_ce=0.8, lambda_gn=1.2, eps=4 / 255, sigma=1.0):
    """L_GradNorm by double backprop: exact, at the cost of differentiating the backward pass.

    The default λ_CE, λ_GN and ε are those of the paper. `eps` is in pixels of [0, 1]. `sigma` is the divisor of the
    input's normalisation in pixels of [0, 1], a number or one per channel: 1 if `x` holds pixels, the paper's 0.224 if
    `x` is already (pixels - mean) / 0.224. By the chain rule ∇pixel = ∇x / σ, so both give the same penalty. (If `x` is
    normalised and `sigma` is forgotten, no error says so.)

    A BatchNorm in train mode mixes the examples of a batch: the norm is then that of the gradient of the *summed*
    loss with respect to each image, the other examples' losses included. The paper keeps BatchNorm in eval mode
    throughout.

    Returns a scalar to call `.backward()` on. Raises ValueError if `x` is not (N, C, H, W) or `eps` not in [0, 1].
    """
    check(x, eps=eps)
    with sdpa_kernel(SDPBackend.MATH):  # flash attention has no double backward; the plain formula has
        losses, gradient = losses_and_gradients(model, x, y, create_graph=True)
    norms = (gradient / per_channel(sigma, x)).abs().flatten(1).sum(1)  # ‖∇x L‖₁ of each example, over (C, H, W)
    return lambda_ce * losses.mean() + lambda_gn * eps * norms.mean()


def gradnorm_loss_finite_difference(model, x, y, *, lambda_ce=0.8, lambda_gn=1.2, eps=4 / 255, sigma=1.0, h=None):
    """L_GradNorm by a finite difference along s = sign ∇x L, held constant: no double backward.

        ‖∇x L‖₁ = sᵀ∇x L ≈ (L(x + h · s) - L(x)) / h

    `h` is in pixels, by default ε/2; the other arguments and the returned value are those of `gradnorm_loss`. As h → 0
    it becomes `gradnorm_loss`; at h = ε with λ_CE = λ_GN only L(x + ε · s) is left, FGSM adversarial training. In
    general it is (λ_CE - w) · L(x) + w · L(x + h · s) with w = λ_GN · ε/h: by default -1.6 · L(x) + 2.4 · L(x + h · s).
    x + h · s is not clipped to [0, 1]. A small h drowns in rounding: in float32 below 1e-6, in bfloat16 below ε/16.

    Only `model.parameters()` get a gradient; hooks on their gradients, and modules' backward hooks, run twice. Dropout
    must be off: it would draw another network at x + h · s. The result cannot be differentiated twice.
    """
    h = eps / 2 if h is None else h
    check(x, eps=eps, h=h)
    # One forward and one backward pass at x give ∇x L and also the gradient of L(x) with respect to the parameters,
    # which `KnownGradient` keeps for .backward(). All that remains is a second forward and backward pass, at x + h · s.
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses, gradient, *parameter_gradients = losses_and_gradients(model, x, y, parameters)
    loss_at_x = KnownGradient.apply(losses.detach().sum(), parameter_gradients, *parameters) / len(x)
    displacement = h / per_channel(sigma, x) * gradient.sign()
    loss_moved = F.cross_entropy(model(x.detach() + displacement), y.detach(), reduction="none").mean()
    return lambda_ce * loss_at_x + lambda_gn * eps * (loss_moved - loss_at_x) / h


class KnownGradient(torch.autograd.Function):
    """A number whose gradients with respect to `parameters` are already known: its backward does not go through the
    model again. `upstream` is the derivative of the final loss with respect to this number."""

    @staticmethod
    def forward(ctx, value, gradients, *parameters):
        ctx.save_for_backward(*gradients)  # and not on ctx, where they would outlive the backward pass
        return value.clone()

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():  # only under create_graph=True, and the kept gradients have no graph
            raise RuntimeError("the finite difference cannot be differentiated twice: take gradnorm_loss")
        return None, None, *(None if g is None else upstream * g for g in ctx.saved_tensors)


def pgd_attack(model, x, y, *, eps=4 / 255, step_size=None, steps=10, random_start=True, start=None):
    """L∞ projected gradient ascent on the loss (Madry et al., "Towards Deep Learning Models Resistant to
    Adversarial Attacks", ICLR 2018).

    `x` holds pixels in [0, 1]; `eps` and `step_size` are in pixels. `step_size` is by default 2.5 · ε / steps, which is
    the paper's validation attack (PGD-10, ε = 4/255, step 1/255). The first point is drawn uniformly from the ball, or
    it is `x` without `random_start`, or `start`, images (N, C, H, W). The model is attacked in the mode that it is in;
    a BatchNorm in train mode therefore updates its statistics. Parameters' `.grad` stay untouched.

    Returns adversarial images (N, C, H, W) within [0, 1] and, up to rounding, within ε of `x`, detached. Raises
    ValueError if `x`, `eps` or `step_size` is not in [0, 1].
    """
    check(x, eps=eps, step_size=step_size or 0.0)
    check_pixels(x)
    step_size = 2.5 * eps / max(steps, 1) if step_size is None else step_size
    x = x.detach().clamp(0, 1)
    lowest, highest = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    if start is None:
        start = x + torch.empty_like(x).uniform_(-eps, eps) if random_start else x
    adversarial = start.detach().clamp(lowest, highest)
    for _ in range(steps):
        gradient = input_gradient(model, adversarial, y)
        sign = gradient.sign() + 0 * gradient  # of nan it is nan: a step of 0 would look like robustness
        adversarial = (adversarial + step_size * sign).clamp(lowest, highest)
    return adversarial


def input_gradient(model, x, y):
    """∇x of each example's own loss, (N, C, H, W), detached. The parameters' `.grad` stay untouched."""
    return losses_and_gradients(model, x, y)[1]


def losses_and_gradients(model, x, y, parameters=(), create_graph=False):
    """The losses (N,), the gradient of each with respect to its own image (N, C, H, W), and then, for each of the
    `parameters`, the gradient of the sum of the losses, or None. Only `create_graph` gives the gradients a graph.

    The sum makes row i of ∇x the gradient of example i's own loss; a mean would divide it by N.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = model(x)
        if logits.ndim != 2 or logits.shape[1] < 2:  # the loss of one class is 0, that of a map has another mean
            raise ValueError(f"the model must return logits (N, classes), not {tuple(logits.shape)}")
        losses = F.cross_entropy(logits, y.detach(), reduction="none")
        with torch.autocast(x.device.type, enabled=False):  # it would cast the operations of the backward pass again
            gradient, *others = torch.autograd.grad(losses.sum(), [x, *parameters], create_graph=create_graph,
                                                    allow_unused=True)
    # Both would look like robustness, if taken for a gradient of zero:
    if gradient is None:
        raise ValueError("the logits have no gradient with respect to x: the model must not detach it")
    if logits.dtype == torch.float16:
        raise ValueError("float16 loses the gradients of pixels: take bfloat16 or float32")
    return losses, gradient, *others


def per_channel(sigma, x):
    """`sigma`, a number or one per channel, in a shape that divides images (N, C, H, W)."""
    if isinstance(sigma, (int, float)):  # as a tensor it would be copied to the GPU, for which the CPU waits
        return sigma
    return torch.as_tensor(sigma, dtype=x.dtype, device=x.device).view(-1, 1, 1).expand(x.shape[1], 1, 1)


# Checks of mistakes that are easily made and would give a wrong number in silence


def check(x, **in_pixels):
    if x.ndim != 4 or x.dtype not in (torch.float32, torch.float64):  # in bfloat16 x + δ would be rounded
        raise ValueError(f"x must be float32 images (N, C, H, W), not {x.dtype} {tuple(x.shape)}")
    for name, value in in_pixels.items():
        if not 0 <= value <= 1:  # 8/255 was meant, not 8
            raise ValueError(f"{name} is in pixels of [0, 1], such as 4/255, not {value}")


def check_pixels(x):
    if not (x.min() >= -1e-6 and x.max() <= 1 + 1e-6):  # more than the rounding of a resized image; or nan
        raise ValueError(f"x must hold pixels in [0, 1], not from {x.min():.3g} to {x.max():.3g}: put the "
                         "normalisation into the model")
