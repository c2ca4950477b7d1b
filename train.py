"""Train an image classifier by natural, GradNorm or PGD adversarial training.

    python train.py --method gradnorm                                          # a laptop: CPU or one GPU
    torchrun --standalone --nproc_per_node=8 train.py --method gradnorm        # one machine, 8 GPUs
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ...

Read `Objective`, the loss of each method, and `main`, which sets up and holds the loop. What follows, the network, the
data, checkpoints and the command line, can be skipped at first. A run writes into --output-dir:

    checkpoint.pt         all that --resume needs; train.load_checkpoint gives the model
    metrics.jsonl         one JSON object per epoch
    gradients/0001.pt     the loss-input gradients of a few held-out images after epoch 1, and so on
"""

import argparse
import contextlib
import datetime
import hashlib
import json
import math
import os
import sys
import time
from collections import Counter
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
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision.transforms import v2
from tqdm import tqdm

import gradnorm
from gradnorm import gradnorm_loss, gradnorm_loss_finite_difference, input_gradient, pgd_attack

RANK = int(os.environ.get("RANK") or 0)  # these three are set by torchrun
LOCAL_RANK = int(os.environ.get("LOCAL_RANK") or 0)
WORLD_SIZE = int(os.environ.get("WORLD_SIZE") or 1)
NO_BAR = True if RANK else None  # None: where there is no terminal
AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Objective(nn.Module):
    """The loss of each method, from images (N, C, H, W) in [0, 1] and their targets.

    A module, so that DDP and torch.compile wrap all of it: attacks and inner gradients call the bare model inside, and
    only the one final `.backward()` meets DDP's hooks. A fourth method is a branch here, a choice of --method, and a
    line in METHODS of visualize.py.
    """

    def __init__(self, model, args):
        super().__init__()
        self.model, self.args, self.step_size = model, args, args.step_size
        if self.step_size is None:  # the paper's for PGD-3, Wong et al.'s (ICLR 2020) for one step
            self.step_size = 2 * args.eps / args.steps if args.steps > 1 else 1.25 * args.eps

    def forward(self, x, y, ramp, penalise=True):
        """A scalar. `ramp`, a tensor, rises from 0 to 1 in the warm-up; `penalise` is False in the steps that
        --gradnorm-every leaves without a penalty."""
        model, args = self.model, self.args
        if args.method == "natural":
            return F.cross_entropy(model(x).float(), y)

        if args.method == "adversarial":
            x = pgd_attack(model, x, y, eps=args.eps, steps=args.steps, step_size=self.step_size * ramp)
            return F.cross_entropy(model(x).float(), y)

        if not penalise:
            return args.lambda_ce * F.cross_entropy(model(x).float(), y)
        # With the penalty only in every K-th step, K times the weight keeps its mean.
        lambdas = {"lambda_ce": args.lambda_ce, "lambda_gn": args.lambda_gn * args.gradnorm_every * ramp}
        if args.h:
            return gradnorm_loss_finite_difference(model, x, y, eps=args.eps, h=args.h, **lambdas)
        return gradnorm_loss(model, x, y, eps=args.eps, **lambdas)


def main():
    tolerate_ascii()
    args, parent = parse_args()
    device = start_process()
    torch.manual_seed(args.seed)  # the same first weights on every rank

    train_set, test_set, loader = load_data(args, pin_memory=device.type == "cuda")
    if from_rank_zero(lambda: len(train_set)) != len(train_set):  # DDP would wait for ever for the rank with fewer
        raise ValueError("the processes have found different numbers of images: give each machine the same data")
    images, labels = held_out(test_set, args.eval_images)
    classes = len(train_set.classes)
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=classes), v2.CutMix(alpha=1.0, num_classes=classes)])
    model = first_model(args, parent, images[0], train_set.classes).to(device)
    config = vars(args) | {"parent": parent, "classes": train_set.classes, "channels": len(model[0].mean),
                           "pixels": parent["pixels"] if parent else images.shape[-1], "images": len(train_set),
                           "world_size": WORLD_SIZE}
    objective = Objective(model, args)
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # which would split the graph in the middle of an inner gradient
        objective.compile()
    if WORLD_SIZE > 1:
        objective = DistributedDataParallel(objective, device_ids=[LOCAL_RANK] if device.type == "cuda" else None)
    optimizer = build_optimizer(model, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay)) if args.ema_decay else None
    warmup_steps, total_steps = round(args.warmup_epochs * len(loader)), args.epochs * len(loader)
    if ema and args.ema_decay ** total_steps > 0.01:  # with --init it would look like a method without effect
        raise ValueError(f"--ema-decay {args.ema_decay}: after {total_steps} steps the first weights would still be "
                         f"{args.ema_decay ** total_steps:.0%} of the average")

    output_dir, first_epoch, metrics = Path(args.output_dir), 0, []
    path = output_dir / "checkpoint.pt"  # which is there only with --resume
    checkpoint = from_rank_zero(lambda: read_checkpoint(path) if path.exists() else None)
    if checkpoint:
        for name in config.keys() - PLACE:
            if config[name] != checkpoint["config"].get(name):
                raise ValueError(f"--resume: {name} is {config[name]}, it was {checkpoint['config'].get(name)}")
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        if ema:
            ema.load_state_dict(checkpoint["ema"])
        first_epoch, metrics = checkpoint["epoch"], checkpoint["metrics"]
    if RANK == 0:
        (output_dir / "gradients").mkdir(parents=True, exist_ok=args.resume)  # of two runs at once, one stops here
        print(f"{args.method} training of {args.model} on {args.dataset}: {len(train_set)} images, {classes} classes, "
              f"{WORLD_SIZE} process(es) on {device.type}; {output_dir}, {first_epoch} of {args.epochs} epochs done",
              flush=True)

    for epoch in range(first_epoch, args.epochs):
        # An epoch's noise is a function of (seed, epoch, rank): a resumed run needs no random state but these.
        torch.manual_seed(int(np.random.SeedSequence([args.seed, epoch, RANK]).generate_state(1)[0]))
        loader.sampler.set_epoch(epoch)
        model.train()
        if args.init:  # as in the paper, the statistics of the network that it starts from stay
            freeze_batchnorm(model)
        losses, start = [], time.perf_counter()
        bar = tqdm(loader, leave=False, desc=f"epoch {epoch + 1}/{args.epochs}", disable=NO_BAR)
        for step, (x, y) in enumerate(bar, start=epoch * len(loader)):
            x = x.to(device, non_blocking=True).float() / 255
            y = y.to(device, non_blocking=True)
            if args.augment == "strong":  # the paper's mixup or cutmix: targets become class probabilities
                x, y = mix(x, y)
            if args.label_smoothing:
                y = smooth(y, classes, args.label_smoothing)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, warmup_steps, total_steps, args.lr)
            # A tensor, since torch.compile would compile anew for each number.
            ramp = torch.full((), step / warmup_steps if step < warmup_steps else 1.0, device=device)

            with torch.autocast(device.type, AMP_DTYPES[args.amp], enabled=args.amp != "off"):
                loss = objective(x, y, ramp, penalise=step % args.gradnorm_every == 0)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            total_norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)  # the paper's
            scaler.step(optimizer)  # skips a step whose fp16 gradients overflowed
            scaler.update()
            optimizer.zero_grad()
            if ema:
                ema.update_parameters(model)

            losses.append(loss.detach())
            stop_if_not_finite(total_norm, loss, scaler, f"epoch {epoch + 1}, step {step + 1} of {total_steps}")
        seconds = time.perf_counter() - start

        mean_loss = mean_over_ranks(torch.stack(losses).nanmean())  # the loss of a step that fp16 skipped may be nan
        if RANK == 0:  # the others wait for it in their next step
            kept = ema.module if ema else model  # what load_checkpoint will give
            metrics.append({"epoch": epoch + 1, "loss": mean_loss, "lr": optimizer.param_groups[0]["lr"],
                            "seconds": seconds, **validate(kept, images, labels, args.eps, args.batch_size, device)})
            save_gradients(output_dir / f"gradients/{epoch + 1:04d}.pt", kept, images[:4], labels[:4], device)
            with atomic_write(output_dir / "metrics.jsonl") as file:
                file.writelines(json.dumps(line).encode() + b"\n" for line in metrics)
            with atomic_write(path) as file:  # the last: after a kill before it, the epoch is repeated
                torch.save({"model": model.state_dict(), "ema": ema.state_dict() if ema else None,
                            "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                            "epoch": epoch + 1, "metrics": metrics, "config": config}, file)
            print("  ".join(f"{name} {value:.4g}" for name, value in metrics[-1].items()), flush=True)
    leave_processes()


def smooth(y, classes, label_smoothing):
    """Targets, class indices (N,) or probabilities (N, classes), with a share of each spread over all classes."""
    y = y if y.is_floating_point() else F.one_hot(y, classes).float()
    return (1 - label_smoothing) * y + label_smoothing / classes


def learning_rate(step, warmup_steps, total_steps, peak, floor=1e-5):
    """Linear warm-up from `floor` to `peak`, then half a cosine down to `floor`; the paper's floor is 1e-5."""
    floor = min(floor, peak)
    if step < warmup_steps:
        return floor + (peak - floor) * step / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


def stop_if_not_finite(total_norm, loss, scaler, place):
    """DDP averages a nan into every rank's gradients: all ranks stop here together. In fp16 some overflow is normal:
    GradScaler skips the step and halves its scale. Below a scale of 1 it is no accident."""
    if total_norm.isfinite() or scaler.is_enabled() and scaler.get_scale() >= 1:
        return
    raise FloatingPointError(f"loss {loss.item()}, norm of its gradient {total_norm.item()} in {place}: lower --lr or "
                             "--lambda-gn; the last epoch's checkpoint stays")


def validate(model, images, labels, eps, batch_size, device):
    """Clean and PGD-10 accuracy (%) and mean ‖∇x L‖₁ (pixels in [0, 1]) of images (N, C, H, W) uint8. PGD starts from
    the same random points in every epoch."""
    model.eval()
    torch.manual_seed(0)
    clean, robust, gradient_norm = 0, 0, 0.0
    for x, y in zip(images.split(batch_size), labels.split(batch_size)):
        x, y = x.to(device).float() / 255, y.to(device)
        gradient_norm += input_gradient(model, x, y).abs().sum().item()
        adversarial = pgd_attack(model, x, y, eps=eps, steps=10)
        with torch.no_grad():
            right = ~misclassified(model(x), y)
            clean += right.sum().item()
            robust += (right & ~misclassified(model(adversarial), y)).sum().item()
    return {"clean_accuracy": 100 * clean / len(images), "pgd10_accuracy": 100 * robust / len(images),
            "gradient_norm": gradient_norm / len(images)}


def save_gradients(path, model, images, labels, device):
    """Images (N, C, H, W) uint8, their labels, and ∇x L of each."""
    gradients = input_gradient(model, images.to(device).float() / 255, labels.to(device)).bfloat16().cpu()
    with atomic_write(path) as file:  # clones, since all images behind a view would be saved with it
        torch.save({"images": images.clone(), "labels": labels.clone(), "gradients": gradients}, file)


def misclassified(logits, y):
    """The verdict, (N,), here and in evaluate.py: by argmax, which gives a tie to the lowest class; nan is wrong."""
    return (logits.argmax(1) != y) | logits.isnan().any(1)


def build_optimizer(model, args):
    """AdamW, or SGD with momentum. Weight decay is for the weights of linear layers and convolutions; norms, biases,
    class tokens, position embeddings, Swin's bias tables and layer scales are exempt, as is usual."""
    decayed = [p for name, p in model.named_parameters() if name.endswith("weight") and p.ndim > 1]
    exempt = [p for name, p in model.named_parameters() if not (name.endswith("weight") and p.ndim > 1)]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=args.lr)
    return torch.optim.SGD(groups, lr=args.lr, momentum=0.9)


# The network


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class ConvNet(nn.Module):
    """The small default: 4x4 patches, then stages of three residual blocks. Between stages the resolution halves and
    the width doubles, until about 8x8 is left: one stage (0.1 M parameters) up to 32 pixels, two (0.6 M) for 64, four
    for 224. GroupNorm of one group normalises each example by itself, and GELU is smooth: GradNorm wants both."""

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
    if name in ("googlenet", "inception_v3"):
        raise ValueError(f"{name} returns auxiliary logits beside the logits")
    if name == "convnet":
        model = nn.Sequential(Normalize([0.5] * channels, [0.25] * channels), ConvNet(channels, classes, image_size))
    else:
        size = {"image_size": image_size} if name.startswith("vit_") else {}  # the others take any, or their weights'
        network = (torchvision.models.get_model(name, weights="DEFAULT") if pretrained
                   else torchvision.models.get_model(name, num_classes=classes, **size))
        preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        model = nn.Sequential(Normalize(preset.mean, preset.std), network)
        if pretrained and classes != 1000:
            replace_head(model, classes)
    replaced = 0
    for module in list(model.modules()):
        # No dropout and no drop-path, as in the paper: every pass of a step must see the same network.
        if isinstance(module, (nn.Dropout, torchvision.ops.StochasticDepth)):
            module.p = 0.0
        for child_name, child in module.named_children():
            if activation and isinstance(child, tuple(ACTIVATIONS.values())):
                setattr(module, child_name, ACTIVATIONS[activation]())
                replaced += 1
    if activation and not replaced:
        raise ValueError(f"--activation {activation}: {name} has no ReLU, GELU or SiLU module to replace")
    return model


def replace_head(model, classes):
    """A fresh last layer, for other classes."""
    name, head = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    if isinstance(head, nn.Linear):
        fresh = nn.Linear(head.in_features, classes, bias=head.bias is not None)
    else:
        fresh = nn.Conv2d(head.in_channels, classes, head.kernel_size)
    model.set_submodule(name, fresh)


def freeze_batchnorm(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def first_model(args, parent, image, classes):
    """The network before its first step: that of --init, or a new one for such images and classes (names)."""
    if not parent:
        return build_model(args.model, len(image), len(classes), args.activation, args.pretrained, image.shape[-1])
    model, _ = load_checkpoint(args.init)
    if parent["classes"] != classes:
        replace_head(model, len(classes))
    return model


# Data


def load_data(args, pin_memory):
    """The training set, the held-out set, and this rank's batches of the former, shuffled anew by `sampler.set_epoch`:
    images (N, C, H, W) uint8 and targets (N,)."""
    with first_on_each_machine():  # which may download
        train_set, test_set = load_dataset(args, "train"), load_dataset(args, "test")
    classes = train_set.classes
    if len(classes) < 2:  # of which any network is right on all images
        raise ValueError(f"the data have one class, {classes}: --data-dir DIR means DIR/train/CLASS/IMAGE")
    if test_set.classes != classes:
        raise ValueError(f"train/ and val/ have different classes: {sorted({*classes} ^ {*test_set.classes})[:5]}")
    if args.batch_size * WORLD_SIZE > len(train_set):
        raise ValueError(f"--batch-size {args.batch_size} x {WORLD_SIZE} is more than the {len(train_set)} images")
    slow = args.dataset == "imagefolder" or args.augment == "strong"  # then worker processes are worth their start
    loader = DataLoader(train_set, args.batch_size, drop_last=True, pin_memory=pin_memory,
                        num_workers=args.workers if slow else 0,
                        sampler=DistributedSampler(train_set, WORLD_SIZE, RANK, seed=args.seed, drop_last=True))
    return train_set, test_set, loader


DATASETS = ["shapes", "shapes-clean", "imagenette", "fashion-mnist", "cifar10", "imagefolder"]
IMAGENETTE = {"train": (9469, 10), "val": (3925, 10)}  # images, classes; an extraction cut short leaves fewer


def load_dataset(args, part):
    """The images to train on ("train"), or those to evaluate on ("test"): the test part of --dataset, or, with
    --val-images, so many of its training images, the classes in equal parts. Items are (image (C, H, W) uint8, class).
    """
    folder, size, training = Path(args.data_dir or "data"), args.image_size, part == "train"
    from_train_part = training or args.val_images > 0
    if args.dataset == "imagefolder":  # one folder of image files per class, as ImageNet has it
        crop = v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)])
        transform = train_transform(args, size, v2.RandomResizedCrop(size), crop) if training else crop
        dataset = torchvision.datasets.ImageFolder(folder / ("train" if from_train_part else "val"),
                                                   v2.Compose([v2.PILToTensor(), transform]), loader=read_image)
    else:
        images, targets, classes = read_images(args, folder, from_train_part)
        side = images.shape[-1]
        size, padding = (size, 0) if args.dataset == "imagenette" else (side, side // 8)
        crop = v2.CenterCrop(size)
        transform = train_transform(args, size, v2.RandomCrop(size, padding), crop) if training else crop
        dataset = whole = Images(images, targets, classes, transform)
    if args.val_images:
        classes, targets = dataset.classes, torch.as_tensor(dataset.targets)
        chosen = balanced_subset(targets, args.val_images)
        if training:  # on all the others
            chosen = torch.from_numpy(np.setdiff1d(np.arange(len(dataset)), chosen))
        dataset = Subset(dataset, chosen.tolist())
        dataset.classes, dataset.targets = classes, targets[chosen]
    if training and args.dataset == "shapes":  # after the choice above, so that held-out images keep their true labels
        whole.targets = mislabel(whole.targets)
    return dataset


class Images(Dataset):
    """A data set in memory: images (N, C, H, W) uint8, targets (N,), the names of the classes."""

    def __init__(self, images, targets, classes, transform):
        self.images, self.targets, self.classes, self.transform = images, targets, classes, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.targets[i]


def read_images(args, folder, train_part):
    """A data set that is drawn, or downloaded: images (N, C, H, W) uint8, targets (N,), names of the classes."""
    if args.dataset.startswith("shapes"):
        return draw_shapes(10_000, seed=0) if train_part else draw_shapes(2_000, seed=1)
    if args.dataset == "imagenette":  # photographs of ten classes, decoded once, a little larger than the crop
        side = args.image_size * 9 // 8
        decode = v2.Compose([v2.PILToTensor(), v2.Resize(side), v2.CenterCrop(side)])
        part, place = "train" if train_part else "val", folder / "imagenette2-160"
        data = torchvision.datasets.Imagenette(folder, part, "160px", download=True, transform=decode)  # if not there
        found, whole = (len(data), len(data.classes)), IMAGENETTE[part]
        if found != whole:
            raise ValueError(f"{place} has {found[0]} images of {found[1]} classes in {part}/, not {whole[0]} of "
                             f"{whole[1]}: remove it, and it is downloaded anew")
        images, targets = zip(*tqdm(data, desc="decoding", leave=False, disable=NO_BAR))
        return torch.stack(images), torch.tensor(targets), [names[0] for names in data.classes]
    source = torchvision.datasets.CIFAR10 if args.dataset == "cifar10" else torchvision.datasets.FashionMNIST
    data = source(folder, train_part, download=True)
    images = torch.as_tensor(data.data)  # (N, H, W), or (N, H, W, C)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images, torch.as_tensor(data.targets), data.classes


def read_image(path):
    """An image file as a PIL image of RGB bytes; what is transparent is white, as a viewer shows it."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # which convert would clip to white
                raise ValueError(f"its pixels are {image.mode}, not bytes")
            if "A" in image.mode or "transparency" in image.info:  # which convert would drop
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # PIL does not name the file whose end is missing
        raise OSError(f"cannot read the image {path}: {error}") from error


def load_test_set(config, data_dir=None):
    """What a run with this configuration is evaluated on."""
    test_set = load_dataset(argparse.Namespace(**config | {"data_dir": data_dir or config["data_dir"]}), "test")
    if test_set.classes != config["classes"]:
        raise ValueError(f"the data have the classes {test_set.classes}, the model {config['classes']}")
    if config["val_images"] and len(test_set.dataset) - len(test_set) != config.get("images"):
        raise ValueError(f"the training images have changed: some of the {len(test_set)} held out may be trained on")
    return test_set


def held_out(test_set, n):
    """n of the images, (n, C, H, W) uint8, and their targets: always the same, the classes in equal parts."""
    chosen = balanced_subset(test_set.targets, n)
    return torch.stack([test_set[i][0] for i in chosen]), torch.as_tensor(test_set.targets)[chosen]


def train_transform(args, size, random_crop, crop):
    """--augment for one image (C, H, W) uint8. Strong is the paper's; its mixup and cutmix follow in the loop."""
    if args.augment == "none":
        return crop
    if args.augment == "basic":
        return v2.Compose([random_crop, v2.RandomHorizontalFlip()])
    # timm's rand-m9: each of two operations with probability 1/2, at level 9 of 10, which is torchvision's 27 of 30.
    # The recipe also has a colour jitter of 0.4, which timm leaves out beside RandAugment.
    operation = v2.RandomApply([v2.RandAugment(num_ops=1, magnitude=27)], p=0.5)
    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), operation, operation, erase])


def erase(image, mean=0.45, std=0.225):
    """Random erasing of one image (C, H, W) uint8. Its noise is N(0, 1) on normalised inputs, hence the way there and
    back; on bytes torchvision's would wrap around."""
    normalised = v2.RandomErasing(0.25, value="random")((image / 255 - mean) / std)
    return ((normalised * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)


def balanced_subset(targets, n):
    """Indices of n images in a fixed, shuffled order: the k-th images of all classes come before the k+1-th of any."""
    targets = torch.as_tensor(targets)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    before, turns = Counter(), []  # of an image, how many of its class come before it
    for target in targets[order].tolist():
        turns.append(before[target])
        before[target] += 1
    return order[torch.tensor(turns).argsort(stable=True)][:n]


def draw_shapes(n, seed, size=32):
    """The images of `shapes`, the embedded data set: ten anti-aliased outlines r(θ) of random colour, place, size and
    rotation on a shaded, noisy background. Images (n, 3, size, size) uint8, targets (n,), the names of the classes."""
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
    coverage = torch.sigmoid(size * (radius * outline - torch.hypot(x, y)))[:, None]  # an edge about two pixels wide

    background = uniform(0, 0.6, 3, 1, 1)
    colour = background + uniform(0.2, 0.4, 3, 1, 1)
    slope = uniform(-0.1, 0.1, 2, 1, 1)
    images = background + (slope[:, :1] * axis + slope[:, 1:] * axis[:, None])
    images = images + coverage * (colour - images) + 0.01 * torch.randn(n, 3, size, size, generator=rng)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), targets, list(outlines)


def mislabel(targets, classes=10, share=0.1):
    """The training labels of `shapes`: targets (N,), each with probability `share` drawn anew from all classes. With
    true labels a small network becomes sure of every image, and its loss vanishes together with its input gradient,
    however steep it is nearby: the penalty finds nothing there. Photographs keep a network in doubt by themselves."""
    rng = torch.Generator().manual_seed(2)  # 0 and 1 have drawn the images
    anew = torch.rand(len(targets), generator=rng) < share
    return torch.where(anew, torch.randint(classes, targets.shape, generator=rng), targets)


# Checkpoints


# Flags that say where a run is made, not what it learns; what --init brings is in `parent`. (The number of workers
# changes the noise of augmentation.)
PLACE = {"output_dir", "resume", "data_dir", "workers", "init"}


def recipe(config):
    """The part of a configuration that the runs of one experiment share, whatever their seeds."""
    return {name: value for name, value in config.items() if name not in PLACE | {"seed", "eval_images"}}


def checkpoint_path(path):
    """A folder of a run stands for its checkpoint.pt."""
    path = Path(path)
    return path / "checkpoint.pt" if path.is_dir() else path


def read_checkpoint(path):
    return torch.load(checkpoint_path(path), map_location="cpu", weights_only=True)  # never unpickles code


def file_sha256(path):
    """Which checkpoint a result is of."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_checkpoint(path, device="cpu"):
    """The model of a checkpoint, in eval mode, and its configuration, a dict of train.py's flags, `classes` (names),
    `channels`, `pixels` (the side of its images), `parent` (the recipe of the run that --init named, or None) and
    `epoch`, the last one trained. The averaged weights if it was trained with --ema-decay."""
    checkpoint = read_checkpoint(path)
    config = checkpoint["config"] | {"epoch": checkpoint["epoch"]}
    model = build_model(config["model"], config["channels"], len(config["classes"]), config["activation"],
                        image_size=config["pixels"])
    weights = checkpoint["model"]
    if checkpoint.get("ema"):
        weights = {name.removeprefix("module."): w for name, w in checkpoint["ema"].items() if name != "n_averaged"}
    model.load_state_dict(weights)
    return model.eval().to(device), config


@contextlib.contextmanager
def atomic_write(path):
    """A binary file to write, which takes the place of `path` at the end, whole, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# Processes


def start_process():
    """This process's device: a GPU of its own, or the CPU on a machine without. Joins the processes that torchrun has
    started, which wait for each other up to a day: for a download, a scan of ImageNet, the slowest one's attacks."""
    device = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    missing = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
               if not os.environ.get(name)]
    if missing and (RANK, LOCAL_RANK, WORLD_SIZE) != (0, 0, 1):  # a rank 1 of one process would write nothing
        raise ValueError(f"the environment has some of torchrun's variables, but not {', '.join(missing)}")
    if WORLD_SIZE > 1:
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1), device_id=device_id)
    return device


@contextlib.contextmanager
def prefer_speed():
    """For training and its benchmark. A notebook in which they ran goes on as before."""
    torch.set_float32_matmul_precision("high")  # TF32, as convolutions have it
    torch.backends.cudnn.benchmark = True  # all batches of training have one shape
    gradnorm.CHECK_VALUES = False  # pixels are bytes / 255, and targets those of the data set
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.benchmark = False
        gradnorm.CHECK_VALUES = True


def leave_processes():
    if WORLD_SIZE > 1:
        dist.barrier()  # rank 0 may have more to do
        dist.destroy_process_group()


@contextlib.contextmanager
def first_on_each_machine():
    """The first process of each machine runs the body, which may download, before the others do."""
    if WORLD_SIZE > 1 and LOCAL_RANK > 0:
        dist.barrier()
    yield
    if WORLD_SIZE > 1 and LOCAL_RANK == 0:
        dist.barrier()


def from_rank_zero(read):
    """What `read` returns on rank 0, whose disk the others need not see."""
    values = [read() if RANK == 0 else None]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(values)
    return values[0]


def mean_over_ranks(value):
    if WORLD_SIZE > 1:
        dist.all_reduce(value)
    return value.item() / WORLD_SIZE


# Command line


def zero_to_one(text):
    """An argparse type: a share, or a number in pixels, which may be a fraction, such as 4/255."""
    value = float(Fraction(text))
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not within [0, 1]; 4 of 255 grey levels are 4/255")
    return value


def tolerate_ascii():
    """A screen without ε prints a question mark. The streams of a notebook have no `reconfigure`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def make_parser():
    parser = argparse.ArgumentParser(usage="%(prog)s [--flag VALUE ...]", description=__doc__.splitlines()[0],
                                     allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument

    add("--method", default="gradnorm", choices=["natural", "gradnorm", "adversarial"], help="loss to minimise")
    add("--eps", default="4/255", type=zero_to_one, help="radius of the L∞ ball in pixels, also in evaluation")
    add("--lambda-ce", default=0.8, type=float, help="gradnorm: weight of the cross-entropy")
    add("--lambda-gn", default=1.2, type=float, help="gradnorm: weight of the gradient norm")
    add("--h", type=zero_to_one, help="gradnorm: step of the finite difference, such as 2/255; else double backprop")
    add("--gradnorm-every", default=1, type=int, metavar="K", help="gradnorm: penalty in every K-th step, K times it")
    add("--steps", default=3, type=int, metavar="N", help="adversarial: steps of PGD")
    add("--step-size", type=zero_to_one, help="adversarial: in pixels; by default 2ε/N, and 1.25ε for N = 1")

    add("--dataset", default="shapes", choices=DATASETS,
        help="shapes is drawn, with a tenth of the training labels random, shapes-clean with none; three are downloaded")
    add("--data-dir", help="where the data are, or go; for imagefolder it holds train/ and val/")
    add("--val-images", default=0, type=int, help="evaluate on so many held-out training images, to choose settings")
    add("--image-size", type=int, help="imagenette (photographs of 160 pixels): by default 64; imagefolder: 224")
    add("--augment", default="none", choices=["none", "basic", "strong"], help="crop and flip; the paper's recipe")
    add("--model", help="convnet, the default, or a classifier of torchvision, such as resnet50, swin_b or vit_b_16")
    add("--activation", choices=list(ACTIVATIONS), help="in the place of every ReLU, GELU and SiLU module")
    add("--init", metavar="CHECKPOINT", help="start from another run's weights: its model, activation, BatchNorm")
    add("--pretrained", action="store_true", help="start from torchvision's ImageNet weights")

    add("--epochs", default=6, type=int, help="passes over the training images")
    add("--batch-size", default=128, type=int, help="images per process and step")
    add("--optimizer", default="adamw", choices=["adamw", "sgd"], help="sgd wants a --weight-decay near 5e-4")
    add("--lr", type=float, help="peak learning rate; by default 1e-2 for convnet, 1e-3 for the others")
    add("--warmup-epochs", type=float, help="rise of learning rate, penalty and training attack's step; by default 2")
    add("--weight-decay", default=0.05, type=float, help="not on norms and biases")
    add("--label-smoothing", default=0.0, type=zero_to_one, help="share of each target, spread over all classes")
    add("--ema-decay", default=0.0, type=float, help="keep an average of the weights; the paper's is 0.9998; 0: none")

    add("--output-dir", help="where the run is written; by default runs/METHOD")
    add("--resume", action="store_true", help="continue from the checkpoint in --output-dir; start if there is none")
    add("--amp", default="off", choices=list(AMP_DTYPES), help="mixed precision in training")
    add("--compile", action="store_true", help="torch.compile the objective; takes minutes to start")
    add("--workers", default=min(8, os.cpu_count()), type=int, help="loading processes per training process")
    add("--eval-images", default=250, type=int, help="held-out images to evaluate on after each epoch")
    add("--seed", default=0, type=int, help="of the weights, the order of images and all noise")
    return parser


def parse_args():
    """The settings, complete, and the recipe of the run that --init names, or None."""
    parser = make_parser()
    args, parent = parser.parse_args(), None
    args.output_dir = args.output_dir or f"runs/{args.method}"
    if not args.resume and os.path.isdir(args.output_dir) and os.listdir(args.output_dir):
        parser.error(f"{args.output_dir} holds a run: continue it with --resume, or choose another --output-dir")
    if args.warmup_epochs is None:
        args.warmup_epochs = min(2, args.epochs)
    if args.warmup_epochs > args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs} is more than --epochs {args.epochs}")
    if args.init:
        if args.model or args.activation or args.pretrained:
            parser.error("--init brings its model: leave out --model, --activation and --pretrained")
        config = read_checkpoint(args.init)["config"]
        args.model, args.activation, parent = config["model"], config["activation"], recipe(config)
        if args.dataset == config["dataset"] and args.val_images > config["val_images"]:
            parser.error(f"--val-images {args.val_images}: {args.init} was trained on some of these images")
    args.model = args.model or "convnet"
    if args.pretrained and args.model == "convnet":
        parser.error("--pretrained: convnet has no ImageNet weights; choose another --model")
    if args.pretrained and args.dataset == "imagenette":
        parser.error("--pretrained: ImageNet's training images include the test images of --dataset imagenette")
    image_sizes = {"imagenette": 64, "imagefolder": 224}
    if args.image_size and args.dataset not in image_sizes:
        parser.error(f"--image-size: the images of --dataset {args.dataset} have a size of their own")
    if args.data_dir and args.dataset.startswith("shapes"):
        parser.error("--data-dir: shapes are drawn; choose another --dataset")
    args.image_size = args.image_size or image_sizes.get(args.dataset)
    if args.lr is None:
        args.lr = 1e-2 if args.model == "convnet" else 1e-3
    return args, parent


if __name__ == "__main__":
    with prefer_speed():
        main()
