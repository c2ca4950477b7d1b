"""Clean, PGD and AutoAttack accuracy of classifiers under the L∞ threat model, as a Markdown table and as JSON.

    python evaluate.py runs/natural/checkpoint.pt runs/gradnorm/checkpoint.pt --attack pgd --steps 20
    python evaluate.py runs/gradnorm/checkpoint.pt --attack autoattack --eps 4/255 8/255 16/255 --num-images 500
    torchrun --standalone --nproc_per_node=8 evaluate.py ...                   # the images are split over 8 GPUs

Read from the top: `autoattack` and `run_stage`, by which one attack after another meets what is left standing. Then
come the attacks of standard AutoAttack (Croce, Hein, "Reliable evaluation of adversarial robustness with an ensemble of
diverse parameter-free attacks", ICML 2020, arXiv 2003.01690), each by itself; the command line can be skipped. A result
is written beside its checkpoint, as autoattack-500-eps4-8-16.json; the same command resumes an interrupted evaluation,
and does not repeat a finished one.

Everywhere, `x` holds pixels in [0, 1], (N, C, H, W), in float32 or float64, `y` class indices (N,), `eps` is in pixels,
and `model` is any `nn.Module` from pixels to logits (N, classes), in eval mode. At most `batch_size` images go through
it at a time. Each image has integer `seeds` (N, any) of its own: its random numbers do not depend on its batch.
"""

import argparse
import hashlib
import json
import math
import os
import warnings
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import train
from gradnorm import check, check_pixels, input_gradient, pgd_attack
from train import RANK, WORLD_SIZE, misclassified


# The evaluation. A stage is (attack, ε, number of its start or target): it attacks the images that still stand at ε.
# `radius` (N,), float64, is ‖adversarial - x‖∞ of the closest proved adversarial image: 0 where `x` itself is
# misclassified, inf where none is known. The first two functions are for a model in memory; the command line runs the
# same stages, in `run_stages`.


def autoattack(model, x, y, *, eps, batch_size=256):
    """Standard AutoAttack. Returns images (N, C, H, W): misclassified ones within ε of `x`; `x` where it found none.
    Warns of signs that they are not to be trusted; raises ValueError where `x` holds no pixels. On a CPU or CUDA:
    distances are taken in float64, which Apple's GPUs lack."""
    x, logits = checked(model, x, y, eps, batch_size)
    radius, targets, images = first_radius(logits, y), likeliest_others(logits), x
    for stage in standard_stages([eps], targets.shape[1]):
        radius, images = run_stage(stage, model, x, y, targets, radius, images, batch_size=batch_size)
    return pick(radius <= eps, images, x)


def pgd_accuracy(model, x, y, *, eps, steps=10, restarts=1, batch_size=256):
    """Accuracy (%) under PGD with that many random starts. Warns and raises as `autoattack` does."""
    x, logits = checked(model, x, y, eps, batch_size)
    radius = first_radius(logits, y)
    for stage in pgd_stages([eps], restarts):
        radius, _ = run_stage(stage, model, x, y, None, radius, batch_size=batch_size, steps=steps)
    return accuracy(radius, eps)


def standard_stages(radii, targets):
    """Those of standard AutoAttack for all `radii`, with that many targets. What is found at one ε holds at every
    larger one; and FAB looks for the smallest perturbation, so that it runs at the smallest ε alone."""
    radii, numbers = sorted({eps for eps in radii if eps > 0}), range(targets)
    return ([("APGD-CE", eps, 0) for eps in radii] + [("APGD-T", eps, i) for eps in radii for i in numbers]
            + [("FAB-T", eps, i) for eps in radii[:1] for i in numbers] + [("Square", eps, 0) for eps in radii])


def pgd_stages(radii, restarts):
    return [("PGD", eps, i) for eps in sorted({eps for eps in radii if eps > 0}) for i in range(restarts)]


def run_stage(stage, model, x, y, targets, radius, images=None, *, batch_size=256, rank=0, world_size=1, **options):
    """One stage, on this rank's share of the images that stand at its ε. Returns `radius`, lowered where the attack
    came closer than those before it, and `images`, if given, with what it found there."""
    name, eps, number = stage
    radius, images = radius.clone(), None if images is None else images.clone()
    standing = (radius > eps).nonzero()[rank::world_size, 0]
    for rows in standing.split(8 * batch_size) if len(standing) else []:  # Square draws all its numbers first
        seeds = torch.stack([rows, torch.full_like(rows, number)], 1)
        target = targets[rows, number] if name.endswith("-T") else None
        found = ATTACKS[name](model, x[rows], y[rows], eps=eps, seeds=seeds, target=target, batch_size=batch_size,
                              **options)
        proved = proved_radius(model, x[rows], y[rows], found, batch_size)
        closer = proved < radius[rows]
        radius[rows[closer]] = proved[closer]
        if images is not None:
            images[rows[closer]] = found[closer]
    if world_size > 1:
        dist.all_reduce(radius, dist.ReduceOp.MIN)
    return radius, images


def proved_radius(model, x, y, images, batch_size=256):
    """‖images - x‖∞ where the images are misclassified and within [0, 1], inf elsewhere: (N,) float64."""
    wrong = misclassified(predict(model, images, batch_size), y)
    inside = ((images >= 0) & (images <= 1)).flatten(1).all(1)
    return torch.where(wrong & inside, linf(images, x), math.inf)


def first_radius(logits, y):
    return torch.where(misclassified(logits, y), 0.0, math.inf).double()


def likeliest_others(logits):
    """The targets, (N, up to 9): the most likely classes after the predicted one."""
    others = logits.scatter(1, logits.argmax(1, keepdim=True), -math.inf).argsort(dim=1, descending=True)
    return others[:, :min(9, logits.shape[1] - 1)]


def accuracy(radius, eps):
    """Accuracy (%) at ε: the share of images without a known adversarial one within ε. ε = 0 gives clean accuracy."""
    return 100 * (radius > eps).sum().item() / len(radius)


def checked(model, x, y, eps, batch_size):
    """The images without the rounding that leads out of [0, 1], and their logits, after a look at all of them."""
    check(x, eps=eps)
    check_pixels(x)
    if model.training:
        warn(["the model is in train mode, with its dropout and BatchNorm: call model.eval() first"])
    x = x.detach().clamp(0, 1)
    logits = predict(model, x, batch_size)
    warn(signs_of_failure(model, x, y, logits, batch_size))
    return x, logits


def signs_of_failure(model, x, y, logits, batch_size):
    """A line for each sign that robust accuracy cannot be trusted (Athalye et al., "Obfuscated gradients give a false
    sense of security", ICML 2018)."""
    lines, first = [], x[:batch_size]
    again = predict(model, first, (len(first) + 1) // 2)
    rounding = 1e-4 * again.nan_to_num(0, 0, 0).abs().max().item()
    if not torch.allclose(again, logits[:len(first)], rtol=0, atol=rounding, equal_nan=True):
        lines.append("the model answers differently when asked twice, then in smaller batches: it is random, which the "
                     "attacks do not average over, or it mixes the images of a batch")
    if 0 <= logits.min() and logits.max() <= 1:
        lines.append("the model's outputs look like probabilities: give the logits, before the softmax or sigmoid")
    if nan := logits.isnan().any(1).sum().item():
        lines.append(f"the model's logits are nan on {nan} of {len(x)} images, which count as misclassified")
    gradients = (input_gradient(model, *batch) for batch in zip(x.split(batch_size), y.split(batch_size)))
    blind = sum(((g == 0).flatten(1).all(1) | g.isnan().flatten(1).any(1)).sum().item() for g in gradients)
    if blind:
        lines.append(f"the input gradient of {blind} of {len(x)} images is zero or nan: what follows the gradient "
                     "of cross-entropy, as PGD and APGD-CE do, is blind there")
    return lines


def warn(lines, prefix=""):
    """Every time; `warnings.warn` would report the same text only once, of a loop over models."""
    for line in lines if RANK == 0 else []:
        warnings.warn_explicit(prefix + line, UserWarning, __file__, 0)


# The attacks. Each returns images (N, C, H, W): misclassified ones where it found them, `x` or anything elsewhere. In
# those of AutoAttack an image drops out once it is misclassified; `s` holds the state of the others, one row per image.
# All have one signature; some have no use for `seeds` or `target`.


def pgd(model, x, y, *, eps, seeds, target=None, steps=10, batch_size=256):
    """The last step of PGD from a random start (Madry et al., ICLR 2018)."""
    start = x + eps * (2 * uniform(seeds, x.shape[1:]).to(x) - 1)
    batches = zip(*(t.split(batch_size) for t in (x, y, start)))
    moved = torch.cat([pgd_attack(model, x, y, eps=eps, steps=steps, start=start) for x, y, start in batches])
    return moved.clamp(*ball(x, eps))


@torch.no_grad()
def apgd(model, x, y, *, eps, seeds, target=None, steps=100, rho=0.75, batch_size=256):
    """Auto-PGD (Croce, Hein, ICML 2020, Algorithm 1): PGD with momentum, and a step size η that halves where the loss
    no longer grows. Ascends the cross-entropy, or, with `target` classes (N,), the targeted DLR loss.

        z = P(x_k + η · sign ∇)        x_{k+1} = P(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1}))

    P clips to the ball and the box; the first step is z alone."""
    found = x.clone()
    lowest, highest = ball(x, eps)
    noise = 2 * uniform(seeds, x.shape[1:]).to(x) - 1
    noise /= noise.abs().amax((1, 2, 3), keepdim=True)
    s = SimpleNamespace(row=torch.arange(len(x), device=x.device), y=y, target=y if target is None else target,
                        lowest=lowest, highest=highest, x=(x + eps * noise).clamp(lowest, highest),
                        step=torch.full_like(x[:, :1, :1, :1], 2 * eps), halved=torch.ones_like(y, dtype=torch.bool))
    s.previous = s.x
    checkpoints, last = apgd_checkpoints(steps), 0
    for k in range(steps + 1):
        if k > 0:
            ahead = (s.x + s.step * s.gradient.sign()).clamp(s.lowest, s.highest)
            if k > 1:
                ahead = s.x + 0.75 * (ahead - s.x) + 0.25 * (s.x - s.previous)
            s.previous, s.x = s.x, ahead.clamp(s.lowest, s.highest)
        logits, loss, gradient = ascent(model, cross_entropy if target is None else targeted_dlr, batch_size,
                                        s.x, s.y, s.target)
        if k == 0:
            s.best_loss = s.best_at_checkpoint = s.loss = loss
            s.best_x, s.best_gradient, s.grown = s.x, gradient, torch.zeros_like(loss)
        better = loss > s.best_loss
        s.best_x, s.best_gradient = pick(better, s.x, s.best_x), pick(better, gradient, s.best_gradient)
        s.best_loss = torch.where(better, loss, s.best_loss)
        s.gradient, s.grown, s.loss = gradient, s.grown + (loss > s.loss), loss

        wrong = misclassified(logits, s.y)
        if wrong.any():
            found[s.row[wrong]] = s.x[wrong]
            keep(s, ~wrong)
        if not len(s.row):
            break
        if k in checkpoints:
            # Conditions 1 and 2 of the paper: the loss grew in too few steps, or the best stayed without a halving.
            s.halved = (s.grown <= rho * (k - last)) | ~s.halved & (s.best_loss == s.best_at_checkpoint)
            s.step = pick(s.halved, s.step / 2, s.step)
            s.x, s.gradient = pick(s.halved, s.best_x, s.x), pick(s.halved, s.best_gradient, s.gradient)
            s.best_at_checkpoint, s.grown, last = s.best_loss, torch.zeros_like(s.grown), k
    return found


def apgd_checkpoints(steps):
    """The steps after which Auto-PGD may halve its step size: 22, 41, 57, 70, 80, 87, 93, 99 of 100."""
    checkpoints, last, window = [], 0, max(int(0.22 * steps), 1)
    while last + window <= steps:
        last += window
        checkpoints.append(last)
        window = max(window - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
    return checkpoints


def cross_entropy(logits, y, _):
    return F.cross_entropy(logits, y, reduction="none")


def targeted_dlr(logits, y, target):
    """Targeted difference-of-logits-ratio loss, (N,): invariant to shifting and scaling the logits, unlike
    cross-entropy. The denominator needs four classes. With three it is that of the untargeted loss; with two there is
    none, and the loss is the plain difference."""
    z = logits.sort(dim=1, descending=True).values
    scale = z[:, 0] - z[:, 2:4].mean(1) if z.shape[1] > 2 else 1
    return difference(logits, y, target) / (scale + 1e-12)


def difference(logits, y, target):
    return at(logits, target) - at(logits, y)


@torch.no_grad()
def fab(model, x, y, *, eps, target, seeds=None, steps=100, alpha_max=0.1, eta=1.05, beta=0.9, batch_size=256):
    """Targeted FAB (Croce, Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack", ICML
    2020, Algorithm 1): the smallest perturbation, of any size, across the boundary to the class `target` (N,). An image
    leaves the attack once it is misclassified within ε."""
    found, distance = x.clone(), torch.full((len(x),), math.inf, dtype=torch.double, device=x.device)
    s = SimpleNamespace(row=torch.arange(len(x), device=x.device), x=x, original=x, y=y, target=target)
    for _ in range(steps):
        _, gap, normal = ascent(model, difference, batch_size, s.x, s.y, s.target)
        # The boundary, linearised at s.x, is normal · (p - s.x) + gap = 0. Both points are projected onto it.
        gap_original = gap - (normal * (s.x - s.original)).flatten(1).sum(1)
        d, d_original = project(torch.cat([s.x, s.original]), torch.cat([normal, normal]),
                                -torch.cat([gap, gap_original])).chunk(2)
        size, size_original = (v.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-8) for v in (d, d_original))
        alpha = (size / (size + size_original)).clamp(max=alpha_max)
        s.x = ((1 - alpha) * (s.x + eta * d) + alpha * (s.original + eta * d_original)).clamp(0, 1)

        wrong = misclassified(predict(model, s.x, batch_size), s.y)
        far = linf(s.x, s.original)
        closer = wrong & (far < distance[s.row])
        found[s.row[closer]] = s.x[closer]
        distance[s.row[closer]] = far[closer]
        s.x = pick(wrong, s.original + beta * (s.x - s.original), s.x)  # back, to look for a closer crossing
        left = distance[s.row] > eps
        if not left.all():
            keep(s, left)
        if not len(s.row):
            break
    return found


def project(x, normal, height):
    """The d (N, C, H, W) of smallest ‖d‖∞ with normal · d = height (N,) and x + d in [0, 1]; where there is none, the
    one that goes as far as the box allows.

    Every pixel moves by λ, or by its room to the wall: height = Σ |normalᵢ| min(λ, roomᵢ), which is concave in λ. So
    Newton's method from 0 rises to the solution, in at most as many steps as it passes walls, and without sorting them.
    """
    direction = normal.sign() * height.sign()[:, None, None, None]
    room = torch.where(direction > 0, 1 - x, x).flatten(1)
    weight, height = normal.abs().flatten(1), height.abs()[:, None]
    size = torch.zeros_like(height)
    for step in range(100):
        slope = (weight * (room > size)).sum(1, keepdim=True)
        rest = height - (weight * torch.minimum(room, size)).sum(1, keepdim=True)
        larger = size + torch.where(slope > 0, rest / slope, 0).clamp(min=0)
        if step % 5 == 4 and (larger == size).all():  # not in each step: the CPU waits for a GPU's answer
            break
        size = larger
    return direction * torch.minimum(room, size).view_as(x)


@torch.no_grad()
def square(model, x, y, *, eps, seeds, target=None, queries=5000, p=0.8, batch_size=256):
    """Square Attack (Andriushchenko et al., ECCV 2020, Algorithms 1 and 2): random search, without gradients, that sets
    squares of ever smaller size to x ± ε and keeps what lowers the margin between the true and the next class."""
    found, (n, channels, height, width) = x.clone(), x.shape
    lowest, highest = ball(x, eps)
    # An image's numbers: the signs of the first stripes; then, of each query, its row, column and channels' signs.
    numbers = uniform(seeds, (channels * width + queries * (2 + channels),)).to(x)
    stripes = numbers[:, :channels * width].reshape(n, channels, 1, width) < 0.5
    s = SimpleNamespace(row=torch.arange(n, device=x.device), y=y, lowest=lowest, highest=highest,
                        numbers=numbers[:, channels * width:].reshape(n, queries, 2 + channels),
                        x=torch.where(stripes, highest, lowest))
    s.margin = margin(predict(model, s.x, batch_size), y)
    channel = torch.arange(channels, device=x.device)[:, None, None]
    for query in range(queries + 1):
        wrong = s.margin == -math.inf
        if wrong.any():
            found[s.row[wrong]] = s.x[wrong]
            keep(s, ~wrong)
        if not len(s.row) or query == queries:
            break
        halvings = sum(query > k for k in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))  # the published schedule
        side = min(max(round(math.sqrt(p / 2**halvings * height * width)), 1), height, width)
        offset = torch.arange(side, device=x.device)
        top, left = ((s.numbers[:, query, i] * (room - side + 1)).long() for i, room in enumerate((height, width)))
        up = s.numbers[:, query, 2:, None, None] < 0.5
        image = torch.arange(len(up), device=x.device)
        window = (image[:, None, None, None], channel, (top[:, None] + offset)[:, None, :, None],
                  (left[:, None] + offset)[:, None, None, :])
        proposal = s.x.clone()
        proposal[window] = torch.where(up, s.highest[window], s.lowest[window])
        proposed = margin(predict(model, proposal, batch_size), s.y)
        s.x, s.margin = pick(proposed < s.margin, proposal, s.x), torch.minimum(proposed, s.margin)
    return found


def margin(logits, y):
    """True class's logit minus the highest other, (N,); -inf where misclassified, which a tie can be."""
    others = logits.scatter(1, y[:, None], -math.inf).amax(1)
    return torch.where(misclassified(logits, y), -math.inf, at(logits, y) - others)


def ascent(model, objective, batch_size, x, y, target):
    """Logits (N, classes), `objective` of them (N,), and the gradient of each with respect to its own image."""
    parts = []
    for x, y, target in zip(*(t.split(batch_size) for t in (x, y, target))):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = model(x)
            value = objective(logits, y, target)
            gradient, = torch.autograd.grad(value.sum(), x)
        parts.append((logits.detach(), value.detach(), gradient))
    return (torch.cat(part) for part in zip(*parts))


@torch.no_grad()
def predict(model, x, batch_size):
    """Logits (N, classes)."""
    return torch.cat([model(part) for part in x.split(batch_size)])


def ball(x, eps):
    """The lowest and the highest image within ε of `x` and within [0, 1], in exact arithmetic: where x ± ε is rounded
    out of the ball, the next number inside."""
    lowest, highest = (x.double() - eps).clamp(min=0).to(x), (x.double() + eps).clamp(max=1).to(x)
    return (torch.where(x.double() - lowest.double() > eps, lowest.nextafter(x), lowest),
            torch.where(highest.double() - x.double() > eps, highest.nextafter(x), highest))


def linf(a, b):
    """‖a - b‖∞ of each pair of images, (N,), without rounding."""
    return (a.double() - b.double()).abs().flatten(1).amax(1)


def uniform(seeds, shape):
    """Random numbers in [0, 1), (N, *shape), those of each image from its own seeds."""
    return torch.from_numpy(np.stack([np.random.default_rng(seed).random(shape, np.float32)
                                      for seed in seeds.tolist()]))


def at(logits, classes):
    return logits.gather(1, classes[:, None])[:, 0]


def pick(condition, a, b):
    """Images of `a` where the condition (N,) holds, of `b` elsewhere."""
    return torch.where(condition[:, None, None, None], a, b)


def keep(s, rows):
    """Keeps these rows in every attribute of `s`."""
    for name, value in vars(s).items():
        setattr(s, name, value[rows])


ATTACKS = {"PGD": pgd, "APGD-CE": apgd, "APGD-T": apgd, "FAB-T": fab, "Square": square}


# Command line


def main():
    args = parse_args()
    device = train.start_process()
    torch.set_float32_matmul_precision("highest")  # rounding decides no verdict
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    results = {path: evaluate_checkpoint(path, args, device) for path in args.checkpoints}
    if RANK == 0:
        print_table(results, args)
    train.leave_processes()


def evaluate_checkpoint(path, args, device):
    """The result of one checkpoint on its own evaluation images. The file beside it keeps how far it has come, at last
    the result: an evaluation with the same settings goes on from there."""
    sha256 = train.from_rank_zero(lambda: file_sha256(path))
    model, config = train.load_checkpoint(path, device)
    dataset = train.load_evaluation_set(config, args.data_dir)
    if args.num_images > len(dataset):
        raise ValueError(f"--num-images {args.num_images}: there are {len(dataset)} images")
    images, labels = train.evaluation_images(dataset, args.num_images)
    x, y = images.to(device).float() / 255, labels.to(device)
    settings = {"sha256": sha256, "images_sha256": hashlib.sha256(images.numpy()).hexdigest(), "attack": args.attack,
                "radii": args.eps, "steps": args.steps, "restarts": args.restarts, "num_images": args.num_images}
    file = result_path(path, args)
    saved = train.from_rank_zero(lambda: json.loads(file.read_bytes()) if file.exists() else {})
    if saved.get("images_sha256", settings["images_sha256"]) != settings["images_sha256"]:
        raise ValueError(f"{file} is of other images: move it away")
    begun = all(saved.get(name) == value for name, value in settings.items())
    if begun and "radius" not in saved:  # which the progress has, and the result has not
        if RANK == 0:
            print(f"{file} has the result: remove it to repeat the evaluation")
        warn(saved["warnings"], f"{path}: ")
        return saved

    logits = predict(model, x, args.batch_size)
    progress = saved if begun else {"radius": first_radius(logits, y).tolist(), "done": 0, "after": {}}
    radius, after = run_stages(model, x, y, likeliest_others(logits), settings, progress, file, args)
    lines = signs_of_failure(model, x, y, logits, args.batch_size)
    if config["epoch"] < config["epochs"]:
        lines.append(f"trained for {config['epoch']} of {config['epochs']} epochs")
    parent = config["parent"]
    if parent and parent.get("epoch", parent["epochs"]) < parent["epochs"]:  # older runs did not note it
        lines.append(f"its --init was trained for {parent['epoch']} of {parent['epochs']} epochs")
    if config["val_images"]:
        lines.append(f"on the training images that --val-images {config['val_images']} held out, not on test images")
    if any(a > b for a, b in zip(after.get("FAB-T", []), after.get("Square", []))):
        lines.append("Square, which follows no gradient, broke images after the attacks that do had given up: the "
                     "gradient may mislead them")
    result = settings | {
        "checkpoint": str(path), "clean_accuracy": accuracy(radius, 0),
        "robust_accuracy": [accuracy(radius, eps) for eps in args.eps], "after": after, "warnings": lines,
        # For each ε, image by image: 1 where it stands. Models that met the same images can be compared in pairs.
        "standing": ["".join(map(str, (radius > eps).int().tolist())) for eps in args.eps], "config": config}
    write_json(file, result)
    warn(lines, f"{path}: ")
    return result


def run_stages(model, x, y, targets, settings, progress, file, args):
    """`radius` after all stages, and the accuracies (%) after each attack; `progress` has them after some stages."""
    stages, options = [], {}
    if args.attack == "pgd":
        stages, options = pgd_stages(args.eps, args.restarts), {"steps": args.steps}
    elif args.attack == "autoattack":
        stages = standard_stages(args.eps, targets.shape[1])
    write_json(file, settings | progress)  # before the first attack: it may take hours, and the folder be read-only
    radius, after = torch.tensor(progress["radius"], dtype=torch.double, device=x.device), progress["after"]
    bar = tqdm(stages[progress["done"]:], desc=str(file.parent), initial=progress["done"], total=len(stages),
               leave=False, unit=" attacks", disable=train.NO_BAR)
    for done, stage in enumerate(bar, start=progress["done"] + 1):
        name, eps, _ = stage
        bar.set_postfix_str(f"{accuracy(radius, eps):.2f} % left for {name} at {255 * eps:.3g}/255")
        radius, _ = run_stage(stage, model, x, y, targets, radius, batch_size=args.batch_size, rank=RANK,
                              world_size=WORLD_SIZE, **options)
        after[name] = [accuracy(radius, eps) for eps in args.eps]
        write_json(file, settings | {"radius": radius.tolist(), "done": done, "after": after})
    return radius, after


def file_sha256(path):
    """Which checkpoint a result is of."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def result_path(path, args):
    """runs/x/autoattack-500-eps4-8.json for runs/x/checkpoint.pt at 4/255 and 8/255, runs/x/best-... for best.pt."""
    stem = "" if path.name == "checkpoint.pt" else path.name.removesuffix(".pt") + "-"
    radii = "-eps" + "-".join(f"{255 * eps:g}" for eps in args.eps) if args.eps else ""
    if args.sweep is not None:
        radii = f"-sweep{args.sweep}"
    return path.with_name(f"{stem}{args.name.replace('-', '').lower()}-{args.num_images}{radii}.json")


def write_json(path, value):
    if RANK == 0:
        with train.atomic_write(path) as file:
            file.write(json.dumps(value, indent=1).encode() + b"\n")


def print_table(results, args):
    """One row per checkpoint, and mean ± standard deviation of those that differ in their seed, and in it alone."""
    header = [f"{args.name}, {args.num_images} images", "clean", *(f"eps={255 * eps:.3g}/255" for eps in args.eps)]
    rows, repeats = [header], {}
    for path, result in results.items():
        accuracies = [result["clean_accuracy"], *result["robust_accuracy"]]
        rows.append([str(path), *(f"{value:.2f}" for value in accuracies)])
        setting = json.dumps([train.experiment(result["config"]), result["images_sha256"]])
        repeats.setdefault(setting, []).append((str(path), result["config"]["seed"], accuracies))
    for repeat in repeats.values():
        paths, seeds, accuracies = zip(*repeat)
        if len(repeat) > 1 and len({*seeds}) == len(seeds):
            rows.append([f"{os.path.commonprefix(paths)}*, {len(seeds)} seeds",
                         *(f"{np.mean(a):.2f} ± {np.std(a, ddof=1):.2f}" for a in zip(*accuracies))])
    if args.sweep is not None:
        rows = list(zip(*rows))  # one row per ε
    for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]:
        print("|", " | ".join(row), "|", flush=True)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("checkpoints", nargs="+", type=train.checkpoint_path, metavar="CHECKPOINT",
        help="checkpoint.pt of train.py, or its folder")
    add("--attack", default="pgd", choices=["clean", "pgd", "autoattack"],
        help="autoattack is its standard version, complete: APGD-CE, APGD-T, FAB-T and Square")
    radii = parser.add_mutually_exclusive_group()
    radii.add_argument("--eps", nargs="+", type=train.zero_to_one, metavar="E",
                       help="radii of the L∞ ball, in pixels of [0, 1]; by default 1/255 2/255 4/255")
    radii.add_argument("--sweep", type=train.count, metavar="N", help="0/255, 1/255, ... N/255 in the place of --eps")
    add("--steps", default=10, type=train.count, metavar="N", help="pgd: steps, of size 2.5ε/N")
    add("--restarts", default=1, type=train.count, metavar="N", help="pgd: random starts")
    add("--num-images", default=1000, type=train.count, metavar="N", help="images, the classes in equal parts")
    add("--batch-size", default=256, type=train.count, metavar="N", help="images per process and forward pass")
    add("--data-dir", type=train.path_type, metavar="DIR", help="where the data are, if not where training found them")
    args = parser.parse_args()
    if args.attack != "pgd":  # only PGD has them: a changed --steps must not begin another attack anew
        args.steps, args.restarts = parser.get_default("steps"), parser.get_default("restarts")
    if args.attack == "clean":
        args.eps, args.sweep = [], None
    elif args.sweep is not None:
        args.eps = [k / 255 for k in range(args.sweep + 1)]
    elif args.eps is None:
        args.eps = [1 / 255, 2 / 255, 4 / 255]
    args.name = attack_name(vars(args))
    return args


def attack_name(settings):
    """As tables and pictures have it: PGD-20, PGD-100x3 with three restarts, AutoAttack."""
    if settings["attack"] != "pgd":
        return {"clean": "clean", "autoattack": "AutoAttack"}[settings["attack"]]
    restarts = settings["restarts"]
    return f"PGD-{settings['steps']}" + (f"x{restarts}" if restarts > 1 else "")


if __name__ == "__main__":
    main()
