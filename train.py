"""Train an image classifier by natural, GradNorm or PGD adversarial training.

    python train.py --method gradnorm                                          # a laptop: CPU or one GPU
    torchrun --nproc_per_node=8 train.py --method gradnorm                     # one machine, 8 GPUs
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ...

The file reads top to bottom: the three methods, the training loop, then what they stand on: evaluation, data, model,
checkpoints, and the command line. A run writes into --output-dir:

    checkpoint.pt         all that --resume needs; train.load_checkpoint gives the model
    metrics.jsonl         one JSON object per epoch
    gradients/0001.pt     the loss-input gradients of a few fixed images after epoch 1, and so on
"""

import argparse
import contextlib
import gzip
import json
import math
import os
import pickle
import sys
import tempfile
import time
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from tqdm import tqdm

from gradnorm import (
    gradnorm_loss,
    gradnorm_loss_finite_difference,
    input_gradient,
    pgd_attack,
)

RANK, LOCAL_RANK, WORLD_SIZE = (int(os.environ.get(name, default))  # set by torchrun
                                for name, default in [("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)])


class Objective(nn.Module):
    """The three methods, each a map from images and targets to the loss to minimise.

    A module, so that DDP and torch.compile wrap all of it: attacks and inner gradients call the bare model inside, and
    only the one final `.backward()` meets DDP's hooks.
    """

    def __init__(self, model, args):
        super().__init__()
        self.model, self.args = model, args

    def forward(self, x, y, method, ramp, grad_scale=1.0):
        """The loss, and, detached, its terms: cross-entropy and penalty. `method` is this step's: in a training by
        another method some steps are natural, and --penalty alternating has a "first half" and a "second half".
        `ramp` rises from 0 to 1 in the warm-up."""
        args = self.args
        # With the penalty in every K-th step alone, K times the weight keeps its mean.
        lambda_gn = args.lambda_gn * args.gradnorm_every * ramp
        h = step_of_difference(args)
        if method == "gradnorm":
            loss = gradnorm_loss
            if args.penalty == "finite-difference":
                loss = partial(gradnorm_loss_finite_difference, h=h)
            return loss(self.model, x, y, lambda_ce=args.lambda_ce, lambda_gn=lambda_gn, eps=args.eps,
                        grad_scale=grad_scale, return_terms=True)
        if method == "adversarial":  # the paper's step for PGD-3 is 2ε/3
            x = pgd_attack(self.model, x, y, eps=args.eps, steps=args.steps,
                           step_size=2 * args.eps / max(args.steps, 1) * ramp, grad_scale=grad_scale)
        cross_entropy = F.cross_entropy(self.model(x).float(), y)
        value, zero = cross_entropy.detach(), torch.zeros_like(ramp)
        # λ_CE L(x) + λ_GN ε (L(x + h·s) - L(x)) / h, by its two terms
        if method == "first half":
            return (args.lambda_ce - lambda_gn * args.eps / h) * cross_entropy, value, -args.eps / h * value
        if method == "second half":
            return lambda_gn * args.eps / h * cross_entropy, zero, args.eps / h * value
        return args.lambda_ce * cross_entropy if args.method == "gradnorm" else cross_entropy, value, zero


def step_of_difference(args):
    return args.h or args.eps / 2


def train(args, checkpoint, device):
    """The loop: epochs of optimiser steps, each epoch closed by an evaluation and a checkpoint."""
    train_set, test_set, model = load_data_and_model(args, checkpoint)
    model.to(device)
    loader = make_loader(train_set, args, pin_memory=device.type == "cuda")
    mix = mixup_or_cutmix(len(train_set.classes)) if args.augment == "strong" else lambda x, y: (x, y)
    eval_images, eval_labels = held_out(test_set, args.eval_images, RANK, WORLD_SIZE)
    steps_per_epoch = len(loader) // args.accumulate
    warmup_steps, total_steps = round(args.warmup_epochs * steps_per_epoch), args.epochs * steps_per_epoch

    objective = Objective(model, args)
    if args.compile:
        objective.compile()
    if WORLD_SIZE > 1:
        objective = DistributedDataParallel(objective, device_ids=[LOCAL_RANK] if device.type == "cuda" else None)
    optimizer = build_optimizer(model, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    ema = None
    if args.ema_decay:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay), use_buffers=True)

    epoch, metrics = 0, []
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        if ema:
            ema.load_state_dict(checkpoint["ema"])
        epoch, metrics = checkpoint["epoch"], checkpoint["metrics"]
    check_epoch(epoch)
    config = vars(args) | {"classes": train_set.classes, "channels": eval_images.shape[1], "world_size": WORLD_SIZE}
    output_dir = Path(args.output_dir)
    if RANK == 0:
        make_writable(output_dir / "gradients")
        print(f"{args.method} training of {args.model} on {args.dataset}: {len(train_set)} images, "
              f"{len(train_set.classes)} classes, {WORLD_SIZE} process(es) on {device.type}; {output_dir} "
              + (f"from epoch {epoch + 1} to {args.epochs}" if epoch < args.epochs else "is finished"), flush=True)

    while epoch < args.epochs:
        # Every epoch is a function of (seed, epoch, rank): a resumed run needs no random state but these.
        torch.manual_seed(int(np.random.SeedSequence([args.seed, epoch, RANK]).generate_state(1)[0]))
        loader.sampler.set_epoch(epoch)
        train_mode(model, args.freeze_bn and epoch >= args.natural_epochs)
        sums = torch.zeros(5, device=device)
        start = time.perf_counter()
        batches = iter(loader)
        for step in tqdm(range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch), leave=False,
                         desc=f"epoch {epoch + 1}/{args.epochs}", disable=True if RANK else None):
            lr = learning_rate(step, warmup_steps, total_steps, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            one = torch.ones((), device=device)
            ramp = one * min(1.0, step / max(warmup_steps, 1))
            between_penalties = args.method == "gradnorm" and step % args.gradnorm_every > 0
            method = "natural" if epoch < args.natural_epochs or between_penalties else args.method
            batch = []
            for _ in range(args.accumulate):
                x, y = next(batches)
                x, y = x.to(device, non_blocking=True).float() / 255, y.to(device, non_blocking=True)
                batch.append(mix(x, y))
            terms, norm = update(objective, optimizer, scaler, batch, method, ramp, args)
            terms = torch.cat([terms, torch.stack([one, one * (method == "gradnorm")])])
            sums += torch.where(terms.isfinite().all(), terms, 0)  # GradScaler has skipped an overflow
            # DDP averages a nan into every rank's gradients: all ranks stop here together.
            if not norm.isfinite() and not (scaler.is_enabled() and scaler.get_scale() >= 1):
                fail(f"not finite in epoch {epoch + 1}, step {step + 1}: loss {terms[0].item()}, norm of its gradient "
                     f"{norm.item()}; lower --lr or --lambda-gn. The last good checkpoint stays in {output_dir}", 1)
            if ema:
                ema.update_parameters(model)
        seconds = time.perf_counter() - start
        epoch += 1

        if WORLD_SIZE > 1:
            dist.all_reduce(sums)
        loss, cross_entropy, penalty, count, regularised = sums.tolist()
        if not count:
            fail(f"fp16 overflowed in every step of epoch {epoch}: use --amp bf16, or lower --lr", 1)
        images = steps_per_epoch * args.accumulate * args.batch_size * WORLD_SIZE
        metrics.append({"epoch": epoch, "loss": loss / count, "cross_entropy": cross_entropy / count,
                        "penalty": penalty / regularised if regularised else None, "lr": lr,
                        "seconds": seconds, "images_per_second": images / seconds,
                        **evaluate(model, eval_images, eval_labels, args.eps, args.batch_size, device)})
        if ema:
            averaged = evaluate(ema.module, eval_images, eval_labels, args.eps, args.batch_size, device)
            metrics[-1] |= {f"ema_{name}": value for name, value in averaged.items()}
        if RANK == 0:  # the checkpoint last: whatever a kill leaves without one is written anew
            save_gradients(output_dir / f"gradients/{epoch:04d}.pt", (ema.module if ema else model).eval(),
                           eval_images[:4], eval_labels[:4], device)
            with replace(output_dir / "metrics.jsonl") as file:
                file.writelines(json.dumps(line).encode() + b"\n" for line in metrics)
            with replace(output_dir / "checkpoint.pt") as file:
                torch.save({"model": model.state_dict(), "ema": ema.state_dict() if ema else None,
                            "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                            "epoch": epoch, "metrics": metrics, "config": config}, file)
            print_epoch(metrics[-1], args.epochs)


def update(objective, optimizer, scaler, batch, method, ramp, args):
    """One step of the optimiser on a batch, a list of --accumulate pairs (x, y); two with --penalty alternating.

    Returns the terms, mean loss, cross-entropy and penalty (3,), and the norm of the gradient before it was clipped.
    """
    if method == "gradnorm" and args.penalty == "alternating":
        batch = [(x.requires_grad_(), y) for x, y in batch]
        terms, norm = update(objective, optimizer, scaler, batch, "first half", ramp, args)
        # The backward pass of L(x) that moved the weights has left ∇x L as well: s costs nothing.
        batch = [(x.detach() + step_of_difference(args) * x.grad.sign(), y) for x, y in batch]
        more_terms, more_norm = update(objective, optimizer, scaler, batch, "second half", ramp, args)
        return terms + more_terms, torch.maximum(norm, more_norm)

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[args.amp]
    sums = torch.zeros(3, device=ramp.device)
    for i, (x, y) in enumerate(batch):
        # The inner gradient is that of one example's loss, N times the scaled loss's.
        grad_scale = scaler.scale(torch.ones_like(ramp)) / len(x) if scaler.is_enabled() else 1.0
        with contextlib.nullcontext() if i == len(batch) - 1 or WORLD_SIZE == 1 else objective.no_sync():
            with torch.autocast(x.device.type, dtype, enabled=args.amp != "off"):
                loss, cross_entropy, penalty = objective(x, y, method, ramp, grad_scale)
            scaler.scale(loss / len(batch)).backward()
        sums += torch.stack([loss.detach(), cross_entropy, penalty]) / len(batch)
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, args.clip_grad_norm or math.inf)
    scaler.step(optimizer)  # skips a step whose fp16 gradients overflowed
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return sums, norm


def learning_rate(step, warmup_steps, total_steps, peak, floor=1e-5):
    """Linear warm-up from `floor` to `peak`, then half a cosine down to `floor`; the paper's floor is 1e-5."""
    floor = min(floor, peak)
    if step < warmup_steps:
        return floor + (peak - floor) * step / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


def build_optimizer(model, args):
    """AdamW or SGD with momentum; norms and biases, the parameters of one dimension, are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.weight_decay},
              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=args.lr)
    return torch.optim.SGD(groups, lr=args.lr, momentum=0.9)


def is_batchnorm(module):
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def train_mode(model, freeze_bn):
    """Train mode, but for BatchNorm in eval mode with `freeze_bn`: its statistics stay as they are."""
    model.train()
    if freeze_bn:
        for module in filter(is_batchnorm, model.modules()):
            module.eval()


# Evaluation


def evaluate(model, images, labels, eps, batch_size, device):
    """Clean and PGD-10 accuracy (%) and mean ‖∇x L‖₁ (pixels in [0, 1]), over the images of all ranks.

    `images` are this rank's, (N, C, H, W) uint8. PGD starts from the same random points in every epoch.
    """
    model.eval()
    torch.manual_seed(RANK)
    sums = torch.zeros(4, device=device)
    for x, y in zip(images.split(batch_size), labels.split(batch_size)):
        x, y = x.to(device).float() / 255, y.to(device)
        gradient_norm = input_gradient(model, x, y).abs().sum()
        adversarial = pgd_attack(model, x, y, eps=eps, steps=10)
        with torch.no_grad():
            clean = model(x).argmax(1) == y
            robust = clean & (model(adversarial).argmax(1) == y)
        sums += torch.stack([clean.sum(), robust.sum(), gradient_norm, torch.tensor(len(x), device=device)])
    if WORLD_SIZE > 1:
        dist.all_reduce(sums)
    clean, robust, gradient_norm, count = sums.tolist()
    return {"clean_accuracy": 100 * clean / count, "pgd10_accuracy": 100 * robust / count,
            "gradient_norm": gradient_norm / count}


def save_gradients(path, model, images, labels, device):
    """What the picture of gradient against epoch needs; bfloat16 keeps the range of float32 in half its size."""
    gradients = input_gradient(model, images.to(device).float() / 255, labels.to(device))
    with replace(path) as file:
        torch.save({"images": images, "labels": labels, "gradients": gradients.bfloat16().cpu()}, file)


def print_epoch(line, epochs):
    penalty = "" if line["penalty"] is None else f" penalty {line['penalty']:.4f}"
    ema = ""
    if "ema_clean_accuracy" in line:
        ema = f" (EMA: {line['ema_clean_accuracy']:.2f}, {line['ema_pgd10_accuracy']:.2f})"
    print(f"epoch {line['epoch']}/{epochs}  loss {line['loss']:.4f} cross-entropy {line['cross_entropy']:.4f}{penalty} "
          f" clean {line['clean_accuracy']:.2f} PGD-10 {line['pgd10_accuracy']:.2f}{ema} "
          f" |grad| {line['gradient_norm']:.2f}  lr {line['lr']:.1e}  {line['seconds']:.1f} s "
          f" {line['images_per_second']:.0f} images/s", flush=True)


# Data


def load_data_and_model(args, checkpoint):
    """The training set, the held-out set and the model; stops with one line where these do not fit each other."""
    with rank_zero_first():
        train_set, test_set = load_dataset(args, train=True), load_dataset(args, train=False)
        image, classes = train_set[0][0], train_set.classes
        if test_set.classes != classes:
            fail(f"train/ has the classes {classes}, val/ {test_set.classes}: they must be the same")
        if checkpoint and checkpoint["config"]["classes"] != classes:
            fail(f"the data have {len(classes)} classes, not the {len(checkpoint['config']['classes'])} of the "
                 "checkpoint: resume with the same --data-dir")
        images_per_step = args.batch_size * args.accumulate * WORLD_SIZE
        if images_per_step > len(train_set):
            fail(f"--batch-size {args.batch_size} x --accumulate {args.accumulate} x {WORLD_SIZE} processes is "
                 f"{images_per_step}, more than the {len(train_set)} training images: lower --batch-size")
        try:
            model = build_model(args.model, image.shape[0], len(classes), args.activation,
                                pretrained=args.pretrained and not checkpoint)
        except OSError as error:
            fail(f"--pretrained: cannot download the weights of {args.model} ({error})")
        check_model(model, args, image)
    return train_set, test_set, model


def make_loader(train_set, args, pin_memory):
    """Batches of shuffled images, (N, C, H, W) uint8, and targets; each rank has its share, which set_epoch draws."""
    sampler = DistributedSampler(train_set, WORLD_SIZE, RANK, seed=args.seed, drop_last=True)
    batches_at_once = {"num_workers": 0, "collate_fn": lambda batch: batch}
    return DataLoader(train_set, args.batch_size, sampler=sampler, drop_last=True, pin_memory=pin_memory,
                      **batches_at_once if isinstance(train_set, Images) else {"num_workers": args.workers})


def held_out(test_set, n, rank=0, world_size=1):
    """A rank's share of n images (n, C, H, W) uint8 and their targets: always the same, the classes in equal parts."""
    chosen = balanced_subset(test_set.targets, n)[rank::world_size]
    return torch.stack([test_set[i][0] for i in chosen]), torch.as_tensor(test_set.targets)[chosen]


class Images(Dataset):
    """A data set in memory: images (N, C, H, W) uint8, targets (N,), the names of the classes."""

    def __init__(self, images, targets, classes, transform=None):
        self.images, self.targets, self.classes, self.transform = images, targets, classes, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], self.targets[i]

    def __getitems__(self, indices):
        """A whole batch at once, for the loader; the transform draws anew for each image."""
        images = self.images[indices]
        if self.transform:
            images = torch.stack([self.transform(image) for image in images])
        return images, self.targets[indices]


class BadImage(Exception):
    """An image file that cannot be read."""


def load_dataset(args, train):
    """The images to train on, or those held out: the test part of --dataset, or with --val-images as many of its
    training images, the classes in equal parts. Of (image (C, H, W) uint8, class index)."""
    dataset = load_part(args, train or args.val_images > 0, augment=train)
    if not args.val_images:
        return dataset
    if args.val_images >= len(dataset):
        fail(f"--val-images {args.val_images}: there are {len(dataset)} training images")
    chosen = balanced_subset(dataset.targets, args.val_images).numpy()
    if train:  # on all the others
        chosen = np.setdiff1d(np.arange(len(dataset)), chosen)
    if isinstance(dataset, Images):
        return Images(dataset.images[chosen], dataset.targets[chosen], dataset.classes, dataset.transform)
    dataset.samples = [dataset.samples[i] for i in chosen]
    dataset.targets = [dataset.targets[i] for i in chosen]
    return dataset


def load_part(args, train_part, augment):
    if args.dataset == "imagefolder":
        return load_image_folder(args, train_part, augment)
    if args.dataset == "shapes":
        images, targets, classes = draw_shapes(20_000, seed=0) if train_part else draw_shapes(2_000, seed=1)
    else:
        folder = Path(args.data_dir or "data")
        try:
            if args.dataset == "fashion-mnist":
                images, targets, classes = load_fashion_mnist(folder, train_part)
            else:
                data = torchvision.datasets.CIFAR10(folder, train_part, download=True)
                images, targets, classes = torch.from_numpy(data.data).permute(0, 3, 1, 2), data.targets, data.classes
        except (OSError, RuntimeError, EOFError, ValueError) as error:
            debian = f" or {DEBIAN} (apt-get install dataset-fashion-mnist)" * (args.dataset == "fashion-mnist")
            fail(f"cannot find {args.dataset} in {folder.absolute()}{debian}, nor download it ({error}): "
                 "put it there or name its place with --data-dir")
    size = images.shape[-1]
    transform = train_transform(args, size, v2.RandomCrop(size, padding=size // 8)) if augment else None
    return Images(images.contiguous(), torch.as_tensor(targets), classes, transform)


DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def load_fashion_mnist(folder, train_part):
    """Fashion-MNIST from the four idx .gz files in `folder` or where Debian puts them, or else from torchvision."""
    classes = torchvision.datasets.FashionMNIST.classes
    part = "train" if train_part else "t10k"
    for place in (folder, DEBIAN):
        if (place / f"{part}-images-idx3-ubyte.gz").exists():
            with gzip.open(place / f"{part}-images-idx3-ubyte.gz") as file:
                images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
            with gzip.open(place / f"{part}-labels-idx1-ubyte.gz") as file:
                targets = np.frombuffer(file.read(), np.uint8, offset=8)
            return torch.from_numpy(images.copy()), targets.astype(np.int64), classes
    data = torchvision.datasets.FashionMNIST(folder, train_part, download=True)
    return data.data[:, None], data.targets, classes


def load_image_folder(args, train_part, augment):
    """--data-dir/train or val, one folder of image files per class, as ImageNet has it."""
    if not args.data_dir:
        fail("--dataset imagefolder needs --data-dir, which holds train/ and val/, each with a folder per class")
    folder, size = Path(args.data_dir) / ("train" if train_part else "val"), args.image_size
    transform = train_transform(args, size, v2.RandomResizedCrop(size)) if augment else None
    transform = transform or v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)])
    try:
        return torchvision.datasets.ImageFolder(folder, v2.Compose([v2.PILToTensor(), transform]), loader=read_image)
    except OSError as error:
        fail(f"no images in {folder.absolute()} ({error}): --data-dir must hold train/ and val/, each with a folder "
             "per class")


def read_image(path):
    try:
        return torchvision.datasets.folder.pil_loader(path)
    except (OSError, SyntaxError, ValueError) as error:  # what PIL raises on a bad file
        raise BadImage(f"cannot read the image {path} ({error}): mend or remove it") from None


def train_transform(args, size, crop):
    """--augment for one image (C, H, W) uint8. Strong is the paper's; its mixup and cutmix follow per batch."""
    if args.augment == "none":
        return None
    if args.augment == "basic":
        return v2.Compose([crop, v2.RandomHorizontalFlip()])
    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.RandAugment(magnitude=9),
                       v2.ColorJitter(0.4, 0.4, 0.4), v2.RandomErasing(0.25, value="random")])


def mixup_or_cutmix(classes, smoothing=0.1):
    """The paper's mixup 0.8 or cutmix 1.0, each for half of the batches, and label smoothing: targets turn soft."""
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=classes), v2.CutMix(alpha=1.0, num_classes=classes)])

    def augment(x, y):
        x, y = mix(x, y)
        return x, y * (1 - smoothing) + smoothing / classes

    return augment


def balanced_subset(targets, n):
    """Indices of n images in a fixed, shuffled order in which the classes take turns."""
    targets = torch.as_tensor(targets)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    by_class = order[targets[order].argsort(stable=True)]
    turn = torch.cat([torch.arange(count) for count in targets.bincount().tolist()])
    return by_class[turn.argsort(stable=True)][:n]


def draw_shapes(n, seed, size=32):
    """`shapes`, the embedded data set: ten anti-aliased shapes of random colour, place, size and rotation on a shaded,
    noisy background. Images (n, 3, size, size) uint8, targets (n,), the names of the classes."""
    rng = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return torch.empty(n, *shape).uniform_(low, high, generator=rng)

    # Each shape by its signed distance (negative inside), in units of its radius.
    corner = math.sqrt(3) / 2

    def bar(x, y):
        return torch.maximum(x.abs() - 1, y.abs() - 0.3)

    def star(x, y):
        angle = torch.atan2(y, x).remainder(math.tau / 5) - math.tau / 10
        radius = torch.hypot(x, y)
        return (0.588 * (radius * angle.cos() - 0.42) - 0.389 * radius * angle.sin().abs()) / 0.705

    def heart(x, y):
        return torch.minimum((x.abs() + y.abs()) / math.sqrt(2), torch.hypot(x.abs() - 0.354, y - 0.354)) - 0.5

    distances = {
        "disc": lambda x, y: torch.hypot(x, y) - 0.9,
        "ring": lambda x, y: (torch.hypot(x, y) - 0.75).abs() - 0.2,
        "half-disc": lambda x, y: torch.maximum(torch.hypot(x, y) - 1, y),
        "crescent": lambda x, y: torch.maximum(torch.hypot(x, y) - 1, 0.75 - torch.hypot(x - 0.5, y)),
        "triangle": lambda x, y: torch.maximum(-y, y / 2 + corner * x.abs()) - 0.5,
        "square": lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.75,
        "bar": bar,
        "cross": lambda x, y: torch.minimum(bar(x, y), bar(y, x)),
        "star": star,
        "heart": heart,
    }
    targets = torch.randperm(n, generator=rng) % len(distances)
    radius, angle = uniform(0.6, 0.85, 1, 1), uniform(-0.5, 0.5, 1, 1)
    axis = torch.linspace(-1, 1, size)
    x = (axis - uniform(-0.2, 0.2, 1, 1)) / radius
    y = (axis[:, None] - uniform(-0.2, 0.2, 1, 1)) / radius
    x, y = x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()
    distance = torch.empty(n, size, size)
    for target, signed_distance in enumerate(distances.values()):
        chosen = targets == target
        distance[chosen] = signed_distance(x[chosen], y[chosen])
    coverage = torch.sigmoid(-2 * distance * radius * size / 2)[:, None]  # an edge about a pixel wide

    background = uniform(0, 1, 3, 1, 1)
    colour = (background + uniform(0.2, 0.4, 3, 1, 1)) % 1  # apart by at least 0.2 in each channel
    slope = uniform(-0.1, 0.1, 2, 1, 1)
    images = background + (slope[:, :1] * axis + slope[:, 1:] * axis[:, None])
    images = images + coverage * (colour - images) + 0.02 * torch.randn(n, 3, size, size, generator=rng)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), targets, list(distances)


# Model


class ConvNet(nn.Module):
    """The small default: 4x4 patches, three residual blocks, 0.1 M parameters. GroupNorm of one group normalises each
    example by itself, and GELU is smooth: both are what GradNorm needs."""

    def __init__(self, channels, classes, width=64, blocks=3):
        super().__init__()
        self.patches = nn.Conv2d(channels, width, kernel_size=4, stride=4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(1, width), nn.GELU(), nn.Conv2d(width, width, kernel_size=3, padding=1))
            for _ in range(blocks))
        self.norm, self.act = nn.GroupNorm(1, width), nn.GELU()
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.patches(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.act(self.norm(x)).mean((2, 3)))


class Normalize(nn.Module):
    """The first layer of every model, which therefore takes pixels in [0, 1]. A grey image becomes an RGB one where the
    mean has three channels."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x):
        return (x - self.mean) / self.std


ACTIVATIONS = {"gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU}


def build_model(name, channels, classes, activation=None, pretrained=False):
    """A model from pixels (N, `channels`, H, W) to logits (N, `classes`): ConvNet, or torchvision's of that name with
    ImageNet's normalisation. `activation` replaces every ReLU, GELU and SiLU module."""
    if name == "convnet":
        model = nn.Sequential(Normalize([0.5] * channels, [0.25] * channels), ConvNet(channels, classes))
    else:
        if pretrained:
            network = torchvision.models.get_model(name, weights="DEFAULT")
            head, module = [(n, m) for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
            if module.weight.shape[0] != classes:  # a fresh head, unless the data have ImageNet's 1000 classes
                fresh = (nn.Linear(module.in_features, classes) if isinstance(module, nn.Linear) else
                         nn.Conv2d(module.in_channels, classes, module.kernel_size))
                network.set_submodule(head, fresh)
        else:
            network = torchvision.models.get_model(name, num_classes=classes)
        model = nn.Sequential(Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), network)
    for module in list(model.modules()):
        # No dropout and no drop-path, as in the paper: the penalty and the attack must see the function of the loss.
        if isinstance(module, (nn.Dropout, torchvision.ops.StochasticDepth)):
            module.p = 0.0
        for child_name, child in module.named_children():
            if activation and isinstance(child, tuple(ACTIVATIONS.values())):
                setattr(module, child_name, ACTIVATIONS[activation]())
    return model


def check_model(model, args, image):
    """Stop here, not in the middle of the first step, if the model does not fit the settings or such an image."""
    if args.activation and not any(isinstance(module, ACTIVATIONS[args.activation]) for module in model.modules()):
        fail(f"--activation {args.activation}: {args.model} has no ReLU, GELU or SiLU module to replace")
    if args.compile and args.method != "natural" and not args.freeze_bn and any(map(is_batchnorm, model.modules())):
        fail(f"--compile cannot trace the inner gradient of {args.model} while BatchNorm updates its statistics: "
             "add --freeze-bn")
    try:
        with torch.no_grad():
            model.eval()(image[None].float() / 255)
    except (RuntimeError, AssertionError, ValueError) as error:
        fail(f"{args.model} does not take images of {tuple(image.shape)} (channels, height, width): {error}")


# Benchmark


def benchmark(args, device):
    """What a step of each method costs: a Markdown table of time, its ratios, FLOPs and memory, and the same as JSON.

    A round makes one step of each (K steps where the penalty is in every K-th), all on the same weights and the same
    batch, so that a slow moment of the machine meets them all. Ratios are taken within a round. The table has medians,
    and of the ratios the quartiles too.
    """
    if args.output_dir:
        make_writable(Path(args.output_dir))
    train_set, _, model = load_data_and_model(args, None)
    x, y = next(iter(make_loader(train_set, args, pin_memory=False)))
    x, y = x.to(device).float() / 255, y.to(device)
    model.to(device)
    # One optimiser for all, at a learning rate of 0: the same work, and the weights stay as they are.
    optimizer = build_optimizer(model, argparse.Namespace(**vars(args) | {"lr": 0.0}))

    methods = {"natural": {"method": "natural", "gradnorm_every": 1}}
    for every in sorted({1, args.gradnorm_every}):
        for penalty in ("double-backprop", "finite-difference", "alternating"):
            name = f"GradNorm, {penalty.replace('-', ' ')}" + f", every {every} steps" * (every > 1)
            methods[name] = {"method": "gradnorm", "penalty": penalty, "gradnorm_every": every}
    adversarial = f"adversarial, PGD-{args.steps}"
    methods[adversarial] = {"method": "adversarial", "gradnorm_every": 1}

    steps, seconds, rows = {}, {name: [] for name in methods}, {name: {} for name in methods}
    for name, settings in methods.items():
        eager = argparse.Namespace(**vars(args) | settings | {"compile": False})
        with FlopCounterMode(display=False) as counter:
            counter.mod_tracker.__exit__()  # its hooks on modules refuse autograd.grad with respect to the input
            make_step(eager, model, optimizer, x, y)()
        rows[name]["flops"] = counter.get_total_flops() / eager.gradnorm_every
        steps[name] = make_step(argparse.Namespace(**vars(args) | settings), model, optimizer, x, y)
        for _ in range(2):  # warm-up: compilation, and the allocator's growth
            steps[name]()
        rows[name]["peak_memory"] = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            steps[name]()
            rows[name]["peak_memory"] = torch.cuda.max_memory_allocated()
        elif sys.platform == "linux" and not args.compile:
            with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
                rows[name]["peak_memory"] = pool.apply(grown_memory, (eager, x.shape, len(train_set.classes)))

    for _ in tqdm(range(args.benchmark), desc="rounds", leave=False, disable=None):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - start) / methods[name]["gradnorm_every"])

    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.model} on {args.dataset}, batches of {tuple(x.shape)}, {machine}, torch {torch.__version__}, "
          f"amp {args.amp}{', compiled' * args.compile}; median (quartiles) of {args.benchmark} rounds\n\n"
          f"| a step of | ms | time / natural | time / PGD-{args.steps} | FLOPs / natural | images/s | memory, MiB |\n"
          "|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        row |= {"seconds": float(np.median(seconds[name])), "flops_to_natural": row["flops"] / rows["natural"]["flops"]}
        for ratio, other in ("to_natural", "natural"), ("to_adversarial", adversarial):
            row[ratio] = np.quantile(np.divide(seconds[name], seconds[other]), [0.5, 0.25, 0.75]).tolist()
        to_natural, to_adversarial = ("{:.2f} ({:.2f} to {:.2f})".format(*row[ratio])
                                      for ratio in ("to_natural", "to_adversarial"))
        memory = "-" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:.0f}"
        print(f"| {name} | {1e3 * row['seconds']:.1f} | {to_natural} | {to_adversarial} "
              f"| {row['flops_to_natural']:.2f} | {len(x) / row['seconds']:.0f} | {memory} |")
    if args.output_dir:
        with replace(Path(args.output_dir) / "benchmark.json") as file:
            file.write(json.dumps({"machine": machine, "torch": torch.__version__, "image": list(x.shape[1:]),
                                   "rows": rows, "config": vars(args)}, indent=1).encode() + b"\n")


def make_step(args, model, optimizer, x, y):
    """A function that makes --gradnorm-every steps of training on this batch, with nothing else of the loop."""
    objective = Objective(model, args)
    if args.compile:
        objective.compile()
    scaler = torch.amp.GradScaler(x.device.type, enabled=args.amp == "fp16")
    ramp = torch.ones((), device=x.device)

    def step():
        train_mode(model, args.freeze_bn)
        for k in range(args.gradnorm_every):
            update(objective, optimizer, scaler, [(x.detach(), y)], args.method if k == 0 else "natural", ramp, args)

    return step


def grown_memory(args, shape, classes):
    """By how many bytes a fresh process, this one, has grown at its peak in three steps, the model included (Linux)."""
    def kibibytes(name):  # not getrusage's peak, which a child inherits from its parent
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))
    before = kibibytes("VmRSS")
    model = build_model(args.model, shape[1], classes, args.activation)
    step = make_step(args, model, build_optimizer(model, args), torch.rand(shape), torch.randint(classes, shape[:1]))
    for _ in range(3):
        step()
    return 1024 * (kibibytes("VmHWM") - before)


# Checkpoints


def check_epoch(epoch):
    """Stop where the machines of a resumed run see different checkpoints."""
    if WORLD_SIZE > 1:
        epochs = [None] * WORLD_SIZE
        dist.all_gather_object(epochs, epoch)
        if len(set(epochs)) > 1:
            fail(f"the processes found checkpoints of epochs {epochs}: put --output-dir on a file system of them all")


# Where a run is made; nothing of what it learns.
PLACE = {"output_dir", "resume", "data_dir", "device", "workers"}


def setting(config):
    """What two runs of one experiment, with different seeds, have in common of their configurations."""
    return {name: value for name, value in config.items() if name not in PLACE | {"seed", "eval_images"}}


def load_checkpoint(path, device="cpu"):
    """The model of a checkpoint, in eval mode, and its configuration, a dict of train.py's flags, `classes` (names) and
    `channels`. The averaged weights if it was trained with --ema-decay. Raises ValueError on any other file."""
    checkpoint = read_checkpoint(path)
    config = checkpoint["config"]
    model = build_model(config["model"], config["channels"], len(config["classes"]), config["activation"])
    if checkpoint["ema"]:
        averaged = AveragedModel(model, use_buffers=True)
        averaged.load_state_dict(checkpoint["ema"])
        model = averaged.module
    else:
        model.load_state_dict(checkpoint["model"])
    return model.eval().to(device), config


def read_checkpoint(path):
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # never unpickles code
        checkpoint["config"]["classes"], checkpoint["model"], checkpoint["epoch"]
    except FileNotFoundError:
        raise ValueError(f"no checkpoint at {path}") from None
    except (OSError, RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError,
            pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines() or [""]
        raise ValueError(f"{path} is not a checkpoint of train.py ({type(error).__name__}: {reason[0]})") from None
    return checkpoint


@contextlib.contextmanager
def replace(path):
    """A binary file to write, which takes the place of `path` at the end, whole, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def make_writable(folder, remedy="choose another --output-dir"):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        fail(f"cannot write into {folder} ({error.strerror}): {remedy}")


# Command line


def fail(message, status=2, every_rank=False):
    """End with one line on stderr, by default once per machine."""
    if LOCAL_RANK == 0 or every_rank:
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def warn(message):
    """One line on stderr, from rank 0."""
    if RANK == 0:
        print(f"{Path(sys.argv[0]).name}: warning: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def rank_zero_first():
    """The first process of each machine runs the body, which may download, before the others do."""
    if WORLD_SIZE > 1 and LOCAL_RANK > 0:
        dist.barrier()
    yield
    if WORLD_SIZE > 1 and LOCAL_RANK == 0:
        dist.barrier()


def number(kind, low, high=math.inf, above=False):
    """An argparse type: int, or float that may be a fraction such as 4/255; from `low` (or above it) to `high`."""
    def parse(text):
        try:
            value = int(text) if kind is int else float(Fraction(text))
        except (ValueError, ZeroDivisionError, OverflowError):
            value = math.nan
        if not (low < value if above else low <= value) or value > high:
            what = "an integer" if kind is int else "a number or a fraction"
            span = f"{'above' if above else 'from'} {low}" + f" up to {high}" * (high < math.inf)
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {span}")
        return value
    return parse


def parse_args():
    """The settings, and the checkpoint to resume from or None."""
    count, weight, radius = number(int, 1), number(float, 0), number(float, 0, 1, above=True)
    models = set(torchvision.models.list_models(module=torchvision.models))
    models -= {"googlenet", "inception_v3"}  # they return auxiliary logits beside the logits
    parser = argparse.ArgumentParser(
        description="Train an image classifier by natural, GradNorm or PGD adversarial training.",
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail

    add = parser.add_argument_group("method").add_argument
    add("--method", default="gradnorm", choices=["natural", "gradnorm", "adversarial"],
        help="loss to minimise: cross-entropy, L_GradNorm, or cross-entropy of PGD's images")
    add("--eps", default="4/255", type=radius, metavar="E",
        help="radius ε of the L∞ ball, in pixels of [0, 1]: of the penalty, the attack and the evaluation")
    add("--lambda-ce", default=0.8, type=weight, metavar="L", help="gradnorm: weight of the cross-entropy")
    add("--lambda-gn", default=1.2, type=weight, metavar="L", help="gradnorm: weight of the gradient norm")
    add("--penalty", default="double-backprop", choices=["double-backprop", "finite-difference", "alternating"],
        help="gradnorm: how the gradient norm is differentiated; alternating: as the finite difference, but its two "
             "terms are two steps of the optimiser")
    add("--h", type=radius, metavar="H", help="gradnorm: step of the finite difference in pixels; ε/2 if not given")
    add("--gradnorm-every", default=1, type=count, metavar="K",
        help="gradnorm: penalty in every K-th step alone, with K times the weight")
    add("--natural-epochs", default=0, type=number(int, 0), metavar="N",
        help="gradnorm, adversarial: the first N epochs are of natural training, which is cheap")
    add("--steps", default=3, type=number(int, 0), metavar="N", help="adversarial: steps of PGD, of size 2ε/N")

    add = parser.add_argument_group("data and model").add_argument
    add("--dataset", default="shapes", choices=["shapes", "fashion-mnist", "cifar10", "imagefolder"],
        help="shapes is drawn by this file, the next two are downloaded, imagefolder is any folder of images")
    add("--data-dir", metavar="DIR", help="where the data are, or go; for imagefolder it holds train/ and val/")
    add("--val-images", default=0, type=number(int, 0), metavar="N",
        help="hold N of the training images out and evaluate on these, to choose settings by; 0 evaluates on the test "
             "part (val/ of imagefolder)")
    add("--image-size", default=224, type=count, metavar="N", help="imagefolder: side of the crop in pixels")
    add("--augment", default="none", choices=["none", "basic", "strong"],
        help="basic: crop and flip; strong: the paper's recipe, with RandAugment, colour jitter, random erasing, "
             "mixup, cutmix and label smoothing")
    add("--model", default="convnet", choices=["convnet", *sorted(models)], metavar="NAME",
        help="convnet, or any classification model of torchvision, such as resnet50, swin_b or vit_b_16")
    add("--pretrained", action="store_true", help="start from torchvision's ImageNet weights")
    add("--activation", choices=list(ACTIVATIONS), help="replace every ReLU, GELU and SiLU of the model by this")
    add("--freeze-bn", action="store_true",
        help="keep BatchNorm in eval mode, after --natural-epochs: the paper's ResNets are trained naturally first")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", default=8, type=count, metavar="N", help="passes over the training images")
    add("--batch-size", default=128, type=count, metavar="N", help="images per process and forward pass")
    add("--accumulate", default=1, type=count, metavar="N", help="forward passes per optimiser step")
    add("--optimizer", default="adamw", choices=["adamw", "sgd"],
        help="sgd has momentum 0.9, and wants a --weight-decay near 5e-4")
    add("--lr", default=1e-2, type=number(float, 0, above=True), metavar="LR", help="peak learning rate")
    add("--warmup-epochs", default=2, type=weight, metavar="N",
        help="learning rate, weight of the gradient norm and step of the training attack rise over these epochs")
    add("--weight-decay", default=0.05, type=weight, metavar="W", help="not on norms and biases")
    add("--clip-grad-norm", default=1.0, type=weight, metavar="C", help="largest norm of the gradient; 0 clips nothing")
    add("--ema-decay", default=0.0, type=number(float, 0, 1), metavar="D",
        help="keep, evaluate and save an average of the weights; the paper's is 0.9998; 0 keeps none")

    add = parser.add_argument_group("running").add_argument
    add("--output-dir", metavar="DIR", help="where the run is written; runs/METHOD if not given")
    add("--resume", action="store_true",
        help="go on from the checkpoint in --output-dir with its settings; start if there is none")
    add("--amp", default="off", choices=["off", "bf16", "fp16"], help="mixed precision in training")
    add("--compile", action="store_true", help="torch.compile the objective; takes minutes to start")
    add("--device", choices=["cpu", "cuda"], help="cuda where there is one, if not given")
    add("--workers", default=min(8, os.cpu_count()), type=number(int, 0), metavar="N",
        help="imagefolder: loading processes per training process")
    add("--eval-images", default=1000, type=count, metavar="N", help="held-out images to evaluate on after each epoch")
    add("--benchmark", nargs="?", const=20, type=count, metavar="N",
        help="train nothing: time N rounds (20 if not given) of a step of each method, and print a table of time, "
             "FLOPs and memory; --gradnorm-every K adds its rows, --output-dir keeps it as benchmark.json")
    add("--seed", default=0, type=number(int, 0), metavar="N", help="of the weights, the order of images and all noise")

    args, checkpoint = parser.parse_args(), None
    path = Path(args.output_dir or f"runs/{args.method}") / "checkpoint.pt"
    if os.path.lexists(path) and not args.benchmark:
        if not args.resume:
            fail(f"{path} exists already: go on with --resume, or choose another --output-dir")
        try:
            checkpoint = read_checkpoint(path)
        except ValueError as error:
            fail(error)
        saved = {name: value for name, value in checkpoint["config"].items()
                 if name in vars(args) and name not in ("resume", "output_dir")}
        parser.set_defaults(**saved)
        args = parser.parse_args()
        for name in saved.keys() - PLACE:
            if getattr(args, name) != saved[name]:
                fail(f"--{name.replace('_', '-')} {getattr(args, name)} is not the checkpoint's {saved[name]}: resume "
                     f"{path} with its own settings, or choose another --output-dir")
        world_size = checkpoint["config"]["world_size"]
        if world_size != WORLD_SIZE:
            fail(f"{path} was trained by {world_size} processes: resume it with as many, not {WORLD_SIZE}")
    if args.pretrained and args.model == "convnet":
        fail("--pretrained: convnet has no ImageNet weights; choose another --model")
    if args.method == "gradnorm" and args.penalty == "alternating":
        weight = args.lambda_gn * args.gradnorm_every * args.eps / step_of_difference(args)
        if weight >= args.lambda_ce:  # at 0 the first half would leave no gradient to take the sign of
            fail(f"--penalty alternating: the steps on L(x) alone have the weight λ_CE - λ_GN·K·ε/h = "
                 f"{args.lambda_ce - weight:.3g}, which must be positive: lower --lambda-gn, or raise --h")
    if args.natural_epochs >= args.epochs:
        fail(f"--natural-epochs {args.natural_epochs} leaves none of the {args.epochs} epochs to --method "
             f"{args.method}: lower it")
    if args.eval_images < WORLD_SIZE:
        fail(f"--eval-images {args.eval_images}: {WORLD_SIZE} processes need an image each")
    if args.benchmark and WORLD_SIZE > 1:
        fail("--benchmark times one process: start it without torchrun")
    if not args.benchmark:
        args.output_dir = str(path.parent)
    args.device = choose_device(args.device)
    return args, checkpoint


def choose_device(name):
    """--device, cpu or cuda."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and torch.cuda.device_count() <= LOCAL_RANK:
        fail(f"--device cuda: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu"
             + " or fewer processes" * (LOCAL_RANK > 0))
    return name


def start_process(device_name, timeout=None):
    """This process's device, once it has joined those that torchrun started. They wait for each other up to `timeout`,
    a timedelta."""
    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    if WORLD_SIZE > 1:
        if device.type == "cuda":
            dist.init_process_group("nccl", timeout=timeout, device_id=torch.device("cuda", LOCAL_RANK))
        else:
            dist.init_process_group("gloo", timeout=timeout)
    return device


def main():
    args, checkpoint = parse_args()
    device = start_process(args.device)
    torch.manual_seed(args.seed)  # the same first weights on every rank
    try:
        if args.benchmark:
            benchmark(args, device)
        else:
            train(args, checkpoint, device)
    except BadImage as error:
        fail(str(error).rpartition("BadImage: ")[2].strip(), every_rank=True)
    except KeyboardInterrupt:
        fail("interrupted" if args.benchmark else
             f"interrupted; go on from the last epoch with --resume --output-dir {args.output_dir}", 130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
