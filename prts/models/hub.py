"""Bundles on the Hugging Face hub: `hf://owner/name[@revision]` is downloaded into the hub's own cache, and a folder is uploaded.

Only `model.json` and the files that it names are downloaded: `model.safetensors` and, if the encoder was trained, `adapter.safetensors`.
Endpoint, cache, login and offline mode are huggingface_hub's own (`HF_ENDPOINT`, `HF_HUB_CACHE`, `hf auth login` or `HF_TOKEN`,
`HF_HUB_OFFLINE`).
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from prts import __version__
from prts.errors import InputError, choose, refusal
from prts.io.cache import sha256_file
from prts.models.bundle_description import read_description

logger = logging.getLogger(__name__)

SCHEME = "hf://"
DESCRIPTION = "model.json"
_CARD = ("README.md", ".gitattributes")  # what a repository without a model may hold
_BY_PRTS = {"library_name": "prts", "library_version": __version__}
_LOGIN = "log in with `hf auth login` or set HF_TOKEN"


class Reference(NamedTuple):
    """A repository on the hub and a revision of it: a branch, a tag or a commit; None is its main branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}" + (f"@{self.revision}" if self.revision else "")


class Pulled(NamedTuple):
    """A downloaded bundle.

    Attributes
    ----------
    folder
        Where it is in the cache.
    origin
        `hf://owner/name@commit`.
    """

    folder: Path
    origin: str


def is_reference(place: Path | str) -> bool:
    """Whether a place is on the hub, also if it is mistyped.

    Examples
    --------
    >>> is_reference("hf://owner/name"), is_reference("models/hf"), is_reference("https://huggingface.co/owner/name")
    (True, False, True)
    """
    return isinstance(place, str) and re.match(r"hf:|https?://", place, re.IGNORECASE) is not None


def parse_reference(place: str) -> Reference:
    """Read `hf://owner/name[@revision]`.

    Raises
    ------
    InputError
        If it is written in another way.

    Examples
    --------
    >>> parse_reference("hf://owner/name@v1")
    Reference(repo='owner/name', revision='v1')
    """
    found = re.fullmatch(r"hf://([^/@\s]+/[^/@\s]+)(?:@(\S+))?", place)
    if found is None:
        raise InputError(f"{place}: is not the address of a model; write hf://owner/name or hf://owner/name@revision")
    return Reference(check_repository(found[1]), found[2])


def check_repository(repo: str) -> str:
    """The name of a repository, unchanged.

    Raises
    ------
    InputError
        If the hub does not allow it.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if re.fullmatch(r"[^/\s]+/[^/\s]+", repo) is None:
        raise InputError(f"{repo}: is not the name of a repository; write owner/name")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{repo}: is not the name of a repository ({error}); write owner/name") from None
    return repo


def pull(place: str) -> Pulled:
    """Download a bundle, or find it in the cache.

    Parameters
    ----------
    place
        `hf://owner/name[@revision]`.

    Returns
    -------
    The folder with its files, and the commit that they belong to.

    Raises
    ------
    InputError
        If the repository or revision does not exist or cannot be reached, is not a bundle, or has weights that model.json does not name.
    """
    wanted = parse_reference(place)
    unreachable = _unreachable(wanted)
    description = _download(wanted, DESCRIPTION, unreachable)
    found = Reference(wanted.repo, description.parent.name)  # .../snapshots/<commit>/model.json
    with as_on_hub(description.parent, str(found)):
        _, about = read_description(description)
    for name, sha256 in about.files().items():
        _pull_file(found, name, sha256, unreachable)
    logger.info("%s: commit %s", place, description.parent.name)
    return Pulled(description.parent, str(found))


def _pull_file(found: Reference, name: str, sha256: str, unreachable: Exception | None) -> None:
    """Download a file that model.json names, and check that it is the one."""
    file = _download(found, name, unreachable)
    if sha256_file(file) != sha256:
        if unreachable is not None:
            raise InputError(f"{file}: is damaged; run it again with a network connection, which downloads it anew")
        file = _download(found, name, again=True)
    if sha256_file(file) != sha256:
        raise InputError(
            f"{found}: {name} is not the file that model.json names (SHA-256 {sha256}), so it was changed or "
            "damaged on the hub; ask its owner to push the model again, or give an earlier revision as hf://owner/name@revision"
        )


@contextmanager
def as_on_hub(folder: Path, origin: str) -> Iterator[None]:
    """Name a file of a pulled bundle in errors as it is on the hub, not by its place in the cache."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(str(folder), origin)) from error


def push(
    repo: str, files: Mapping[str, Path | bytes], *, private: bool, revision: str | None, message: str
) -> tuple[str, bool]:
    """Upload the files of a bundle in one commit; the repository and the branch are made if needed.

    Parameters
    ----------
    repo
        `owner/name`.
    files
        Path or content of each file, by name.
    private
        Whether a new repository is private; one that exists stays as it is.
    revision
        The branch; None: main.
    message
        First line of the commit message.

    Returns
    -------
    `hf://owner/name@commit`, and whether the repository is private.

    Raises
    ------
    InputError
        If the hub cannot be reached, refuses the upload, or the repository holds something else.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi(**_BY_PRTS)
    with _one_line(Reference(check_repository(repo), revision)), _quiet():
        try:
            info = api.model_info(repo)
        except RepositoryNotFoundError:
            api.create_repo(repo, private=private, exist_ok=True)
            info = api.model_info(repo)
        names = [each.rfilename for each in info.siblings or []]
        others = [name for name in names if name not in _CARD]
        if others and "model.json" not in names:
            raise InputError(f"{repo}: holds {others[0]} and is not a prts model; give the name of a new repository")
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        additions = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        done = api.create_commit(repo, additions, commit_message=message, revision=revision)
    return str(Reference(repo, done.oid)), bool(info.private)


def _unreachable(wanted: Reference) -> Exception | None:
    """Why the hub cannot be reached, found without the half minute for which `hf_hub_download` tries; None if it can, or need not be."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if constants.HF_HUB_OFFLINE:
        return OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
    is_commit = re.fullmatch("[0-9a-f]{40}", wanted.revision or "") is not None
    if is_commit and isinstance(try_to_load_from_cache(wanted.repo, DESCRIPTION, revision=wanted.revision), str):
        return None
    try:
        with _quiet():
            get_hf_file_metadata(hf_hub_url(wanted.repo, DESCRIPTION, revision=wanted.revision))
    except HfHubHTTPError:
        return None  # it answers; the download says what is wrong
    except (OSError, _transport_error()) as error:
        return error
    return None


def _download(wanted: Reference, name: str, unreachable: Exception | None = None, *, again: bool = False) -> Path:
    """A file of a repository, from the cache alone if the hub is unreachable."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    local = unreachable is not None
    with _one_line(wanted, name), _quiet():
        try:
            file = hf_hub_download(
                wanted.repo, name, revision=wanted.revision, force_download=again, local_files_only=local, **_BY_PRTS
            )
        except LocalEntryNotFoundError as error:
            raise error from unreachable
    return Path(file)


@contextmanager
def _one_line(wanted: Reference, name: str = "") -> Iterator[None]:
    """Turn the errors of huggingface_hub into InputErrors."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except InputError:
        raise
    except (HfHubHTTPError, OSError, ValueError, _transport_error()) as error:
        if (refused := refusal(error)) is not None:
            raise InputError(refused) from error
        raise InputError(f"{wanted}: {_problem(wanted, name, error)}") from error


def _problem(wanted: Reference, name: str, error: Exception) -> str:
    """What is wrong and what to do."""
    from huggingface_hub import constants, errors

    hub, page = constants.ENDPOINT, f"{constants.ENDPOINT}/{wanted.repo}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if constants.HF_HUB_OFFLINE:
        return (
            f"{name or 'the hub'} is not available offline (HF_HUB_OFFLINE is set) and not in the cache {constants.HF_HUB_CACHE}; unset "
            "HF_HUB_OFFLINE and run it again with a network, or give the model as a folder"
        )
    if isinstance(error, errors.GatedRepoError):
        return f"access has to be granted; ask for it on {page} and {_LOGIN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no such repository on {hub}, or it is private; check the name, or {_LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"there is no revision {wanted.revision!r}{_revisions(wanted)}"
    if isinstance(error, errors.LocalEntryNotFoundError) or status is None:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        return f"{hub} cannot be reached ({reason}); check the network and run it again, or give the model as a folder"
    if isinstance(error, errors.EntryNotFoundError):
        return f"has no {name}, so it is not a prts model; look at {page}/tree/main and check the name"
    if status in (401, 403):
        return f"{hub} does not permit this ({status}); {_LOGIN} with a token that may write to {wanted.repo.partition('/')[0]}"
    reason = str(error).strip().partition("\n")[0]
    return f"{hub} refused ({reason}); correct what it names, or run it again later"


def _revisions(wanted: Reference) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        refs = HfApi(**_BY_PRTS).list_repo_refs(wanted.repo)
    except (HfHubHTTPError, _transport_error()):
        return "; omit it to get the main branch"
    return choose(str(wanted.revision), [ref.name for ref in (*refs.branches, *refs.tags)])


def _client() -> ModuleType:
    """The HTTP client of huggingface_hub; its versions use different ones."""
    from huggingface_hub.utils import get_session

    return sys.modules[type(get_session()).__module__.partition(".")[0]]


def _transport_error() -> type[Exception]:
    """What the client raises without a connection."""
    client = _client()
    found: type[Exception] = getattr(client, "TransportError", None) or client.RequestException
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the client's line for each request, and the hub's progress bars where stderr is not a terminal."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    requests = logging.getLogger(_client().__name__)
    level, hide = requests.level, not (sys.stderr.isatty() or are_progress_bars_disabled())
    requests.setLevel(logging.WARNING)
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        requests.setLevel(level)
        if hide:
            enable_progress_bars()
