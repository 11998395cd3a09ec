"""`python -m acestep_ray`: the same as `acestep-ray`."""

from acestep_ray.cli import entry_point

entry_point()
