"""PyTorch files: read without torch's unpickler, and nothing in them is ever run."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from library.log import DataError
from library.models.locations import joint_header, open_tensors
from library.pickles import PickledTensors, is_pickled, pickled_header


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def test_tensors_of_all_kinds_as_torch_reads_them(tmp_path: Path) -> None:
    big = torch.arange(24.0).reshape(4, 6)
    content = {
        "float": torch.randn(3, 4),
        "half": torch.randn(2).half(),
        "bfloat": torch.randn(5, 1).bfloat16(),
        "long": torch.arange(3),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(4.6),
        "empty": torch.zeros(0, 3),
        "view": big[1:3],
        "transposed": big.T,
        "parameter": nn.Parameter(torch.ones(2, 2)),
        "eight": torch.randn(4).to(torch.float8_e4m3fn),
    }
    path = saved(tmp_path / "x.ckpt", content)
    with PickledTensors([path]) as tensors:
        assert set(tensors) == set(content)
        for name, expected in content.items():
            found = tensors[name]
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
            assert torch.equal(found.float(), expected.detach().float()), name
            assert tensors.shapes[name] == tuple(expected.shape)
        assert tensors.infos["half"].dtype == "F16"


class Litter:
    """As programs leave it, in a package that is known to."""

    __module__ = "torch"

    def __init__(self) -> None:
        self.value = 1


def test_a_tensor_with_an_attribute(tmp_path: Path) -> None:
    tensor = torch.ones(2)
    tensor.note = "kept by torch"  # type: ignore[attr-defined]
    with PickledTensors([saved(tmp_path / "x.pt", {"a": tensor})]) as tensors:
        assert torch.equal(tensors["a"], torch.ones(2))


def test_state_dict_beside_the_litter_of_training_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = nn.Linear(2, 2).state_dict()  # an OrderedDict with an attribute
    content = {
        "state_dict": state,
        "epoch": 3,
        "global_step": 470000,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"betas": (0.9, 0.999)}]}],
        "callbacks": {"name": {"best": None, "score": 1.5, "shape": torch.Size([1, 2])}},
        "types": [torch.float32, OrderedDict(a=1), {1, 2}, Path("x"), np.float32(1), np.ones(2), Litter()],
        "tables": {OrderedDict: 1, (1, 2): 2},
    }
    monkeypatch.setattr(torch, "Litter", Litter, raising=False)
    path = saved(tmp_path / "x.ckpt", content)
    header = joint_header([path], "--x")
    assert header.shapes == {"weight": (2, 2), "bias": (2,)}
    assert header.metadata == {"epoch": "3", "global_step": "470000"}
    with open_tensors([path]) as tensors:
        assert torch.equal(tensors["weight"], state["weight"])


def test_several_files_and_protocols(tmp_path: Path) -> None:
    first = saved(tmp_path / "a.bin", {"a": torch.ones(1)})
    second = tmp_path / "b.bin"
    torch.save({"b": torch.zeros(2)}, second, pickle_protocol=4)
    with PickledTensors([first, second]) as tensors:
        assert tensors.shapes == {"a": (1,), "b": (2,)}
        assert torch.equal(tensors["b"], torch.zeros(2))


class Reduces:
    """Runs something when it is unpickled."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def archive(path: Path, program: bytes, more: dict[str, bytes] | None = None, compress: bool = False) -> Path:
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as file:
        for name, data in {"data.pkl": program, "version": b"3\n", **(more or {})}.items():
            file.writestr(f"archive/{name}", data)
    return path


def refused(path: Path, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        pickled_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (Reduces(__import__, "this"), r"it wants to run __builtin__\.__import__"),
        (Reduces(eval, "1/0"), r"it wants to run __builtin__\.eval"),
        (Reduces(os.getcwd), r"(posix|nt)\.getcwd"),
        (Reduces(print, "hello"), r"__builtin__\.print"),
        (Reduces(io.open, "owned", "w"), "it wants to run"),
    ],
)
def test_what_wants_to_run_is_refused(
    tmp_path: Path, call: Reduces, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": {"a": torch.ones(1)}, "callbacks": call}
    refused(saved(tmp_path / "evil.ckpt", content), words)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "owned").exists()


def test_torch_functions_are_named_but_never_called(tmp_path: Path) -> None:
    target = tmp_path / "owned"
    content = {"state_dict": {"a": torch.ones(1)}, "x": Reduces(torch.save, 1, str(target))}
    with PickledTensors([saved(tmp_path / "x.ckpt", content)]) as tensors:
        assert torch.equal(tensors["a"], torch.ones(1))
    target.unlink(missing_ok=True)
    pickled_header(tmp_path / "x.ckpt")
    assert not target.exists()


def program(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def tensor_program(elements: int, offset: int = 0, size: int = 2, stride: int = 1) -> bytes:
    """A table of one tensor, by hand."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(elements) + b"tQ"
    return program(
        b"}" + text("a") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage,
        number(offset) + number(size) + b"\x85" + number(stride) + b"\x85\x89ccollections\nOrderedDict\n)RtRs",
    )


def test_a_table_by_hand_is_read(tmp_path: Path) -> None:
    data = struct.pack("<2f", 1, 2)
    with PickledTensors([archive(tmp_path / "x.ckpt", tensor_program(2), {"data/0": data})]) as tensors:
        assert tensors["a"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (tensor_program(3), "the size of its data is not what it says"),
        (tensor_program(2, offset=1), "reaches beyond its data"),
        (tensor_program(2, offset=-1), "makes no sense"),
        (tensor_program(2, stride=-1), "makes no sense"),
        (tensor_program(2, size=1_000_000_000, stride=0), "reaches beyond its data"),
        (program(b"})\x85\x85q\x01h\x01\x86K\x01s"), "the keys of its tables make no sense"),
        (program(b"N"), "holds no table of tensors"),
        (program(b"}"), "holds no table of tensors"),
        (program(b"]Nb"), "holds no table of tensors"),
        (program(b"]K\x01K\x02s"), "fills what can't be filled"),
        (program(b"K\x01K\x02sq\x00"), "makes no sense"),
        (program(b"K\x01Q"), "makes no sense"),
        (program(b"}]K\x01s"), "makes no sense"),
        (program(b"h\x05"), "makes no sense"),
        (program(b"K\x01)R"), "calls what can't be called"),
        (program(b"cos\nsystem\nX\x02\x00\x00\x00ls\x85R"), r"it wants to run os\.system"),
        (program(b"(X\x02\x00\x00\x00lsios\nsystem\n"), "the instruction INST"),
        (program(b"\x82\x01"), "the instruction EXT1"),
        (b"\x80\x02}", "makes no sense"),
        (b"\xff\xff", "makes no sense"),
        (b"", "makes no sense"),
    ],
)
def test_nonsense_is_refused(tmp_path: Path, made: bytes, words: str) -> None:
    refused(archive(tmp_path / "x.ckpt", made, {"data/0": struct.pack("<2f", 1, 2)}), words)


def test_deep_nesting_and_compression_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        pickled_header(archive(tmp_path / "deep.ckpt", program(b"}" + b"(" * 200_000)))
    bomb = archive(tmp_path / "bomb.ckpt", pickle.dumps({"a": bytes(10_000_000)}, protocol=2), compress=True)
    refused(bomb, "compressed")


def test_other_archives_and_halves(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("image.png", b"")
    refused(path, r"it has no data\.pkl")
    whole = saved(tmp_path / "whole.ckpt", {"a": torch.ones(1000)}).read_bytes()
    for size in (10, len(whole) // 2, len(whole) - 10):
        (tmp_path / "half.ckpt").write_bytes(whole[:size])
        refused(tmp_path / "half.ckpt", "not a whole PyTorch checkpoint")
    assert not is_pickled(tmp_path / "none")


def test_old_pickles_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "old.ckpt"
    torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(DataError, match=r"a Python pickle \(old"):
        joint_header([path], "--x")
