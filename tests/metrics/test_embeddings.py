"""Embeddings of responses, against the model's own hidden states."""

import pytest
import torch

from rotopo.data.batch import Role, TokenizedRow, collate
from rotopo.metrics.embeddings import response_embeddings
from tests.models.families import make


@pytest.mark.parametrize("layout", ["packed", "shared_prompt", "padded"])
def test_means_of_the_states_that_predict_a_response(layout):
    model = make("llama").eval()
    model.set_attn_implementation("sdpa")
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(3, 96, (n,), generator=generator).tolist()

    rows = [
        TokenizedRow(ids(p), [ids(a), ids(b)], [Role.CHOSEN, Role.REJECTED], n)
        for n, (p, a, b) in enumerate([(4, 3, 7), (9, 1, 2), (2, 5, 5)])
    ]
    batches = [collate(part, 0, layout, 1.0) for part in (rows[:2], rows[2:])]
    points, roles = response_embeddings(model, batches)
    assert roles.tolist() == [0, 1] * 3
    expected = []
    for row in rows:
        for response in row.responses:
            with torch.no_grad():
                out = model.model(torch.tensor([row.prompt + response[:-1]]))
            expected.append(out.last_hidden_state[0, len(row.prompt) - 1 :].mean(0).float())
    torch.testing.assert_close(points, torch.stack(expected), rtol=1e-5, atol=1e-6)
