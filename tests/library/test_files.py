"""Reading safetensors in every way, writing them so that nothing is lost, and text in the encodings people have."""

from __future__ import annotations

import errno
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from library import files
from library.files import (
    LazyTensors,
    atomic_write,
    fingerprint,
    header,
    read_text,
    save_safetensors,
    sha256,
    write_text,
)
from library.log import DataError, ResourceError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def sample() -> dict[str, Tensor]:
    tensors = {f"t.{dtype}": (torch.arange(6).reshape(2, 3) % 2).to(dtype) for dtype in (*FLOATS, *INTEGERS)}
    return tensors | {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "turned": torch.arange(6.0).reshape(2, 3).T,
    }


def same(found: Tensor, expected: Tensor) -> bool:
    return (
        found.dtype == expected.dtype
        and found.shape == expected.shape
        and bytes(files.raw_bytes(found)) == bytes(files.raw_bytes(expected))
    )


# writing


def test_bytes_are_those_of_the_official_writer(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in sample().items()}
    save_safetensors(tensors, tmp_path / "ours.safetensors", {"key": "värde ☃"})
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors", {"key": "värde ☃"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_official_reader_reads_what_is_written(tmp_path: Path) -> None:
    tensors = sample()
    path = tmp_path / "new folder" / "模型 ж.safetensors"
    save_safetensors(tensors, path, {"number": "1"})
    found = safetensors.torch.load_file(path)
    assert found.keys() == tensors.keys()
    assert all(same(found[name], tensor) for name, tensor in tensors.items())
    assert header(path).metadata == {"number": "1"}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_aliases_and_views_are_written_whole(tmp_path: Path) -> None:
    base = torch.arange(10.0)
    save_safetensors({"base": base, "alias": base, "part": base[2:4]}, tmp_path / "a.safetensors")
    with LazyTensors(tmp_path / "a.safetensors") as found:
        assert torch.equal(found["alias"], base)
        assert found["part"].tolist() == [2, 3]


def test_metadata_with_broken_characters_is_written(tmp_path: Path) -> None:
    save_safetensors({"a": torch.ones(1)}, tmp_path / "a.safetensors", {"name": "x\udcff"})
    assert header(tmp_path / "a.safetensors").metadata["name"] == "x?"


def failing(error: OSError) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_old_file_stays_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_safetensors({"a": torch.ones(1)}, path)
    before = path.read_bytes()
    monkeypatch.setattr(files, "raw_bytes", failing(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(ResourceError, match="disk full"):
        save_safetensors({"a": torch.zeros(1)}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_lack_of_space_is_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(files.shutil.disk_usage(tmp_path))
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage(100, 50, 50))
    with pytest.raises(ResourceError, match=r"disk full: 40,\d+ bytes needed, 50 bytes free"):
        save_safetensors({"a": torch.zeros(10_000)}, tmp_path / "a.safetensors")


def test_damage_while_writing_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "raw_bytes", lambda tensor: memoryview(b"short"))
    with pytest.raises(ResourceError, match="damaged"):
        save_safetensors({"a": torch.zeros(10)}, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_file_held_by_another_program_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[Path] = []
    replace = Path.replace

    def held(self: Path, target: Path) -> Path:
        tries.append(target)
        if len(tries) < 3:
            raise PermissionError(errno.EACCES, "held")
        return replace(self, target)

    monkeypatch.setattr(files.time, "sleep", lambda _: None)
    monkeypatch.setattr(Path, "replace", held)
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "new"
    monkeypatch.setattr(Path, "replace", failing(PermissionError(errno.EACCES, "held")))
    with pytest.raises(ResourceError, match="no permission"):
        write_text(tmp_path / "a.txt", "newer")
    monkeypatch.undo()
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "new"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("sync", [False, True])
def test_atomic_write_leaves_nothing_behind_after_an_error(tmp_path: Path, sync: bool) -> None:
    def fail() -> None:
        with atomic_write(tmp_path / "deep" / "a.bin", sync=sync) as temporary:
            temporary.write_bytes(b"half")
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail()
    assert list((tmp_path / "deep").iterdir()) == []
    with atomic_write(tmp_path / "deep" / "a.bin", sync=sync) as temporary:
        temporary.write_bytes(b"whole")
    assert (tmp_path / "deep" / "a.bin").read_bytes() == b"whole"


# reading


@pytest.mark.parametrize("mmap", [False, True])
def test_lazy_reading_is_exact(tmp_path: Path, mmap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "is_remote", lambda _: False)
    tensors = sample()
    save_safetensors(tensors, tmp_path / "a.safetensors", {"a": "b"})
    with LazyTensors(tmp_path / "a.safetensors", mmap=mmap) as found:
        assert set(found) == set(tensors)
        assert len(found) == len(tensors)
        assert "scalar" in found
        assert "other" not in found
        assert found.metadata == {"a": "b"}
        assert found.shapes["turned"] == (3, 2)
        assert all(same(found[name], tensor) for name, tensor in tensors.items())
        starts = [found.infos[name].start for name in found]
        assert starts == sorted(starts)
        with pytest.raises(KeyError):
            found["other"]
        kept = found["scalar"]
    assert kept.item() == 3


def test_shards_and_index(tmp_path: Path) -> None:
    names = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    for i, name in enumerate(names):
        save_safetensors({f"t{i}": torch.full((2,), float(i))}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    write_text(index, json.dumps({"weight_map": {"t0": names[0], "t1": names[1]}}))
    for source in (index, [tmp_path / name for name in names]):
        with LazyTensors(source) as found:
            assert found["t1"].tolist() == [1, 1]
            assert list(found) == ["t0", "t1"]
    write_text(index, "[]")
    with pytest.raises(DataError, match="index"):
        LazyTensors(index)


def test_truncated_file_names_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_safetensors({"a": torch.zeros(5_000_000), "b": torch.zeros(5_000_000)}, path)
    with path.open("rb+") as file:
        file.truncate(30_000_000)
    with pytest.raises(DataError, match=r"file is 0\.03 GB, header says 0\.04 GB"):
        header(path)
    with path.open("rb+") as file:
        file.truncate(60)
    with pytest.raises(DataError, match="truncated"):
        header(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (bytes(1000), "empty"),
        (b"PK\x03\x04rest of a zip archive", "PyTorch checkpoint"),
        (b"\x80\x02}q\x00", "pickle"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"\n<html></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "git-lfs pointer"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b'{"weight_map": {}}', "JSON"),
        (struct.pack("<Q", 4) + b"nope", "not a safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "not a safetensors file"),
        (struct.pack("<Q", 8) + b'{"a": 3}', "not a safetensors file"),
    ],
)
def test_what_is_not_safetensors_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        header(tmp_path / "a.safetensors")
    assert "a.safetensors" in str(caught.value)


def crafted(path: Path, entries: dict[str, object], data: int) -> None:
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))


@pytest.mark.parametrize(
    "entries",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]},
        },
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}},
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, entries: dict[str, object]) -> None:
    crafted(tmp_path / "a.safetensors", entries, 8)
    with pytest.raises(DataError):
        header(tmp_path / "a.safetensors")


def test_longer_file_and_unknown_type(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    crafted(tmp_path / "long.safetensors", {"a": entry}, 5)
    with pytest.raises(DataError, match="damaged"):
        header(tmp_path / "long.safetensors")
    crafted(tmp_path / "new.safetensors", {"a": entry | {"dtype": "F4"}}, 4)
    with LazyTensors(tmp_path / "new.safetensors") as found, pytest.raises(DataError, match="F4"):
        found["a"]


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        header(tmp_path / "none.safetensors")
    with pytest.raises(DataError):
        header(tmp_path)


# identities and text


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    data = bytearray(1_000_000)
    prints = set()
    for position in (None, 0, 500_000 - 9_000, 999_999):
        if position is not None:
            data[position] ^= 1
        (tmp_path / "b").write_bytes(data)
        prints.add(fingerprint(tmp_path / "b"))
    (tmp_path / "b").write_bytes(data + b"x")
    prints.add(fingerprint(tmp_path / "b"))
    assert len(prints) >= 4
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "a")


JAPANESE = "青い髪の女の子、笑顔でこちらを見ている。"
CHINESE = "一个蓝色头发的女孩，微笑着看着镜头。"  # noqa: RUF001
RUSSIAN = "Девушка с голубыми волосами, смотрит на зрителя"  # noqa: RUF001


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (JAPANESE, "cp932"),
        ("1girl, " + JAPANESE, "cp932"),
        (CHINESE, "cp936"),
        ("masterpiece, " + CHINESE, "cp936"),
        (RUSSIAN, "cp1251"),
        ("C:\\Картинки\\кошки", "cp1251"),
        ("café, très beau", "cp1252"),
    ],
)
def test_text_of_old_code_pages_is_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, encoding: str
) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert read_text(tmp_path / "a.txt") == text
    assert encoding in caplog.text
    assert "a.txt" in caplog.text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_unicode_is_read_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture, encoding: str) -> None:
    for text in (JAPANESE, CHINESE, RUSSIAN, ""):
        (tmp_path / "a.txt").write_bytes(text.encode(encoding))
        assert read_text(tmp_path / "a.txt") == text
    assert caplog.text == ""


def test_text_that_is_no_text_never_fails(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(256)))
    assert "abc" in read_text(tmp_path / "a.txt")


def test_text_is_written_as_utf8_with_plain_newlines(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "ä\nж\n")
    assert (tmp_path / "a.txt").read_bytes() == "ä\nж\n".encode()
