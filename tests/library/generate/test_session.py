"""Images from lists and from the terminal."""

import pytest
from PIL import Image

from library.generate.session import Session, prompts_from_terminal
from library.log import UserError
from library.prompts import SampleRequest

FIRST = SampleRequest(prompt="", width=100, height=64, steps=3, seed=5)


class Painter:
    """Remembers what it was asked for."""

    def __init__(self):
        self.requests, self.multipliers = [], []

    def render(self, request):
        self.requests.append(request)
        return Image.new("RGB", request.size)

    def set_multipliers(self, multipliers):
        self.multipliers.append(multipliers)


def answers(*lines):
    """A terminal at which these lines are typed."""
    waiting = list(lines)

    def ask(question):
        assert question.startswith("prompt")
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    return ask


@pytest.fixture
def painter():
    return Painter()


def test_requests_become_files_that_say_how_they_were_made(tmp_path, painter):
    session = Session(painter.render, tmp_path / "out")
    paths = session.run([SampleRequest(prompt="猫", width=100, height=64, seed=5)] * 2)
    assert len(set(paths)) == 2
    assert sorted((tmp_path / "out").iterdir()) == sorted(paths)
    assert all("_5" in path.name for path in paths)
    with Image.open(paths[0]) as image:
        assert image.size == (112, 64)
        assert image.text["prompt"] == "猫"
        assert image.text["seed"] == "5"


def test_a_request_without_seed_gets_one_that_is_recorded(tmp_path, painter):
    (path,) = Session(painter.render, tmp_path).run([SampleRequest(prompt="x")])
    seed = painter.requests[0].seed
    assert 0 <= seed < 1 << 32
    assert path.stem.endswith(f"_{seed}")


def test_the_terminal_goes_on_until_an_empty_line(caplog):
    ask = answers("a cat --w 128 --n bad --d 3", "  a dog --x 1 ", "   ", "never read")
    cat, dog = prompts_from_terminal(FIRST, ask)
    assert (cat.prompt, cat.width, cat.height, cat.seed, cat.negative_prompt) == ("a cat", 128, 64, 3, "bad")
    assert (dog.prompt, dog.width, dog.steps, dog.seed, dog.negative_prompt) == ("a dog", 128, 3, None, None)
    assert any("x 1" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("embedded", [True, False])
def test_guidance_is_that_of_the_negative_prompt_where_the_model_embeds_none(embedded):
    first = SampleRequest(prompt="", guidance=3.5 if embedded else None, cfg=5.0)
    one, two = prompts_from_terminal(first, answers("a --g 2", "b"))
    for request in (one, two):
        assert (request.guidance, request.cfg) == ((2.0, 5.0) if embedded else (None, 2.0))


def test_the_terminal_may_close():
    assert [request.prompt for request in prompts_from_terminal(FIRST, answers("a"))] == ["a"]


def test_interactive_sessions_set_multipliers_and_save_at_once(tmp_path, painter):
    session = Session(painter.render, tmp_path, set_multipliers=painter.set_multipliers)
    lines = iter(["a --m 0.5,1", "b", ""])

    def ask(question):
        assert len(list(tmp_path.iterdir())) == len(painter.requests)
        return next(lines)

    assert len(session.run_interactive(FIRST, ask)) == 2
    assert painter.multipliers == [(0.5, 1.0)]
    assert [request.prompt for request in painter.requests] == ["a", "b"]


def test_a_failed_image_leaves_no_file(tmp_path):
    def render(request):
        raise UserError("no")

    with pytest.raises(UserError):
        Session(render, tmp_path).run([FIRST])
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_fails_does_not_end_the_conversation(tmp_path, painter, caplog):
    def render(request):
        if request.prompt == "bad":
            raise UserError("no such thing")
        return painter.render(request)

    paths = Session(render, tmp_path).run_interactive(FIRST, answers("bad", "good"))
    assert len(paths) == 1
    assert "no such thing" in caplog.text
