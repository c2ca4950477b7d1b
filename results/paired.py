"""Robust accuracy at 4/255 of the photographs' trainings less that of PGD-3, image by image, as a Markdown table.

    python -m results.paired

All models met the same images, so that their differences are surer than their accuracies. Each cell is the mean
difference over images and seeds, with its standard error over images. AutoAttack's 256 images are the first of the
3,925, and harder: PGD-20 stands beside it on the same ones, and the last column is by how much more AutoAttack takes.
"""

import json
from pathlib import Path

import numpy as np

TRAININGS = {"double backprop": "gradnorm", "double backprop, λ_GN = 0.9": "gradnorm-tuned",
             "finite difference": "difference-1.2", "finite difference, λ_GN = 0.9": "difference",
             "finite difference, λ_GN = 0.9, every 2nd step": "every-2",
             "finite difference, 29 epochs": "difference-long",
             "single-step": "single", "single-step, 36 epochs": "single-long", "PGD-3": "adversarial"}


def standing(training, file):
    """Which images stand, (seeds, images), in %."""
    folder = Path(__file__).parent / "imagenette"
    results = [json.loads((folder / f"{training}-{seed}" / file).read_bytes()) for seed in range(3)]
    return np.array([[100 * int(c) for c in result["standing"][result["radii"].index(4 / 255)]] for result in results])


def cell(difference):
    """Of (seeds, images): mean and standard error."""
    of_images = difference.mean(0)
    return f"{of_images.mean():+.1f} ({of_images.std(ddof=1) / len(of_images) ** 0.5:.1f})"


def main():
    pgd, auto = ({name: standing(run, file) for name, run in TRAININGS.items()}
                 for file in ("pgd20-3925-eps4.json", "autoattack-256-eps4.json"))
    print("| training | PGD-20, 256 images | AutoAttack, the same 256 | PGD-20, 3,925, less PGD-3's | PGD-20, 256 "
          "| AutoAttack, 256 | AutoAttack less PGD-20 |\n|---|---|---|---|---|---|---|")
    for name in TRAININGS:
        some = pgd[name][:, :256]
        ours, theirs = some - pgd["PGD-3"][:, :256], auto[name] - auto["PGD-3"]
        cells = [cell(pgd[name] - pgd["PGD-3"]), cell(ours), cell(theirs), cell(theirs - ours)]
        print(f"| {name} | {some.mean():.1f} | {auto[name].mean():.1f} |",
              " | ".join(cells if name != "PGD-3" else [""] * 4), "|")


if __name__ == "__main__":
    main()
