"""The tables of results/README.md that compare accuracies on photographs at ε = 4/255, and how_far.png, from the JSON.

    python -m results.tables

Accuracies are in %, with the standard deviation over seeds; differences are means over images and seeds, with the
standard error over images in parentheses. All models met the same images, so that their differences, image by image,
are surer than their accuracies.
"""

import json
from pathlib import Path

import numpy as np

import visualize

HERE = Path(__file__).parent
TRAININGS = {"natural": "natural", "double backprop": "gradnorm", "double backprop, λ_GN = 0.9": "gradnorm-tuned",
             "finite difference": "difference-1.2", "finite difference, 29 epochs": "difference-long",
             "finite difference, every 2nd step": "every-2-1.2", "finite difference, λ_GN = 0.9": "difference",
             "finite difference, λ_GN = 0.9, every 2nd step": "every-2",
             "single-step": "single", "single-step, 36 epochs": "single-long", "PGD-3": "adversarial",
             "PGD-3, half the rate": "adversarial-1e-2", "PGD-3, 40 epochs": "adversarial-40"}
SMOOTH = {"double backprop": "gradnorm-smooth", "finite difference": "difference-smooth",
          "single-step": "single-smooth", "PGD-3": "adversarial-smooth"}
PUBLISHED = {"natural": "imagenette/natural-0", "double backprop": "imagenette/gradnorm-0",
             "finite difference": "imagenette-cpu/finite-difference-1.2", "PGD-3": "imagenette/adversarial-0"}


def folders(run):
    """The folders of a training in imagenette/, one for each seed."""
    return sorted(f"imagenette/{path.name}" for path in (HERE / "imagenette").glob(f"{run}-[012]"))


def read(file, runs):
    return [json.loads((HERE / run / file).read_bytes()) for run in runs]


def standing(file, *runs):
    """Which images stand in the result of that name, (runs, images), in %, or None where not all runs have it."""
    if not all((HERE / run / file).exists() for run in runs):
        return None
    return np.array([[100 * int(c) for c in result["standing"][result["radii"].index(4 / 255)]]
                     for result in read(file, runs)])


def mean(images):
    """Of (seeds, images): the mean, and the standard deviation of the seeds."""
    if images is None:
        return ""
    seeds = images.mean(1)
    return f"{seeds.mean():.1f}" + (f" ± {seeds.std(ddof=1):.1f}" if len(seeds) > 1 else "")


def difference(ours, theirs):
    """Of two (seeds, images): the mean difference, and its standard error over images."""
    images = (ours - theirs).mean(0)
    return f"{images.mean():+.1f} ({images.std(ddof=1) / len(images) ** 0.5:.1f})".replace("-", "−")


def table(*rows):
    print(*(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])), "", sep="\n")


def clean(*runs):
    """The clean accuracy of each run, (runs, 1): the JSON has no verdict of each image."""
    return np.array([[result["clean_accuracy"]] for result in read("pgd20-3925-eps4.json", runs)])


def main():
    runs = {name: folders(run) for name, run in TRAININGS.items()}
    pgd = {name: standing("pgd20-3925-eps4.json", *runs[name]) for name in runs}
    some = {name: images[:, :256] for name, images in pgd.items()}  # those that AutoAttack met
    auto = {name: standing("autoattack-256-eps4.json", *runs[name]) for name in runs}
    table(["training", "seeds", "clean", "PGD-20", "PGD-20, 256", "AutoAttack, 256"],
          *([name, str(len(runs[name])), mean(clean(*runs[name])), mean(pgd[name]), mean(some[name]), mean(auto[name])]
            for name in runs))
    table(["minus PGD-3", "PGD-20", "PGD-20, 256", "AutoAttack, 256", "AutoAttack minus PGD-20, 256"],
          *([name, *(difference(each[name], each["PGD-3"]) for each in (pgd, some, auto)),
             difference(auto[name] - some[name], auto["PGD-3"] - some["PGD-3"])]
            for name in runs if len(runs[name]) == 3 and auto[name] is not None and name not in ("natural", "PGD-3")))

    rows = []
    for name, run in SMOOTH.items():
        with_it = folders(run)
        without = [f"imagenette/{TRAININGS[name]}-{each[-1]}" for each in with_it]  # the same seeds
        ours, theirs = standing("pgd20-3925-eps4.json", *with_it), standing("pgd20-3925-eps4.json", *without)
        rows.append([f"{name}, label smoothing 0.1", str(len(with_it)), mean(clean(*with_it)), mean(ours),
                     f"{(clean(*with_it) - clean(*without)).mean():+.1f}".replace("-", "−"), difference(ours, theirs)])
    table(["with label smoothing", "seeds", "clean", "PGD-20", "clean, minus without", "PGD-20, minus without"], *rows)

    pgd = {name: standing("pgd20-3925-eps4.json", run)[:, :1024] for name, run in PUBLISHED.items()}
    auto = {name: standing("autoattack-1024-eps4.json", run) for name, run in PUBLISHED.items()}
    more = {name: auto[name] - pgd[name] for name in PUBLISHED}
    table(["seed 0, 1,024 images", "PGD-20", "AutoAttack", "PGD-20, minus PGD-3", "AutoAttack, minus PGD-3",
           "AutoAttack minus PGD-20, minus PGD-3"],
          *([name, mean(pgd[name]), mean(auto[name]),
             *(difference(each[name], each["PGD-3"]) if name != "PGD-3" else "" for each in (pgd, auto, more))]
            for name in PUBLISHED))

    steps = [f"imagenette-h/{h}" for h in range(5)]
    pgd, accuracy = standing("pgd20-3925-eps4.json", *steps), clean(*steps)
    table(["h", "clean", "PGD-20", "minus double backprop"],
          *([f"{h}/255", f"{accuracy[h, 0]:.2f}", f"{pgd[h].mean():.2f}",
             difference(pgd[h:h + 1], pgd[:1]) if h else ""] for h in range(5)))
    figure = visualize.new_figure(8, 3.6)
    robust, right = figure.subplots(1, 2)
    gained = pgd - pgd[0]
    robust.errorbar(range(5), gained.mean(1), gained.std(1, ddof=1) / gained.shape[1] ** 0.5, color="0.2", marker="s")
    right.plot(range(5), accuracy - accuracy[0], color="0.2", marker="o")
    for ax, name in (robust, "PGD-20"), (right, "clean"):
        ax.set(title=f"{name} accuracy gained, in points", xlabel="h (1/255)", xticks=range(5),
               xticklabels=["0\ndouble\nbackprop", "1", "2", "3", "4\nFGSM\ntraining"])
        ax.grid(color="0.9")
    visualize.save(figure, HERE / "how_far.png")


if __name__ == "__main__":
    main()
