"""How large an image may be that has to be decoded whole: the guard against decompression bombs.

A file of some kB can hold an image that fills the memory. Formats that are read tile by tile (pyramids of scanners, tiled TIFF) may be as
large as they like; PNG, JPEG and a TIFF in one compressed piece are refused above a limit, before anything of them is decoded.
"""

from __future__ import annotations

from prts.errors import InputError

# 537 Mpx, which take 1.6 GB, and 3.9 GB while Pillow decodes them. Its own limit of 89 Mpx is meant for web uploads.
MAX_PIXELS = 1 << 29

_allowed = MAX_PIXELS


def allow_pixels(max_pixels: int | None) -> None:
    """Set the limit for this process, from the key `max_pixels` of a command; None is `MAX_PIXELS`.

    For the whole process, as Pillow's own limit is: images are opened in many places, and none of them knows better.

    Raises
    ------
    InputError
        If it is no whole number above 0.
    """
    global _allowed
    if max_pixels is None:
        _allowed = MAX_PIXELS
        return
    if isinstance(max_pixels, bool) or not isinstance(max_pixels, int | float) or max_pixels < 1 or max_pixels % 1:
        raise InputError(f"max_pixels={max_pixels}: a whole number of pixels is needed, such as {2 * MAX_PIXELS}")
    _allowed = int(max_pixels)


def allowed_pixels() -> int:
    """The limit, px."""
    return _allowed


def require_decodable(
    width: int, height: int, what: str, cure: str = "convert it to a tiled TIFF", *, n_bytes: int = 3
) -> None:
    """Refuse what is too large to be decoded at once.

    Parameters
    ----------
    width, height
        Of what is decoded at once, px.
    what
        Completes "has ... px in ".
    cure
        What would be right, beside `max_pixels`.
    n_bytes
        Of a pixel, while it is decoded.

    Raises
    ------
    InputError
        If it has more pixels than allowed; the message names the key that allows it.
    """
    n = width * height
    if n > _allowed:
        raise InputError(
            f"has {width:,} x {height:,} px in {what}, which must be decoded whole and takes {n_bytes * n / 1e9:.1f} GB; {cure}, "
            f"or allow it with max_pixels={n}"
        )
