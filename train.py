"""Train an image classifier by natural, GradNorm or PGD adversarial training.

    python train.py --method gradnorm                                          # a laptop: CPU or one GPU
    torchrun --standalone --nproc_per_node=8 train.py --method gradnorm        # one machine, 8 GPUs
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ...

Read `Objective`, the loss of each method; `training_step` and `train_epoch`, the loop; `main`, which sets them up. What
follows, the network, the data, checkpoints and the command line, can be skipped at first. A run writes into
--output-dir:

    checkpoint.pt         all that --resume needs; train.load_checkpoint gives the model
    metrics.jsonl         one JSON object per epoch
    gradients/0001.pt     the loss-input gradients of a few evaluation images after epoch 1, and so on
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import pickle
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision.transforms import v2
from tqdm import tqdm

from gradnorm import gradnorm_loss, gradnorm_loss_finite_difference, input_gradient, pgd_attack

RANK = int(os.environ.get("RANK") or 0)  # these three are set by torchrun
LOCAL_RANK = int(os.environ.get("LOCAL_RANK") or 0)
WORLD_SIZE = int(os.environ.get("WORLD_SIZE") or 1)
NO_BAR = True if RANK else None  # None: tqdm draws none where there is no terminal


class Objective(nn.Module):
    """The loss of each method, from images (N, C, H, W) in [0, 1] and their targets.

    A module, so that DDP wraps all of it: attacks and inner gradients call the bare model inside, and only the one
    final `.backward()` meets DDP's hooks. A fourth method is a branch here, a choice of --method, and a line in METHODS
    of visualize.py.
    """

    def __init__(self, model, args):
        super().__init__()
        self.model, self.args = model, args

    def forward(self, x, y, ramp, penalise=True):
        """A scalar. `ramp` rises from 0 to 1 in the warm-up; `penalise` is False in the steps that --gradnorm-every
        leaves without a penalty."""
        model, args = self.model, self.args
        if args.method == "gradnorm" and penalise:
            # With the penalty only in every K-th step, K times the weight keeps its mean.
            lambdas = {"lambda_ce": args.lambda_ce, "lambda_gn": args.lambda_gn * args.gradnorm_every * ramp}
            if args.h:
                return gradnorm_loss_finite_difference(model, x, y, eps=args.eps, h=args.h, **lambdas)
            return gradnorm_loss(model, x, y, eps=args.eps, **lambdas)
        if args.method == "gradnorm":
            return args.lambda_ce * F.cross_entropy(model(x), y)
        if args.method == "adversarial":
            x = pgd_attack(model, x, y, eps=args.eps, steps=args.steps, step_size=args.step_size * ramp)
        return F.cross_entropy(model(x), y)  # natural training, or that on the attacked images


def training_step(objective, optimizer, args, x, y, ramp=1.0, penalise=True):
    """The loss, before the step."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp == "bf16"):
        loss = objective(x, y, ramp, penalise)
    loss.backward()
    total_norm = nn.utils.clip_grad_norm_(objective.parameters(), max_norm=1.0)  # the paper's value
    if not total_norm.isfinite():  # on every rank, since DDP has averaged the gradients: all stop here together
        raise FloatingPointError(f"loss {loss}, norm of its gradient {total_norm}: lower --lr or --lambda-gn, or take "
                                 "--h; the last epoch's checkpoint stays")
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def train_epoch(epoch, model, objective, optimizer, ema, loader, args, device):
    """The mean loss of the epoch. Its steps are counted from the start of the training."""
    model.train()
    if args.init or args.pretrained:  # as in the paper, a network that was trained before keeps its statistics
        freeze_batchnorm(model)
    warmup_steps, total_steps = args.warmup_epochs * len(loader), args.epochs * len(loader)
    losses = []
    bar = tqdm(loader, leave=False, desc=f"epoch {epoch + 1}/{args.epochs}", disable=NO_BAR)
    for step, (x, y) in enumerate(bar, start=epoch * len(loader)):
        x, y = x.to(device, non_blocking=True).float() / 255, y.to(device, non_blocking=True)
        x, y = mix_and_smooth(x, y, args)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, warmup_steps, total_steps, args.lr)
        ramp = step / warmup_steps if step < warmup_steps else 1.0
        losses.append(training_step(objective, optimizer, args, x, y, ramp, step % args.gradnorm_every == 0))
        if ema:
            ema.update_parameters(model)
    mean = torch.stack(losses).mean()
    if WORLD_SIZE > 1:
        dist.all_reduce(mean)
    return mean.item() / WORLD_SIZE


def main():
    args = parse_args()
    device = start_process()
    torch.set_float32_matmul_precision("high")  # TF32, as convolutions have it
    torch.backends.cudnn.benchmark = True  # all batches of training have one shape
    torch.manual_seed(args.seed)  # the same first weights on every rank
    train_set, evaluation_set, loader = load_data(args, pin_memory=device.type == "cuda")
    images, labels = evaluation_images(evaluation_set, args.eval_images)
    args.classes, args.images, args.world_size = train_set.classes, len(train_set), WORLD_SIZE  # for the checkpoint
    model = first_model(args, images[0]).to(device)
    args.channels = len(model[0].mean)
    args.pixels = args.parent["pixels"] if args.init else images.shape[-1]  # the side of the network's images
    objective = Objective(model, args)
    if WORLD_SIZE > 1:
        objective = DistributedDataParallel(objective, device_ids=[LOCAL_RANK] if device.type == "cuda" else None)
    optimizer = build_optimizer(model, args)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay)) if args.ema_decay else None
    first_share = args.ema_decay ** (args.epochs * len(loader))
    if ema and first_share > 0.01:  # it would look like a method without effect
        raise ValueError(f"--ema-decay {args.ema_decay}: at the end the first weights would still be {first_share:.0%} "
                         "of the average")
    output_dir = Path(args.output_dir)
    first_epoch, metrics = resume(output_dir / "checkpoint.pt", model, optimizer, ema, args)
    if RANK == 0:
        (output_dir / "gradients").mkdir(parents=True, exist_ok=args.resume)  # fails if another run has just begun
        start = f" from epoch {args.parent['epoch']} of {args.parent['epochs']} of {args.init}" if args.init else ""
        print(f"{args.method} training of {args.model}{start} on {args.dataset}: {len(train_set)} images, "
              f"{len(args.classes)} classes, {WORLD_SIZE} process(es) on {device.type}; {output_dir}, {first_epoch} of "
              f"{args.epochs} epochs done", flush=True)

    for epoch in range(first_epoch, args.epochs):
        # An epoch's noise is a function of (seed, epoch, rank), so that --resume needs no random state.
        torch.manual_seed(int(np.random.SeedSequence([args.seed, epoch, RANK]).generate_state(1)[0]))
        loader.sampler.set_epoch(epoch)
        start = time.perf_counter()
        loss = train_epoch(epoch, model, objective, optimizer, ema, loader, args, device)
        seconds = time.perf_counter() - start
        if RANK == 0:  # the others wait for it in their next step
            averaged = ema.module if ema else model  # what load_checkpoint will give
            metrics.append({"epoch": epoch + 1, "loss": loss, "lr": optimizer.param_groups[0]["lr"], "seconds": seconds,
                            **validate(averaged, images, labels, args.eps, args.batch_size, device)})
            few, their_labels = images[:4].clone(), labels[:4].clone()  # with a view torch.save would write all images
            gradients = input_gradient(averaged, few.to(device).float() / 255, their_labels.to(device))
            write_epoch(output_dir, model, optimizer, ema, metrics, args,
                        {"images": few, "labels": their_labels, "gradients": gradients.bfloat16().cpu()})
            print("  ".join(f"{name} {value:.4g}" for name, value in metrics[-1].items()), flush=True)
    leave_processes()


def mix_and_smooth(x, y, args):
    """A batch after the paper's mixup or cutmix (--augment strong) and --label-smoothing. Its targets are then class
    probabilities (N, classes)."""
    classes, share = len(args.classes), args.label_smoothing
    if args.augment == "strong":
        x, y = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=classes),
                                v2.CutMix(alpha=1.0, num_classes=classes)])(x, y)
    if share:
        y = y if y.is_floating_point() else F.one_hot(y, classes).float()
        y = (1 - share) * y + share / classes
    return x, y


def learning_rate(step, warmup_steps, total_steps, peak, floor=1e-5):
    """Linear warm-up from `floor` to `peak`, then half a cosine down to `floor`; the paper's floor is 1e-5."""
    floor = min(floor, peak)
    if step < warmup_steps:
        return floor + (peak - floor) * step / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


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
    """The first layer of every model, which therefore takes pixels in [0, 1]. A grey image broadcasts to three channels
    if the mean has three."""

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
        weights = torchvision.models.get_model_weights(name).DEFAULT
        size = {"image_size": image_size} if name.startswith("vit_") and not pretrained else {}  # the others take any
        network = torchvision.models.get_model(name, num_classes=classes, **size)
        if pretrained:
            load_matching(network, torchvision.models.get_model(name, weights=weights).state_dict())
        model = nn.Sequential(Normalize(weights.transforms().mean, weights.transforms().std), network)
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


def load_matching(model, weights):
    """All weights but those of a head for another number of classes, which stays as it was drawn."""
    own = model.state_dict()
    heads = {name for name, w in weights.items()
             if w.shape[:1] != own[name].shape[:1] and w.shape[1:] == own[name].shape[1:]}
    model.load_state_dict({name: own[name] if name in heads else w for name, w in weights.items()})


def freeze_batchnorm(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def first_model(args, image):
    """The network before its first step: that of --init, or a new one for such images (C, H, W) and args.classes."""
    if not args.init:
        return build_model(args.model, len(image), len(args.classes), args.activation, args.pretrained, image.shape[-1])
    parent = args.parent
    # Data of the same classes are taken for the same data. If their number has changed, other images are held out.
    changed = args.images + args.val_images != parent["images"] + parent["val_images"]
    if args.val_images and parent["classes"] == args.classes and (changed or args.val_images > parent["val_images"]):
        raise ValueError(f"--val-images {args.val_images}: {args.init} was trained on some of these images")
    model = build_model(args.model, parent["channels"], len(args.classes), args.activation, image_size=parent["pixels"])
    load_matching(model, trained_weights(read_checkpoint(args.init)))
    return model


# Data


def load_data(args, pin_memory):
    """The training set, the set to evaluate on, and this rank's batches of the former, shuffled anew by
    `sampler.set_epoch`: images (N, C, H, W) uint8 and targets (N,)."""
    train_set, evaluation_set = load_dataset(args, "train"), load_dataset(args, "test")
    if len(train_set.classes) < 2:  # of which any network is right on all images
        raise ValueError(f"the data have one class, {train_set.classes}: --data-dir DIR means DIR/train/CLASS/IMAGE")
    if evaluation_set.classes != train_set.classes:
        differing = sorted({*train_set.classes} ^ {*evaluation_set.classes})[:5]
        raise ValueError(f"train/ and val/ have different classes: {differing}")
    if args.batch_size * WORLD_SIZE > len(train_set):
        raise ValueError(f"--batch-size {args.batch_size} x {WORLD_SIZE} is more than the {len(train_set)} images")
    slow = args.dataset == "imagefolder" or args.augment == "strong"  # then worker processes are worth their start
    loader = DataLoader(train_set, args.batch_size, drop_last=True, pin_memory=pin_memory,
                        num_workers=args.workers if slow else 0,
                        sampler=DistributedSampler(train_set, WORLD_SIZE, RANK, seed=args.seed, drop_last=True))
    return train_set, evaluation_set, loader


IMAGENETTE = {"train": 9469, "val": 3925}  # images; an extraction that was cut short leaves fewer


def load_dataset(args, part):
    """The images to train on ("train"), or those to evaluate on ("test"): the test part of --dataset, or, with
    --val-images, so many of its training images, the classes in equal parts. Items are (image (C, H, W) uint8, class).
    """
    folder, size, training = Path(args.data_dir or "data"), args.image_size, part == "train"
    from_train_part = training or args.val_images > 0
    if WORLD_SIZE > 1 and LOCAL_RANK > 0:
        dist.barrier()  # until the first process of this machine has downloaded them
    if args.dataset == "imagefolder":  # one folder of image files per class, as ImageNet has it
        crop = v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)])
        transform = train_transform(args, size, v2.RandomResizedCrop(size), crop) if training else crop
        dataset = torchvision.datasets.ImageFolder(folder / ("train" if from_train_part else "val"),
                                                   v2.Compose([v2.PILToTensor(), transform]))
    else:
        images, targets, classes = read_images(args, folder, from_train_part)
        side = images.shape[-1]
        size, padding = (size, 0) if args.dataset == "imagenette" else (side, side // 8)
        crop = v2.CenterCrop(size)
        transform = train_transform(args, size, v2.RandomCrop(size, padding), crop) if training else crop
        dataset = whole = Images(images, targets, classes, transform)
    if WORLD_SIZE > 1 and LOCAL_RANK == 0:
        dist.barrier()
    if args.val_images:
        classes, targets = dataset.classes, torch.as_tensor(dataset.targets)
        chosen = balanced_subset(targets, args.val_images)
        if training:  # on all the others
            chosen = torch.from_numpy(np.setdiff1d(np.arange(len(dataset)), chosen))
        dataset = Subset(dataset, chosen.tolist())
        dataset.classes, dataset.targets = classes, targets[chosen]
        if training and (missing := {*range(len(classes))} - {*dataset.targets.tolist()}):
            raise ValueError(f"--val-images {args.val_images} holds out all images of {classes[min(missing)]}")
    if training and args.dataset == "shapes":  # after --val-images, which keep their true labels
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
        part = "train" if train_part else "val"
        data = torchvision.datasets.Imagenette(folder, part, "160px", download=True, transform=decode)  # if not there
        if len(data) != IMAGENETTE[part]:
            raise ValueError(f"{folder}/imagenette2-160/{part} has {len(data)} images, not {IMAGENETTE[part]}: remove "
                             "imagenette2-160, and it is downloaded anew")
        images, targets = zip(*tqdm(data, desc="decoding", leave=False, disable=NO_BAR))
        return torch.stack(images), torch.tensor(targets), [names[0] for names in data.classes]
    source = torchvision.datasets.CIFAR10 if args.dataset == "cifar10" else torchvision.datasets.FashionMNIST
    data = source(folder, train_part, download=True)
    images = torch.as_tensor(data.data)  # (N, H, W), or (N, H, W, C)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images, torch.as_tensor(data.targets), data.classes


def load_evaluation_set(config, data_dir=None):
    """The images that a run with this configuration is evaluated on."""
    dataset = load_dataset(argparse.Namespace(**config | {"data_dir": data_dir or config["data_dir"]}), "test")
    if dataset.classes != config["classes"]:
        raise ValueError(f"the data have the classes {dataset.classes}, the model {config['classes']}")
    if config["val_images"] and len(dataset.dataset) - len(dataset) != config.get("images"):
        raise ValueError(f"the training images have changed: some of the {len(dataset)} held out may be trained on")
    return dataset


def evaluation_images(dataset, n):
    """n of the images, (n, C, H, W) uint8, and their targets: always the same, the classes in equal parts."""
    chosen = balanced_subset(dataset.targets, n)
    return torch.stack([dataset[i][0] for i in chosen]), torch.as_tensor(dataset.targets)[chosen]


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
    true labels a small network becomes sure of every image: its loss vanishes, and its input gradient too, however
    steep the loss is nearby, so that the penalty has nothing to act on. Photographs leave a network in doubt anyway."""
    rng = torch.Generator().manual_seed(2)  # 0 and 1 have drawn the images
    anew = torch.rand(len(targets), generator=rng) < share
    return torch.where(anew, torch.randint(classes, targets.shape, generator=rng), targets)


# Checkpoints


# Flags in which a run and its continuation may differ. (What --init names is compared as `parent`; the number of
# workers changes the noise of augmentation alone.)
NOT_COMPARED = {"output_dir", "resume", "data_dir", "workers", "init"}


def experiment(config):
    """The part of a configuration that the runs of one experiment share, whatever their seeds."""
    return {name: value for name, value in config.items() if name not in NOT_COMPARED | {"seed", "eval_images"}}


def checkpoint_path(path):
    """A folder of a run stands for its checkpoint.pt."""
    path = Path(path_type(path))
    return path / "checkpoint.pt" if path.is_dir() else path


def read_checkpoint(path):
    try:
        return torch.load(checkpoint_path(path), map_location="cpu", weights_only=True)  # never unpickles code
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        raise ValueError(f"{path} is no checkpoint of train.py, or no whole one") from None


def trained_weights(checkpoint):
    """The averaged weights if it was trained with --ema-decay, else those of the last step."""
    if not checkpoint.get("ema"):
        return checkpoint["model"]
    return {name.removeprefix("module."): w for name, w in checkpoint["ema"].items() if name != "n_averaged"}


def load_checkpoint(path, device="cpu"):
    """The model of a checkpoint, in eval mode, and its configuration, a dict of train.py's flags, `classes` (names),
    `channels`, `pixels` (the side of its images), `parent` (the `experiment` of the run that --init named, or None)
    and `epoch`, the last one trained."""
    checkpoint = read_checkpoint(path)
    config = checkpoint["config"] | {"epoch": checkpoint["epoch"]}
    model = build_model(config["model"], config["channels"], len(config["classes"]), config["activation"],
                        image_size=config["pixels"])
    model.load_state_dict(trained_weights(checkpoint))
    return model.eval().to(device), config


def resume(path, model, optimizer, ema, args):
    """How many epochs are done, and their metrics. Where there is a checkpoint, all state is brought back."""
    checkpoint = from_rank_zero(lambda: read_checkpoint(path) if path.exists() else None)  # there only with --resume
    if not checkpoint:
        return 0, []
    for name in sorted(vars(args).keys() - NOT_COMPARED):
        if getattr(args, name) != checkpoint["config"].get(name):
            raise ValueError(f"--resume: {name} is {getattr(args, name)}, it was {checkpoint['config'].get(name)}")
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    if ema:
        ema.load_state_dict(checkpoint["ema"])
    return checkpoint["epoch"], checkpoint["metrics"]


def write_epoch(output_dir, model, optimizer, ema, metrics, args, gradients):
    epoch = len(metrics)
    with atomic_write(output_dir / f"gradients/{epoch:04d}.pt") as file:
        torch.save(gradients, file)
    with atomic_write(output_dir / "metrics.jsonl") as file:
        file.writelines(json.dumps(line).encode() + b"\n" for line in metrics)
    with atomic_write(output_dir / "checkpoint.pt") as file:  # the last: a run that is killed before repeats the epoch
        torch.save({"model": model.state_dict(), "ema": ema.state_dict() if ema else None, "epoch": epoch,
                    "optimizer": optimizer.state_dict(), "metrics": metrics, "config": vars(args)}, file)


@contextlib.contextmanager
def atomic_write(path):
    """A binary file to write, which takes the place of `path` at the end, whole, or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # another process may write the same file
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
    if WORLD_SIZE > 1:
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1), device_id=device_id)
    return device


def leave_processes():
    if WORLD_SIZE > 1:
        dist.barrier()  # rank 0 may have more to do
        dist.destroy_process_group()


def from_rank_zero(read):
    """What `read` returns on rank 0, whose disk the others need not see."""
    values = [read() if RANK == 0 else None]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(values)
    return values[0]


# Command line: types of argparse, and the flags


def zero_to_one(text):
    """A share, or a number in pixels, which may be a fraction, such as 4/255."""
    value = float(Fraction(text))
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not within [0, 1]; 4 of 255 grey levels are 4/255")
    return value


def count(text):
    """1 or more."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def count_or_0(text):
    return 0 if text == "0" else count(text)


def path_type(text):
    """Not the empty "$UNSET" of a shell, and ~ where the shell has left it, as in --output-dir=~/runs."""
    if not str(text):
        raise argparse.ArgumentTypeError("the path is empty")
    return os.path.expanduser(text)


def make_parser():
    parser = argparse.ArgumentParser(usage="%(prog)s [--flag VALUE ...]", description=__doc__.splitlines()[0],
                                     allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument

    add("--method", default="gradnorm", choices=["natural", "gradnorm", "adversarial"], help="loss to minimise")
    add("--eps", default="4/255", type=zero_to_one, help="radius of the L∞ ball in pixels, also in evaluation")
    add("--lambda-ce", default=0.8, type=float, help="gradnorm: weight of the cross-entropy")
    add("--lambda-gn", default=1.2, type=float, help="gradnorm: weight of the gradient norm")
    add("--h", type=zero_to_one, help="gradnorm: step of the finite difference, such as 2/255; else double backprop")
    add("--gradnorm-every", default=1, type=count, metavar="K", help="gradnorm: in every K-th step K times the penalty")
    add("--steps", default=3, type=count, metavar="N", help="adversarial: steps of PGD")
    add("--step-size", type=zero_to_one, help="adversarial: in pixels; by default 2ε/N, and 1.25ε for N = 1")

    add("--dataset", default="shapes",
        choices=["shapes", "shapes-clean", "imagenette", "fashion-mnist", "cifar10", "imagefolder"],
        help="shapes are drawn, a tenth of the training labels random, in shapes-clean none; three are downloaded")
    add("--data-dir", type=path_type, help="where the data are, or go; for imagefolder it holds train/ and val/")
    add("--val-images", default=0, type=count_or_0, metavar="N",
        help="hold so many training images out and evaluate on them, to choose settings")
    add("--image-size", type=count, help="imagenette (photographs of 160 pixels): by default 64; imagefolder: 224")
    add("--augment", default="none", choices=["none", "basic", "strong"], help="crop and flip; the paper's recipe")
    add("--model", help="convnet, the default, or a classifier of torchvision, such as resnet50, swin_b or vit_b_16")
    add("--activation", choices=list(ACTIVATIONS), help="in the place of every ReLU, GELU and SiLU module")
    add("--init", type=path_type, metavar="CHECKPOINT",
        help="start from another run's weights: its model, activation, image size and frozen BatchNorm")
    add("--pretrained", action="store_true", help="start from torchvision's ImageNet weights; BatchNorm is frozen")

    add("--epochs", default=6, type=count, help="passes over the training images")
    add("--batch-size", default=128, type=count, help="images per process and step")
    add("--optimizer", default="adamw", choices=["adamw", "sgd"], help="sgd wants a --weight-decay near 5e-4")
    add("--lr", type=float, help="peak learning rate; by default 1e-2 for convnet, 1e-3 for the others")
    add("--warmup-epochs", default=2, type=count_or_0, metavar="N",
        help="linear rise of learning rate, penalty and training attack's step, in --epochs at most")
    add("--weight-decay", default=0.05, type=float, help="not on norms and biases")
    add("--label-smoothing", default=0.0, type=zero_to_one, help="share of each target, spread over all classes")
    add("--ema-decay", default=0.0, type=zero_to_one, metavar="D",
        help="average the weights over about 1 / (1 - D) steps; the paper's is 0.9998")

    add("--output-dir", type=path_type, help="where the run is written; by default runs/METHOD")
    add("--resume", action="store_true", help="continue from the checkpoint in --output-dir; start if there is none")
    add("--amp", default="off", choices=["off", "bf16"], help="mixed precision in training")
    add("--workers", default=min(8, os.cpu_count()), type=count_or_0, help="loading processes per training process")
    add("--eval-images", default=250, type=count, help="images to evaluate on after each epoch")
    add("--seed", default=0, type=count_or_0, help="of the weights, the order of images and all noise")
    return parser


def parse_args():
    """The settings, complete. `parent` is the experiment of the run that --init names, or None."""
    parser = make_parser()
    args = parser.parse_args()
    args.parent, args.output_dir = None, args.output_dir or f"runs/{args.method}"
    if not args.resume and os.path.isdir(args.output_dir) and os.listdir(args.output_dir):
        parser.error(f"{args.output_dir} holds a run: continue it with --resume, or choose another --output-dir")
    args.warmup_epochs = min(args.warmup_epochs, args.epochs)
    if args.step_size is None:  # the paper's for PGD-3, Wong et al.'s (ICLR 2020) for one step
        args.step_size = 2 * args.eps / args.steps if args.steps > 1 else 1.25 * args.eps
    if args.init:
        if args.model or args.activation or args.pretrained:
            parser.error("--init brings its model: leave out --model, --activation and --pretrained")
        checkpoint = read_checkpoint(args.init)
        args.parent = experiment(checkpoint["config"]) | {"epoch": checkpoint["epoch"]}
        args.model, args.activation = args.parent["model"], args.parent["activation"]
        args.pretrained = args.parent["pretrained"]
    args.model = args.model or "convnet"
    if args.pretrained and args.model == "convnet":
        parser.error("--pretrained: convnet has no ImageNet weights; choose another --model")
    if args.pretrained and args.dataset == "imagenette":
        parser.error("--pretrained: ImageNet's training images include the test images of --dataset imagenette")
    if args.data_dir and args.dataset.startswith("shapes"):
        parser.error("--data-dir: shapes are drawn; choose another --dataset")
    size = {"imagenette": 64, "imagefolder": 224}.get(args.dataset)  # the other data have a size of their own
    args.image_size = size and (args.image_size or (args.parent["pixels"] if args.init else size))
    if args.lr is None:
        args.lr = 1e-2 if args.model == "convnet" else 1e-3
    return args


if __name__ == "__main__":
    main()
