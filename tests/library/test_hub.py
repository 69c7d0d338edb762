"""Uploads and downloads, with a stand-in for the hub."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from library.hub import HubPath, Uploads, download_state, fetch_folder
from library.log import ResourceError, UserError


@dataclass(frozen=True)
class Options:
    huggingface_repo_id: str | None = "me/my-lora"
    huggingface_repo_type: str | None = None
    huggingface_path_in_repo: str | None = None
    huggingface_token: str | None = "hf_SECRET"
    huggingface_repo_visibility: str | None = None
    async_upload: bool = False


class LocalHub:
    """A hub that keeps everything in a dictionary, or is out of reach."""

    def __init__(self, folder: Path | None = None, reachable: bool = True) -> None:
        self.folder, self.reachable = folder, reachable
        self.repos: list[tuple[object, ...]] = []
        self.files: dict[str, bytes] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.threads: set[str] = set()

    def check(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.gate.wait(10)
        if not self.reachable:
            raise ConnectionError("no route to host, token hf_SECRET")

    def create_repo(self, *, repo_id, repo_type, private, exist_ok):
        self.check()
        self.repos.append((repo_id, repo_type, private, exist_ok))

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, repo_type):
        self.check()
        self.files[path_in_repo] = Path(path_or_fileobj).read_bytes()

    def upload_folder(self, *, folder_path, path_in_repo, repo_id, repo_type):
        self.check()
        for path in Path(folder_path).iterdir():
            self.files[f"{path_in_repo}/{path.name}"] = path.read_bytes()

    def list_repo_files(self, *, repo_id, revision, repo_type):
        self.check()
        return sorted(self.files)

    def hf_hub_download(self, *, repo_id, filename, revision, repo_type):
        path = self.folder / repo_type / revision / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.files[filename])
        return str(path)


@pytest.fixture
def model(tmp_path) -> Path:
    path = tmp_path / "my.safetensors"
    path.write_bytes(b"weights")
    return path


@pytest.mark.parametrize(
    ("visibility", "private"), [(None, True), ("private", True), ("Public", True), ("", True), ("public", False)]
)
def test_a_repository_is_private_unless_it_is_exactly_public(visibility, private):
    hub = LocalHub()
    Uploads(Options(huggingface_repo_visibility=visibility, huggingface_repo_type="model"), hub).prepare()
    assert hub.repos == [("me/my-lora", "model", private, True)]


@pytest.mark.parametrize(
    ("path", "name"), [(None, "my.safetensors"), ("a/b", "a/b/my.safetensors"), ("a/", "a/my.safetensors")]
)
def test_files_and_folders_arrive(tmp_path, model, path, name):
    hub = LocalHub()
    uploads = Uploads(Options(huggingface_path_in_repo=path), hub)
    uploads(model)
    state = tmp_path / "my-state"
    state.mkdir()
    (state / "run.json").write_bytes(b"{}")
    uploads(state, final=True)
    uploads.finish()
    folder = name.removesuffix("my.safetensors")
    assert hub.files == {name: b"weights", f"{folder}my-state/run.json": b"{}"}
    assert uploads.failures == []


def test_uploads_in_the_background_and_the_last_one_waits(model):
    hub = LocalHub()
    hub.gate.clear()
    uploads = Uploads(Options(async_upload=True), hub)
    uploads(model)
    assert hub.files == {}
    hub.gate.set()
    uploads(model, final=True)
    assert set(hub.files) == {"my.safetensors"}
    assert any(name.startswith("upload") for name in hub.threads)
    uploads.finish()


@pytest.mark.parametrize("background", [False, True])
def test_a_hub_out_of_reach_is_said_once_without_the_token(model, caplog, background):
    uploads = Uploads(Options(async_upload=background), LocalHub(reachable=False))
    uploads.prepare()
    uploads(model)
    uploads(model, final=True)
    uploads.finish()
    assert caplog.text.count("no route to host") == 1
    assert "hf_SECRET" not in caplog.text
    assert uploads.failures == ["my.safetensors"] * 2


def test_a_vanished_file_is_a_failure_only(tmp_path, caplog):
    uploads = Uploads(Options(), LocalHub())
    uploads(tmp_path / "gone.safetensors")
    assert "gone.safetensors can't be uploaded" in caplog.text


def test_without_a_repository_nothing_is_sent(model):
    hub = LocalHub()
    uploads = Uploads(Options(huggingface_repo_id=None), hub)
    uploads.prepare()
    uploads(model, final=True)
    uploads.finish()
    assert (hub.repos, hub.files) == ([], {})


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("me/repo/states/my-state", HubPath("me/repo", "states/my-state", "main", "model")),
        ("me/repo/my-state:v1", HubPath("me/repo", "my-state", "v1", "model")),
        ("me/repo/my-state:v1:dataset", HubPath("me/repo", "my-state", "v1", "dataset")),
        ("me/repo/my-state::dataset", HubPath("me/repo", "my-state", "main", "dataset")),
    ],
)
def test_places(text, place):
    assert HubPath.parse(text) == place


@pytest.mark.parametrize("text", ["me/repo", "repo", "", "a/b/c:d:e:f"])
def test_what_is_no_place(text):
    with pytest.raises(UserError, match="user/repo/path"):
        HubPath.parse(text)


def test_a_state_is_fetched(tmp_path):
    hub = LocalHub(tmp_path)
    hub.files = {"x/my-state/run.json": b"{}", "x/my-state/sub/model.safetensors": b"w", "x/my-state2/run.json": b"no"}
    folder = download_state("me/repo/x/my-state:v1", None, hub)
    assert folder.name == "my-state"
    assert sorted(path.name for path in folder.rglob("*.*")) == ["model.safetensors", "run.json"]
    assert not (folder.parent / "my-state2").exists()


def test_an_empty_place_is_a_mistake_and_no_network_a_lack(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        download_state("me/repo/nothing", None, LocalHub(tmp_path))
    with pytest.raises(ResourceError, match="no route") as caught:
        download_state("me/repo/nothing", "hf_SECRET", LocalHub(reachable=False))
    assert "hf_SECRET" not in str(caught.value)


def test_a_hub_out_of_reach_is_given_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    def unexpected(*_: object, **keywords: object) -> str:
        if not keywords["local_files_only"]:
            raise AssertionError("the client would try for minutes")
        raise FileNotFoundError

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", unexpected)
    monkeypatch.setattr("library.hub.getproxies", dict)
    monkeypatch.setattr("library.hub.socket.create_connection", no_network)
    assert fetch_folder("me/tokenizer", ["vocab.json"]) is None
    assert fetch_folder("me/tokenizer", ["vocab.json"], cached_only=True) is None


def test_what_was_fetched_before_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repository, **_: str(tmp_path / repository))
    assert fetch_folder("me/tokenizer", ["vocab.json"], cached_only=True) == tmp_path / "me" / "tokenizer"
