"""A matplotlib figure as a part of a page: inline SVG in the page's colours, or PNG where that is smaller."""

from __future__ import annotations

import base64
import io
import re
import warnings
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
_WEBP_QUALITY = 85
_PICTURE_DPI = 150
"""Of what is an image within an SVG, such as a spectrogram."""
# Black and white are those of the page: light on dark where the reader's system is dark.
_PAGE_COLOURS = {"#000000": "currentColor", "#ffffff": "var(--surface)"}
_REFERENCE = re.compile(r"#([\w-]+)")


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
    """A PNG file as an address; as WebP, which every browser shows, where that is smaller.

    Raises OSError for what is no PNG.
    """
    from PIL import Image

    with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
        picture.load()
        if len(png) > _MAX_PNG_BYTES:
            file = io.BytesIO()
            picture.save(file, format="webp", quality=_WEBP_QUALITY)
            if file.tell() < len(png):
                return data_uri("image/webp", file.getvalue())
    return data_uri("image/png", png)


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
