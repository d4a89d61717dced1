"""Limit on the size of images that are decoded whole: the guard against decompression bombs.

A file of a few kB can contain an image that fills the memory. Formats that are read tile by tile (scanner pyramids, tiled TIFF) may be of
any size; PNG, JPEG and TIFF in one compressed piece are refused above the limit before anything is decoded.
"""

from __future__ import annotations

from prts.errors import InputError, ParameterError

# 537 Mpx take 1.6 GB, and 3.9 GB while Pillow decodes them. Pillow's own limit of 89 Mpx is meant for web uploads.
MAX_PIXELS = 1 << 29

_default = MAX_PIXELS


def allow_pixels(max_pixels: int | None) -> None:
    """Set the limit for calls that are not given `max_pixels`; None resets it to `MAX_PIXELS`."""
    global _default
    _default = pixel_limit(max_pixels) if max_pixels is not None else MAX_PIXELS


def pixel_limit(max_pixels: int | None) -> int:
    """The limit in px: `max_pixels`, or the default if None.

    Raises
    ------
    ParameterError
        If it is not a positive whole number.
    """
    if max_pixels is None:
        return _default
    if isinstance(max_pixels, bool) or not isinstance(max_pixels, int | float) or max_pixels < 1 or max_pixels % 1:
        problem = f"{max_pixels!r} is not a number of pixels; give a whole number, such as {2 * MAX_PIXELS}"
        raise ParameterError("", "max_pixels", problem)
    return int(max_pixels)


def check_pixels(
    size: tuple[int, int],
    what: str,
    max_pixels: int | None = None,
    *,
    cure: str = "convert it to a tiled TIFF",
    n_bytes: int = 3,
) -> None:
    """Refuse an image, or part of one, that is too large to be decoded at once.

    Parameters
    ----------
    size
        Width and height of what is decoded at once, px.
    what
        Name of it, such as "a PNG".
    max_pixels
        The limit; the default if None.
    cure
        What to do other than raising the limit.
    n_bytes
        Bytes per pixel while it is decoded.

    Raises
    ------
    InputError
        If it has more pixels than allowed.
    """
    width, height = size
    n = width * height
    if n > pixel_limit(max_pixels):
        raise InputError(
            f"{what} of {width:,} x {height:,} px must be decoded whole, which takes {n_bytes * n / 1e9:.1f} GB; {cure}, "
            f"or set max_pixels={n}"
        )
