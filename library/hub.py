"""The Hugging Face hub: sending models away, fetching states. The only place that talks to it."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies

from library.log import ResourceError, UserError, get_logger

if TYPE_CHECKING:
    from library.option_groups import HubOptions

logger = get_logger(__name__)


class Api(Protocol):
    """The part of `huggingface_hub.HfApi` that is used."""

    def create_repo(self, *, repo_id: str, repo_type: str | None, private: bool, exist_ok: bool) -> Any:
        """Makes a repository where there is none."""

    def upload_file(self, *, path_or_fileobj: str, path_in_repo: str, repo_id: str, repo_type: str | None) -> Any:
        """Sends a file."""

    def upload_folder(self, *, folder_path: str, path_in_repo: str, repo_id: str, repo_type: str | None) -> Any:
        """Sends a folder."""

    def list_repo_files(self, *, repo_id: str, revision: str | None, repo_type: str | None) -> Sequence[str]:
        """Names of all files."""

    def hf_hub_download(self, *, repo_id: str, filename: str, revision: str | None, repo_type: str | None) -> str:
        """Fetches a file and gives its path."""


def connect(token: str | None) -> Api:
    """The hub's own client. Nothing is sent before it is asked to do something."""
    from huggingface_hub import HfApi

    api: Api = HfApi(token=token)
    return api


@dataclass
class Uploads:
    """Sends what a run saves to a repository of the hub. Failures are said once each and never end the training."""

    options: HubOptions
    api: Api | None = None
    """None: connects when first needed."""
    failures: list[str] = field(default_factory=list)
    _pool: ThreadPoolExecutor | None = None
    _running: list[Future[None]] = field(default_factory=list)
    _said: set[str] = field(default_factory=set)

    @property
    def wanted(self) -> bool:
        """Whether a repository was named."""
        return bool(self.options.huggingface_repo_id)

    def prepare(self) -> None:
        """Makes the repository where there is none: private unless the visibility is exactly `public`."""
        if not self.wanted:
            return
        try:
            self._client().create_repo(
                repo_id=str(self.options.huggingface_repo_id),
                repo_type=self.options.huggingface_repo_type,
                private=self.options.huggingface_repo_visibility != "public",
                exist_ok=True,
            )
        except Exception as error:  # noqa: BLE001 - side work must never end the training
            self._complain("the repository can't be reached or made", error)

    def __call__(self, path: Path, *, final: bool = False) -> None:
        """Sends a file or a folder; with `--async_upload` in the background, except the final one."""
        if not self.wanted:
            return
        if self.options.async_upload and not final:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")
            self._running.append(self._pool.submit(self._send, path))
            return
        self.wait()
        self._send(path)

    def wait(self) -> None:
        """Waits until everything has been sent."""
        unfinished = [future for future in self._running if not future.done()]
        if unfinished:
            logger.info("waiting for %d upload(s)", len(unfinished))
        for future in unfinished:
            future.result()
        self._running.clear()

    def finish(self) -> None:
        """Waits, and says what couldn't be sent."""
        self.wait()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        if self.failures:
            logger.warning("uploads that failed: %s", "; ".join(self.failures))

    def _send(self, path: Path) -> None:
        options = self.options
        target = str(PurePosixPath(options.huggingface_path_in_repo or "") / path.name)
        place: dict[str, Any] = {
            "path_in_repo": target,
            "repo_id": str(options.huggingface_repo_id),
            "repo_type": options.huggingface_repo_type,
        }
        try:
            if path.is_dir():
                self._client().upload_folder(folder_path=str(path), **place)
            else:
                self._client().upload_file(path_or_fileobj=str(path), **place)
            logger.info("uploaded %s to %s", path.name, options.huggingface_repo_id)
        except Exception as error:  # noqa: BLE001 - as above
            self.failures.append(path.name)
            self._complain(f"{path.name} can't be uploaded", error)

    def _client(self) -> Api:
        if self.api is None:
            self.api = connect(self.options.huggingface_token)
        return self.api

    def _complain(self, what: str, error: Exception) -> None:
        text = without_secret(f"{type(error).__name__}: {error}", self.options.huggingface_token)
        level = logging.DEBUG if text in self._said else logging.WARNING
        self._said.add(text)
        logger.log(level, "%s - %s: %s - the training goes on", self.options.huggingface_repo_id, what, text)


@dataclass(frozen=True)
class HubPath:
    """A place on the hub."""

    repo_id: str
    path: str
    revision: str = "main"
    repo_type: str = "model"

    @classmethod
    def parse(cls, text: str) -> HubPath:
        """Of `user/repo/path[:revision[:type]]`. Errors: UserError for anything else."""
        place, *rest = text.split(":")
        parts = [part for part in place.split("/") if part]
        if len(parts) < 3 or len(rest) > 2:
            raise UserError("not a place on the hub", text, "write user/repo/path[:revision[:type]]", code="E-HUB-PATH")
        defaults = ("main", "model")
        revision, repo_type = (
            *(part or default for part, default in zip(rest, defaults, strict=False)),
            *defaults[len(rest) :],
        )
        return cls("/".join(parts[:2]), "/".join(parts[2:]), revision, repo_type)


def download_state(text: str, token: str | None = None, api: Api | None = None) -> Path:
    """Fetches a state from `user/repo/path[:revision[:type]]` and gives its folder.

    Errors: UserError when there is nothing at that place, ResourceError when the hub can't be reached.
    """
    place = HubPath.parse(text)
    where = {"repo_id": place.repo_id, "revision": place.revision, "repo_type": place.repo_type}
    try:
        client = api or connect(token)
        names = [name for name in client.list_repo_files(**where) if name.startswith(f"{place.path}/")]
        if not names:
            raise UserError(
                "there is no such folder on the hub", text, "check the path, revision and type", code="E-HUB-EMPTY"
            )
        paths = [Path(client.hf_hub_download(filename=name, **where)) for name in names]
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - every kind of failure of the client becomes one line
        reason = without_secret(f"{type(error).__name__}: {error}", token)
        raise ResourceError(
            f"the state can't be fetched: {reason}", text, "check network and token", code="E-HUB"
        ) from None
    depth = len(PurePosixPath(names[0]).parts) - len(PurePosixPath(place.path).parts)
    folder = paths[0]
    for _ in range(depth):
        folder = folder.parent
    return folder


def fetch_folder(repository: str, names: Sequence[str], *, cached_only: bool = False) -> Path | None:
    """The folder with those of the named files that a repository has; None when the hub can't be reached.

    `cached_only` looks at what was fetched before and asks nobody.
    """
    from huggingface_hub import snapshot_download

    if not cached_only and not _is_reachable():
        return None
    try:
        return Path(snapshot_download(repository, allow_patterns=list(names), local_files_only=cached_only))
    except Exception as error:  # noqa: BLE001 - every kind of failure of the client means the same
        logger.debug("%s: %s: %s", repository, type(error).__name__, error)
        return None


def _is_reachable() -> bool:
    """Whether the hub may be asked and answers at all; its client would try for minutes."""
    from huggingface_hub import constants

    place = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies() or not place.hostname:
        return True
    try:
        with socket.create_connection((place.hostname, place.port or 443), timeout=5):
            return True
    except OSError:
        return False


def without_secret(text: str, secret: str | None) -> str:
    """The text with the secret blotted out."""
    return text.replace(secret, "***") if secret else text
