"""Directories and files on this machine or in object storage (`s3://`, `gs://`, `hf://`), behind one small class.

A file is written whole or not at all: a local one beside its place and then renamed, an object in one upload that only
its end makes visible. So what can be read was never half-written. What fails for a moment is tried again, with growing
waits and up to a bound.

Credentials come from where the storage's own tools take them (environment, profile, instance role); other options of
the client from fsspec's configuration, such as FSSPEC_S3_ANON=true for a public bucket.
"""

from acestep_ray.paths import expand_home, split_paths
from acestep_ray.storage.disk import DiskFullError, check_room, full_disk_explained, full_disk_of
from acestep_ray.storage.errors import AccessDeniedError, StorageError
from acestep_ray.storage.files import FileStatus
from acestep_ray.storage.folders import (
    check_new,
    fetched,
    output_folder,
    replaced_folder,
    updated_folder,
    upload_folder,
)
from acestep_ray.storage.lease import HeldError, Lease
from acestep_ray.storage.scratch import scratch_folder
from acestep_ray.storage.store import Store, is_url
from acestep_ray.storage.stored_file import StoredFile
from acestep_ray.storage.writers import lock_name, only_writer, only_writer_of

__all__ = [
    "AccessDeniedError",
    "DiskFullError",
    "FileStatus",
    "HeldError",
    "Lease",
    "StorageError",
    "Store",
    "StoredFile",
    "check_new",
    "check_room",
    "expand_home",
    "fetched",
    "full_disk_explained",
    "full_disk_of",
    "is_url",
    "lock_name",
    "only_writer",
    "only_writer_of",
    "output_folder",
    "replaced_folder",
    "scratch_folder",
    "split_paths",
    "updated_folder",
    "upload_folder",
]
