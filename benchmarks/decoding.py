"""Decoding and resizing JPEGs for a tower, in full and at the reduced scale of `image_tower.jpeg_draft`.

    python -m benchmarks.decoding --json decoding.json

One process, one thread. The effect of the draft is reported as the difference of the pixels that the tower gets.
"""

import argparse
import io

import numpy as np
import timm
import torch
from PIL import Image

from benchmarks.common import interleaved, parser, picture, ratio, report
from siglit.data.decode_image import decode_image

SIZES = ((640, 480), (1600, 1200))


def main() -> None:
    """Draw pictures of both sizes, take turns, report."""
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=32, help="pictures of a size")
    options.add_argument("--input", type=int, default=224, help="side of the tower's input in pixels")
    options.add_argument("--repeats", type=int, default=9, help="turns")
    args = options.parse_args()
    torch.set_num_threads(1)
    figures = {f"{width} × {height}": measure(args, width, height) for width, height in SIZES}
    table = []
    for size, of_size in figures.items():
        table += [
            (f"{size}: draft / full", f"{of_size['gain']:.2f}", ""),
            (f"{size}: images/s in full", f"{of_size['full']:,.0f}", ""),
            (f"{size}: images/s with the draft", f"{of_size['draft']:,.0f}", ""),
            (f"{size}: mean difference of a pixel, of 255", f"{of_size['difference']:.2f}", ""),
        ]
    figures["options"] = {name: value for name, value in vars(args).items() if name != "json"}
    report(f"JPEGs to {args.input} × {args.input}, median of {args.repeats} turns", table, figures, args.json)


def measure(args: argparse.Namespace, width: int, height: int) -> dict[str, float]:
    """Images/s both ways, their ratio, and how far the pixels are apart."""
    rng = np.random.default_rng(0)
    files = [encoded(picture(rng, width, height)) for _ in range(args.images)]
    transform = timm.data.create_transform((3, args.input, args.input), crop_mode="squash", crop_pct=1, normalize=False)

    def pixels(draft: int | None) -> torch.Tensor:
        return torch.stack([transform(decode_image(data, 10**9, draft)) for data in files])

    seconds = interleaved({"full": lambda: pixels(None), "draft": lambda: pixels(args.input)}, args.repeats)
    return {
        "gain": ratio(seconds["full"], seconds["draft"]),
        "full": args.images / float(np.median(seconds["full"])),
        "draft": args.images / float(np.median(seconds["draft"])),
        "difference": float((pixels(None).float() - pixels(args.input).float()).abs().mean()),
    }


def encoded(image: Image.Image) -> bytes:
    """A picture as the bytes of a JPEG of quality 90."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


if __name__ == "__main__":
    main()
