"""What a training step of each method costs, as a Markdown table: time, its ratio to natural training and to PGD-3
adversarial training, peak memory (CUDA), and the cost model's prediction.

    python -m results.benchmark                                                 # train.py's ConvNet, 32 x 32 pixels
    python -m results.benchmark --model resnet50 --image-size 224 --batch-size 4 --activation gelu --rounds 5
    python -m results.benchmark --model swin_t --image-size 224 --amp bf16 --batch-size 32

Random images, and the flags of train.py. The methods' steps alternate, so that a slow moment of the machine meets them
all, and ratios are taken within a round. BatchNorm is frozen, as in the paper.
"""

import argparse
import time

import numpy as np
import torch
from tqdm import tqdm

import train

METHODS = {  # name: (flags of train.py, cost in forward passes)
    "natural": ({"method": "natural"}, 3),
    "GradNorm, double backprop": ({"method": "gradnorm", "h": 0.0}, 6),
    "GradNorm, finite difference": ({"method": "gradnorm", "h": 2 / 255}, 6),
    "GradNorm, finite difference, every 2nd step": ({"method": "gradnorm", "h": 2 / 255, "gradnorm_every": 2}, 4.5),
    "single-step": ({"method": "adversarial", "steps": 1, "step_size": 5 / 255}, 2 * 1 + 3),
    "PGD-3": ({"method": "adversarial", "steps": 3, "step_size": 2.67 / 255}, 2 * 3 + 3),
}


def make_step(model, optimizer, args, x, y):
    """A function that makes the k-th step of a training with these settings, on this batch, after the warm-up."""
    objective = train.Objective(model, args)
    return lambda k: train.training_step(objective, optimizer, args, x, y, penalise=k % args.gradnorm_every == 0)


def main():
    parser = train.make_parser()
    parser.set_defaults(model="convnet", image_size=32)
    parser.add_argument("--rounds", type=int, default=20, help="steps of each method that are timed")
    args = parser.parse_args()
    device = train.start_process()
    torch.set_float32_matmul_precision("high")  # these two as in train.py
    torch.backends.cudnn.benchmark = True
    model = train.build_model(args.model, 3, 10, args.activation, image_size=args.image_size).to(device).train()
    train.freeze_batchnorm(model)
    # One optimiser for all, at a rate of 0: the same work, and the weights stay as they are.
    optimizer = train.build_optimizer(model, argparse.Namespace(**vars(args) | {"lr": 0.0}))
    x = torch.rand(args.batch_size, 3, args.image_size, args.image_size, device=device)
    y = torch.randint(10, (args.batch_size,), device=device)

    steps, memory, seconds = {}, {}, {name: [] for name in METHODS}
    for name, (flags, _) in METHODS.items():
        steps[name] = make_step(model, optimizer, argparse.Namespace(**vars(args) | flags), x, y)
        for k in range(2):  # the allocator's growth
            steps[name](k)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            steps[name](0)
            memory[name] = f"{torch.cuda.max_memory_allocated() / 2**20:.0f}"
    for _ in tqdm(range(args.rounds), desc="rounds", leave=False, disable=None):
        for name, (flags, _) in METHODS.items():
            every, start = flags.get("gradnorm_every", 1), time.perf_counter()
            for k in range(every):
                steps[name](k)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - start) / every)

    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.model}, images {tuple(x.shape)}, {machine}, torch {torch.__version__}, amp {args.amp}; "
          f"median (quartiles) of {args.rounds} rounds\n\n"
          "| a step of | ms | time / natural | time / PGD-3 | memory, MiB | predicted / PGD-3 |\n"
          "|---|---|---|---|---|---|")
    for name, (_, passes) in METHODS.items():
        ratios = [np.quantile(np.divide(seconds[name], seconds[other]), [0.5, 0.25, 0.75])
                  for other in ("natural", "PGD-3")]
        natural, pgd = ("{:.2f} ({:.2f} to {:.2f})".format(*ratio) for ratio in ratios)
        print(f"| {name} | {1000 * np.median(seconds[name]):.1f} | {natural} | {pgd} | {memory.get(name, '-')} "
              f"| {passes / METHODS['PGD-3'][1]:.2f} |")


if __name__ == "__main__":
    main()
