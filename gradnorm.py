"""Gradient-norm regularisation ("GradNorm"), its finite-difference twin, and the PGD attack.

    L_GradNorm(x, y) = λ_CE · L(x, y) + λ_GN · (ε/σ) · ‖∇x L(x, y)‖₁,     L = cross-entropy

Source: Rodríguez-Muñoz, Wang, Torralba, "Characterizing Model Robustness via Natural Input Gradients",
ECCV 2024, arXiv 2409.20139.

Since ‖∇x L‖₁ = max over ‖δ‖∞ ≤ 1 of δᵀ∇x L, the sum L(x) + ε‖∇x L‖₁ is the first-order Taylor expansion of
the adversarial loss L(x + ε · sign ∇x L): with λ_CE = λ_GN, GradNorm is adversarial training of the linearised loss.

Read the two losses and `pgd_attack`. Below them is what they are made of: derivatives, traps of precision, checks. This
file needs only torch and can be copied into any project. Everywhere, `x` holds images (N, C, H, W), and `y` their
targets: class indices (N,) or class probabilities (N, classes), as mixup makes them. `model` is an `nn.Module` from
images to logits (N, classes). Input that would give a wrong number in silence raises ValueError where that can be
seen; a normalised `x` without its `sigma` is not noticed.
"""

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad_and_value
from torch.nn.attention import SDPBackend, sdpa_kernel

# To check the values of x and y, the CPU must wait for the GPU. A training loop that knows its data may set this to
# False.
CHECK_VALUES = True


def gradnorm_loss(model, x, y, *, lambda_ce=0.8, lambda_gn=1.2, eps=4 / 255, sigma=1.0):
    """L_GradNorm by double backprop: exact, at the cost of differentiating the backward pass.

        x.requires_grad_()
        losses = F.cross_entropy(model(x), y, reduction="none")                 # L of each example
        gradient, = torch.autograd.grad(losses.sum(), x, create_graph=True)     # ∇x of each example's own L
        norms = gradient.abs().flatten(1).sum(1)                                # ‖∇x L‖₁, over (C, H, W)
        loss = lambda_ce * losses.mean() + lambda_gn * eps * norms.mean()

    That is all, but for σ. Lines 1 to 3 are in `losses_and_gradients`; what the code has besides avoids traps, each
    named in its place.

    The default λ_CE, λ_GN and ε are those of the paper. `eps` is in pixels of [0, 1]. `sigma` is the divisor of
    the input's normalisation, a number or one per channel: 1 if `x` holds pixels, the paper's 0.224 if `x` is
    already (pixels - mean) / 0.224. By the chain rule ∇pixel = ∇x / σ, so both give the same penalty.

    A BatchNorm in train mode mixes the examples of a batch: the norm is then that of the gradient of the *summed*
    loss with respect to each image, the other examples' losses included. The paper keeps BatchNorm in eval mode
    throughout.

    Returns a scalar to call `.backward()` on.
    """
    check_images(x, eps, sigma)
    with sdpa_kernel(SDPBackend.MATH):  # flash attention has no double backward; the plain formula has
        losses, gradient = losses_and_gradients(model, x, y, create_graph=True)
    norms = (gradient / per_channel(sigma, x)).abs().flatten(1).sum(1)
    return lambda_ce * losses.mean() + lambda_gn * eps * nan_where_infinite(norms.mean())


def gradnorm_loss_finite_difference(model, x, y, *, lambda_ce=0.8, lambda_gn=1.2, eps=4 / 255, sigma=1.0, h=None):
    """L_GradNorm by a finite difference along s = sign ∇x L, held constant: no double backward.

        ‖∇x L‖₁ = sᵀ∇x L ≈ (L(x + h · s) - L(x)) / h

    In its plain form, with the cost of each line in forward passes, 8 together:

        s = input_gradient(model, x, y).sign()                              # 2
        clean = F.cross_entropy(model(x), y)                                # 1
        moved = F.cross_entropy(model(x + h * s), y)                        # 1
        loss = lambda_ce * clean + lambda_gn * eps * (moved - clean) / h
        loss.backward()                                                     # 4

    The code takes 6: one forward and one backward pass at `x` give both ∇x L and the gradient of L by the parameters,
    which `KnownGradient` keeps for `.backward()`. It works where no double backward exists, in the memory of natural
    training and one copy of the parameters' gradients. Dropout must be off: it would draw another network at x + h · s.

    `h` is in pixels, by default ε/2; the other arguments and the returned value are those of `gradnorm_loss`. As h → 0
    it becomes `gradnorm_loss`; at h = ε with λ_CE = λ_GN only L(x + ε · s) is left, FGSM adversarial training. In
    between, L(x) counts λ_CE - λ_GN · ε/h times, with the defaults -1.6 times. x + h · s is not clipped to [0, 1]. A
    small h drowns in rounding: in float32 below 1e-6, under bfloat16 autocast below ε/16, and images in bfloat16 round
    x + h · s itself. Weights must be among `model.parameters()`.
    """
    check_images(x, eps, sigma)
    h = eps / 2 if h is None else h
    if not 0 < h <= 1:
        raise ValueError(f"h is in pixels of [0, 1], such as 2/255, not {h}")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if any(p._backward_hooks for p in parameters.values()):  # which would run twice, first on the summed loss
        raise ValueError("the parameters have gradient hooks: change their .grad after .backward()")
    losses, gradient, *of_parameters = losses_and_gradients(model, x, y, parameters)
    clean = KnownGradient.apply(losses.detach().sum(), of_parameters, *parameters.values()) / len(x)
    step = h / per_channel(sigma, x) * sign(gradient)
    moved = cross_entropies(model, (x.detach() + step).to(x.dtype), y).mean()
    return lambda_ce * clean + lambda_gn * eps * (moved - clean) / h


class KnownGradient(torch.autograd.Function):
    """A number whose gradients by `parameters` are already known, so that its backward need not go through the model
    again: here the sum of the losses. `parameters` are arguments only so that autograd asks for their gradients;
    `upstream` is the derivative of the final loss by this number."""

    @staticmethod
    def forward(ctx, value, gradients, *parameters):
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx, upstream):
        return None, None, *(upstream * g for g in ctx.gradients)


def input_gradient(model, x, y):
    """∇x of each example's own loss, (N, C, H, W), detached. The parameters' `.grad` stay untouched."""
    check_images(x)
    return losses_and_gradients(model, x, y)[1]


def pgd_attack(model, x, y, *, eps=4 / 255, step_size=None, steps=10, random_start=True, start=None):
    """L∞ projected gradient ascent on the loss (Madry et al., "Towards Deep Learning Models Resistant to
    Adversarial Attacks", ICLR 2018).

    `x` holds pixels in [0, 1], up to rounding; `eps` and `step_size` are in pixels. `step_size` is by default
    2.5 · ε / steps, which is the paper's validation attack (PGD-10, ε = 4/255, step 1/255). The first point is drawn
    uniformly from the ball, or it is `x` without `random_start`, or `start`, images (N, C, H, W). The model is attacked
    in the mode that it is in; a BatchNorm in train mode therefore updates its statistics. Parameters' `.grad` stay
    untouched.

    Returns adversarial images (N, C, H, W) within [0, 1] and, up to rounding, within ε of `x`, detached, in at least
    float32; pixels whose gradient is nan become nan.
    """
    check_images(x, eps, pixels=True)
    if steps < 0:
        raise ValueError(f"steps must not be negative, not {steps}")
    if step_size is None:
        step_size = 2.5 * eps / max(steps, 1)
    elif may_look() and not 0 <= step_size <= 1:
        raise ValueError(f"step_size is in pixels of [0, 1], such as 1/255, not {step_size}")
    # The ball's walls would be rounded in bfloat16. The model gets images of the type that it was given.
    dtype = x.dtype
    x = at_least_float32(x.detach()).clamp(0, 1)
    lowest, highest = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    if start is None:
        start = x + torch.empty_like(x).uniform_(-eps, eps) if random_start else x
    adversarial = start.detach().clamp(lowest, highest)
    for _ in range(steps):
        _, gradient = losses_and_gradients(model, adversarial.to(dtype), y)
        adversarial = (adversarial + step_size * sign(gradient)).clamp(lowest, highest)
    return adversarial


# Derivatives


def losses_and_gradients(model, x, y, parameters=None, create_graph=False):
    """The losses (N,), the gradient of each by its own image (N, C, H, W), and then, for each of the named
    `parameters`, the gradient of the sum of the losses.

    The sum makes row i of ∇x the gradient of example i's own loss; a mean would divide it by N. The gradients carry a
    graph only with `create_graph`. Without `parameters`, only the passes that ∇x needs are run.
    """
    parameters = parameters or {}
    if torch.compiler.is_compiling():
        return traceable_losses_and_gradients(model, x, y, parameters, create_graph)
    if x.grad_fn is not None:  # which detach cuts: what has computed x would never be trained
        raise ValueError("x has a graph, through which no gradient would go: make what computes x a part of the model, "
                         "or detach x")
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        losses = cross_entropies(model, x, y)
        inputs, scale = [x, *parameters.values()], fp16_scale(x)
        with torch.autocast(x.device.type, enabled=False):  # which would cast the backward operations once more
            gradients = torch.autograd.grad(scale * losses.sum(), inputs, create_graph=create_graph, allow_unused=True)
    if gradients[0] is None:  # taken for zero, it would look like robustness
        raise ValueError("the logits have no gradient with respect to x: the model must not detach it")
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(inputs, gradients)]
    return losses, *(at_least_float32(g) / scale for g in gradients)


def traceable_losses_and_gradients(model, x, y, parameters, create_graph):
    """The same for torch.compile, which cannot trace torch.autograd.grad. Eager mode does without torch.func, which
    refuses BatchNorm in train mode. A model that detaches x is not noticed here."""
    scale = fp16_scale(x)

    def total(x, parameters):
        losses = cross_entropies(lambda x: functional_call(model, parameters, (x,)), x, y)
        return scale * losses.sum(), losses

    (gradient, named), (_, losses) = grad_and_value(total, argnums=(0, 1), has_aux=True)(x.detach(), parameters)
    gradients = [at_least_float32(g) / scale for g in (gradient, *named.values())]
    return losses, *(gradients if create_graph else [g.detach() for g in gradients])


def cross_entropies(model, x, y):
    """Cross-entropy of each example, (N,), in at least float32."""
    logits = at_least_float32(model(x))
    check_targets(logits, y)
    return F.cross_entropy(logits, y if y.is_floating_point() else y.long(), reduction="none")


def per_channel(sigma, x):
    """`sigma`, a number or one per channel, in a shape that divides images."""
    if isinstance(sigma, (int, float)):  # as a tensor it would be copied to the GPU, for which the CPU waits
        return sigma
    return torch.as_tensor(sigma, dtype=x.dtype, device=x.device).view(-1, 1, 1)


# Traps of precision


def at_least_float32(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def fp16_scale(x):
    """In fp16 the gradient of a pixel, often below 6e-8, would underflow: it is computed this much larger."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return 2.0**8 if torch.float16 in (x.dtype, autocast) else 1.0


def nan_where_infinite(value):
    """|inf| has the finite derivative ±1, so that GradScaler would not see an overflow of fp16. The factor is 1 where
    the value is finite, else nan, for the value and for its gradient."""
    return value * (1 + 0 * value.detach())


def sign(gradient):
    """Of nan it is nan, and not the 0 of torch.sign, which would look like robustness."""
    return torch.where(gradient.isnan(), gradient, gradient.sign())


# Checks of what would be wrong in silence


def may_look():
    """Whether a check may look at values, which torch.compile cannot trace."""
    return CHECK_VALUES and not torch.compiler.is_compiling()


def check_images(x, eps=0.0, sigma=1.0, pixels=False):
    if x.ndim != 4:  # the norm would be summed over the wrong dimensions
        raise ValueError(f"x must be images (N, C, H, W), not {tuple(x.shape)}")
    if not 0 <= eps <= 1:  # 8/255 was meant, not 8
        raise ValueError(f"eps is in pixels of [0, 1], such as 4/255, not {eps}")
    sigma = torch.as_tensor(sigma)
    # Three divisors would make the norm of a grey image three times as large.
    if sigma.numel() not in (1, x.shape[1]) or may_look() and not ((0 < sigma) & (sigma <= 1)).all():
        raise ValueError(f"sigma is in pixels of [0, 1], one number or one per channel, not {sigma.tolist()}")
    outside = max(-x.min().item(), x.max().item() - 1) if pixels and may_look() else 0.0
    if not outside <= 1e-6:  # more than a resized image's rounding; or nan
        raise ValueError(f"x must hold pixels in [0, 1], and is outside by {outside:.2g}: put the normalisation into "
                         "the model")


def check_targets(logits, y):
    if logits.ndim != 2 or logits.shape[1] < 2:  # the loss of a single class is always 0
        raise ValueError(f"the model must return logits (N, classes) of two or more classes, not {tuple(logits.shape)}")
    if not may_look():
        return
    if y.is_floating_point():
        sums = y.sum(1)
        if (y < 0).any() or not ((sums - 1).abs() <= max(1e-3, torch.finfo(y.dtype).eps)).all():
            raise ValueError(f"class probabilities y must sum to 1, not to {sums.min():.4g} to {sums.max():.4g}, and "
                             f"not be negative, as {y.min():.4g}")
    elif ((y < 0) | (y >= logits.shape[1])).any():  # cross-entropy ignores -100
        raise ValueError(f"class indices y must be from 0 to {logits.shape[1] - 1}, not {y.min()} to {y.max()}")
