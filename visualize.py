"""The pictures of the paper, one command and one PNG each, from the runs of train.py and the results of evaluate.py.

    python visualize.py gradients runs/natural runs/gradnorm runs/adversarial    # ∇x L of the same images, side by side
    python visualize.py epochs    runs/natural runs/gradnorm runs/adversarial    # ∇x L and its norm against the epoch
    python visualize.py accuracy  runs/natural runs/gradnorm runs/adversarial    # clean and PGD-10 against the epoch
    python visualize.py sweep     runs/natural runs/gradnorm runs/adversarial    # PGD against ε, of evaluate.py --sweep
    python visualize.py cost      runs/natural runs/gradnorm runs/adversarial    # robustness against training time
    python visualize.py loss      runs/natural runs/gradnorm runs/adversarial    # the loss along its gradient, and PGD
    python visualize.py attack    runs/natural runs/gradnorm                     # what the models say when attacked
    python visualize.py all       runs/                                          # each picture that there are data for

A picture goes where --output says, else into the folder that holds the first run. Needs matplotlib. Each picture is one
function, from runs to a figure; read the one that you want. What they are made of, and the command line, come after.
"""

import argparse
import json
import math
import os
import textwrap
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torchvision.utils import make_grid

import train
from evaluate import attack_name, file_sha256
from gradnorm import input_gradient, pgd_attack

# A method has the same colour in every picture; these can be told apart by colour-blind readers (Okabe, Ito, 2008).
METHODS = {"natural": "#0072B2", "double backprop": "#D55E00", "finite difference": "#E69F00", "PGD": "#009E73",
           "single-step": "#CC79A7"}


# The pictures. Each takes runs, as `load_run` reads and `tell_apart` names them, and returns a matplotlib figure.


def gradients(runs, count=6):
    """Columns: evaluation images that all models classify rightly. Rows: the image, and ∇x L of each model; at its left
    the mean L1 norm over up to 200 evaluation images."""
    models, x, labels, chosen, names = models_and_images(runs, count)
    rows, titles = [x[chosen]], ["image"]
    for model, run in zip(models, runs):
        gradient = input_gradients(model, x, labels)
        rows.append(gradient_tiles(gradient[chosen]))
        titles.append(f"{run.style['label']}\nmean norm {gradient.abs().sum((1, 2, 3)).mean():.3g}")
    return captioned_grid(rows, titles, [names] + [[""] * len(chosen)] * len(runs))


def attack(runs, count=4, steps=20):
    """Columns: evaluation images that all models classify rightly. Rows: the image, with each model's confidence in its
    class; then for each model what PGD adds at the training ε, enlarged, and the sum, with the model's verdict, ✓ or ✗.
    """
    models, x, labels, chosen, names = models_and_images(runs, count)
    x, labels = x[chosen], labels[chosen]
    rows, titles, captions = [x], ["image"], [names]
    for model, run in zip(models, runs):
        eps, label = run.config["eps"], run.style["label"]
        torch.manual_seed(0)
        attacked = pgd_attack(model, x, labels, eps=eps, steps=steps)
        rows += [(0.5 + 0.5 * (attacked - x) / eps).clamp(0, 1), attacked]
        titles += [f"{label}:\n{0.5 / eps:.0f} × the change", f"{label},\nattacked: ε = {fraction(run)}"]
        captions[0] = [f"{above}\n{label}: {confidence:.0%}"
                       for above, (confidence, _) in zip(captions[0], verdicts(model, x))]
        said = [f"{'✓' if verdict == true else '✗'} {run.config['classes'][verdict]}: {confidence:.0%}"
                for (confidence, verdict), true in zip(verdicts(model, attacked), labels.tolist())]
        captions += [[""] * len(x), said]
    return captioned_grid(rows, titles, captions)


def verdicts(model, x):
    """Of each image the confidence and the class."""
    with torch.no_grad():
        confidence, said = model(x).softmax(1).max(1)
    return zip(confidence.tolist(), said.tolist())


def models_and_images(runs, count):
    """The models of the runs; up to 200 evaluation images (N, C, H, W) and their labels (N,); the indices of the first
    `count` that all models classify rightly, the classes in turn, and the names of these images' classes."""
    config = runs[0].config
    models = [train.load_checkpoint(run.checkpoint)[0] for run in runs]
    images, labels = train.evaluation_images(train.load_evaluation_set(config), 200)
    x = images.float() / 255
    with torch.no_grad():
        right = torch.stack([~train.misclassified(model(x), labels) for model in models]).all(0)
    chosen = right.nonzero()[:count, 0]  # `evaluation_images` alternates the classes
    if not len(chosen):
        raise ValueError("no image is classified rightly by all models: train them longer")
    return models, x, labels, chosen, [config["classes"][label] for label in labels[chosen]]


def input_gradients(model, x, labels):
    return torch.cat([input_gradient(model, *batch) for batch in zip(x.split(50), labels.split(50))])


def gradient_tiles(gradient, quantile=0.99):
    """0.5 + 0.5 · g / q, clipped to [0, 1], with q a high quantile of |g| of each image by itself: zero is grey."""
    q = gradient.abs().flatten(1).quantile(quantile, dim=1).clamp(min=torch.finfo(gradient.dtype).tiny)
    return (0.5 + 0.5 * gradient / q[:, None, None, None]).clamp(0, 1)


def captioned_grid(rows, titles, captions):
    """Rows of images (N, C, H, W) in [0, 1], each with a title at its left and a caption under every image."""
    captions = [[wrapped(caption, 22) for caption in below] for below in captions]
    lines = sum(max(caption.count("\n") + 1 for caption in below) for below in captions)
    figure = new_figure(2.2 * len(rows[0]), 2.2 * len(rows) + 0.2 * lines)
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for row, title, below, row_axes in zip(rows, titles, captions, axes):
        row_axes[0].set_ylabel(wrapped(title, 22))
        for image, caption, ax in zip(row, below, row_axes):
            ax.imshow(image.expand(3, -1, -1).permute(1, 2, 0).numpy(), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.set_xlabel(caption, fontsize="small")
            ax.spines[:].set_visible(False)
    return figure


def epochs(runs, columns=10):
    """Strips of images and their ∇x L after some of the epochs; under them, mean ‖∇x L‖₁ of the evaluation images, in
    which a run with --init goes on from the last epoch of the one that it started from."""
    must_agree(runs, "eval_images")
    across = 1 + min(columns, max(len(run.metrics) for run in runs))
    height = 16 / across
    figure = new_figure(10, len(runs) * (height + 0.5) + 3.4)
    *strip_axes, curve = figure.subplots(len(runs) + 1, 1, height_ratios=[height] * len(runs) + [3.0])
    for run, ax in zip(runs, strip_axes):
        files = [run.path / f"gradients/{line['epoch']:04d}.pt" for line in run.metrics]
        files = [files[round(i)] for i in torch.linspace(0, len(files) - 1, min(columns, len(files))).tolist()]
        kept = [torch.load(file, weights_only=True) for file in files]
        tiles = [kept[0]["images"][:2] / 255, *(gradient_tiles(each["gradients"].float()[:2]) for each in kept)]
        strip = make_grid(torch.stack(tiles, dim=1).flatten(0, 1), nrow=len(tiles), padding=1, pad_value=1.0)
        ax.imshow(strip.permute(1, 2, 0).numpy(), interpolation="nearest", extent=(0, len(tiles), 0, 2))
        ax.set(xlim=(0, across), yticks=[])
        ax.set_xticks([i + 0.5 for i in range(len(tiles))], 
                      ["image", *(str(first_epoch(run.config) + int(file.stem)) for file in files)])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set_title(f"{run.style['label']}: ∇x L after epoch", color=run.style["color"], loc="left")
        plot(curve, run, epochs_of(run), values(run, "gradient_norm"))
    curve.set_yscale("log")
    curve.locator_params(axis="y", subs=(1, 2, 5))
    curve.yaxis.set_major_formatter("{x:g}")
    curve.minorticks_off()
    curve.set(xlabel="epoch", ylabel="mean ‖∇x L‖₁ (pixels in [0, 1])")
    curve.locator_params(axis="x", integer=True)
    curve.grid(color="0.9")
    curve.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def accuracy(runs):
    """Clean (solid) and PGD-10 accuracy (dashed) of the evaluation images against the epoch, counted as in `epochs`."""
    must_agree(runs, "eval_images")
    figure, ax = curves()
    for run in runs:
        plot(ax, run, epochs_of(run), values(run, "clean_accuracy"))
        plot(ax, run, epochs_of(run), values(run, "pgd10_accuracy"), linestyle="--", label="_")
    radii = " and ".join(sorted({fraction(run) for run in runs}))
    ax.plot([], [], color="black", label="clean")
    ax.plot([], [], color="black", linestyle="--", label=f"PGD-10\nε = {radii}")
    ax.locator_params(axis="x", integer=True)
    ax.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(-2, 102))
    figure.legend(loc="outside right upper")
    return figure


def sweep(runs):
    """Accuracy under attack against ε, up to four times that of training, which is marked, from the results of
    evaluate.py --sweep. The bands are a standard error wide, to both sides."""
    figure, ax = curves()
    swept = common_results(runs, ["*-sweep*.json"])
    for run, result in zip(runs, swept):
        radii, robust = [255 * eps for eps in result["radii"]], torch.tensor(result["robust_accuracy"])
        error = (robust * (100 - robust) / result["num_images"]).sqrt()
        plot(ax, run, radii, robust)
        ax.fill_between(radii, robust - error, robust + error, color=run.style["color"], alpha=0.2, linewidth=0)
    for i, eps in enumerate(sorted({run.config["eps"] for run in runs})):
        ax.axvline(255 * eps, color="0.4", linewidth=1.5, linestyle=":", label="_" if i else "training ε")
    ax.set(xlabel="ε (1/255)", ylabel=f"{attack_name(swept[0])} accuracy (%)", ylim=(-2, 102),
           xlim=(0, min(255 * 4 * max(run.config["eps"] for run in runs), radii[-1])))
    ax.locator_params(axis="x", integer=True)
    figure.legend(loc="outside right upper")
    return figure


def loss(runs, count=300, steps=20):
    """Mean loss of evaluation images along the sign of its gradient, L(x + t · s) with s = sign ∇x L(x), against t;
    images are clipped to [0, 1]. Dotted, the tangent at 0, of slope ‖∇x L(x)‖₁ (without the pixels that clipping holds
    at 0 or 1), of which GradNorm is made. A star: PGD at ε."""
    must_agree(runs, "eps")
    figure, ax = curves()
    eps = runs[0].config["eps"]
    images, labels = train.evaluation_images(train.load_evaluation_set(runs[0].config), count)
    x, distances, lowest = images.float() / 255, torch.linspace(0, 2 * eps, 17), math.inf
    for run in runs:
        model, _ = train.load_checkpoint(run.checkpoint)
        gradient = input_gradients(model, x, labels)
        sign = gradient.sign()
        torch.manual_seed(0)
        attacked = pgd_attack(model, x, labels, eps=eps, steps=steps)
        with torch.no_grad():
            losses = [F.cross_entropy(model((x + t * sign).clamp(0, 1)), labels).item() for t in distances]
            strongest = F.cross_entropy(model(attacked), labels).item()
        moves = 255 * ((x + sign / 255).clamp(0, 1) - x)  # the sign, or 0 where clipping would undo it
        tangent, lowest = losses[0] + distances * (gradient * moves).sum((1, 2, 3)).mean(), min(lowest, *losses)
        plot(ax, run, 255 * distances, losses, marker="")
        plot(ax, run, 255 * distances, tangent, linestyle=":", marker="", label="_")
        plot(ax, run, [255 * eps], [strongest], marker="*", markersize=15, label="_")
    ax.plot([], [], color="black", linestyle=":", linewidth=2, label="tangent at 0")
    ax.plot([], [], color="black", linestyle="", marker="*", markersize=15,
            label=f"PGD-{steps}, ε = {fraction(runs[0])}")
    ax.set(xlabel="t (1/255)", ylabel="mean of L(x + t · sign ∇x L(x))")
    if lowest < 0.01:  # of networks that are sure: on a linear axis they would lie on the frame. The tangent is bent.
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
    else:
        ax.set_ylim(bottom=0)
    figure.legend(loc="outside right upper")
    return figure


def cost(runs):
    """Robust accuracy at the training ε of the first run against the time of training, one point per run: AutoAttack's
    where all runs have it, else PGD's."""
    figure, ax = curves()
    eps = runs[0].config["eps"]
    best = common_results(runs, ["*autoattack-*.json", "*pgd*.json"], eps)
    times = [sum(values(run, "seconds")) / 60 for run in runs]
    for run, minutes, result in zip(runs, times, best):
        robust = result["robust_accuracy"][result["radii"].index(eps)]
        plot(ax, run, [minutes], [robust], markersize=9, linestyle="none", clip_on=False)
    parents = ", without --init's" if any(run.config.get("parent") for run in runs) else ""
    ax.set(xlabel=f"training time (minutes{parents})", xlim=(0, 1.15 * max(times)),
           ylabel=f"{attack_name(best[0])} accuracy (%), ε = {fraction(runs[0])}", ylim=(0, 100))
    figure.legend(loc="outside right upper")
    return figure


PICTURES = {"gradients": gradients, "epochs": epochs, "accuracy": accuracy, "sweep": sweep, "loss": loss,
            "cost": cost, "attack": attack}


# What they are made of


def new_figure(width, height):
    """A figure outside pyplot, which would look for a screen and keep it."""
    matplotlib.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False,
                                "legend.frameon": False, "text.parse_math": False})  # a class may be named $
    return Figure(figsize=(width, height), layout="constrained")


def curves():
    figure = new_figure(8, 4.5)
    ax = figure.subplots()
    ax.grid(color="0.9")
    return figure, ax


def plot(ax, run, x, y, **style):
    ax.plot(x, y, **run.style | {"linewidth": 2, "markersize": 5, "markevery": max(1, len(x) // 10)} | style)


def values(run, name):
    """Of that name in metrics.jsonl, one per epoch."""
    return [line[name] for line in run.metrics]


def first_epoch(config):
    """The epochs that were trained before this run, by those in its chain of --init."""
    parent = config.get("parent")
    return first_epoch(parent) + parent.get("epoch", parent["epochs"]) if parent else 0


def epochs_of(run):
    return [first_epoch(run.config) + epoch for epoch in values(run, "epoch")]


def common_results(runs, patterns, eps=None):
    """Results that every run has, with ε, of the same attack on the same images: those of most images, then of most
    steps, one per run. The patterns of file names are tried in their order."""
    for pattern in patterns:
        common = [{(attack_name(result), result["num_images"], str(result.get("images_sha256"))): result
                   for result in run.results
                   if Path(result["file"]).match(pattern) and (eps is None or eps in result["radii"])} for run in runs]
        shared = set.intersection(*map(set, common))
        if shared:
            best = max(shared, key=lambda key: (common[0][key]["num_images"], common[0][key]["steps"], key))
            return [each[best] for each in common]
    raise ValueError(f"the runs have no {' or '.join(patterns)} of evaluate.py in common"
                     + (f" with eps {255 * eps:.3g}/255" if eps else ""))


def fraction(run):
    return f"{255 * run.config['eps']:.3g}/255"


def load_run(path, data_dir=None):
    """A run's folder, or a checkpoint in it: its configuration, its metrics (one dict per epoch), its results of
    evaluate.py. The results alone are enough for the curves, where the checkpoint is not kept."""
    checkpoint = train.checkpoint_path(path)
    path = checkpoint.parent
    results = [json.loads(file.read_bytes()) | {"file": file.name} for file in sorted(path.glob("*-*.json"))]
    results = [result for result in results if "robust_accuracy" in result]  # an unfinished evaluation has none
    if results and not checkpoint.exists() and checkpoint.name == "checkpoint.pt":
        config = results[0]["config"]
        if len({result.get("sha256") for result in results}) > 1:
            raise ValueError(f"the results in {path} are of different checkpoints")
    else:
        config = train.read_checkpoint(checkpoint)["config"]
        sha256 = file_sha256(checkpoint)
        results = [result for result in results if result.get("sha256") == sha256]  # none of an older checkpoint
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_bytes().splitlines()]
    return SimpleNamespace(path=path, checkpoint=checkpoint, metrics=metrics, results=results,
                           config=config | {"data_dir": data_dir or config["data_dir"]})


def tell_apart(runs):
    """The runs, of the same data, each with the style of its lines. The colour is that of its method, in shades where
    several have one; the label is the method and the flags that differ, or else the folder's name."""
    must_agree(runs, "dataset", "classes", "images", "val_images", "image_size", "pixels")
    above = os.path.commonpath([os.path.abspath(run.path.parent) for run in runs])
    same = {method: [run for run in runs if method_of(run.config) == method] for method in METHODS}
    for run in runs:
        run.words = [f"PGD-{run.config['steps']}" if run in same["PGD"] else method_of(run.config)]
    robust = [run for run in runs if run not in same["natural"]]  # natural training has no ε, and is but the start
    gradnorm = same["double backprop"] + same["finite difference"]
    groups = [(robust, ["eps", "epochs"]), (gradnorm, ["lambda_gn"]), *((each, None) for each in same.values())]
    for some, names in groups:
        for run, words in zip(some, differences([run.config for run in some], names)):
            run.words += [word for word in words if word not in run.words]
    for method, colour in METHODS.items():
        for number, run in enumerate(same[method]):
            label = ", ".join(run.words)
            if [other.words for other in same[method]].count(run.words) > 1:
                path = run.path if run.checkpoint.name == "checkpoint.pt" else run.checkpoint
                label = os.path.relpath(os.path.abspath(path), above)
            if len(run.metrics) < run.config["epochs"]:
                label += f", {len(run.metrics)} of {run.config['epochs']} epochs"
            label = f" {label}" if label.startswith("_") else label  # which a legend would leave out
            shade = tuple(1 - (1 - number / (len(same[method]) + 1)) * (1 - channel) for channel in to_rgb(colour))
            run.style = {"color": shade, "marker": "osD^vPX*"[number % 8], "label": wrapped(label, 24)}
    return runs


def method_of(config):
    """The two forms of GradNorm, and single-step among adversarial training, are methods of their own here."""
    if config["method"] == "gradnorm":
        return "finite difference" if config.get("h") else "double backprop"
    if config["method"] == "adversarial":
        return "PGD" if config["steps"] > 1 else "single-step"
    return config["method"]


def differences(configs, names=None):
    """For each configuration the flags, with their values, that differ between them: of these `names`, or of all."""
    flags = vars(train.make_parser().parse_args([])).keys() - train.NOT_COMPARED - {"eval_images", "steps", "step_size"}
    shown = [{flag: f"{flag.replace('_', '-')} {config.get(flag) or 0}" for flag in sorted(flags)}
             | {name: f"{name} {255 * (config.get(name) or 0):.3g}/255" for name in ("eps", "h")}
             | {"parent": f"from {config['parent']['method'] if config.get('parent') else 'scratch'}"}
             for config in configs]
    return [[each[name] for name in names or each if len({other[name] for other in shown}) > 1] for each in shown]


def wrapped(text, width):
    return "\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in text.split("\n"))


def must_agree(runs, *names):
    """One picture of runs of different data, or of different numbers of images, would compare what cannot be."""
    for name in names:
        if any(run.config.get(name) != runs[0].config.get(name) for run in runs):
            raise ValueError(f"the runs differ in {name}: draw them apart")


# Command line


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", choices=[*PICTURES, "all"], help="all makes each of them that it has the data for")
    parser.add_argument("runs", nargs="+", type=train.path_type, metavar="RUN",
                        help="folders of train.py, or their checkpoints; for all, folders of such folders")
    parser.add_argument("--data-dir", type=train.path_type, metavar="DIR",
                        help="where the data are, if not where training found them")
    parser.add_argument("--output", type=train.path_type, metavar="FILE",
                        help="PNG to write; for all, the folder to write into")
    args = parser.parse_args()
    if args.output and args.picture == "all" and len(args.runs) > 1:
        parser.error("--output: the pictures of these folders would take each other's place")
    if args.picture == "all":
        draw_all(args)
        return
    runs = tell_apart([load_run(path, args.data_dir) for path in args.runs])
    save(PICTURES[args.picture](runs), args.output or runs[0].path.absolute().parent / f"{args.picture}.png")


def draw_all(args):
    """All pictures of each folder, of all runs in it together. Prints what cannot be drawn, and why."""
    for folder in map(Path, args.runs):
        runs = []
        for metrics in folder.glob("*/metrics.jsonl"):
            try:
                runs.append(load_run(metrics.parent, args.data_dir))
            except Exception as error:
                print(f"{metrics.parent} is left out: {error}")
        if not runs:
            raise ValueError(f"no runs in {folder}")
        runs.sort(key=lambda run: (list(METHODS).index(method_of(run.config)), run.path))
        for name, draw in PICTURES.items():
            try:
                save(draw(tell_apart(runs)), Path(args.output or folder) / f"{name}.png")
            except Exception as error:  # a file or a result that they lack
                print(f"no {name}.png of {folder}: {error}")


def save(figure, path):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with train.atomic_write(path) as file:
        figure.savefig(file, dpi=150, format="png")
    print(path)


if __name__ == "__main__":
    main()
