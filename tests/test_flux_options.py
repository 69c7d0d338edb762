"""Options of FLUX training that change what is learned: each reaches the weights, cached or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image
from torch import Tensor

from library import files
from tests import tiny
from tests.cells import CELLS, Cell, MakeCell, assert_same

UNET = ("--network_train_unet_only", "--network_dropout", "0", "--max_train_steps", "3")
UNET += ("--t5xxl_max_token_length", "32")  # so that captions leave room for padding


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(tensor.equal(right[name]) for name, tensor in left.items())


def trained(make_cell: MakeCell, cell: str, folder: str, *more: str) -> dict[str, Tensor]:
    made = make_cell(cell, folder)
    made(*UNET, *more)
    return made.weights()


@pytest.mark.parametrize(
    "more", [("--apply_t5_attn_mask",), ("--guidance_scale", "1"), ("--caption_dropout_rate", "1")]
)
def test_each_reaches_the_weights_with_caches_as_without(make_cell: MakeCell, more: Sequence[str]) -> None:
    cached = trained(make_cell, "lora, all cached", "cached", *more)
    live = trained(make_cell, "lora, nothing cached", "live", *more)
    plain = trained(make_cell, "lora, all cached", "plain")
    assert not equal(cached, plain)
    distances = {name: float((tensor - live[name]).abs().max()) for name, tensor in cached.items()}
    assert max(distances.values()) < 1e-6, distances


def with_config(cell: Cell, path: Path, text: str) -> Cell:
    """The cell with a dataset file in place of its dataset options."""
    path.write_text(text, encoding="utf-8")
    given = cell.argv.index("--train_data_dir")
    cell.argv[given : cell.argv.index("--output_dir")] = ["--dataset_config", str(path)]
    return cell


def config(images: Path, *subsets: str) -> str:
    folder = (images / "3_thing").as_posix()
    each = "\n".join(
        f"[[datasets.subsets]]\nimage_dir = '{folder}{'/' * number}'\ncaption_extension = '.txt'\n{more}"
        for number, more in enumerate(subsets)
    )
    return f"[[datasets]]\nresolution = 64\nbatch_size = 1\n{each}\n"


PRESERVED = "custom_attributes.diff_output_preservation = true"


@pytest.mark.parametrize("cell", ["lora, all cached", "lora, nothing cached"])
def test_a_fresh_network_learns_nothing_from_preserved_samples(
    make_cell: MakeCell, images: Path, tmp_path: Path, cell: str
) -> None:
    """It does nothing yet, so that the answer is the target, and it stays so."""
    made = with_config(make_cell(cell, "out"), tmp_path / "data.toml", config(images, PRESERVED))
    made(*UNET, "--gradient_checkpointing")
    assert not any(tensor.any() for name, tensor in made.weights().items() if "lora_up" in name)


def test_the_whole_model_cannot_preserve_its_output(
    make_cell: MakeCell, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = with_config(make_cell("full, all cached"), tmp_path / "data.toml", config(images, PRESERVED))
    with pytest.raises(SystemExit):
        made("--max_train_steps", "1")
    assert "error[E-PRESERVATION]" in capsys.readouterr().err


def test_regularization_images_count_as_told(make_cell: MakeCell, images: Path, tmp_path: Path) -> None:
    regular = images.parent / "reg" / "1_thing"
    regular.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (64, 64), (60 * number, 9, 9)).save(regular / f"r{number}.png")
    folders = ("--reg_data_dir", str(regular.parent), "--caption_extension", ".txt", "--train_batch_size", "2")
    weighted = trained(make_cell, "lora, all cached", "one", *folders)
    halved = trained(make_cell, "lora, all cached", "half", *folders, "--prior_loss_weight", "0.5")
    assert not equal(weighted, halved)


def test_schnell(tmp_path: Path, images: Path) -> None:
    models = tiny.write_all(tmp_path / "schnell", guidance=False)
    (tmp_path / "prompts.txt").write_text("a thing --w 64 --h 64 --s 2 --d 1\n", "utf-8")
    script, more = CELLS["lora, all cached"]
    cells = [Cell(script, models, images, tmp_path / name, more) for name in ("one", "two")]
    samples = ("--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "3")
    cells[0](*UNET, *samples)
    cells[1](*UNET, "--guidance_scale", "1")
    assert_same(cells[0].weights(), cells[1].weights())  # it has no guidance input
    metadata = files.header(cells[0].output / "run.safetensors").metadata
    assert metadata["modelspec.architecture"] == "flux-1-schnell/lora"
    assert list((cells[0].output / "sample").glob("run_0*.png"))
