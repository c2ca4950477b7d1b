"""Clean and PGD accuracy of checkpoints on held-out images, as a Markdown table.

    python evaluate.py runs/natural/checkpoint.pt runs/gradnorm/checkpoint.pt --eps 4/255 8/255 --steps 20

A row is a checkpoint, a column an ε of the L∞ ball in pixels of [0, 1]. All checkpoints meet the same images.
"""

import argparse

import torch

import train


def main():
    parser = argparse.ArgumentParser(description="Clean and PGD accuracy (%%) of checkpoints on held-out images.",
                                     allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = train.fail
    add, count = parser.add_argument, train.number(int, 1)
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="checkpoint.pt of train.py")
    add("--eps", nargs="+", default=["1/255", "2/255", "4/255"], metavar="E",
        help="radii of the L∞ ball, in pixels of [0, 1]")
    add("--steps", default=10, type=count, metavar="N", help="steps of PGD, of size 2.5ε/N")
    add("--num-images", default=1000, type=count, metavar="N", help="held-out images, the classes in equal parts")
    add("--batch-size", default=500, type=count, metavar="N", help="images per forward pass")
    add("--data-dir", metavar="DIR", help="where the data are; the place they were trained from if not given")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device; use --device cpu")
    try:
        radii = [train.number(float, 0, 1)(text) for text in args.eps]
        models = [train.load_checkpoint(path, args.device) for path in args.checkpoints]
    except (argparse.ArgumentTypeError, ValueError) as error:
        parser.error(error)
    first = models[0][1]
    for path, (_, config) in zip(args.checkpoints, models):
        if (config["dataset"], config["classes"]) != (first["dataset"], first["classes"]):
            parser.error(f"{path} was trained on {config['dataset']}, {args.checkpoints[0]} on {first['dataset']}: "
                         "evaluate them one by one")
    settings = argparse.Namespace(**first)
    settings.data_dir = args.data_dir or settings.data_dir
    test_set = train.load_dataset(settings, train=False)
    if args.num_images > len(test_set):
        parser.error(f"--num-images {args.num_images}: there are {len(test_set)} held-out images")
    try:
        images, labels = train.held_out(test_set, args.num_images)
    except train.BadImage as error:
        parser.error(error)

    print(f"| PGD-{args.steps}, {len(images)} images | clean |" + "".join(f" ε={text} |" for text in args.eps))
    print("|---" * (2 + len(radii)) + "|")
    for path, (model, _) in zip(args.checkpoints, models):
        results = [train.evaluate(model, images, labels, eps, args.batch_size, args.device, args.steps)
                   for eps in radii]
        accuracies = [results[0]["clean_accuracy"], *(result[f"pgd{args.steps}_accuracy"] for result in results)]
        print(f"| {path} |" + "".join(f" {accuracy:.2f} |" for accuracy in accuracies), flush=True)


if __name__ == "__main__":
    main()
