"""Sets of embeddings, and what sorting their whole score matrix gives."""

import numpy as np


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def random_set(images, texts, dim, seed=0):
    """Texts near their images, several for some and none for others."""
    rng = np.random.default_rng(seed)
    zimg = unit(rng.standard_normal((images, dim)))
    image_of_text = rng.integers(0, images, texts)
    return zimg, unit(zimg[image_of_text] + 0.8 * rng.standard_normal((texts, dim))), image_of_text


def whole_numbers(images, texts, dim, seed=0):
    """Few small whole numbers, whose products are exact and often equal: full of ties."""
    rng = np.random.default_rng(seed)
    image_of_text = rng.integers(0, images, texts)
    zimg, ztxt = (rng.integers(-1, 2, (n, dim)).astype(np.float32) for n in (images, texts))
    return zimg, ztxt, image_of_text


def full_ranking(zimg, ztxt, image_of_text, ks):
    """Metrics of both directions, query by query, a correct answer sorted behind the wrong ones that tie with it."""
    scores = zimg.astype(np.float64) @ ztxt.astype(np.float64).T

    def figures(rows, right):
        first, precision = [], []
        for query, row in enumerate(rows):
            correct = right(query)
            if correct.any():
                ranked = correct[np.lexsort((correct, -row))]
                first.append(1 + np.argmax(ranked))
                seen = [ranked[: place + 1].mean() for place in np.flatnonzero(ranked[:10])]
                precision.append(sum(seen) / correct.sum())
        recall = {f"R@{k}": np.mean(np.array(first) <= k) for k in ks}
        return recall | {"median_rank": np.median(first), "mAP@10": np.mean(precision)}

    to_text = figures(scores, lambda image: image_of_text == image)
    to_image = figures(scores.T, lambda text: np.arange(len(zimg)) == image_of_text[text])
    return {f"image_to_text/{name}": value for name, value in to_text.items()} | {
        f"text_to_image/{name}": value for name, value in to_image.items()
    }
