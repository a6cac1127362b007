"""Markdown tables, pages of images, and where they are published."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffportrait3d.files import write_atomically, write_text
from diffportrait3d.images import as_pixels, save_image, sheet
from training.dataset.images import DataError

from .bootstrap import Interval

LABEL_WIDTH, LABEL_CHARACTERS = 120, 18


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns line up in a terminal too."""
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, *rows]]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(interval: Interval, digits: int, signed: bool = False) -> str:
    """'mean [low, high]', or 'none' if nothing was measured."""
    if interval.count == 0:
        return "none"
    sign = "+" if signed else ""
    return f"{interval.mean:{sign}.{digits}f} [{interval.low:{sign}.{digits}f}, {interval.high:{sign}.{digits}f}]"


def image_rows(rows: list[tuple[str, Tensor]]) -> Image.Image:
    """Rows of images [n, 3, H, W] in [0, 1], each with its title at the left; short rows end in grey."""
    side, images = rows[0][1].shape[-1], Image.fromarray(as_pixels(sheet([images for _, images in rows])))
    page = Image.new("RGB", (LABEL_WIDTH + images.width, images.height), (128, 128, 128))
    page.paste(images, (LABEL_WIDTH, 0))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for y, (title, _) in enumerate(rows):
        lines = textwrap.wrap(title, LABEL_CHARACTERS)
        draw.text((6, y * side + side // 2 - 8 * len(lines)), "\n".join(lines), fill=(255, 255, 255), font=font)
    return page


def stack_pages(paths: list[Path], out: Path) -> None:
    """Pages below one another in one PNG; one that is damaged is named and left out."""
    pages = [page for page in map(_page, paths) if page is not None]
    if not pages:
        return
    whole = Image.new("RGB", (max(p.width for p in pages), sum(p.height + 8 for p in pages)), (255, 255, 255))
    top = 0
    for page in pages:
        whole.paste(page, (0, top))
        top += page.height + 8
    save_png(whole, out)


def _page(path: Path) -> Image.Image | None:
    try:
        with Image.open(path) as page:
            return page.convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow's words for broken PNGs
        print(f"'{path}' is damaged ({error}) and left out; delete its record to measure it again.", file=sys.stderr)
        return None


def publish(path: Path, command: str, text: str) -> None:
    """Replace the text between a command's marks in a Markdown file; DataError if it has none."""
    begin, end = (f"<!-- made by {command}: {word} -->" for word in ("begin", "end"))
    old = path.read_text(encoding="utf-8") if path.is_file() else f"# Results\n\n{begin}\n{end}\n"
    before, found_begin, rest = old.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise DataError(f"'{path}' lacks the lines '{begin}' and '{end}', which the results go between; add them.")
    write_text(path, f"{before}{begin}\n\n{text}\n\n{end}{after}")


def save_png(image: Image.Image, path: Path) -> None:
    save_image(path, np.asarray(image))


def save_webp(source: Path, path: Path) -> None:
    """An image file again, small enough for a document."""
    with Image.open(source) as image:
        write_atomically(path, lambda file: image.save(file, format="WEBP", quality=85, method=6))
