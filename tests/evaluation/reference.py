"""Sets of embeddings, and their metrics by sorting the whole score matrix."""

import numpy as np


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def random_set(images, texts, dim, seed=0):
    """Texts near their images, several for some and none for others."""
    rng = np.random.default_rng(seed)
    zimg = unit(rng.standard_normal((images, dim)))
    image_of_text = rng.integers(0, images, texts)
    return zimg, unit(zimg[image_of_text] + 0.8 * rng.standard_normal((texts, dim))), image_of_text


def integer_set(images, texts, dim, seed=0):
    """Embeddings of small integers, whose products are exact and often equal: full of ties."""
    rng = np.random.default_rng(seed)
    image_of_text = rng.integers(0, images, texts)
    zimg, ztxt = (rng.integers(-1, 2, (n, dim)).astype(np.float32) for n in (images, texts))
    return zimg, ztxt, image_of_text


def full_ranking(zimg, ztxt, image_of_text, ks):
    """Metrics of both directions, query by query, a correct answer sorted behind the wrong ones that tie with it."""
    scores = zimg.astype(np.float64) @ ztxt.astype(np.float64).T

    def metrics(rows, correct_answers):
        first, precision = [], []
        for query, row in enumerate(rows):
            correct = correct_answers(query)
            if correct.any():
                ranked = correct[np.lexsort((correct, -row))]
                first.append(1 + np.argmax(ranked))
                precisions = [ranked[: place + 1].mean() for place in np.flatnonzero(ranked[:10])]
                precision.append(sum(precisions) / correct.sum())
        recall = {f"R@{k}": np.mean(np.array(first) <= k) for k in ks}
        return recall | {"median_rank": np.median(first), "mAP@10": np.mean(precision)}

    to_text = metrics(scores, lambda image: image_of_text == image)
    to_image = metrics(scores.T, lambda text: np.arange(len(zimg)) == image_of_text[text])
    return {f"image_to_text/{name}": value for name, value in to_text.items()} | {
        f"text_to_image/{name}": value for name, value in to_image.items()
    }
