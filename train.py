"""Train an image classifier by natural, GradNorm or PGD adversarial training.

    python train.py --method gradnorm                                          # a laptop: CPU or one GPU
    torchrun --nproc_per_node=8 train.py --method gradnorm                     # one machine, 8 GPUs
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ...

The file reads top to bottom: the three losses, the training loop, then what they stand on: evaluation, data, model,
checkpoints, and the command line. A run writes into --output-dir:

    checkpoint.pt         all that --resume needs; train.load_checkpoint gives the model
    metrics.jsonl         one JSON object per epoch
    gradients/0001.pt     the loss-input gradients of a few held-out images after epoch 1, and so on
"""

import argparse
import contextlib
import copy
import datetime
import json
import math
import os
import sys
import time
import traceback
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, default_convert
from torchvision.transforms import v2
from tqdm import tqdm

import gradnorm
from gradnorm import gradnorm_loss, gradnorm_loss_finite_difference, input_gradient, pgd_attack

RANK, LOCAL_RANK, WORLD_SIZE = (int(os.environ.get(name, default))  # set by torchrun
                                for name, default in [("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)])
AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Mistake(ValueError):
    """A user's mistake. `run_script` turns it into one line without a traceback."""


class Objective(nn.Module):
    """The loss of each method, from images (N, C, H, W) in [0, 1] and their targets. A fourth method goes here.

    A module, so that DDP and torch.compile wrap all of it: attacks and inner gradients call the bare model inside, and
    only the one final `.backward()` meets DDP's hooks.
    """

    def __init__(self, model, args):
        super().__init__()
        self.model, self.args = model, args

    def forward(self, x, y, ramp, penalise=True):
        """A scalar. `ramp`, a tensor, rises from 0 to 1 in the warm-up; `penalise` is False in the steps that
        --gradnorm-every leaves without a penalty."""
        args = self.args
        if args.method == "gradnorm" and penalise:
            # With the penalty only in every K-th step, K times the weight keeps its mean.
            weights = {"lambda_ce": args.lambda_ce, "lambda_gn": args.lambda_gn * args.gradnorm_every * ramp}
            if args.h:
                return gradnorm_loss_finite_difference(self.model, x, y, eps=args.eps, h=args.h, **weights)
            return gradnorm_loss(self.model, x, y, eps=args.eps, **weights)
        if args.method == "adversarial":
            step_size = args.step_size
            if step_size is None:  # the paper's for PGD-3, and that of single-step training (Wong et al., ICLR 2020)
                step_size = 2 * args.eps / args.steps if args.steps > 1 else 1.25 * args.eps
            x = pgd_attack(self.model, x, y, eps=args.eps, steps=args.steps, step_size=step_size * ramp)
        cross_entropy = F.cross_entropy(self.model(x).float(), y)
        return args.lambda_ce * cross_entropy if args.method == "gradnorm" else cross_entropy


def train(args, checkpoint, device):
    """The loop: epochs of optimiser steps, each epoch closed by an evaluation and a checkpoint."""
    train_set, test_set, model = load_data_and_model(args, checkpoint)
    model.to(device)
    loader = make_loader(train_set, args, pin_memory=device.type == "cuda")
    mix = mixup_or_cutmix(len(train_set.classes)) if args.augment == "strong" else lambda x, y: (x, y)
    eval_images, eval_labels = held_out(test_set, args.eval_images, RANK, WORLD_SIZE)
    warmup_steps, total_steps = round(args.warmup_epochs * len(loader)), args.epochs * len(loader)

    objective = parallel(Objective(model, args), args, device)
    optimizer = build_optimizer(model, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    ema = AveragedModel(model, avg_fn=moving_average(args.ema_decay), use_buffers=True) if args.ema_decay else None
    kept = ema.module if ema else model  # what load_checkpoint will give

    first_epoch, metrics = 0, []
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        if ema:
            ema.load_state_dict(checkpoint["ema"])
        first_epoch, metrics = checkpoint["epoch"], checkpoint["metrics"]
    if mean_over_ranks(torch.tensor([float(first_epoch)], device=device)) != [first_epoch]:
        raise Mistake("the processes found different checkpoints: put --output-dir on a file system of them all")
    config = vars(args) | {"classes": train_set.classes, "channels": len(model[0].mean),
                           "pixels": eval_images.shape[-1], "images": len(train_set), "world_size": WORLD_SIZE}
    del config["init"]  # a path; `parent` has the settings of the run that it names, or None
    output_dir = Path(args.output_dir)
    if RANK == 0:
        (output_dir / "gradients").mkdir(parents=True, exist_ok=True)
        (output_dir / "metrics.jsonl").touch()  # to be unable to must not cost an epoch
        print(f"{args.method} training of {args.model} on {args.dataset}: {len(train_set)} images, "
              f"{len(train_set.classes)} classes, {WORLD_SIZE} process(es) on {device.type}; {output_dir} "
              + (f"from epoch {first_epoch + 1} to {args.epochs}" if first_epoch < args.epochs else "is finished"),
              flush=True)

    for epoch in range(first_epoch, args.epochs):
        # Every epoch is a function of (seed, epoch, rank): a resumed run needs no random state but these.
        torch.manual_seed(int(np.random.SeedSequence([args.seed, epoch, RANK]).generate_state(1)[0]))
        loader.sampler.set_epoch(epoch)
        model.train()
        if args.parent:  # --init: as in the paper, the statistics of the network that it starts from stay
            batchnorms(model).eval()
        losses, start = [], time.perf_counter()
        bar = tqdm(loader, leave=False, desc=f"epoch {epoch + 1}/{args.epochs}", disable=True if RANK else None)
        for step, (x, y) in enumerate(bar, start=epoch * len(loader)):
            x, y = x.to(device, non_blocking=True).float() / 255, y.to(device, non_blocking=True)
            x, y = mix(x, y)
            lr = learning_rate(step, warmup_steps, total_steps, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # A tensor, since torch.compile would compile anew for each number.
            ramp = torch.full((), step / warmup_steps if step < warmup_steps else 1.0, device=device)

            with torch.autocast(device.type, AMP_DTYPES[args.amp], enabled=args.amp != "off"):
                loss = objective(x, y, ramp, penalise=step % args.gradnorm_every == 0)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)  # the paper's
            scaler.step(optimizer)  # skips a step whose fp16 gradients overflowed
            scaler.update()
            optimizer.zero_grad()
            if ema:
                ema.update_parameters(model)

            losses.append(loss.detach())
            # DDP averages a nan into every rank's gradients: all ranks stop here together. In fp16 some overflow is
            # normal: GradScaler skips the step and halves its scale. Below a scale of 1 it is no accident.
            if not norm.isfinite() and not (scaler.is_enabled() and scaler.get_scale() >= 1):
                raise Mistake(f"not finite in epoch {epoch + 1}, step {step + 1} of {total_steps}: loss {loss.item()}, "
                              f"norm of its gradient {norm.item()}; lower --lr or --lambda-gn. The last checkpoint "
                              f"stays in {output_dir}")
        seconds = time.perf_counter() - start

        if WORLD_SIZE > 1:  # each rank's BatchNorm has seen its own images: evaluate what rank 0 will save
            for buffer in kept.buffers():
                dist.broadcast(buffer, 0)
        loss, = mean_over_ranks(torch.stack(losses).nanmean()[None])
        metrics.append({"epoch": epoch + 1, "loss": loss, "lr": lr, "seconds": seconds,
                        **evaluate(kept, eval_images, eval_labels, args.eps, args.batch_size, device)})
        if RANK == 0:  # the checkpoint last: after a kill before it, the epoch is repeated and all is written anew
            if epoch == 0 and (output_dir / "checkpoint.pt").exists():
                raise Mistake(f"another run has begun to write into {output_dir}: choose another --output-dir")
            x, y = eval_images[:4].clone(), eval_labels[:4].clone()  # a view would save all of them
            gradients = input_gradient(kept, x.to(device).float() / 255, y.to(device)).bfloat16().cpu()
            torch.save({"images": x, "labels": y, "gradients": gradients}, output_dir / f"gradients/{epoch + 1:04d}.pt")
            with replace(output_dir / "metrics.jsonl") as file:
                file.writelines(json.dumps(line).encode() + b"\n" for line in metrics)
            with replace(output_dir / "checkpoint.pt") as file:
                torch.save({"model": model.state_dict(), "ema": ema.state_dict() if ema else None,
                            "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                            "epoch": epoch + 1, "metrics": metrics, "config": config}, file)
            print("  ".join(f"{name} {value:.4g}" for name, value in metrics[-1].items()), flush=True)


def parallel(objective, args, device):
    """The objective, compiled and shared out over the processes if so asked."""
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # which would split the graph in the middle of an inner gradient
        objective.compile()
    if WORLD_SIZE > 1:
        objective = DistributedDataParallel(objective, device_ids=[LOCAL_RANK] if device.type == "cuda" else None)
    return objective


def moving_average(decay):
    """For AveragedModel: exponential, of what floats; the rest, such as Swin's index of positions, is copied."""
    return lambda averaged, current, _: averaged.lerp(current, 1 - decay) if averaged.is_floating_point() else current


def learning_rate(step, warmup_steps, total_steps, peak, floor=1e-5):
    """Linear warm-up from `floor` to `peak`, then half a cosine down to `floor`; the paper's floor is 1e-5."""
    floor = min(floor, peak)
    if step < warmup_steps:
        return floor + (peak - floor) * step / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


def build_optimizer(model, args):
    """AdamW, or SGD with momentum. Weight decay is for the weights of linear layers and convolutions; norms, biases,
    class tokens, position embeddings, Swin's bias tables and layer scales are exempt, as is usual."""
    decayed = [p for name, p in model.named_parameters() if name.endswith("weight") and p.ndim > 1]
    exempt = [p for name, p in model.named_parameters() if not (name.endswith("weight") and p.ndim > 1)]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=args.lr)
    return torch.optim.SGD(groups, lr=args.lr, momentum=0.9)


def batchnorms(model):
    """Its BatchNorm layers, whose statistics stay as they are in eval mode."""
    return nn.ModuleList(module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))


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
            clean = ~misclassified(model(x), y)
            robust = clean & ~misclassified(model(adversarial), y)
        sums += torch.stack([clean.sum(), robust.sum(), gradient_norm, torch.tensor(len(x), device=device)])
    clean, robust, gradient_norm, count = mean_over_ranks(sums)
    return {"clean_accuracy": 100 * clean / count, "pgd10_accuracy": 100 * robust / count,
            "gradient_norm": gradient_norm / count}


def misclassified(logits, y):
    """The verdict, (N,), here and in evaluate.py: by argmax, which gives a tie to the lowest class; nan is wrong."""
    return (logits.argmax(1) != y) | logits.isnan().any(1)


def mean_over_ranks(values):
    """The numbers of a tensor, averaged over all processes."""
    if WORLD_SIZE > 1:
        dist.all_reduce(values)
    return (values / WORLD_SIZE).tolist()


# Data


def load_data_and_model(args, checkpoint):
    """The training set, the held-out set and the model; raises Mistake where these do not fit each other."""
    with rank_zero_first():
        train_set, test_set = load_dataset(args, train=True), load_dataset(args, train=False)
        image, classes = test_set[0][0], train_set.classes
        if len(classes) < 2:
            raise Mistake(f"the data have one class, {classes}: a classifier needs two, and --data-dir DIR means "
                          "DIR/train/CLASS/IMAGE")
        if test_set.classes != classes:
            raise Mistake("train/ and val/ must have the same classes: "
                          f"{sorted({*classes} ^ {*test_set.classes})[:5]} are in one alone")
        saved = checkpoint["config"] if checkpoint else None
        if saved and (saved["classes"], saved["images"]) != (classes, len(train_set)):
            raise Mistake(f"the data have {len(classes)} classes and {len(train_set)} training images, those of the "
                          f"checkpoint {len(saved['classes'])} and {saved['images']}: resume with the same data")
        if min(args.eval_images, len(test_set)) < WORLD_SIZE:
            raise Mistake(f"--eval-images {args.eval_images} of {len(test_set)} are too few for {WORLD_SIZE} processes")
        if args.batch_size * WORLD_SIZE > len(train_set):
            raise Mistake(f"--batch-size {args.batch_size} x {WORLD_SIZE} process(es) is more than the "
                          f"{len(train_set)} training images: lower it")
        if args.init and not checkpoint:
            model, config = load_checkpoint(args.init)
            if config["pixels"] != image.shape[-1] and args.model.startswith(("convnet", "vit_")):
                raise Mistake(f"--init {args.init}: its {args.model} is built for {config['pixels']} pixels, these "
                              f"images have {image.shape[-1]}")
            if config["classes"] != classes:
                replace_head(model, len(classes))
        else:
            channels = saved["channels"] if saved else image.shape[0]
            model = build_model(args.model, channels, len(classes), args.activation, args.pretrained and not checkpoint,
                                image.shape[-1])
    check_model(model, args, image)
    return train_set, test_set, model


def make_loader(train_set, args, pin_memory):
    """Batches of images, (N, C, H, W) uint8, and targets: this rank's share, shuffled anew by set_epoch."""
    sampler = DistributedSampler(train_set, WORLD_SIZE, RANK, seed=args.seed, drop_last=True)
    in_memory = isinstance(train_set, Images)  # which hands out whole batches; workers pay for strong augmentation
    return DataLoader(train_set, args.batch_size, sampler=sampler, drop_last=True, pin_memory=pin_memory,
                      num_workers=0 if in_memory and args.augment != "strong" else args.workers,
                      collate_fn=default_convert if in_memory else None)


def held_out(test_set, n, rank=0, world_size=1):
    """A rank's share of n images (n, C, H, W) uint8 and their targets: always the same, the classes in equal parts."""
    chosen = balanced_subset(test_set.targets, n)[rank::world_size]
    return torch.stack([test_set[i][0] for i in chosen]), torch.as_tensor(test_set.targets)[chosen]


class Images(TensorDataset):
    """A data set in memory: images (N, C, H, W) uint8, targets (N,), the names of the classes."""

    def __init__(self, images, targets, classes, transform=None):
        super().__init__(images, targets)
        self.images, self.targets, self.classes, self.transform = images, targets, classes, transform

    def __getitems__(self, indices):
        """A whole batch at once, for the loader; the transform draws anew for each image."""
        images = self.images[indices]
        if self.transform:
            images = torch.stack([self.transform(image) for image in images])
        return images, self.targets[indices]


def load_dataset(args, train):
    """The images to train on, or those to evaluate on: the test part of --dataset, or, with --val-images, so many of
    its training images, the classes in equal parts. Its items are (image (C, H, W) uint8, class index)."""
    dataset = load_part(args, train or args.val_images > 0, augment=train)
    if not args.val_images:
        return dataset
    if args.val_images >= len(dataset):
        raise Mistake(f"--val-images {args.val_images}: there are {len(dataset)} training images")
    chosen = balanced_subset(dataset.targets, args.val_images).numpy()
    if train:  # on all the others
        chosen = np.setdiff1d(np.arange(len(dataset)), chosen)
    if isinstance(dataset, Images):
        return Images(dataset.images[chosen], dataset.targets[chosen], dataset.classes, dataset.transform)
    dataset.samples = [dataset.samples[i] for i in chosen]
    dataset.targets = [dataset.targets[i] for i in chosen]
    return dataset


def check_same_data(configs, data_dir=None):
    """Raises Mistake if runs, {path: configuration}, were not trained on the same data."""
    (first, config), *others = configs.items()
    folder = ("data_dir",) if config["dataset"] == "imagefolder" and not data_dir else ()
    for path, other in others:
        for name in ("dataset", "classes", "images", "val_images", "pixels", *folder):
            if other.get(name) != config.get(name):
                raise Mistake(f"{path} was trained with the {name} {other.get(name)}, {first} with {config.get(name)}: "
                              "take them one by one")


def load_test_set(config, data_dir=None):
    """What a run with this configuration is evaluated on."""
    test_set = load_dataset(argparse.Namespace(**config | {"data_dir": data_dir or config["data_dir"]}), train=False)
    if test_set.classes != config["classes"]:
        raise Mistake(f"the data have the classes {test_set.classes}, the model has {config['classes']}: choose other "
                      "data with --data-dir")
    return test_set


def load_part(args, train_part, augment):
    """The training or the test part of --dataset."""
    folder = Path(args.data_dir or "data")
    try:
        if args.dataset == "imagefolder":
            return load_image_folder(args, folder / ("train" if train_part else "val"), augment)
        images, targets, classes = read_data_set(args, folder, train_part)
    except (OSError, RuntimeError) as error:
        raise Mistake(f"cannot read {args.dataset} from {folder.absolute()} ({error}): put the data there, or name "
                      "their place with --data-dir") from None
    side = images.shape[-1]
    size, padding = (args.image_size, 0) if args.dataset == "imagenette" else (side, side // 8)
    transform = train_transform(args, size, v2.RandomCrop(size, padding)) if augment else None
    return Images(images if transform else v2.functional.center_crop(images, [size]), targets, classes, transform)


def read_data_set(args, folder, train_part):
    """A data set that is drawn, or downloaded: images (N, C, H, W) uint8, targets (N,), names of the classes."""
    if args.dataset == "shapes":
        return draw_shapes(10_000, seed=0) if train_part else draw_shapes(2_000, seed=1)
    if args.dataset == "imagenette":  # photographs of ten classes, decoded once, a little larger than the crop
        side = args.image_size * 9 // 8
        decode = v2.Compose([v2.PILToTensor(), v2.Resize(side), v2.CenterCrop(side)])
        data = torchvision.datasets.Imagenette(folder, "train" if train_part else "val", "160px", transform=decode,
                                               download=not (folder / "imagenette2-160").exists())
        images, targets = zip(*tqdm(data, desc="decoding", leave=False, disable=True if RANK else None))
        return torch.stack(images), torch.tensor(targets), [names[0] for names in data.classes]
    source = torchvision.datasets.CIFAR10 if args.dataset == "cifar10" else torchvision.datasets.FashionMNIST
    data = source(folder, train_part, download=True)
    images = torch.as_tensor(data.data)  # (N, H, W), or (N, H, W, C)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images, torch.as_tensor(data.targets), data.classes


def load_image_folder(args, folder, augment):
    """One folder of image files per class, as ImageNet has it."""
    size = args.image_size
    transform = train_transform(args, size, v2.RandomResizedCrop(size)) if augment else None
    transform = transform or v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)])
    return torchvision.datasets.ImageFolder(folder, v2.Compose([v2.PILToTensor(), transform]), loader=read_image)


class BadImage(Mistake):
    """An image file that cannot be read: a mistake that one process alone may meet."""


def read_image(path):
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # which convert would clip to white
                raise ValueError(f"its pixels are {image.mode}, not 8-bit")
            return image.convert("RGB")
    except Exception as error:  # PIL raises of every kind
        raise BadImage(f"cannot read the image {path} ({error}): mend, convert or remove it") from None


def train_transform(args, size, crop):
    """--augment for one image (C, H, W) uint8. Strong is the paper's; its mixup and cutmix follow per batch."""
    if args.augment == "none":
        return None
    if args.augment == "basic":
        return v2.Compose([crop, v2.RandomHorizontalFlip()])
    # timm's rand-m9: each of two operations with probability 1/2, at level 9 of 10, which is torchvision's 27 of 30.
    # The recipe also has a colour jitter of 0.4, which timm leaves out beside RandAugment.
    operation = v2.RandomApply([v2.RandAugment(num_ops=1, magnitude=27)], p=0.5)
    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), operation, operation, erase])


def erase(image, mean=0.45, std=0.225):
    """Random erasing of one image (C, H, W) uint8. Its noise is N(0, 1) on normalised inputs, hence the way there and
    back; on bytes torchvision's would wrap around."""
    normalised = v2.RandomErasing(0.25, value="random")((image / 255 - mean) / std)
    return ((normalised * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)


def mixup_or_cutmix(classes, smoothing=0.1):
    """The paper's mixup 0.8 or cutmix 1.0, each for half of the batches, and label smoothing: targets turn soft."""
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=classes), v2.CutMix(alpha=1.0, num_classes=classes)])

    def augment(x, y):
        x, y = mix(x, y)
        return x, y * (1 - smoothing) + smoothing / classes

    return augment


def balanced_subset(targets, n):
    """Indices of n images in a fixed, shuffled order in which the classes take turns, each time in another order."""
    targets = torch.as_tensor(targets)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    turn = torch.empty_like(order)
    turn[targets[order].argsort(stable=True)] = torch.cat([torch.arange(count) for count in targets.bincount()])
    return order[turn.argsort(stable=True)][:n]


def draw_shapes(n, seed, size=32):
    """`shapes`, the embedded data set: ten anti-aliased outlines r(θ) of random colour, place, size and rotation on a
    shaded, noisy background. Images (n, 3, size, size) uint8, targets (n,), the names of the classes."""
    rng = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return torch.empty(n, *shape).uniform_(low, high, generator=rng)

    def polygon(k):
        return lambda angle: math.cos(math.pi / k) / (angle.remainder(math.tau / k) - math.pi / k).cos()

    def flower(k):
        return lambda angle: 0.65 + 0.35 * (k * angle).cos()

    def star(k):
        return lambda angle: 0.3 + 0.7 * (angle.remainder(math.tau / k) * k / math.pi - 1).abs()

    outlines = {"disc": lambda angle: 0.8, "ellipse": lambda angle: 1 / torch.hypot(angle.cos(), 2.5 * angle.sin()),
                "heart": lambda angle: 0.55 - 0.45 * angle.sin(), "triangle": polygon(3), "square": polygon(4),
                "propeller": flower(2), "clover": flower(3), "flower": flower(5), "cross": star(4), "star": star(6)}
    targets = torch.randperm(n, generator=rng) % len(outlines)
    radius, turn = uniform(0.65, 0.85, 1, 1), uniform(-0.4, 0.4, 1, 1)
    axis = torch.linspace(-1, 1, size)
    x, y = axis - uniform(-0.15, 0.15, 1, 1), axis[:, None] - uniform(-0.15, 0.15, 1, 1)
    angle, outline = torch.atan2(y, x) + turn, torch.empty(n, size, size)
    for target, r in enumerate(outlines.values()):
        outline[targets == target] = r(angle[targets == target])
    coverage = torch.sigmoid(size * (radius * outline - torch.hypot(x, y)))[:, None]  # an edge about a pixel wide

    background = uniform(0, 0.6, 3, 1, 1)
    colour = background + uniform(0.2, 0.4, 3, 1, 1)
    slope = uniform(-0.1, 0.1, 2, 1, 1)
    images = background + (slope[:, :1] * axis + slope[:, 1:] * axis[:, None])
    images = images + coverage * (colour - images) + 0.01 * torch.randn(n, 3, size, size, generator=rng)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), targets, list(outlines)


# Model


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class ConvNet(nn.Module):
    """The small default: 4x4 patches, then stages of three residual blocks. Between stages the resolution halves and
    the width doubles, until about 8x8 is left: one stage (0.1 M parameters) up to 32 pixels, two (0.6 M) for 64, four
    for 224. GroupNorm of one group normalises each example by itself, and GELU is smooth: GradNorm needs both."""

    def __init__(self, channels, classes, image_size, width=64):
        super().__init__()
        layers = [nn.Conv2d(channels, width, kernel_size=4, stride=4)]
        if image_size > 32:  # in two steps and overlapping: the input gradients are finer than the patches
            layers = [nn.Conv2d(channels, width // 2, kernel_size=4, stride=2, padding=1), nn.GELU(),
                      nn.Conv2d(width // 2, width, kernel_size=4, stride=2, padding=1)]
        for stage in range(1 + max(0, round(math.log2(image_size / 32)))):
            if stage > 0:
                layers.append(nn.Conv2d(width, 2 * width, kernel_size=2, stride=2))
                width *= 2
            layers += [Residual(nn.GroupNorm(1, width), nn.GELU(), nn.Conv2d(width, width, kernel_size=3, padding=1))
                       for _ in range(3)]
        self.layers = nn.Sequential(*layers, nn.GroupNorm(1, width), nn.GELU())
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.layers(x).mean((2, 3)))


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


def build_model(name, channels, classes, activation=None, pretrained=False, image_size=32):
    """A model from pixels (N, `channels`, H, W) to logits (N, `classes`): ConvNet, or torchvision's of that name with
    the normalisation of its weights. `activation` replaces every ReLU, GELU and SiLU module. ConvNet and ViTs are
    built for their `image_size`."""
    if name == "convnet":
        model = nn.Sequential(Normalize([0.5] * channels, [0.25] * channels), ConvNet(channels, classes, image_size))
    else:
        size = {"image_size": image_size} if name.startswith("vit_") else {}  # the others take any, or their weights'
        try:
            network = (torchvision.models.get_model(name, weights="DEFAULT") if pretrained
                       else torchvision.models.get_model(name, num_classes=classes, **size))
        except (OSError, AssertionError) as error:  # no download; an image size that is no multiple of the patches'
            raise Mistake(f"cannot build {name} for {image_size} pixels ({error})") from None
        preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        model = nn.Sequential(Normalize(preset.mean, preset.std), network)
        if pretrained and classes != 1000:
            replace_head(model, classes)
    for module in list(model.modules()):
        # No dropout and no drop-path, as in the paper: every pass of a step must see the same network.
        if isinstance(module, (nn.Dropout, torchvision.ops.StochasticDepth)):
            module.p = 0.0
        for child_name, child in module.named_children():
            if activation and isinstance(child, tuple(ACTIVATIONS.values())):
                setattr(module, child_name, ACTIVATIONS[activation]())
    return model


def replace_head(model, classes):
    """A fresh last layer, for other classes."""
    name, head = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    if isinstance(head, nn.Linear):
        fresh = nn.Linear(head.in_features, classes, bias=head.bias is not None)
    else:
        fresh = nn.Conv2d(head.in_channels, classes, head.kernel_size)
    model.set_submodule(name, fresh)


def check_model(model, args, image):
    """Stop here, not after minutes, if the model does not fit the settings or cannot make a step on such images."""
    if args.activation and not any(isinstance(module, ACTIVATIONS[args.activation]) for module in model.modules()):
        raise Mistake(f"--activation {args.activation}: {args.model} has no ReLU, GELU or SiLU module to replace")
    if args.compile and args.method != "natural" and batchnorms(model) and not args.parent:
        raise Mistake(f"--compile cannot trace the inner gradient of {args.model} while BatchNorm updates its "
                      "statistics: start from a trained network with --init, which keeps them")
    trial = copy.deepcopy(model).train()  # BatchNorm would remember the step
    if args.parent:
        batchnorms(trial).eval()
    x = (image.float() / 255).expand(min(args.batch_size, 2), -1, -1, -1)
    try:
        Objective(trial, args)(x, torch.zeros(len(x), dtype=torch.long), torch.ones(())).backward()
    except (RuntimeError, AssertionError, ValueError) as error:
        raise Mistake(f"{args.model} fails on {len(x)} image(s) of {tuple(image.shape)} (channels, height, width): "
                      + next(iter(str(error).splitlines()), repr(error))
                      + "; --h 2/255 needs no second derivative" * ("derivative" in str(error))) from None


# Checkpoints


# Flags that say where a run is made, not what it learns (but for the noise of augmentation, which is the workers').
PLACE = {"output_dir", "resume", "data_dir", "workers"}


def setting(config):
    """What two runs of one experiment, with different seeds, have in common of their configurations."""
    return {name: value for name, value in config.items() if name not in PLACE | {"seed", "eval_images"}}


def load_checkpoint(path, device="cpu"):
    """The model of a checkpoint, in eval mode, and its configuration, a dict of train.py's flags, `classes` (names),
    `channels`, `pixels` (the side of its images) and `epoch`, the last one trained. The averaged weights if it was
    trained with --ema-decay. Raises ValueError on any other file."""
    checkpoint = read_checkpoint(path)
    config = checkpoint["config"] | {"epoch": checkpoint["epoch"]}
    model = build_model(config["model"], config["channels"], len(config["classes"]), config["activation"],
                        image_size=config["pixels"])
    if checkpoint.get("ema"):
        averaged = AveragedModel(model, use_buffers=True)
        averaged.load_state_dict(checkpoint["ema"])
        model = averaged.module
    else:
        model.load_state_dict(checkpoint["model"])
    return model.eval().to(device), config


def checkpoint_path(path):
    """A folder of a run stands for its checkpoint.pt."""
    path = Path(path).expanduser()
    return path / "checkpoint.pt" if path.is_dir() else path


def read_checkpoint(path):
    path = checkpoint_path(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # never unpickles code
        checkpoint["config"]["pixels"], checkpoint["model"], checkpoint["epoch"]  # LookupError in another file
    except FileNotFoundError:
        raise Mistake(f"no checkpoint at {path}") from None
    except Exception as error:  # torch.load raises of every kind
        reason = str(error).strip().splitlines() or [""]
        raise Mistake(f"{path} is not a checkpoint of train.py ({type(error).__name__}: {reason[0]})") from None
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


# Command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Mistake(message)


def in_range(kind, low, high=math.inf):
    """An argparse type: int, or float that may be a fraction such as 4/255; from `low` to `high`."""
    def number(text):
        try:
            value = int(text) if kind is int else float(Fraction(text))
        except ArithmeticError:  # 4/0, 1e999
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in the range from {low} to {high}")
        return value
    return number


def make_parser():
    count, whole, weight, unit = in_range(int, 1), in_range(int, 0), in_range(float, 0), in_range(float, 0, 1)
    models = set(torchvision.models.list_models(module=torchvision.models))
    models -= {"googlenet", "inception_v3"}  # they return auxiliary logits beside the logits
    parser = Parser(description="Train an image classifier by natural, GradNorm or PGD adversarial training.",
                    allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    method = parser.add_argument_group("method")
    method.add_argument("--method", default="gradnorm", choices=["natural", "gradnorm", "adversarial"],
                        help="loss to minimise: cross-entropy, L_GradNorm, or cross-entropy of PGD's images")
    method.add_argument("--eps", default="4/255", type=in_range(float, 1e-6, 1),
                        help="radius of the L∞ ball, in pixels of [0, 1], for the loss and for the evaluation")
    method.add_argument("--lambda-ce", default=0.8, type=weight, help="gradnorm: weight of the cross-entropy")
    method.add_argument("--lambda-gn", default=1.2, type=weight, help="gradnorm: weight of the gradient norm")
    method.add_argument("--h", default=0.0, type=unit,
                        help="gradnorm: 0 is the exact penalty, by double backprop; above 0 it is a finite difference "
                             "with this step in pixels, such as ε/2")
    method.add_argument("--gradnorm-every", default=1, type=count, metavar="K",
                        help="gradnorm: penalty only in every K-th step, with K times the weight")
    method.add_argument("--steps", default=3, type=count, metavar="N", help="adversarial: steps of PGD")
    method.add_argument("--step-size", type=unit, help="adversarial: in pixels; by default 2ε/N, and 1.25ε for N = 1")

    data = parser.add_argument_group("data and model")
    data.add_argument("--dataset", default="shapes",
                      choices=["shapes", "imagenette", "fashion-mnist", "cifar10", "imagefolder"],
                      help="shapes is drawn by train.py, the next three are downloaded")
    data.add_argument("--data-dir", type=os.path.expanduser,
                      help="where the data are, or go; for imagefolder it holds train/ and val/")
    data.add_argument("--val-images", default=0, type=whole,
                      help="evaluate on so many held-out training images, to choose settings; 0: on the test part")
    data.add_argument("--image-size", type=count,
                      help="side in pixels; imagenette (photographs of 160): by default 64; imagefolder: 224")
    data.add_argument("--augment", default="none", choices=["none", "basic", "strong"],
                      help="basic: crop and flip; strong: the paper's recipe, with RandAugment, random erasing, "
                           "mixup, cutmix and label smoothing")
    data.add_argument("--model", default="convnet", choices=["convnet", *sorted(models)], metavar="NAME",
                      help="convnet, or any classification model of torchvision, such as resnet50, swin_b or vit_b_16")
    data.add_argument("--activation", choices=list(ACTIVATIONS),
                      help="replaces every ReLU, GELU and SiLU module; functional ones, as DenseNet's last, stay")
    start = data.add_mutually_exclusive_group()
    start.add_argument("--init", metavar="CHECKPOINT",
                       help="start from the weights of another run, of its model and activation; BatchNorm keeps its "
                            "statistics, as in the paper; other classes get a fresh last layer")
    start.add_argument("--pretrained", action="store_true", help="start from torchvision's ImageNet weights")

    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--epochs", default=6, type=count, help="passes over the training images")
    optim.add_argument("--batch-size", default=128, type=count, help="images per process and step")
    optim.add_argument("--optimizer", default="adamw", choices=["adamw", "sgd"],
                       help="sgd has momentum 0.9, and wants a --weight-decay near 5e-4")
    optim.add_argument("--lr", type=weight,
                       help="peak learning rate; by default 1e-2 for convnet, 1e-3 for the others; from scratch, 3e-3 "
                            "suits resnet18 and 3e-4 swin_t")
    optim.add_argument("--warmup-epochs", default=2, type=weight,
                       help="rise of the learning rate, the gradient norm's weight and the training attack's step size")
    optim.add_argument("--weight-decay", default=0.05, type=weight, help="not on norms and biases")
    optim.add_argument("--ema-decay", default=0.0, type=in_range(float, 0, 0.99999),
                       help="evaluate and save an average of the weights; the paper's is 0.9998; 0 keeps none")

    run = parser.add_argument_group("running")
    run.add_argument("--output-dir", type=os.path.expanduser,
                     help="where the run is written; by default runs/METHOD")
    run.add_argument("--resume", action="store_true",
                     help="go on from the checkpoint in --output-dir with its settings; start if there is none")
    run.add_argument("--amp", default="off", choices=["off", "bf16", "fp16"], help="mixed precision in training")
    run.add_argument("--compile", action="store_true", help="torch.compile the objective; takes minutes to start")
    run.add_argument("--workers", default=min(8, os.cpu_count()), type=whole,
                     help="imagefolder and strong augmentation: loading processes per training process")
    run.add_argument("--eval-images", default=250, type=count, help="held-out images to evaluate on after each epoch")
    run.add_argument("--seed", default=0, type=in_range(int, 0, 2**32 - 1),
                     help="of the weights, the order of images and all noise")
    return parser


def parse_args():
    """The settings, and the checkpoint to resume from or None."""
    parser = make_parser()
    args, checkpoint, parent = parser.parse_args(), None, None
    path = Path(args.output_dir or f"runs/{args.method}") / "checkpoint.pt"
    if path.exists():
        if not args.resume:
            raise Mistake(f"{path} exists already: go on with --resume, or choose another --output-dir")
        checkpoint = read_checkpoint(path)
        if "optimizer" not in checkpoint:
            raise Mistake(f"{path} holds a published network: start from it with --init, into another --output-dir")
        config = checkpoint["config"]
        parent, world_size = config["parent"], config["world_size"]
        args = parse_again(parser, {name: config[name] for name in vars(args).keys() & config.keys()}, path)
        if args.init and setting(read_checkpoint(args.init)["config"]) != parent:
            raise Mistake(f"{path} did not start from --init {args.init}: choose another --output-dir")
        if world_size != WORLD_SIZE:
            raise Mistake(f"{path} was trained by {world_size} processes: resume it with as many, not {WORLD_SIZE}")
    elif args.init:
        config = read_checkpoint(args.init)["config"]
        parent = setting(config)
        args = parse_again(parser, {"model": config["model"], "activation": config["activation"]}, args.init)
        while args.val_images and config:
            if args.dataset == config["dataset"] and args.val_images > config["val_images"]:
                warnings.warn(f"--val-images {args.val_images}: {args.init}, trained with {config['val_images']}, may "
                              "have seen these images")
            config = config["parent"]
    metrics = path.with_name("metrics.jsonl")
    if not args.resume and metrics.exists() and metrics.stat().st_size:
        raise Mistake(f"{metrics} is of a run whose checkpoint is gone: choose another --output-dir, or move it away")
    if args.warmup_epochs > args.epochs:
        raise Mistake(f"--warmup-epochs {args.warmup_epochs} is more than --epochs {args.epochs}: lower it")
    if args.data_dir and args.dataset == "shapes":
        raise Mistake(f"--data-dir {args.data_dir}: --dataset shapes reads none; choose another --dataset")
    sizes = {"imagenette": 64, "imagefolder": 224}
    if args.image_size and args.dataset not in sizes:
        raise Mistake(f"--image-size {args.image_size}: --dataset {args.dataset} has a size of its own; leave it out")
    if args.pretrained and args.model == "convnet":
        raise Mistake("--pretrained: convnet has no ImageNet weights; choose another --model")
    args.image_size = args.image_size or sizes.get(args.dataset)
    args.parent = parent
    if args.lr is None:
        args.lr = 1e-2 if args.model == "convnet" else 1e-3
    args.output_dir = str(path.parent)
    return args, checkpoint


def parse_again(parser, saved, path):
    """The command line with a checkpoint's settings as its defaults. Flags that are given must agree with them."""
    parser.set_defaults(**saved)
    args = parser.parse_args()
    for name, value in saved.items():
        if getattr(args, name) != value and name not in PLACE:
            raise Mistake(f"--{name.replace('_', '-')} {getattr(args, name)} is not {value}, as {path} has it")
    return args


@contextlib.contextmanager
def rank_zero_first():
    """The first process of each machine runs the body, which may download, before the others do."""
    if WORLD_SIZE > 1 and LOCAL_RANK > 0:
        dist.barrier()
    yield
    if WORLD_SIZE > 1 and LOCAL_RANK == 0:
        dist.barrier()


def start_process():
    """This process's device: a GPU of its own, or the CPU on a machine without. Joins the processes that torchrun has
    started, which wait for each other up to a day: for a download, a scan of ImageNet, the slowest one's attacks."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
            raise Mistake(f"this machine has {torch.cuda.device_count()} GPUs: lower --nproc_per_node")
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
    if WORLD_SIZE > 1:
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1), device_id=device_id)
    return device


def prefer_speed():
    """For training and its benchmark."""
    torch.set_float32_matmul_precision("high")  # TF32, as convolutions have it
    torch.backends.cudnn.benchmark = True  # all batches have one shape
    gradnorm.CHECK_VALUES = False  # the data fit


def run_script(main, when_interrupted):
    """Calls a script's `main`. A user's mistake, or a file that cannot be read or written, ends in one line, once per
    machine, and Ctrl-C in another."""
    name = Path(sys.argv[0]).name
    warnings.formatwarning = lambda message, *_: f"{name}: warning: {message}\n"
    for stream in (sys.stdout, sys.stderr):  # which may have no ε
        stream.reconfigure(errors="replace")
    try:
        main()
    except (Mistake, OSError, torch.OutOfMemoryError) as error:
        status, speaks = 2, LOCAL_RANK == 0 or type(error) is not Mistake
        line = "error: " + str(error).rpartition("BadImage: ")[2].strip()  # a worker puts its traceback before
    except KeyboardInterrupt:
        status, speaks, line = 130, LOCAL_RANK == 0, f"interrupted: {when_interrupted}"
    except Exception:
        status, speaks, line = 1, True, traceback.format_exc()
    else:
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    if speaks:
        print(f"{name}: {line}", file=sys.stderr, flush=True)
    elif status == 2:
        time.sleep(5)  # torchrun stops all processes when the first one ends, which must be one that has spoken
    if dist.is_initialized():  # the other processes may be in a collective, and an orderly exit would wait for them
        os._exit(status)
    sys.exit(status)


def main():
    args, checkpoint = parse_args()
    device = start_process()
    prefer_speed()
    torch.manual_seed(args.seed)  # the same first weights on every rank
    train(args, checkpoint, device)


if __name__ == "__main__":
    run_script(main, "--resume goes on from the last epoch")
