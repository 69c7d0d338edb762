"""Long texts in rows, layers of CLIP, and how rows are joined."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.models import text_chunks
from library.models.text_chunks import joined, rows_of

BOS, EOS = 98, 99


def tokens(count: int, length: int, pad: int) -> torch.Tensor:
    """One text of so many words, (1, length + 2)."""
    words = list(range(1, count + 1))[:length]
    return torch.tensor([[BOS, *(word % 90 + 1 for word in words), EOS, *[pad] * (length - len(words))]])


@pytest.fixture(scope="module")
def config() -> CLIPTextConfig:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    return CLIPTextConfig(
        vocab_size=100, projection_dim=12, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=0, **sizes
    )


def test_rows_of_one_row_are_the_text_itself():
    text = tokens(5, 75, EOS)
    assert torch.equal(rows_of(text)[:, 0], text)


def test_rows_share_the_marks_at_their_ends():
    rows = rows_of(tokens(100, 150, EOS))[0]
    assert rows.shape == (2, 77)
    assert rows[:, 0].tolist() == [BOS, BOS]
    assert rows[:, -1].tolist() == [EOS, EOS]
    assert rows[0, 1:-1].tolist() == tokens(100, 150, EOS)[0, 1:76].tolist()
    assert rows[1, 26].item() == EOS


def test_rows_of_tokenizers_that_pad_with_something_else_get_end_marks():
    rows = rows_of(tokens(80, 225, 0), eos=EOS, pad=0)[0]
    assert rows[0, -1] == EOS  # full
    assert rows[1, 6] == EOS  # five words and the end mark of the text
    assert rows[1, -1] == 0
    assert rows[2, :3].tolist() == [BOS, EOS, 0]  # empty
    exact = rows_of(tokens(75, 150, 0), eos=EOS, pad=0)[0]
    assert exact[0, -1] == EOS
    assert exact[1, :3].tolist() == [BOS, EOS, 0]


def test_joining_leaves_out_the_marks_between_rows():
    rows = torch.arange(2 * 3 * 77).view(6, 77, 1).float()
    whole = joined(rows, 3)
    assert whole.shape == (2, 227, 1)
    assert whole[0, 0] == 0
    assert whole[0, 1:76, 0].tolist() == list(range(1, 76))
    assert whole[0, 76].item() == 77 + 1
    assert whole[0, -1].item() == 2 * 77 + 76
    assert torch.equal(joined(rows, 1), rows)


def test_layers_are_counted_from_the_end(config):
    model = CLIPTextModel(config).eval()
    rows = tokens(5, 75, 0)
    said = model(input_ids=rows, output_hidden_states=True)
    norm = text_chunks.final_norm(model)
    assert torch.equal(text_chunks.hidden_state(model, rows), said.last_hidden_state)
    torch.testing.assert_close(text_chunks.hidden_state(model, rows, 1), said.last_hidden_state)
    torch.testing.assert_close(text_chunks.hidden_state(model, rows, 2), norm(said.hidden_states[2]))
    torch.testing.assert_close(text_chunks.hidden_state(model, rows, 2, normed=False), said.hidden_states[2])


def test_the_pooled_state_is_that_of_transformers(config):
    model = CLIPTextModelWithProjection(config).eval()
    rows = torch.cat((tokens(5, 75, 0), tokens(60, 75, 0)))
    states, pooled = text_chunks.penultimate_and_pooled(model, rows, EOS)
    said = model(input_ids=rows, output_hidden_states=True)
    torch.testing.assert_close(pooled, said.text_embeds)
    torch.testing.assert_close(states, said.hidden_states[-2])


def test_weights_multiply_states():
    hidden, weights = torch.ones(1, 3, 2), torch.tensor([[1.0, 2.0, 0.5]])
    assert text_chunks.weighted(hidden, weights)[0, :, 0].tolist() == [1.0, 2.0, 0.5]
    assert text_chunks.weighted(hidden, None) is hidden
