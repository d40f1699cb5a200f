"""Fetching a public tar archive: checked against its digest, unpacked as a whole or not at all.

TFDS's download manager knows SHA-256 only, where the archive's publisher gives an MD5, and its
extractor writes whatever path a member names.
"""

import hashlib
import http.client
import shutil
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from lclseg.data import nifti

CHUNK = 1 << 20  # bytes
TIMEOUT_SECONDS = 60  # without a byte


def _download(url: str) -> Iterator[bytes]:
    """The chunks of a file; raises VolumeError where the server fails or stops early."""
    received = 0
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            length = response.headers.get("Content-Length")
            total = int(length) if length else None
            with tqdm(desc=url, total=total, unit="B", unit_scale=True, disable=None) as bar:
                while chunk := response.read(CHUNK):
                    received += len(chunk)
                    bar.update(len(chunk))
                    yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise nifti.VolumeError(
            f"{url}: download failed after {received} bytes ({type(error).__name__}: {error})"
        ) from error
    if total is not None and received != total:
        raise nifti.VolumeError(
            f"{url}: download ended after {received} of {total} bytes; try again"
        )


def fetch(url: str, path: Path, *, md5: str) -> None:
    """Downloads `url` to `path`, which is written whole and with the right digest, or not at all.

    Args:
      url: of the file.
      path: in a folder that exists.
      md5: hex digest that the file must have.

    Raises:
      VolumeError: no answer, HTTP error, connection cut, another digest.
    """
    partial = path.with_name(path.name + ".partial")
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with partial.open("wb") as file:
            for chunk in _download(url):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != md5:
            raise nifti.VolumeError(
                f"{url}: found MD5 {digest.hexdigest()}, wanted {md5}; the download is damaged "
                "(try again), or another version was published"
            )
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a plain tar archive of files and folders into `folder`, which it creates.

    Raises:
      VolumeError: a member is a link or device or leads out of `folder` (nothing is written then),
        or this is no whole tar archive.
    """
    try:
        with tarfile.open(archive, "r:") as tar:
            members = tar.getmembers()
            for member in members:
                name = PurePosixPath(member.name)
                if (
                    name.is_absolute()
                    or ".." in name.parts
                    or not (member.isreg() or member.isdir())
                ):
                    raise nifti.VolumeError(
                        f"{archive.name}: refused, for member {member.name!r} is a link or leads "
                        "out of the archive; wanted plain files and folders"
                    )
            folder.mkdir(parents=True)
            tar.extractall(folder, members, filter="data")
    except tarfile.TarError as error:
        raise nifti.VolumeError(f"{archive.name}: not a whole tar archive ({error})") from error


def fetch_and_unpack(url: str, folder: Path, *, md5: str) -> None:
    """Downloads and unpacks an archive as `folder`, unless that exists; all or nothing.

    Raises:
      VolumeError: as `fetch` and `unpack`.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.incomplete", dir=folder.parent))
    try:
        archive = temporary / url.rpartition("/")[2]
        fetch(url, archive, md5=md5)
        unpack(archive, temporary / "unpacked")
        # Only a whole folder ever bears the name.
        (temporary / "unpacked").rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
