"""Fetch the public files that a tissue config names: resumable, checked where a checksum is known, unpacked safely."""

from __future__ import annotations

import contextlib
import errno
import gzip
import http
import http.client
import logging
import lzma
import shutil
import ssl
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from prts import __version__
from prts.errors import InputError
from prts.io.cache import sha256_file
from prts.progress import track

if TYPE_CHECKING:
    from prts.data.tissue import SectionSpec

logger = logging.getLogger(__name__)

_BLOCK = 1 << 20
_TIMEOUT_S = 60
_HASHES = ("sha256", "md5")
_NETWORK_ERRORS = urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError
# Of an archive of binned outputs only the 2 um bins are used; the coarser ones are as large again.
_BINS_ARCHIVE, _BINS = "_binned_outputs.tar.gz", "binned_outputs/square_002um"


def download(sources: Sequence[Mapping[str, Any]], data_dir: Path) -> list[Path]:
    """Fetch what is not there yet.

    A broken download leaves `<file>.part`, and the next call goes on from there. A file gets its name only when it is whole and its
    checksum, where one is known, is right.

    Parameters
    ----------
    sources
        Each a mapping with `url`; `path`, relative to `data_dir`, the file to write, or the folder to unpack into; `sha256` or `md5`
        where known; and `unpack`, for a tar archive: true for all of it, or a list of the folders and files in it to keep.
    data_dir
        Folder that everything is put below.

    Returns
    -------
    The files, or the unpacked folders and files, in the order of `sources`.

    Raises
    ------
    InputError
        If the server or the file cannot be reached, the checksum is wrong, the archive is damaged or would write outside its
        folder, or the disk is full.
    """
    done: list[Path] = []
    for source in sources:
        path, unpack = Path(data_dir) / source["path"], source.get("unpack")
        try:
            if unpack:
                done += _fetch_archive(source, path, [] if unpack is True else list(unpack))
            else:
                done.append(_fetch_file(source, path))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                free = shutil.disk_usage(data_dir).free / 1e9
                raise InputError(
                    f"{path}: the disk is full ({free:.1f} GB free); free some space and run it again, it goes on where it stopped"
                ) from error
            if isinstance(error, PermissionError | FileExistsError | NotADirectoryError):
                raise InputError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error
            raise
    return done


def download_section(spec: SectionSpec) -> list[Path]:
    """Fetch the files of one section of a tissue config.

    Parameters
    ----------
    spec
        Its `download` names a `folder`, the `urls`, and `sha256` or `md5`: checksums by file name. Of an archive
        `*_binned_outputs.tar.gz` the 2 um bins are unpacked into the folder.

    Raises
    ------
    InputError
        As `download`, and if `download` lacks its folder or addresses.
    """
    node = spec.download or {}
    if not node.get("folder") or not node.get("urls"):
        raise InputError(f"tissue.sections.{spec.name}.download: needs a folder and a list of urls")
    sources = []
    for url in node["urls"]:
        name = _file_name(url)
        known = {kind: (node.get(kind) or {}).get(name) for kind in _HASHES}
        archive = name.endswith(_BINS_ARCHIVE)
        sources.append({"url": url, "path": "." if archive else name, "unpack": [_BINS] if archive else None, **known})
    return download(sources, Path(node["folder"]))


class ResumingDownloader:
    """A pooch downloader that keeps what it has in `<target>.part` and asks the server for the rest.

    Parameters
    ----------
    target
        The final path; pooch itself only tells a random temporary name, which would be lost with the process.
    attempts
        How often a dropped connection is taken up again without a single new byte before giving up.
    """

    def __init__(self, target: Path, attempts: int = 5) -> None:
        self._part = target.with_name(f"{target.name}.part")
        # The version of the file that the part belongs to, as the server names it.
        self._tag = target.with_name(f"{target.name}.part.tag")
        self._attempts = attempts

    def __call__(self, url: str, output_file: str, pooch: Any = None, check_only: bool = False) -> None:
        """Download `url` whole and move it to `output_file`; the call that pooch makes."""
        failures = 0
        while True:
            before = self._size()
            try:
                complete = self._attempt(url)
            except urllib.error.HTTPError as error:
                complete, reason = False, f"the server answers {error.code} {error.reason}"
                if error.code < http.HTTPStatus.INTERNAL_SERVER_ERROR:
                    raise InputError(f"{url}: {reason}; check the address") from error
            except _NETWORK_ERRORS as error:
                complete, reason = False, str(getattr(error, "reason", error) or type(error).__name__)
            else:
                reason = "the connection was cut"
            if complete:
                shutil.move(self._part, output_file)
                self._tag.unlink(missing_ok=True)
                return
            failures = 0 if self._size() > before else failures + 1
            if failures >= self._attempts:
                raise InputError(
                    f"{url}: cannot be fetched ({reason}); {self._size() / 1e6:.0f} MB are kept: check the network and run it again"
                )
            time.sleep(min(0.1 * 2**failures, 10.0))

    def _size(self) -> int:
        return self._part.stat().st_size if self._part.is_file() else 0

    def _attempt(self, url: str) -> bool:
        """Ask for what is missing; True when the part is the whole file."""
        have, headers = self._size(), {"User-Agent": f"prts/{__version__}", "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if self._tag.is_file():
                headers["If-Range"] = self._tag.read_text(encoding="utf-8")
        try:
            response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
                raise
            # Nothing lies beyond the part: it is whole, or it belongs to another file.
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return True
            self._part.unlink()
            return False
        with response:
            resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
            start = have if resumed else 0
            length = response.headers.get("Content-Length")
            total = None if length is None else start + int(length)
            if not resumed:
                self._remember(response.headers)
            if total is not None and total - start > shutil.disk_usage(self._part.parent).free:
                raise OSError(errno.ENOSPC, f"{total / 1e9:.1f} GB are needed")
            with self._part.open("ab" if resumed else "wb") as handle:
                blocks = None if total is None else -(-(total - start) // _BLOCK)
                for block in track(_blocks(response), _file_name(url), total=blocks):
                    handle.write(block)
        return total is None or self._size() == total

    def _remember(self, headers: http.client.HTTPMessage) -> None:
        tag = headers.get("ETag") or headers.get("Last-Modified")
        if tag and not tag.startswith("W/"):
            self._tag.write_text(tag, encoding="utf-8")
        else:
            self._tag.unlink(missing_ok=True)


def _fetch_file(source: Mapping[str, Any], path: Path) -> Path:
    import pooch

    if path.is_dir():
        raise InputError(f"{path}: is a folder; {source['url']} is to be a file there")
    if path.is_file():
        logger.info("%s is there", path)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    known = next((f"{kind}:{source[kind]}" for kind in _HASHES if source.get(kind)), None)
    pooch.get_logger().setLevel(logging.WARNING)  # it speaks of "data" and "known_hash"
    logger.info("downloading %s", source["url"])
    try:
        pooch.retrieve(
            source["url"], known, fname=path.name, path=path.parent, downloader=ResumingDownloader(path.absolute())
        )
    except ValueError as error:
        if known is None or "hash" not in str(error):
            raise
        raise InputError(
            f"{source['url']}: what came does not have the checksum {known}; it was removed: run it again, or check the address"
        ) from error
    if known is None:
        logger.warning("%s: no checksum is known, taken as it came; its sha256 is %s", path.name, sha256_file(path))
    return path


def _fetch_archive(source: Mapping[str, Any], folder: Path, members: list[str]) -> list[Path]:
    """Download an archive beside its folder, unpack it, and drop it."""
    wanted = [folder / member for member in members]
    marker = folder / f".{_file_name(source['url'])}.unpacked"
    if marker.is_file() or (wanted and all(path.exists() for path in wanted)):
        logger.info("%s is there", ", ".join(map(str, wanted)) or folder)
        return wanted or [folder]
    archive = _fetch_file(source, folder / _file_name(source["url"]))
    try:
        _unpack(archive, folder, members)
    except (tarfile.ReadError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        archive.unlink()
        raise InputError(f"{archive}: the archive is damaged ({error}); it was removed: run it again") from error
    if not members:
        marker.touch()
    archive.unlink()
    return wanted or [folder]


def _unpack(archive: Path, folder: Path, members: Sequence[str]) -> None:
    """Unpack into a temporary folder, then move what is wanted to its place, so that a killed unpacking leaves nothing half."""
    logger.info("unpacking %s", archive.name)
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=folder) as temporary:
        with tarfile.open(archive) as tar:
            try:
                for member in track(_selected(tar, members), f"unpacking {archive.name}"):
                    tar.extract(member, temporary, filter="data")
            except tarfile.FilterError as error:
                raise InputError(f"{archive}: is not safe to unpack ({error})") from error
        for name in members or [path.name for path in sorted(Path(temporary).iterdir())]:
            source, target = Path(temporary) / name, folder / name
            if not source.exists():
                raise InputError(f"{archive}: holds no {name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir():
                shutil.rmtree(target)
            source.replace(target)


def _selected(tar: tarfile.TarFile, members: Sequence[str]) -> Iterator[tarfile.TarInfo]:
    kept = [PurePosixPath(member).parts for member in members]
    for member in tar:
        parts = PurePosixPath(member.name).parts
        if not kept or any(parts[: len(k)] == k for k in kept):
            yield member


def _blocks(response: IO[bytes]) -> Iterator[bytes]:
    # A server that cuts the connection ends the stream early; what came is kept and the length tells.
    with contextlib.suppress(http.client.IncompleteRead):
        while block := response.read(_BLOCK):
            yield block


def _file_name(url: str) -> str:
    return PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
