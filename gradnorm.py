"""Gradient-norm regularisation ("GradNorm"), its finite-difference twin, and the PGD attack.

    L_GradNorm(x, y) = λ_CE · L(x, y) + λ_GN · (ε/σ) · ‖∇x L(x, y)‖₁,     L = cross-entropy

Source: Rodríguez-Muñoz, Wang, Torralba, "Characterizing Robustness via Natural Input Gradients",
ECCV 2024, arXiv 2409.20139.

Since ‖∇x L‖₁ = max over ‖δ‖∞ ≤ 1 of δᵀ∇x L, the sum L(x) + ε‖∇x L‖₁ is the first-order Taylor expansion of
the adversarial loss L(x + ε · sign ∇x L): GradNorm is adversarial training of the linearised loss.

This file needs torch alone and can be copied into any project. Everywhere, `x` holds images (N, C, H, W), and
`y` their targets: class indices (N,) or class probabilities (N, classes), as mixup makes them. `model` is an
`nn.Module` from images to logits (N, classes). Wrong input raises ValueError; inside torch.compile its values are
not looked at, nor is a model noticed that has no gradient with respect to x.
"""

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad_and_value
from torch.nn.attention import SDPBackend, sdpa_kernel

# To look at the values of x and y makes a GPU wait. A training loop that knows its data may set this to False.
CHECK_VALUES = True

# In fp16 the gradient of a pixel, often below 6e-8, would underflow: it is computed this much larger.
FP16_SCALE = 2.0**8


def gradnorm_loss(model, x, y, *, lambda_ce=0.8, lambda_gn=1.2, eps=4 / 255, sigma=1.0):
    """L_GradNorm by double backprop: exact, at the cost of differentiating the backward pass.

    The default λ_CE, λ_GN and ε are those of the paper. `eps` is in pixels of [0, 1]. `sigma` is the divisor of
    the input's normalisation, a number or one per channel: 1 if `x` holds pixels, the paper's 0.224 if `x` is
    already (pixels - mean) / 0.224. By the chain rule ∇pixel = ∇x / σ, so both give the same penalty.

    A BatchNorm in train mode mixes the examples of a batch: the norm is then that of the gradient of the *summed*
    loss with respect to each image, the other examples' losses included. The paper keeps BatchNorm in eval mode
    throughout.

    Returns a scalar to call `.backward()` on.
    """
    check_images(x, eps)
    with sdpa_kernel(SDPBackend.MATH):  # flash attention has no double backward; the plain formula has
        losses, gradient = _losses_and_gradients(model, x, y, create_graph=True)
    # ‖·‖₁ is taken per example, over (C, H, W) of the gradient of that example's own loss; then the batch's mean.
    penalty = eps * (gradient / _per_channel(sigma, x)).abs().flatten(1).sum(1).mean()
    # |inf| has the finite derivative ±1, which would hide an overflow of fp16 from GradScaler: inf · (1 + 0 · inf)
    # is nan.
    penalty = penalty * (1 + 0 * penalty.detach())
    return lambda_ce * losses.mean() + lambda_gn * penalty


def gradnorm_loss_finite_difference(model, x, y, *, lambda_ce=0.8, lambda_gn=1.2, eps=4 / 255, sigma=1.0, h=None):
    """L_GradNorm by a finite difference along s = sign ∇x L, held constant: no double backward.

        ‖∇x L‖₁ = sᵀ∇x L ≈ (L(x + h · s) - L(x)) / h

    `h` is in pixels, by default ε/2. The loss is a weighted sum of two cross-entropies,

        (λ_CE - λ_GN·ε/h) · L(x) + (λ_GN·ε/h) · L(x + h · s),

    with the default λ and h: -1.6 · L(x) + 2.4 · L(x + h · s). As h → 0 it becomes `gradnorm_loss`; at h = ε with
    λ_CE = λ_GN the first weight is 0, and what is left is FGSM adversarial training. A small h drowns in rounding: in
    float32 below 1e-6, in bfloat16 below ε/16. It works where no double backward exists, in the memory of natural
    training, for the time of two forward-backward passes. Weights must be among `model.parameters()`. The other
    arguments and the returned value are those of `gradnorm_loss`.
    """
    check_images(x, eps)
    h = eps / 2 if h is None else h
    if h <= 0:
        raise ValueError(f"h must be positive, not {h}: pass a fraction of eps, such as h=2/255")
    # The first pass, 3F (F = the time of a forward pass): L(x), and one backward pass for both ∇x L, whose sign is s,
    # and g = ∇θ Σ L, by the weights θ.
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses, gradient, *gs = _losses_and_gradients(model, x, y, parameters)
    # The second pass, 3F: L(x + h·s), and the caller's `.backward()` through it.
    moved = (x.detach() + h / _per_channel(sigma, x) * _sign(gradient)).to(x.dtype)
    moved_loss = _cross_entropies(model, moved, y, check=False).mean()
    # `.backward()` needs ∇θ of the mean L(x) as well. To go back through the first pass again would cost 2F; but that
    # gradient is known: g / N. So L(x) is replaced by the linear function of θ with its value and its gradient.
    linear = sum(((p * g).sum() for p, g in zip(parameters.values(), gs)), torch.zeros_like(moved_loss)) / len(x)
    loss = losses.detach().mean() + (linear - linear.detach())
    return lambda_ce * loss + lambda_gn * eps * (moved_loss - loss) / h


def input_gradient(model, x, y):
    """∇x of each example's own loss, (N, C, H, W), detached. The parameters' `.grad` stay untouched."""
    check_images(x)
    return _losses_and_gradients(model, x, y)[1]


def pgd_attack(model, x, y, *, eps=4 / 255, step_size=None, steps=10, random_start=True, start=None):
    """L∞ projected gradient ascent on the loss (Madry et al., "Towards Deep Learning Models Resistant to
    Adversarial Attacks", ICLR 2018).

    `x` holds pixels in [0, 1]; `eps` and `step_size` are in pixels. `step_size` is by default 2.5 · ε / steps, which is
    the paper's validation attack (PGD-10, ε = 4/255, step 1/255). The first point is drawn uniformly from the ball, or
    it is `x` without `random_start`, or `start`, images (N, C, H, W). The model is attacked in the mode that it is in;
    a BatchNorm in train mode therefore updates its statistics. Parameters' `.grad` stay untouched.

    Returns adversarial images (N, C, H, W) within ε of `x` and within [0, 1], detached, in at least float32; pixels
    whose gradient is nan become nan.
    """
    check_images(x, eps, pixels=True)
    if steps < 0:
        raise ValueError(f"steps must not be negative, not {steps}")
    step_size = 2.5 * eps / max(steps, 1) if step_size is None else step_size
    # The ball's walls would be rounded in bfloat16. The model gets images of the type that it was given.
    dtype, x = x.dtype, at_least_float32(x.detach())
    lowest, highest = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    if start is None:
        start = x + torch.empty_like(x).uniform_(-eps, eps) if random_start else x
    adversarial = start.detach().clamp(lowest, highest)
    for step in range(steps):
        _, gradient = _losses_and_gradients(model, adversarial.to(dtype), y, check=step == 0)
        adversarial = (adversarial + step_size * _sign(gradient)).clamp(lowest, highest)
    return adversarial


def _losses_and_gradients(model, x, y, parameters=None, create_graph=False, check=True):
    """Losses (N,), the gradient of each with respect to its own image (N, C, H, W), and, of their sum, the gradient
    with respect to each of the named `parameters`.

    The sum makes row i of ∇x the gradient of example i's own loss; a mean would divide it by N. The gradients carry a
    graph only with `create_graph`. Without `parameters`, only the passes that ∇x needs are run.
    """
    parameters = parameters or {}
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    scale = FP16_SCALE if torch.float16 in (x.dtype, autocast) else 1.0
    if torch.compiler.is_compiling():
        losses, gradients = _traceable_losses_and_gradients(model, x, y, parameters, create_graph, scale)
    else:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            losses = _cross_entropies(model, x, y, check)
            gradients = differentiate(scale * losses.sum(), x, *parameters.values(), create_graph=create_graph)
    return losses, *(at_least_float32(g) / scale for g in gradients)


def differentiate(total, x, *parameters, create_graph=False):
    """The gradients of a scalar with respect to images and parameters. Raises ValueError if none reaches the images:
    taken for zero, it would look like robustness."""
    gradients = [None]
    if total.requires_grad:
        with torch.autocast(x.device.type, enabled=False):  # backward operations choose their own precision
            gradients = torch.autograd.grad(total, [x, *parameters], create_graph=create_graph, allow_unused=True)
    if gradients[0] is None:
        raise ValueError("the model's logits have no gradient with respect to x: it must not detach x, run under "
                         "no_grad, or turn x into integers")
    return [torch.zeros_like(p) if g is None else g for p, g in zip((x, *parameters), gradients)]


def _traceable_losses_and_gradients(model, x, y, parameters, create_graph, scale):
    """The same for torch.compile, which traces torch.func into its graph, but not torch.autograd.grad. Eager mode has
    the latter, since torch.func refuses BatchNorm in train mode."""
    def total(x, parameters):
        losses = _cross_entropies(lambda x: functional_call(model, parameters, (x,)), x, y)
        return scale * losses.sum(), losses

    (gradient, named), (_, losses) = grad_and_value(total, argnums=(0, 1), has_aux=True)(x.detach(), parameters)
    gradients = [gradient, *named.values()]
    return losses, gradients if create_graph else [g.detach() for g in gradients]


def _cross_entropies(model, x, y, check=True):
    """Cross-entropy of each example, (N,), in at least float32. With `check` the values of `y` are looked at, for which
    a GPU has to be waited for."""
    logits = model(x)
    check_targets(logits, y, values=check and CHECK_VALUES and not torch.compiler.is_compiling())
    return F.cross_entropy(at_least_float32(logits), y if y.is_floating_point() else y.long(), reduction="none")


def _sign(gradient):
    """Of nan it is nan, and not the 0 of torch.sign, which would look like robustness."""
    return torch.where(gradient.isnan(), gradient, gradient.sign())


def at_least_float32(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _per_channel(sigma, x):
    """`sigma`, a number or one per channel, in a shape that divides images."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype)
    positive = torch.compiler.is_compiling() or min(sigma.view(-1).tolist()) > 0
    if sigma.numel() not in (1, x.shape[1]) or not positive:
        raise ValueError(f"sigma must be positive, one number or one per channel, not {sigma.tolist()}")
    return sigma.to(x.device).view(-1, 1, 1)


def check_images(x, eps=0.0, pixels=False):
    """Raises ValueError for what is no batch of float images, or with `pixels` none in [0, 1], or for a wrong ε."""
    if not x.is_floating_point():
        raise ValueError(f"x must be a float tensor, not {x.dtype}: convert it with x.float() / 255")
    if x.ndim != 4 or len(x) == 0:
        raise ValueError(f"x must be images (N, C, H, W), not {tuple(x.shape)}")
    if not 0 <= eps <= 1:  # nan too
        raise ValueError(f"eps must be from 0 to 1, in pixels, not {eps}")
    if torch.compiler.is_compiling():
        return
    if torch.is_inference_mode_enabled() or x.is_inference():
        raise ValueError("tensors of torch.inference_mode() have no gradients: use torch.no_grad() in its place")
    if pixels and CHECK_VALUES and not ((x >= 0) & (x <= 1)).all():
        raise ValueError(f"x must hold pixels in [0, 1], not [{x.min():.3g}, {x.max():.3g}]: "
                         "put the normalisation into the model")


def check_targets(logits, y, values=True):
    """Raises ValueError where `y` does not fit the logits, with `values` also for its values."""
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"the model must return logits (N, classes) of two or more classes, not {tuple(logits.shape)}")
    soft = y.is_floating_point()
    shape, kind = (logits.shape, "probabilities") if soft else (logits.shape[:1], "indices")
    if y.shape != shape:
        raise ValueError(f"y must have shape {tuple(shape)} for class {kind}, not {tuple(y.shape)}")
    if values:
        if soft:
            wrong = (y < 0) | ((y.sum(1, keepdim=True) - 1).abs() > max(1e-3, torch.finfo(y.dtype).eps))
        else:
            wrong = (y < 0) | (y >= logits.shape[1])
        if wrong.any():
            raise ValueError(f"y must hold class indices from 0 to {logits.shape[1] - 1} or class probabilities that "
                             f"sum to 1, not {y[wrong][0].item()}")
