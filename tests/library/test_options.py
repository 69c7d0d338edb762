"""Options: command line, config file, environment, and what is refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from library.log import UserError
from library.option_groups import (
    CACHE_LATENTS,
    CACHE_TEXT_ENCODER_OUTPUTS,
    FINE_TUNE,
    FLUX_MINIMAL_INFERENCE,
    FLUX_TRAIN,
    FLUX_TRAIN_NETWORK,
    SHOW_METADATA,
    CacheOptions,
    CaptionOptions,
    DatasetOptions,
    EncoderRateOptions,
    FluxInferenceOptions,
    HubOptions,
    LegacySDOptions,
    LengthOptions,
    ModelOptions,
    NetworkOptions,
    OptimizerOptions,
    PrecisionOptions,
    SaveOptions,
    ScheduleOptions,
)
from library.option_types import int_or_float
from library.options import Options, parse, refuse_custom_modules

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def network(*argv: str) -> Options:
    return parse(FLUX_TRAIN_NETWORK, argv)


def wrong(*argv: str, script: object = FLUX_TRAIN_NETWORK) -> UserError:
    with pytest.raises(UserError) as error:
        parse(script, argv)  # type: ignore[arg-type]
    assert "\n" not in error.value.lines()[0]
    return error.value


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., str]:
    """Writes a config file and gives its path."""

    def write(text: str, name: str = "config.toml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# command line


def test_groups_are_typed_and_frozen() -> None:
    options = network("--network_dim", "8", "--learning_rate=1e-3", "--optimizer_args", "a=1", "b=(0.9, 0.99)")
    assert options[NetworkOptions].network_dim == 8
    assert options[OptimizerOptions].learning_rate == 1e-3
    assert options[OptimizerOptions].optimizer_args == ("a=1", "b=(0.9, 0.99)")
    assert options[NetworkOptions].network_alpha == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        options[NetworkOptions].network_dim = 4  # type: ignore[misc]


def test_sources() -> None:
    options = network("--network_dim", "8", "--max_train_steps", "1600")
    assert options.source("network_dim") == "command line"
    assert options.given("max_train_steps")  # even though it is the default
    assert options.source("max_train_epochs") == "default"
    assert not options.given("max_train_epochs")
    assert options.has(NetworkOptions)
    assert not options.has(FluxInferenceOptions)
    assert options.value("network_dim") == 8
    with pytest.raises(KeyError):
        options.value("no_such_option")


def test_unique_prefixes_are_accepted() -> None:
    assert network("--max_train_e", "3")[LengthOptions].max_train_epochs == 3
    assert network("--no_m")[NetworkOptions].no_metadata
    assert "ambiguous" in wrong("--max_train", "3").what


def test_empty_list_and_repeated_option() -> None:
    options = network("--network_args", "--network_dim", "4", "--network_dim", "8")
    assert options[NetworkOptions].network_args == ()
    assert options[NetworkOptions].network_dim == 8


def test_arguments_default_to_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x.py", "--seed", "7"])
    assert parse(FLUX_TRAIN_NETWORK)[LengthOptions].seed == 7


@pytest.mark.parametrize(
    ("argv", "what", "hint"),
    [
        (["--netwrok_dim", "4"], "unknown option --netwrok_dim", "did you mean network_dim?"),
        (["--network-dim", "4"], "unknown option --network-dim", "did you mean network_dim?"),
        (["--netwrok_dim=4"], "unknown option --netwrok_dim", "did you mean network_dim?"),
        (["--blockwise_fused_optimizers"], "unknown option --blockwise_fused_optimizers", "flux_train.py"),
        (["--xyzzy"], "unknown option --xyzzy", "--help"),
        (["--seed", "x"], "'x' is not a whole number", ""),
        (["--seed", "1.5"], "'1.5' is not a whole number", ""),
        (["--learning_rate", "1e-4x"], "'1e-4x' is not a number", "1e-4"),
        (["--learning_rate", "nan"], "'nan' is not a number", "1e-4"),
        (["--lr_warmup_steps", "1.5"], "share of the run", "10%"),
        (["--lr_warmup_steps=-5%"], "share of the run", "10%"),
        (["--mixed_precision", "bf61"], "'bf61' is not a possible value", "no, fp16, bf16; did you mean bf16?"),
        (["--save_precision", "None"], "'None' is not a possible value", "float, fp16, bf16"),
        (["--seed"], "--seed: expected one argument", "--option=-value"),
        (["--caption_prefix", "-x"], "--caption_prefix: expected one argument", "--option=-value"),
        (["--output_dir", "D:/my", "models/new"], "stray argument 'models/new'", '--output_dir "… models/new"'),
        (["image.png"], "stray argument 'image.png'", "quotes"),
        (["--seed", "1", "--cache_latents", "--no_cache_latents"], "both", "one of them"),
        (["--seed", "-1"], "seed can't be -1", "0 or more"),
        (["--seed", "4294967296"], "seed can't be 4294967296", "4294967295 or less"),
        (["--network_dropout", "1.5"], "network_dropout can't be 1.5", "1 or less"),
        (["--text_encoder_lr", "1e-4", "-1"], "text_encoder_lr can't be 0.0001 -1.0", "0 or more"),
        (["--train_batch_size", "0"], "train_batch_size can't be 0", "1 or more"),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], what: str, hint: str) -> None:
    error = wrong(*argv)
    assert what in error.lines()[0]
    assert hint in error.hint
    assert error.exit_code == 2
    assert error.code == "E-OPTION"


def test_values_that_begin_with_a_dash() -> None:
    assert network("--caption_prefix", "-x y")[CaptionOptions].caption_prefix == "-x y"
    assert network("--caption_prefix=-x")[CaptionOptions].caption_prefix == "-x"
    assert network("--network_alpha", "-1")[NetworkOptions].network_alpha == -1.0


def test_all_unknown_words_are_told_at_once() -> None:
    lines = wrong("--netwrok_dim", "4", "--output_dir", "a", "b", "--unett_lr", "1", "2").lines()
    assert [line.split(" - ")[0].split(": ")[1] for line in lines] == [
        "unknown option --netwrok_dim",
        "stray argument 'b'",
        "unknown option --unett_lr",
    ]


def test_required_options() -> None:
    error = wrong(script=FLUX_MINIMAL_INFERENCE)
    assert "--ckpt_path is missing" in error.what
    assert "--model is missing" in wrong(script=SHOW_METADATA).what


def test_help_ends_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        network("--help")
    assert exit_.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "did you mean" not in out
    assert "steps over which the rate grows from 0, or a share of the run (example: 100, 0.1 or 10%)" in out


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("1", 1),
        ("100", 100),
        ("1e3", 1000),
        ("1.0", 1),
        ("0.1", 0.1),
        ("10%", 0.1),
        ("100%", 1.0),
        (" 5 % ", 0.05),
    ],
)
def test_steps_or_share(text: str, value: float) -> None:
    assert int_or_float(text) == value
    assert type(int_or_float(text)) is type(value)


@pytest.mark.parametrize("text", ["1.5", "-1", "-10%", "x", "", "%", True, None, "nan"])
def test_not_steps_or_share(text: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        int_or_float(text)


# config files


def test_config_file(config: Callable[..., str]) -> None:
    path = config(
        '# options\nnetwork_dim = 8\nmax_grad_norm = 1\nlr_warmup_steps = "10%"\nresolution = 1024\n'
        'persistent_data_loader_workers = 1\n\n["any name"]\nnetwork_args = ["a=1"]\nunet_lr = "1e-3"\n'
        'text_encoder_lr = 1e-5\nmax_train_epochs = 3.0\ncache_latents = true\ndataset_config = "a.toml"\n'
    )
    options = network("--config_file", path, "--network_dim", "16")
    assert options[NetworkOptions].network_dim == 16
    assert options.source("network_dim") == "command line"
    assert options[OptimizerOptions].max_grad_norm == 1.0
    assert type(options[OptimizerOptions].max_grad_norm) is float
    assert options[ScheduleOptions].lr_warmup_steps == 0.1
    assert options[DatasetOptions].resolution == "1024"
    assert options[DatasetOptions].dataset_config == Path("a.toml")
    assert options[LengthOptions].persistent_data_loader_workers is True
    assert options[NetworkOptions].network_args == ("a=1",)
    assert options[NetworkOptions].unet_lr == 1e-3
    assert options[NetworkOptions].text_encoder_lr == (1e-5,)
    assert options[LengthOptions].max_train_epochs == 3
    assert options.source("unet_lr") == "config file"
    assert options.where("unet_lr") == f"{path}:10"


def test_flags_of_the_file_can_be_switched_off(config: Callable[..., str]) -> None:
    path = config("cache_latents = true\nno_half_vae = true\ngradient_checkpointing = true\n")
    options = network("--config_file", path, "--no_cache_latents", "--no_no_half_vae")
    assert not options.value("cache_latents")
    assert options.source("cache_latents") == "command line"
    assert not options.value("no_half_vae")
    assert options.value("gradient_checkpointing")


def test_suffix_may_be_left_out_and_bom_is_tolerated(tmp_path: Path) -> None:
    (tmp_path / "предустановка.toml").write_bytes(b"\xef\xbb\xbfseed = 3\r\noutput_name = 'b'\r\n")
    options = network("--config_file", str(tmp_path / "предустановка"))
    assert options.value("seed") == 3
    assert options.where("output_name").endswith("предустановка.toml:2")


def test_other_encodings_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes("output_name = 'мой портрет'".encode("cp1251"))
    assert network("--config_file", str(path)).value("output_name") == "мой портрет"


def test_required_option_may_come_from_the_file(config: Callable[..., str]) -> None:
    assert not FLUX_MINIMAL_INFERENCE.option("config_file")  # the reference has no such script
    assert wrong(script=SHOW_METADATA).what == "--model is missing"


BROKEN = {
    "typo": ("seed = 1\nnetwrok_dim = 4\n", 2, "unknown key netwrok_dim", "did you mean network_dim?"),
    "typo in a table": ("[x]\nseed = 1\n\nunett_lr = 1e-4\n", 4, "unknown key unett_lr", "did you mean unet_lr?"),
    "hyphens": ("network-dim = 4\n", 1, "unknown key network-dim", "did you mean network_dim?"),
    "quoted key": ('"netwrok_dim" = 4\n', 1, "unknown key netwrok_dim", "did you mean network_dim?"),
    "nonsense": ("xyzzy = 4\n", 1, "unknown key xyzzy", "--help"),
    "text for integer": ('max_train_steps = "many"\n', 1, "max_train_steps: 'many' is not a whole number", "1600"),
    "fraction for integer": ("max_train_steps = 1.5\n", 1, "max_train_steps: 1.5 is not a whole number", "1600"),
    "flag for integer": ("max_train_steps = true\n", 1, "max_train_steps: true is not a whole number", "1600"),
    "text for flag": ('\ncache_latents = "yes"\n', 2, "cache_latents: 'yes' is not true or false", ""),
    "number for flag": ("cache_latents = 2\n", 1, "cache_latents: 2 is not true or false", ""),
    "text for number": ('learning_rate = "fast"\n', 1, "learning_rate: 'fast' is not a number", "1e-4"),
    "nan": ("learning_rate = nan\n", 1, "learning_rate: nan is not a number", "1e-4"),
    "choice": (
        'mixed_precision = "bf61"\n',
        1,
        "mixed_precision: 'bf61' is not a possible value",
        "did you mean bf16?",
    ),
    "list for text": ('output_name = ["a", "b"]\n', 1, "output_name: ['a', 'b'] is not text", ""),
    "list for resolution": ("resolution = [1024, 1024]\n", 1, "resolution: [1024, 1024] is not text", "768,1152"),
    "flag for text": ("output_name = false\n", 1, "output_name: false is not text", ""),
    "flag for path": ("dataset_config = true\n", 1, "dataset_config: true is not a path", ""),
    "list of numbers for list of text": (
        "network_args = [true]\n",
        1,
        "network_args: true is not text",
        "rank_dropout",
    ),
    "wrong element": ('text_encoder_lr = ["1e-4", "x"]\n', 1, "text_encoder_lr: 'x' is not a number", ""),
    "steps": ("lr_warmup_steps = 10.5\n", 1, "lr_warmup_steps: 10.5 is not a whole number of steps", "10%"),
    "date": ("seed = 2024-01-01\n", 1, "seed: 2024-01-01 is not a whole number", ""),
    "table for option": (
        "[network]\n[network.dim]\nvalue = 4\n",
        None,
        "table network.dim is nested too deeply",
        "one level",
    ),
    "config in config": ('config_file = "b.toml"\n', 1, "config_file can't be set in a config file", "command line"),
    "too small": ("seed = 1\nvae_batch_size = 0\n", 2, "vae_batch_size can't be 0", "1 or more"),
    "trusting itself": ("allow_custom_modules = true\n", 1, "allow_custom_modules can't be set", "command line"),
    "not TOML": ("seed = 1\nnetwork_dim 4\n", 2, "not valid TOML", "toml.io"),
    "no value": ("seed =\n", 1, "not valid TOML", ""),
    "same key twice": ("seed = 1\nseed = 2\n", None, "not valid TOML", ""),
    "backslashes": ('train_data_dir = "C:\\data\\Umg"\n', 1, "not valid TOML", "single quotes"),
    "Python's True": ("cache_latents = True\n", 1, "not valid TOML", "small letters"),
    "no quotes": ("output_name = my lora\n", 1, "not valid TOML", "quotes"),
    "not yet": ("\n\ndeepspeed = true\n", 3, "deepspeed is not available yet", "comes later"),
    "not here": ("weighted_captions = true\n", 1, "weighted_captions can't be used here", "FLUX"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_config_files(config: Callable[..., str], name: str) -> None:
    text, line, what, hint = BROKEN[name]
    path = config(text)
    error = wrong("--config_file", path)
    assert what in error.what
    if line is None:
        assert error.where.startswith(path)
    else:
        assert error.where == f"{path}:{line}"
    assert hint in error.hint
    assert error.exit_code == 2


def test_all_mistakes_of_a_file_at_once(config: Callable[..., str]) -> None:
    path = config('seed = "x"\nnetwrok_dim = 4\n\n[a]\ncache_latents = "no"\nunet_lr = 1e-4\n')
    lines = wrong("--config_file", path).lines()
    assert [line.split(" - ")[1] for line in lines] == [f"{path}:1", f"{path}:2", f"{path}:5"]


def test_config_file_that_cannot_be_read(tmp_path: Path) -> None:
    error = wrong("--config_file", str(tmp_path / "a"))
    assert "can't read the config file" in error.what
    assert error.where == str(tmp_path / "a.toml")
    (tmp_path / "b.toml").mkdir()
    assert "can't read" in wrong("--config_file", str(tmp_path / "b.toml")).what


def test_keys_of_front_ends_warn_only(config: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    text = 'epoch = 1\nnoise_offset_type = "Original"\nloraplus_lr_ratio = 4\nfused_optimizer_groups = 2\n'
    network("--config_file", config(text + "lowvram = false\n"))
    lines = [record.getMessage() for record in caplog.records]
    assert [line.rpartition("toml:")[2] for line in lines] == [
        "1: epoch does nothing in flux_train_network.py; use max_train_epochs",
        "2: noise_offset_type does nothing in flux_train_network.py",
        "3: loraplus_lr_ratio does nothing in flux_train_network.py; put it into network_args",
        "4: fused_optimizer_groups does nothing in flux_train_network.py",
    ]


def test_paths_of_a_config_file(config: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'train_data_dir = "images"\nae = "ae.sft"\nclip_l = "none.sft"\noutput_dir = "images"\n'
    path = Path(config(text + 'base_weights = ["ae.sft", "b"]\ndataset_config = "data.toml"\n'))
    (tmp_path / "images").mkdir()
    (tmp_path / "ae.sft").touch()
    (tmp_path / "data.toml").touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    options = network("--config_file", "../config.toml")
    assert options.value("train_data_dir") == str(Path("../images"))
    assert options.value("dataset_config") == Path("../data.toml")
    assert options.value("clip_l") == "none.sft"  # nowhere: as it stands, for the message
    assert options.value("output_dir") == "images"  # written, so relative to the working directory
    assert options.value("base_weights") == (str(Path("../ae.sft")), "b")
    (elsewhere / "ae.sft").touch()
    assert network("--config_file", str(path)).value("ae") == "ae.sft"  # the working directory comes first
    assert network("--train_data_dir", "images").value("train_data_dir") == "images"


def test_writing_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "a.toml"
    argv = [
        "--network_dim",
        "8",
        "--network_args",
        'a="x\\y"',
        "b=2",
        "--caption_prefix",
        "日本\t\x7f",
        "--cache_latents",
    ]
    argv += ["--lr_warmup_steps", "100%", "--lr_decay_steps", "0.1", "--huggingface_token", "s3cret", "--seed", "1"]
    argv += ["--dataset_config", "d.toml", "--learning_rate", "1e-4", "--max_train_steps", "1600"]
    with pytest.raises(SystemExit) as exit_:
        network("--config_file", str(path.with_suffix("")), "--output_config", *argv)
    assert exit_.value.code == 0
    assert str(path) in capsys.readouterr().out
    text = path.read_text(encoding="utf-8")
    assert "s3cret" not in text
    names = [line.split(" = ")[0] for line in text.splitlines()]
    expected = [
        "cache_latents",
        "caption_prefix",
        "dataset_config",
        "learning_rate",
        "lr_decay_steps",
        "lr_warmup_steps",
    ]
    assert names == [*expected, "network_args", "network_dim", "seed"]
    written = network("--config_file", str(path))
    straight = network(*argv)
    changed = {name for name, value in straight.public().items() if written.value(name) != value}
    assert changed == {"config_file"}
    assert type(written.value("lr_warmup_steps")) is float


def test_existing_config_file_is_left_alone(config: Callable[..., str]) -> None:
    path = config("seed = 1\n")
    error = wrong("--config_file", path, "--output_config")
    assert error.exit_code == 1
    assert Path(path).read_text(encoding="utf-8") == "seed = 1\n"
    assert "--config_file" in wrong("--output_config").what


# code and secrets


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("network_module", "evil.module"),
        ("network_module", "evil"),
        ("network_module", "networks_evil.x"),
        ("network_module", "lycoris.kohya.evil"),
        ("network_module", "lycoris_kohya"),
        ("optimizer_type", "evil.Optimizer"),
        ("lr_scheduler_type", "evil.Scheduler"),
        ("dataset_class", "evil.Dataset"),
    ],
)
def test_foreign_code_in_a_config_file_is_refused(config: Callable[..., str], name: str, value: str) -> None:
    path = config(f'{name} = "{value}"\n')
    error = wrong("--config_file", path)
    assert error.code == "E-CUSTOM"
    assert error.where == f"{path}:1"
    assert "--allow_custom_modules" in error.hint
    if name != "dataset_class":  # comes later
        assert network("--config_file", path, "--allow_custom_modules").value(name) == value
        assert network(f"--{name}", value).value(name) == value
        assert network("--config_file", path, f"--{name}", value).value(name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("network_module", "networks.lora_flux"),
        ("network_module", "lycoris.kohya"),
        ("network_module", ""),
        ("optimizer_type", "Prodigy"),
        ("optimizer_type", "torch.optim.RAdam"),
        ("optimizer_type", "bitsandbytes.optim.AdEMAMix8bit"),
        ("lr_scheduler_type", "CosineAnnealingLR"),
        ("lr_scheduler_type", "torch.optim.lr_scheduler.StepLR"),
    ],
)
def test_known_code_in_a_config_file_is_accepted(config: Callable[..., str], name: str, value: str) -> None:
    options = network("--config_file", config(f'{name} = "{value}"\n'))
    assert options.value(name) == value
    refuse_custom_modules(options)


def test_foreign_code_does_not_run(config: Callable[..., str], tmp_path: Path) -> None:
    """Through the real script."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w').close()\n", encoding="utf-8")
    path = config('network_module = "evil"\n')
    program = "from library.log import command\nfrom library.options import *\n" + (
        "@command\ndef main(): parse(FLUX_TRAIN_NETWORK)\nfrom library.option_groups import *\nmain()"
    )
    command = [sys.executable, "-c", program, "--config_file", path]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=False
    )
    assert result.returncode == 2
    assert "E-CUSTOM" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("form", ["--huggingface_token={}", "--huggingface_token {}", "--huggingface_to {}"])
def test_secrets_are_hidden(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    words = ["x.py", "--output_name", "a", *form.format("s3cret").split(), "--wandb_api_key", "k3y", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", words)
    options = parse(FLUX_TRAIN_NETWORK)
    assert options[HubOptions].huggingface_token == "s3cret"
    assert options.value("wandb_api_key") == "k3y"
    assert "s3cret" not in " ".join(sys.argv)
    assert "k3y" not in " ".join(sys.argv)
    assert "***" in " ".join(sys.argv)
    assert sys.argv[-2:] == ["--seed", "1"]
    assert "s3cret" not in repr(options) + repr(options[HubOptions]) + repr(options.public())
    assert not {"huggingface_token", "wandb_api_key"} & options.public().keys()


def test_secrets_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "from env")
    assert network().value("huggingface_token") == "from env"
    assert network().source("huggingface_token") == "environment"
    assert network("--huggingface_token", "given").value("huggingface_token") == "given"


# what a script doesn't do


@pytest.mark.parametrize(
    "argv",
    [
        ["--dataset_class", "a.B"],
        ["--model_type", "chroma"],
        ["--deepspeed"],
        ["--weighted_captions"],
    ],
)
def test_refused_options(argv: list[str]) -> None:
    error = wrong(*argv)
    assert error.code == ("E-REFUSED" if argv[0] in ("--weighted_captions",) else "E-LATER")
    assert error.where == argv[0]
    assert error.hint


def test_all_refused_options_are_told_at_once() -> None:
    assert len(wrong("--model_type", "chroma", "--deepspeed", "--weighted_captions").lines()) == 3


@pytest.mark.parametrize(
    "argv",
    [
        ["--caption_separator", ","],
        ["--prior_loss_weight", "1"],
        ["--keep_tokens", "0"],
        ["--blocks_to_swap", "0"],
        ["--reg_data_dir", ""],
        ["--dynamo_backend", "no"],
        ["--token_warmup_min", "1"],
        ["--sdpa"],
        ["--noise_offset", "0"],
        ["--model_type", "flux"],
    ],
)
def test_values_that_mean_off_pass_silently(argv: list[str], caplog: pytest.LogCaptureFixture) -> None:
    network(*argv)
    assert caplog.records == []


def test_an_empty_path_is_none(config: Callable[..., str]) -> None:
    assert network("--dataset_config", "")[DatasetOptions].dataset_config is None
    assert network("--config_file", config("dataset_config = ''"))[DatasetOptions].dataset_config is None


def test_ignored_options_warn(caplog: pytest.LogCaptureFixture) -> None:
    options = network(
        "--clip_skip", "2", "--v2", "--noise_offset", "0.1", "--mem_eff_attn", "--sample_sampler", "euler_a"
    )
    assert options[LegacySDOptions].v2
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4
    assert lines[0] == "without effect in flux_train_network.py: v2, clip_skip (only for Stable Diffusion)"
    assert "noise_offset" in lines[1]


def test_formats_of_full_models(caplog: pytest.LogCaptureFixture) -> None:
    assert parse(FLUX_TRAIN, ["--save_model_as", "safetensors"]) is not None
    assert caplog.records == []
    parse(FLUX_TRAIN, ["--save_model_as", "ckpt"])
    assert "save_model_as ckpt" in caplog.text
    assert wrong("--save_model_as", "diffusers", script=FLUX_TRAIN).code == "E-REFUSED"


@pytest.mark.parametrize("script", [CACHE_LATENTS, CACHE_TEXT_ENCODER_OUTPUTS])
def test_caching_takes_a_trainer_s_options(script: object, caplog: pytest.LogCaptureFixture) -> None:
    argv = ["--flux", "--max_train_steps", "10", "--output_dir", "x", "--loss_type", "huber", "--seed", "1"]
    options = parse(script, [*argv, "--mixed_precision", "bf16", "--resolution", "512"])  # type: ignore[arg-type]
    assert options[PrecisionOptions].mixed_precision == "bf16"
    [record] = caplog.records
    assert record.getMessage().endswith("max_train_steps, seed, loss_type, output_dir (nothing is trained)")


def test_each_caching_tool_says_what_it_does_not_use(caplog: pytest.LogCaptureFixture) -> None:
    both = ["--resolution", "512", "--ae", "ae.safetensors", "--clip_l", "clip_l.safetensors"]
    parse(CACHE_LATENTS, both)
    parse(CACHE_TEXT_ENCODER_OUTPUTS, both)
    texts, images = caplog.messages
    assert "clip_l (only latents" in texts
    assert "ae (only text" in images


def test_old_names(caplog: pytest.LogCaptureFixture) -> None:
    options = parse(FLUX_TRAIN, ["--skip_latents_validity_check"])
    assert options[CacheOptions].skip_cache_check
    assert options.where("skip_cache_check") == "--skip_latents_validity_check"
    assert caplog.messages == ["--skip_latents_validity_check is now called --skip_cache_check"]


# copies


def test_copies_with_other_values() -> None:
    options = network("--network_dim", "8", "--output_name", "a")
    other = options.with_values(output_name="b", learning_rate=1.0)
    assert other[SaveOptions].output_name == "b"
    assert other[OptimizerOptions].learning_rate == 1.0
    assert other[NetworkOptions].network_dim == 8
    assert other.source("output_name") == "command line"
    assert options[SaveOptions].output_name == "a"
    assert other[ModelOptions] == options[ModelOptions]
    with pytest.raises(AssertionError):
        options.with_values(no_such_option=1)


@pytest.mark.parametrize(("text", "value"), [("-1e-4", -1e-4), ("-2.5E-06", -2.5e-6), ("-3", -3.0), ("-.5e1", -5.0)])
def test_negative_numbers_are_no_options(text: str, value: float) -> None:
    options = parse(FINE_TUNE, ["--learning_rate", text, "--train_text_encoder", f"--learning_rate_te={text}"])
    assert options[OptimizerOptions].learning_rate == value
    assert options[EncoderRateOptions].learning_rate_te == value
