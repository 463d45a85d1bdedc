"""What `loss.ambiguous` does where captions repeat: t, b, accuracy and calibration after the same training.

    siglit precompute -c configs/examples/cifar10.yaml
    python -m benchmarks.ambiguous -c configs/examples/cifar10.yaml --set train.steps=400 --json ambiguous.json

Trains once for each treatment. Then every image of the held-out cache is paired with every distinct caption, and the
probability σ(t x·y + b) that the model gives a pair is compared with how often such pairs match, by class.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import siglit
from benchmarks.common import parser, report
from siglit.data.tokens import token_ids
from siglit.runs.trained import open_trained

TREATMENTS = ("negative", "drop", "positive")


def main() -> None:
    """Train and evaluate with each treatment."""
    options = parser(__doc__)
    options.add_argument(
        "-c", "--config", required=True, help="experiment whose captions repeat and whose rows have labels"
    )
    options.add_argument("--folder", default="runs/ambiguous", help="where the runs go")
    options.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields in place of the file's")
    args = options.parse_args()
    figures = {treatment: measure(args, treatment) for treatment in TREATMENTS}
    names = {
        "t": "t",
        "b": "b",
        "matching": "mean probability of matching pairs (ideal: 1)",
        "others": "mean probability of other pairs (ideal: 0)",
        "calibration_error": "calibration error",
        "label_accuracy": "class accuracy",
    }
    table = [
        (f"{treatment}: {label}", f"{figures[treatment][name]:.4f}", "")
        for treatment in figures
        for name, label in names.items()
    ]
    report(f"ambiguous pairs in {args.config}", table, figures, args.json)


def measure(args: argparse.Namespace, treatment: str) -> dict[str, float]:
    """Train with one treatment; return the metrics of the held-out split."""
    torch.set_num_threads(args.threads)
    overrides = dict(assignment.split("=", 1) for assignment in args.set)
    overrides |= {"loss.ambiguous": treatment, "output_dir": str(Path(args.folder) / treatment)}
    experiment = siglit.load_experiment(args.config, **overrides)
    siglit.train(experiment)
    accuracy = siglit.eval_retrieval(experiment).label_accuracy
    trained = open_trained(experiment)
    cache = trained.cache
    ids, first = np.unique(token_ids(cache, trained.tokenizer), axis=0, return_index=True)
    ztxt = trained.encode_ids(ids, quiet=True)
    labels = cache.labels
    assert labels is not None, "calibration needs labels"
    match = labels[:, None] == labels[cache.caption_rows[first]]
    logits = trained.logit_scale * trained.zimg @ ztxt.T + trained.logit_bias
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    return {
        "t": trained.logit_scale,
        "b": trained.logit_bias,
        "matching": float(probability[match].mean()),
        "others": float(probability[~match].mean()),
        "calibration_error": calibration_error(probability.ravel(), match.ravel()),
        "label_accuracy": accuracy if accuracy is not None else float("nan"),
    }


def calibration_error(probability: np.ndarray, match: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: |mean probability − share of matches| over bins of equal width, weighted by size.

    Source: Guo et al., "On calibration of modern neural networks" (arXiv:1706.04599), equation 3.
    """
    number = np.minimum((probability * bins).astype(int), bins - 1)
    apart = [abs(probability[number == b].sum() - match[number == b].sum()) for b in range(bins)]
    return float(np.sum(apart) / len(probability))


if __name__ == "__main__":
    main()
