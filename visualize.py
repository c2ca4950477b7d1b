"""The pictures of the paper, one command and one PNG each, from the runs of train.py and the results of evaluate.py.

    python visualize.py gradients runs/natural runs/gradnorm runs/adversarial    # ∇x L of the same images, side by side
    python visualize.py epochs    runs/natural runs/gradnorm runs/adversarial    # ∇x L and its norm against the epoch
    python visualize.py accuracy  runs/natural runs/gradnorm runs/adversarial    # clean and PGD-10 against the epoch
    python visualize.py sweep     runs/natural runs/gradnorm runs/adversarial    # PGD against ε, of evaluate.py --sweep
    python visualize.py cost      runs/natural runs/gradnorm runs/adversarial    # robustness against training time
    python visualize.py weights   runs/natural runs/gradnorm-*                   # accuracy against λ_GN / λ_CE
    python visualize.py all       runs/                                          # all that the folder's runs allow

A picture goes where --output says, else into the folder that holds the first run. Curves need matplotlib.
"""

import argparse
import json
import os
import statistics
from fnmatch import fnmatch
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

import train
from gradnorm import input_gradient

# A method has the same colour in every picture; these can be told apart by colour-blind readers (Okabe, Ito, 2008).
COLOURS = {"natural": "#0072B2", "gradnorm": "#D55E00", "adversarial": "#009E73"}
NAMES = {"natural": "natural", "gradnorm": "GradNorm", "adversarial": "adversarial"}


class CannotDraw(Exception):
    """A picture whose data are not there; says what is missing and how to get it."""


# The pictures. Each takes runs, as load_run reads them, and returns a PIL image or a matplotlib figure.


def gradients(runs, count=6):
    """Rows: held-out images of different classes that all models classify rightly. Columns: the image, and ∇x L of each
    model with its L1 norm."""
    config = runs[0]["config"]
    for run in runs:
        if any(run["config"][name] != config[name] for name in ("dataset", "classes", "val_images")):
            raise CannotDraw(f"{run['path']} and {runs[0]['path']} were trained on different data")
    try:
        models = [train.load_checkpoint(run["path"] / "checkpoint.pt")[0] for run in runs]
    except ValueError as error:
        raise CannotDraw(error) from None
    test_set = train.load_dataset(argparse.Namespace(**config), train=False)
    images, labels = train.held_out(test_set, min(200, len(test_set)))
    x = images.float() / 255
    with torch.no_grad():
        right = torch.stack([model(x).argmax(1) == labels for model in models]).all(0)
    chosen = right.nonzero()[:count, 0]  # held_out lets the classes take turns
    if not len(chosen):
        raise CannotDraw("no image is classified rightly by all models: train them longer")
    x, labels = x[chosen], labels[chosen]
    columns, captions = [x], [[config["classes"][label] for label in labels]]
    for model in models:
        gradient = input_gradient(model, x, labels)
        columns.append(gradient_tiles(gradient))
        captions.append([f"L1 norm {norm:.2g}" for norm in gradient.abs().sum((1, 2, 3)).tolist()])
    return captioned_grid(columns, ["image"] + [run["label"] for run in runs], captions)


def gradient_tiles(gradient, quantile=0.99):
    """0.5 + 0.5 · g / q, clipped to [0, 1], with q a high quantile of |g| of each image by itself: zero is grey."""
    q = gradient.abs().flatten(1).quantile(quantile, dim=1).clamp(min=torch.finfo(gradient.dtype).tiny)
    return (0.5 + 0.5 * gradient / q[:, None, None, None]).clamp(0, 1)


def captioned_grid(columns, titles, captions, tile=150, gap=10):
    """Columns of images (N, C, H, W) in [0, 1], each with a title above and a caption under every image."""
    scale = max(1, round(tile / columns[0].shape[-1]))
    columns = [F.interpolate(column, scale_factor=scale, mode="nearest") for column in columns]
    height, width = columns[0].shape[-2:]
    font, small = ImageFont.load_default(20), ImageFont.load_default(17)
    caption, header = 26, 34
    # A white frame around each tile leaves room for its caption.
    tiles = [F.pad(image.expand(3, -1, -1), (gap, gap, 0, caption + gap), value=1.0)
             for row in zip(*columns) for image in row]
    picture = to_pil_image(F.pad(make_grid(tiles, nrow=len(columns), padding=0), (0, 0, header, 0), value=1.0))
    draw = ImageDraw.Draw(picture)
    for i, title in enumerate(titles):
        centre = i * (width + 2 * gap) + gap + width / 2
        draw.text((centre, header / 2), title, fill="black", font=font, anchor="mm")
        for j, text in enumerate(captions[i]):
            below = header + j * (height + caption + gap) + height + caption / 2
            draw.text((centre, below), text, fill="black", font=small, anchor="mm")
    return picture


def epochs(runs, columns=10):
    """Strips of images and their ∇x L after some of the epochs; under them, mean ‖∇x L‖₁ of the held-out images."""
    plt = matplotlib()
    strips = []
    for run in runs:
        files = sorted((run["path"] / "gradients").glob("*.pt"))
        if not files:
            raise CannotDraw(f"{run['path']}/gradients is empty: train.py writes a file into it after each epoch")
        files = [files[round(i)] for i in torch.linspace(0, len(files) - 1, min(columns, len(files))).tolist()]
        kept = [torch.load(file, weights_only=True) for file in files]
        tiles = [kept[0]["images"][:2] / 255, *(gradient_tiles(each["gradients"].float()[:2]) for each in kept)]
        strips.append((make_grid(torch.stack(tiles, dim=1).flatten(0, 1), nrow=len(tiles), padding=1, pad_value=1.0),
                       ["image", *(str(int(file.stem)) for file in files)]))
    across = max(len(shown) for _, shown in strips)
    width = 8.0
    figure = plt.figure(figsize=(width + 2, len(runs) * (2 * width / across + 0.5) + 3.4), layout="constrained")
    *strip_axes, curve = figure.subplots(len(runs) + 1, 1, height_ratios=[2 * width / across] * len(runs) + [3.0])
    for (strip, shown), run, ax in zip(strips, runs, strip_axes):
        ax.imshow(strip.permute(1, 2, 0).numpy(), interpolation="nearest", extent=(0, len(shown), 0, 2))
        ax.set(xlim=(0, across), yticks=[])
        ax.set_xticks([i + 0.5 for i in range(len(shown))], shown)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set_title(f"{run['label']}: ∇x L after epoch", color=run["colour"], loc="left")
    for run in runs:
        plot(curve, run, *column(run, "gradient_norm"))
    curve.set_yscale("log")
    curve.yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
    curve.yaxis.set_major_formatter("{x:g}")
    curve.yaxis.set_minor_locator(plt.NullLocator())
    curve.set(xlabel="epoch", ylabel="mean ‖∇x L‖₁ (pixels in [0, 1])")
    curve.locator_params(axis="x", integer=True)
    curve.grid(color="0.9")
    curve.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def accuracy(runs):
    """Clean (solid) and PGD-10 accuracy (dashed) of the held-out images against the epoch."""
    figure, ax = curves()
    for run in runs:
        plot(ax, run, *column(run, "clean_accuracy"))
        plot(ax, run, *column(run, "pgd10_accuracy"), linestyle="--", label="_")
    ax.locator_params(axis="x", integer=True)
    attacked = "PGD-10\nε = " + " and ".join(sorted({fraction(run) for run in runs}))
    finish_accuracies(figure, ax, attacked, xlabel="epoch")
    return figure


def sweep(runs):
    """Accuracy under attack against ε, from the results of evaluate.py --sweep; the training ε is marked."""
    figure, ax = curves()
    attacks = set()
    for run in runs:
        result = best_result(run, "*-sweep-*.json")
        if result is None:
            raise CannotDraw(f"{run['path']} has no sweep: python evaluate.py {run['path']}/checkpoint.pt --sweep 32 "
                             "--steps 100")
        plot(ax, run, [255 * eps for eps in result["radii"]], result["robust_accuracy"])
        attacks.add(attack_name(result))
    for i, eps in enumerate(sorted({run["config"]["eps"] for run in runs})):
        ax.axvline(255 * eps, color="0.4", linewidth=1.5, linestyle=":", label="_" if i else "training ε")
    ax.set(xlabel="ε (1/255)", ylabel=f"{' and '.join(sorted(attacks))} accuracy (%)", ylim=(-2, 102))
    figure.legend(loc="outside right upper")
    return figure


def cost(runs):
    """Robust accuracy against the time of training: a point a setting, the mean of its seeds; the bar is their standard
    deviation."""
    figure, ax = curves()
    attack, _, robust = accuracies(runs)
    repeats, times, adversarial = {}, [], []
    for run, value in zip(runs, robust):
        minutes = sum(column(run, "seconds")[1]) / 60
        repeats.setdefault(json.dumps(train.setting(run["config"])), []).append((run, minutes, value))
    for repeat in repeats.values():
        same, minutes, values = zip(*repeat)
        name = os.path.commonprefix([run["label"] for run in same]).rstrip("-") or same[0]["label"]
        times.append(statistics.mean(minutes))
        mean = statistics.mean(values)
        plot(ax, same[0], times[-1:], [mean], markersize=9, linestyle="none",
             label=name + f", {len(same)} seeds" * (len(same) > 1))
        if len(same) > 1:
            ax.errorbar(times[-1], mean, statistics.stdev(values), fmt="none", ecolor=same[0]["colour"])
        if same[0]["method"] == "adversarial":
            adversarial.append(times[-1])
    ax.set(xlabel="training time (minutes)", xlim=(0, 1.15 * max(times)),
           ylabel=f"{attack} accuracy (%), ε = {fraction(runs[0])}")
    if adversarial:
        percent = adversarial[0] / 100
        top = ax.secondary_xaxis("top", functions=(lambda time: time / percent, lambda share: share * percent))
        top.set_xlabel("of adversarial training's time (%)")
    figure.legend(loc="outside right upper")
    return figure


def weights(runs):
    """Clean (solid) and robust accuracy (dashed) against λ_GN / λ_CE, means of the seeds. Natural training is GradNorm
    at 0; adversarial training has no such weight: a level line."""
    attack, clean, robust = accuracies(runs)
    settings = [train.setting(run["config"]) for run in runs if run["method"] == "gradnorm"]
    differ = {name for setting in settings for name in setting if setting[name] != settings[0][name]}
    if not differ or differ - {"lambda_gn", "lambda_ce"} or not all(setting["lambda_ce"] for setting in settings):
        raise CannotDraw("it takes GradNorm runs that differ in --lambda-gn alone, and a --lambda-ce over 0; these "
                         f"differ in {', '.join(sorted(differ)) or 'nothing'}")
    points, level = {}, []
    for run, *both in zip(runs, clean, robust):
        if run["method"] == "adversarial":
            level.append(both)
        else:
            weight = run["config"]["lambda_gn"] / run["config"]["lambda_ce"] if run["method"] == "gradnorm" else 0.0
            points.setdefault(weight, []).append(both)
    figure, ax = curves()
    for i, style, hidden in (0, "-", ""), (1, "--", "_"):  # the legend leaves out what begins with _
        means = [statistics.mean(both[i] for both in points[weight]) for weight in sorted(points)]
        ax.plot(sorted(points), means, linestyle=style, marker="o", linewidth=2, color=COLOURS["gradnorm"],
                label=hidden + NAMES["gradnorm"])
        if level:
            ax.axhline(statistics.mean(both[i] for both in level), linestyle=style, linewidth=2,
                       color=COLOURS["adversarial"], label=hidden + NAMES["adversarial"])
    finish_accuracies(figure, ax, f"{attack}\nε = {fraction(runs[0])}", xlabel="λ_GN / λ_CE")
    return figure


PICTURES = {"gradients": gradients, "epochs": epochs, "accuracy": accuracy, "sweep": sweep, "cost": cost,
            "weights": weights}


# What they are made of


def matplotlib():
    try:
        import matplotlib
    except ImportError:
        raise CannotDraw("curves need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")  # no screen
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False,
                         "legend.frameon": False})
    return plt


def curves():
    figure, ax = matplotlib().subplots(figsize=(8, 4.5), layout="constrained")
    ax.grid(color="0.9")
    return figure, ax


def finish_accuracies(figure, ax, attacked, xlabel):
    """The axes and the legend of curves that are solid for clean accuracy, dashed for that under attack."""
    ax.plot([], [], color="black", label="clean")
    ax.plot([], [], color="black", linestyle="--", label=attacked)
    ax.set(xlabel=xlabel, ylabel="accuracy (%)", ylim=(-2, 102))
    figure.legend(loc="outside right upper")


def plot(ax, run, x, y, **style):
    ax.plot(x, y, **{"color": run["colour"], "label": run["label"], "linewidth": 2, "marker": run["marker"],
                     "markersize": 5, "markevery": max(1, len(x) // 10)} | style)


def column(run, name):
    """Epochs, and the values of that name in metrics.jsonl."""
    lines = [line for line in run["metrics"] if isinstance(line.get(name), (int, float))]
    if not lines:
        raise CannotDraw(f"{run['path']}/metrics.jsonl has no {name}: train.py writes it after each epoch")
    return [line["epoch"] for line in lines], [line[name] for line in lines]


def best_result(run, pattern, eps=None):
    """Of the results whose file fits the pattern and that have ε, the one of most images and steps, or None."""
    return max((result for result in run["results"]
                if fnmatch(result["file"], pattern) and (eps is None or eps in result["radii"])),
               key=lambda result: (result["num_images"], result["steps"]), default=None)


def accuracies(runs):
    """The attack's name, and the clean and the robust accuracy of each run at the training ε of the first: AutoAttack's
    where all runs have it, else PGD's."""
    eps = runs[0]["config"]["eps"]
    results = [best_result(run, "autoattack-*.json", eps) for run in runs]
    if None in results:
        results = [best_result(run, "pgd*.json", eps) for run in runs]
    for run, result in zip(runs, results):
        if result is None:
            raise CannotDraw(f"{run['path']} has no result at ε = {fraction(runs[0])}: python evaluate.py "
                             f"{run['path']}/checkpoint.pt --eps {fraction(runs[0])}")
    return (" and ".join(sorted(set(map(attack_name, results)))), [result["clean_accuracy"] for result in results],
            [result["robust_accuracy"][result["radii"].index(eps)] for result in results])


def attack_name(result):
    return "AutoAttack" if result["attack"] == "autoattack" else f"PGD-{result['steps']}"


def fraction(run):
    return f"{255 * run['config']['eps']:.3g}/255"


def load_run(path):
    """A run's folder: its configuration, its metrics (a dict an epoch), its results of evaluate.py, how it is drawn.
    Only without results is the checkpoint read: they are enough for the curves, where they are kept alone."""
    path = path.parent if path.is_file() else path
    metrics, file = [], path / "metrics.jsonl"
    for number, text in enumerate(file.read_bytes().splitlines() if file.exists() else [], 1):
        try:
            line = json.loads(text)
            line["epoch"] + 0
            metrics.append(line)
        except (ValueError, TypeError, KeyError):
            train.warn(f"{file}, line {number}, is not one of train.py's: skipped")
    results = []
    for file in sorted(path.glob("*.json")):
        try:
            result = json.loads(file.read_bytes()) | {"file": file.name}
            result["num_images"], result["steps"], zip(result["radii"], result["robust_accuracy"])
            COLOURS[result["config"]["method"]]
            results.append(result)
        except (ValueError, TypeError, KeyError):
            train.warn(f"{file} is not a result of evaluate.py: skipped")
    try:
        config = results[0]["config"] if results else train.read_checkpoint(path / "checkpoint.pt")["config"]
    except ValueError as error:
        raise CannotDraw(error) from None
    method = config["method"]
    return {"path": path, "config": config, "metrics": metrics, "results": results, "method": method,
            "colour": COLOURS[method], "label": NAMES[method], "marker": "o"}


def told_apart(runs):
    """Runs of one method get markers and the names of their folders, with those of the folders above where these are
    the same."""
    names = [run["path"].resolve().name for run in runs]
    for method in COLOURS:
        same = [run for run in runs if run["method"] == method]
        for run, marker in zip(same if len(same) > 1 else [], "osD^vPX*" * len(same)):
            path = run["path"].resolve()
            label = path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}"
            run |= {"label": label, "marker": marker}
    return runs


def save(picture, path):
    with train.replace(path) as file:
        if isinstance(picture, Image.Image):
            picture.save(file, "PNG")
        else:
            picture.savefig(file, dpi=150, format="png")
            matplotlib().close(picture)
    print(path)


# Command line


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = train.fail
    parser.add_argument("picture", choices=[*PICTURES, "all"], help="all makes each of them that it has the data for")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="folders of train.py, or their checkpoints; for all, folders that hold such folders")
    parser.add_argument("--output", type=Path, metavar="FILE", help="PNG to write; for all, the folder to write into")
    args = parser.parse_args()
    if args.picture == "all":
        draw_all(args)
        return
    try:
        runs = told_apart([load_run(path) for path in args.runs])
        output = args.output or runs[0]["path"].resolve().parent / f"{args.picture}.png"
        train.make_writable(output.parent, "choose another place by --output")
        save(PICTURES[args.picture](runs), output)
    except CannotDraw as error:
        train.fail(error)


def draw_all(args):
    """All pictures of each folder that holds runs, of all its runs together."""
    folders = {}
    for path in sorted({path.parent for folder in args.runs for path in folder.rglob("metrics.jsonl")}):
        try:
            folders.setdefault(path.parent, []).append(load_run(path))
        except CannotDraw as error:
            train.warn(f"left out: {error}")
    if not folders:
        train.fail(f"no runs in {', '.join(map(str, args.runs))}: train.py makes them")
    for folder, runs in folders.items():
        runs = told_apart(sorted(runs, key=lambda run: list(COLOURS).index(run["method"])))
        output = args.output or folder
        train.make_writable(output, "choose another place by --output")
        for name, draw in PICTURES.items():
            try:
                save(draw(runs), output / f"{name}.png")
            except CannotDraw as error:
                train.warn(f"no {output / name}.png: {error}")


if __name__ == "__main__":
    main()
