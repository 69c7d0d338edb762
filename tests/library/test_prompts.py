"""Sample prompts from lines, files and the terminal."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from library.log import UserError
from library.prompts import PromptRules, SampleRequest, load_prompts, parse_line, parse_terminal, request_from
from library.types import Size

CASES = json.loads((Path(__file__).parents[1] / "golden" / "prompt_parsing.json").read_text(encoding="utf-8"))["cases"]

PROMPT_ONLY = {
    "w 640 wide picture",
    "n is a letter --w 512",
    "s 12 monkeys --h 256",
    "d 100 dalmatians",
    "l 9 pitcher",
}
"""Lines in which the reference takes the prompt itself for an option; here it is only a prompt."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["line"])
def test_lines_as_elsewhere(case):
    expected = case.get("parsed_2026", case["parsed"])
    if case["line"] in PROMPT_ONLY:
        prompt, *options = case["line"].split(" --")
        letters = {option[0] for option in options}
        named = {"w": "width", "h": "height"}
        expected = {key: value for key, value in expected.items() if key in {named[letter] for letter in letters}}
        expected["prompt"] = prompt
    assert parse_line(case["line"]).values == expected


def test_the_exceptions_are_cases():
    assert {case["line"] for case in CASES} >= PROMPT_ONLY


@pytest.mark.parametrize(
    ("line", "unmatched"),
    [
        ("x --w512 --h 64", ["w512"]),
        ("x --unknown 5", ["unknown 5"]),
        ("x --d -1", ["d -1"]),
        ("x --n", ["n"]),
        ("x --l 1.2.3", ["l 1.2.3"]),
        ("x -- y", [" y"]),
        ("x --w 64", []),
    ],
)
def test_pieces_that_are_no_option_are_reported(line, unmatched):
    assert parse_line(line).unmatched == unmatched


def test_text_file(tmp_path, caplog):
    path = tmp_path / "プロンプト.txt"
    line = "  кошка в саду --w 256 --h 320 --d 7 --s 4 --g 2 --l 1.5 --n ugly"
    path.write_bytes(f"\ufeff# comment\n\n{line}\r\n # not a comment\ntwo --w512\n".encode())
    requests = load_prompts(path)
    assert requests[0] == SampleRequest(
        prompt="кошка в саду",
        width=256,
        height=320,
        seed=7,
        steps=4,
        guidance=2.0,
        cfg=1.5,
        negative_prompt="ugly",
    )
    assert [request.prompt for request in requests] == ["кошка в саду", "# not a comment", "two"]
    assert [request.index for request in requests] == [0, 1, 2]
    assert any("line 5" in record.getMessage() and "w512" in record.getMessage() for record in caplog.records)


def test_toml_file_entries_win_over_the_table(tmp_path):
    path = tmp_path / "p.toml"
    table = "[prompt]\nwidth = 256\nsample_steps = 3\n"
    subsets = '[[prompt.subset]]\nprompt = "a"\n[[prompt.subset]]\nprompt = "b"\nwidth = 64\n'
    path.write_text(table + subsets, encoding="utf-8")
    first, second = load_prompts(path)
    assert (first.prompt, first.width, first.steps) == ("a", 256, 3)
    assert (second.prompt, second.width, second.steps, second.index) == ("b", 64, 3, 1)


def test_toml_table_alone_is_one_prompt(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text('[prompt]\nprompt = "a"\nguidance_scale = 1\n', encoding="utf-8")
    assert [(request.prompt, request.guidance) for request in load_prompts(path)] == [("a", 1)]


def test_json_file_of_lines_and_objects(tmp_path, caplog):
    path = tmp_path / "p.json"
    entries = ["a --w 128", {"prompt": "b", "height": 96, "hight": 3, "sample_sampler": "ddim"}]
    path.write_text(json.dumps(entries), encoding="utf-8")
    first, second = load_prompts(path)
    assert (first.prompt, first.width) == ("a", 128)
    assert (second.prompt, second.height, second.width) == ("b", 96, 512)
    messages = [record.getMessage() for record in caplog.records]
    assert any("hight" in message for message in messages)
    assert any("sample_sampler means nothing" in message for message in messages)


def test_defaults_belong_to_the_caller(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a --s 5", encoding="utf-8")
    (request,) = load_prompts(path, SampleRequest(prompt="", width=1024, cfg=7.5, steps=30), ignored=())
    assert (request.width, request.cfg, request.steps) == (1024, 7.5, 5)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.yaml", "a"),
        ("missing.txt", None),
        ("empty.txt", "# nothing\n\n"),
        ("broken.json", "[1"),
        ("numbers.json", "[1]"),
        ("broken.toml", "[prompt"),
        ("other.toml", "[promt]\nprompt='a'"),
        ("types.json", '[{"prompt": "a", "width": "512"}]'),
        ("small.json", '[{"prompt": "a", "width": 0}]'),
        ("bool.json", '[{"prompt": "a", "seed": true}]'),
    ],
)
def test_files_that_are_not_understood_are_named(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_prompts(tmp_path / name)
    assert name in caught.value.where


def test_guidance_by_a_negative_prompt():
    plain = SampleRequest(prompt="x", negative_prompt="bad")
    assert plain.negative is None
    assert replace(plain, cfg=4.0).negative == "bad"
    assert replace(plain, cfg=4.0, negative_prompt="").negative == ""
    assert request_from({"prompt": "x", "scale": 2.0}, SampleRequest(prompt="")).negative == ""


def test_sizes_fit_the_model():
    request = SampleRequest(prompt="x", width=530, height=20)
    assert request.fitted(16).size == Size(528, 64)
    assert request.fitted(16, up=True).size == Size(544, 64)
    assert SampleRequest(prompt="x").fitted(16).size == Size(512, 512)


def test_a_seed_is_kept():
    assert SampleRequest(prompt="x", seed=0).seeded(5).seed == 0
    assert SampleRequest(prompt="x").seeded(5).seed == 5


def test_typed_lines_keep_what_lasts():
    before = SampleRequest(prompt="", width=1360, height=768, steps=50, seed=9)
    first, unmatched = parse_terminal("a cat --w 512 --h 256 --s 4 --d 3 --g 1.5 --c 2 --n ugly, bad --m 0.5,1", before)
    assert unmatched == []
    assert first == SampleRequest(
        prompt="a cat",
        width=512,
        height=256,
        steps=4,
        seed=3,
        guidance=1.5,
        cfg=2.0,
        negative_prompt="ugly, bad",
        multipliers=(0.5, 1.0),
    )
    second, _ = parse_terminal("a dog", first)
    assert second == replace(first, prompt="a dog", seed=None, negative_prompt=None, multipliers=None)


def test_typed_lines_name_what_is_no_option_and_leave_dashes_to_the_prompt():
    before = SampleRequest(prompt="")
    request, unmatched = parse_terminal("one -- two --W 64 --x 5 --m a,b", before)
    assert (request.prompt, request.width) == ("one -- two", 64)
    assert unmatched == ["x 5", "m a,b"]
    assert parse_terminal("a --n - --c 3", before)[0].negative == ""


def test_second_prompts_and_samplers_at_the_terminal():
    before = SampleRequest(prompt="", sampler="euler", prompt2="old")
    request, unmatched = parse_terminal("a cat --p2 in oil --ss dpmsolver++ --s 3", before)
    assert (request.prompt, request.prompt2, request.sampler, unmatched) == ("a cat", "in oil", "dpmsolver++", [])
    again, _ = parse_terminal("a dog", request)
    assert (again.prompt2, again.sampler) == (None, "dpmsolver++")
    assert parse_terminal("a cat --ss euler", SampleRequest(prompt=""))[1] == ["ss euler"], "a flow has one"


def test_prompts_for_stable_diffusion(tmp_path, caplog):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\na dog --ss euler_a --l 3 --s 8 --n ugly --g 2\n", encoding="utf-8")
    cat, dog = PromptRules.of("sdxl", "heun").load(path)
    assert (cat.steps, cat.cfg, cat.width, cat.height, cat.sampler, cat.negative) == (30, 7.5, 512, 512, "heun", "")
    assert (dog.steps, dog.cfg, dog.sampler, dog.negative) == (8, 3.0, "euler_a", "ugly")
    (said,) = [record.getMessage() for record in caplog.records]
    assert "line 2" in said
    assert "guidance_scale means nothing" in said
    assert PromptRules.of("flux", "heun").load(path)[0] == SampleRequest(prompt="a cat")


def test_an_unknown_sampler_is_refused_where_samplers_mean_something(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\na dog --ss unipc\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        PromptRules.of("sd").load(path)
    assert caught.value.code == "E-SAMPLER"
    assert "line 2" in caught.value.where
    assert len(PromptRules.of("flux").load(path)) == 2
