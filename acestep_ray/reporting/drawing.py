"""A matplotlib figure as a part of a page: inline SVG in the page's colours, or PNG where that is smaller."""

from __future__ import annotations

import base64
import io
import os
import re
import stat
import struct
import warnings
import zlib
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
# A picture of more points than that is better drawn than described.
_MAX_SVG_BYTES = 250_000
_PNG_DPI = 144
_MAX_PNG_BYTES = 100_000
# Of strangers' pictures; ours of a clip have a hundredth of each.
MAX_PICTURE_BYTES = 16 * 2**20
MAX_PICTURE_PIXELS = 16 * 2**20
_WEBP_QUALITY = 85
_MAX_WEBP_SIDE = 16383
_PICTURE_DPI = 150
"""Of what is an image within an SVG, such as a spectrogram."""
# Black and white are those of the page: light on dark where the reader's system is dark.
_PAGE_COLOURS = {"#000000": "currentColor", "#ffffff": "var(--surface)"}
_REFERENCE = re.compile(r"#([\w-]+)")


class PictureError(Exception):
    """A picture that a page does not show; the message says why."""


def draw(figure: Figure, name: str) -> str | bytes:
    """SVG to write into HTML, or a PNG file where the SVG would be large. `name` is the figure's own in its page."""
    svg = _svg(figure, name)
    if len(svg) <= _MAX_SVG_BYTES:
        return svg
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_PNG_DPI)
    return file.getvalue()


def data_uri(media_type: str, content: bytes) -> str:
    """A file as an address that holds it."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def picture_uri(png: bytes) -> str:
    """A PNG file as an address; as WebP, which every browser shows, where that is smaller. The first of several frames.

    Raises PictureError for what is no PNG, is damaged, or would take more memory than a page's picture needs.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(png), formats=["PNG"])
        with picture:
            width, height = picture.size
            if width * height > MAX_PICTURE_PIXELS or max(width, height) > _MAX_WEBP_SIDE:
                raise PictureError(f"its {width:,} × {height:,} pixels are more than a page shows")
            has_frames = getattr(picture, "is_animated", False)
            picture.load()
            if has_frames or len(png) > _MAX_PNG_BYTES:
                file = io.BytesIO()
                picture.save(file, format="webp", quality=_WEBP_QUALITY)
                if has_frames or file.tell() < len(png):
                    return data_uri("image/webp", file.getvalue())
    except Image.DecompressionBombError:
        raise PictureError("its pixels are more than a page shows") from None
    except UnidentifiedImageError:
        raise PictureError("it is no PNG picture") from None
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        struct.error,
        zlib.error,
    ) as error:  # all of them Pillow's
        raise PictureError(f"it is damaged: {' '.join(str(error).split())}") from None
    return data_uri("image/png", png)


def picture_file_uri(path: str | os.PathLike[str]) -> str:
    """A PNG file on this machine as an address. Raises PictureError, and OSError where it cannot be read."""
    # A named pipe would block whoever opens it.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise PictureError("it is not a regular file")
        content = file.read(MAX_PICTURE_BYTES + 1)
    if len(content) > MAX_PICTURE_BYTES:
        raise PictureError(f"it has more than the {MAX_PICTURE_BYTES >> 20} MB of a picture in a page")
    return picture_uri(content)


def _svg(figure: Figure, name: str) -> str:
    import matplotlib

    file = io.BytesIO()
    # Text stays text, which the browser has the fonts for. The salt makes names within the SVG the figure's own, and
    # the same each time.
    settings = {"svg.fonttype": "none", "svg.hashsalt": name}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, dpi=_PICTURE_DPI, metadata=metadata)
    return _for_page(file.getvalue())


def _for_page(content: bytes) -> str:
    """Matplotlib's SVG without what other figures of the page have too, and with the page's colours."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(content)
    referred = {
        reference
        for element in root.iter()
        for key, value in element.attrib.items()
        if "url(#" in value or key.endswith("href")
        for reference in _REFERENCE.findall(value)
    }
    for parent in root.iter():
        for child in list(parent):
            # Its style is of every element in the page.
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
        if parent.get("id") not in referred:
            parent.attrib.pop("id", None)
        if style := parent.get("style"):
            for colour, of_page in _PAGE_COLOURS.items():
                style = style.replace(colour, of_page)
            parent.set("style", style)
    width = root.attrib.pop("width")
    root.attrib.pop("height", None)
    root.set("style", f"width: {width}; max-width: 100%")
    return ElementTree.tostring(root, encoding="unicode")
