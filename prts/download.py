"""Download public files: resumable, verified if a checksum is known, and unpacked safely."""

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
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from prts import __version__
from prts.errors import InputError, ParameterError
from prts.io.cache import sha256_file
from prts.platforms.xenium_files import BOUNDARIES, CELLS, MANIFEST, MATRIX, TRANSCRIPTS
from prts.progress import track

if TYPE_CHECKING:
    from prts.data.tissue import SectionSpec

logger = logging.getLogger(__name__)

_BLOCK = 1 << 20
_TIMEOUT_S = 60
_HASHES = ("sha256", "md5")
_NETWORK_ERRORS = urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError
# What is used of an archive: of binned outputs, the 2 um bins (the coarser ones would double the size), and of Xenium's output the tables
# (its images and the files of Xenium Explorer are ten times as large).
_XENIUM = (MANIFEST, MATRIX, CELLS[0], *BOUNDARIES.values(), TRANSCRIPTS)
_ARCHIVES = {
    "_binned_outputs.tar.gz": ["binned_outputs/square_002um"],
    "_outs.zip": [f"outs/{name}" for name in _XENIUM],
}


def download(sources: Sequence[Mapping[str, Any]], data_dir: Path) -> list[Path]:
    """Download files that do not exist yet.

    An interrupted download leaves `<file>.part`, from which the next call resumes. A file gets its name only when it is complete and its
    checksum, if known, is right.

    Parameters
    ----------
    sources
        Mappings with `url`; `path`, the file to write or the folder to unpack into, relative to `data_dir`; `sha256` or `md5` if known;
        and, for a tar archive, `unpack`: true for all of it, or a list of the folders and files to keep.
    data_dir
        Folder of all paths.

    Returns
    -------
    Files and unpacked folders, in the order of `sources`.

    Raises
    ------
    InputError
        If the file cannot be downloaded, its checksum is wrong, an archive is damaged or would write outside its folder, or the
        disk is full.
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
                    f"{path}: the disk is full ({free:.1f} GB free); free some space and run it again to resume"
                ) from error
            if isinstance(error, PermissionError | FileExistsError | NotADirectoryError):
                raise InputError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error
            raise
    return done


def download_section(spec: SectionSpec) -> list[Path]:
    """Download the files of a section.

    Parameters
    ----------
    spec
        The section. Its `download` contains `folder`, `urls`, and checksums by file name as `sha256` or `md5`. Of archives named
        `*_binned_outputs.tar.gz`, the 2 um bins are unpacked into the folder; of `*_outs.zip` of Xenium, the tables into `outs` in it.

    Raises
    ------
    InputError
        As for `download`, and if the folder or the URLs are missing.
    """
    node = spec.download or {}
    if not node.get("folder") or not node.get("urls"):
        raise ParameterError("section", f"{spec.name}.download", "is incomplete; give a folder and a list of urls")
    sources = []
    for url in node["urls"]:
        name = _file_name(url)
        known = {kind: (node.get(kind) or {}).get(name) for kind in _HASHES}
        wanted = next((members for ending, members in _ARCHIVES.items() if name.endswith(ending)), None)
        sources.append({"url": url, "path": name if wanted is None else ".", "unpack": wanted, **known})
    return download(sources, Path(node["folder"]))


class ResumingDownloader:
    """A downloader for pooch that keeps partial files as `<target>.part` and requests the rest.

    Parameters
    ----------
    target
        The final path; the random temporary name that pooch passes is lost with the process.
    attempts
        Number of failed attempts without a new byte before giving up.
    """

    def __init__(self, target: Path, attempts: int = 5) -> None:
        self._part = target.with_name(f"{target.name}.part")
        # The server's tag of the version that the part belongs to.
        self._tag = target.with_name(f"{target.name}.part.tag")
        self._attempts = attempts

    def __call__(self, url: str, output_file: str, pooch: Any = None, check_only: bool = False) -> None:
        """Download `url` and move it to `output_file`; called by pooch."""
        failures = 0
        while True:
            before = self._size()
            try:
                complete = self._attempt(url)
            except urllib.error.HTTPError as error:
                complete, reason = False, f"the server returned {error.code} {error.reason}"
                if error.code < http.HTTPStatus.INTERNAL_SERVER_ERROR:
                    raise InputError(f"{url}: {reason}; check the URL") from error
            except _NETWORK_ERRORS as error:
                complete, reason = False, str(getattr(error, "reason", error) or type(error).__name__)
            else:
                reason = "the connection was lost"
            if complete:
                shutil.move(self._part, output_file)
                self._tag.unlink(missing_ok=True)
                return
            failures = 0 if self._size() > before else failures + 1
            if failures >= self._attempts:
                raise InputError(
                    f"{url}: download failed after {self._size() / 1e6:.0f} MB ({reason}); check the network and run it again to resume"
                )
            time.sleep(min(0.1 * 2**failures, 10.0))

    def _size(self) -> int:
        return self._part.stat().st_size if self._part.is_file() else 0

    def _attempt(self, url: str) -> bool:
        """Request the missing part; True if the file is complete."""
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
            # There is nothing after the part: it is complete, or belongs to another version.
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
        raise InputError(f"{path}: is a folder; choose another folder for {source['url']}")
    if path.is_file():
        logger.info("%s: already downloaded", path)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    known = next((f"{kind}:{source[kind]}" for kind in _HASHES if source.get(kind)), None)
    pooch.get_logger().setLevel(logging.WARNING)  # pooch's own messages are about "data" and "known_hash"
    logger.info("downloading %s", source["url"])
    try:
        pooch.retrieve(
            source["url"], known, fname=path.name, path=path.parent, downloader=ResumingDownloader(path.absolute())
        )
    except ValueError as error:
        if known is None or "hash" not in str(error):
            raise
        raise InputError(
            f"{source['url']}: the checksum is not {known} and the file was removed; run it again, or check the URL"
        ) from error
    if known is None:
        logger.warning("%s: not verified, since no checksum is known; its sha256 is %s", path.name, sha256_file(path))
    return path


def _fetch_archive(source: Mapping[str, Any], folder: Path, members: list[str]) -> list[Path]:
    """Download an archive, unpack it, and delete it."""
    wanted = [folder / member for member in members]
    marker = folder / f".{_file_name(source['url'])}.unpacked"
    if marker.is_file() or (wanted and all(path.exists() for path in wanted)):
        logger.info("%s: already downloaded", ", ".join(map(str, wanted)) or folder)
        return wanted or [folder]
    archive = _fetch_file(source, folder / _file_name(source["url"]))
    try:
        _unpack(archive, folder, members)
    except (tarfile.ReadError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        archive.unlink()
        raise InputError(f"{archive}: damaged archive ({error}), removed; run it again") from error
    if not members:
        marker.touch()
    archive.unlink()
    return wanted or [folder]


def _unpack(archive: Path, folder: Path, members: Sequence[str]) -> None:
    """Unpack into a temporary folder first, so that nothing incomplete is left if the process is killed."""
    logger.info("unpacking %s", archive.name)
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=folder) as temporary:
        if archive.suffix == ".zip":
            _unzip(archive, Path(temporary), members)
        else:
            with tarfile.open(archive) as tar:
                try:
                    for member in track(_selected(tar, members), f"unpacking {archive.name}"):
                        tar.extract(member, temporary, filter="data")
                except tarfile.FilterError as error:
                    raise InputError(f"{archive}: not safe to unpack ({error}); check the URL") from error
        for name in members or [path.name for path in sorted(Path(temporary).iterdir())]:
            source, target = Path(temporary) / name, folder / name
            if not source.exists():
                raise InputError(f"{archive}: does not contain {name}; check the URL")
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir():
                shutil.rmtree(target)
            source.replace(target)


def _unzip(archive: Path, folder: Path, members: Sequence[str]) -> None:
    """Unpack files of a zip archive, which may hold them in the named folder or without it."""
    with zipfile.ZipFile(archive) as held:
        names = set(held.namelist())
        for member in track(members, f"unpacking {archive.name}"):
            found = next((name for name in (member, PurePosixPath(member).name) if name in names), None)
            if found is None:
                continue
            target = folder / member
            target.parent.mkdir(parents=True, exist_ok=True)
            with held.open(found) as source, target.open("wb") as handle:
                shutil.copyfileobj(source, handle, _BLOCK)


def _selected(tar: tarfile.TarFile, members: Sequence[str]) -> Iterator[tarfile.TarInfo]:
    kept = [PurePosixPath(member).parts for member in members]
    for member in tar:
        parts = PurePosixPath(member.name).parts
        if not kept or any(parts[: len(k)] == k for k in kept):
            yield member


def _blocks(response: IO[bytes]) -> Iterator[bytes]:
    # If the connection is lost, the stream ends early; the length shows it.
    with contextlib.suppress(http.client.IncompleteRead):
        while block := response.read(_BLOCK):
            yield block


def _file_name(url: str) -> str:
    return PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
