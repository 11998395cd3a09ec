"""Pages that hold all they show: pictures and sound are in the file, and nothing is fetched."""

from acestep_ray.reporting.page import Page

__all__ = ["Page"]
