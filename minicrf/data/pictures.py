"""Pictures in and out: photographs of any orientation, mode and depth -> RGB, uint8; PNGs."""
import os

import numpy as np
from PIL import Image, ImageOps

from ..saving import reason, replacing

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")   # none that starts other programs
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


def open_picture(path, kind):
    """A Pillow image, decoded.  kind: what errors, ValueError or OSError, say was expected."""
    try:
        picture = Image.open(path, formats=FORMATS)
        picture.load()
        return picture
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: found no such file, expected a {kind}") from None
    except Exception as error:      # Pillow raises half a dozen kinds for broken files
        why = reason(error).replace(str(path), "this file")
        raise ValueError(f"{path}: found a file that cannot be read ({why}), expected a {kind}: "
                         f"{', '.join(FORMATS)}") from None


def read_photograph(path, upright=True):
    """A photograph as (H, W, 3) uint8 RGB; upright: turned as its orientation tag says.

    Greyscale (8 and 16 bits), palette, CMYK and RGBA (over white) are converted.
    """
    picture = open_picture(path, "photograph")
    # older Pillows call 16 bits a pixel I, as all do the 32 bits of a TIFF
    deep = picture.mode[:4] == "I;16" or (picture.mode == "I" and picture.format != "TIFF")
    if upright:
        picture = ImageOps.exif_transpose(picture)
    if deep:
        values = np.asarray(picture, np.float32) / 256
        picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"{path}: found a picture of 32 bits a pixel (mode {picture.mode}), whose "
                         "range only you know; expected one converted to 8 or 16 bits")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return np.array(picture.convert("RGB"))


def find_photographs(path):
    """The photographs that path names: itself, or those in a folder, sorted by name."""
    if not os.path.isdir(path):
        return [path]
    found = sorted(entry.path for entry in os.scandir(path)
                   if entry.name.lower().endswith(ENDINGS) and entry.is_file())
    if not found:
        raise FileNotFoundError(f"{path}: found no photographs, expected files ending in "
                                f"{', '.join(ENDINGS)}")
    return found


def save_png(path, picture):
    """Write a Pillow image as PNG; beside, then renamed."""
    with replacing(path, "wb") as file:
        picture.save(file, format="PNG")


def shrink(image, max_pixels=1 << 20):
    """A photograph (H, W, 3) of at most max_pixels, its shape kept."""
    H, W = image.shape[:2]
    scale = min(1, (max_pixels / (H * W)) ** 0.5)
    size = [max(1, int(side * scale)) for side in (W, H)]
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def enlarge(labels, size):
    """Labels (h, w) at another size (H, W), by nearest neighbour."""
    return np.array(Image.fromarray(labels).resize(size[::-1], Image.Resampling.NEAREST))
