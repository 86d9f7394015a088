"""What the rows of a label table tell of its training."""

import pytest
import torch

from fm_stages.networks import LabelEmbedding


def trained(table: LabelEmbedding, labels: range, weight_decay: float = 0.0, steps: int = 30) -> LabelEmbedding:
    """After steps towards random targets, in which only these labels were asked for."""
    generator = torch.Generator().manual_seed(1)
    y = torch.tensor(labels)
    target = torch.randn(len(y), table.embedding_table.embedding_dim, generator=generator)
    optimizer = torch.optim.AdamW(table.parameters(), 0.01, weight_decay=weight_decay)
    for _ in range(steps):
        optimizer.zero_grad()
        (table(y) - target).square().mean().backward()
        optimizer.step()
    return table


@pytest.mark.parametrize("width", [16, 128, 1152])
def test_a_null_row_that_was_never_asked_for_is_seen(width):
    for seed in range(20):
        torch.manual_seed(seed)
        table = LabelEmbedding(10, width)
        table.reset()
        assert not table.null_is_untrained  # nothing is trained yet
        assert trained(table, range(10), weight_decay=0.1).null_is_untrained
        assert not trained(table, range(-1, 0)).null_is_untrained


def test_of_few_classes_and_of_none_nothing_wrong_is_said():
    torch.manual_seed(0)
    table = LabelEmbedding(10, 128)
    table.reset()
    assert not trained(table, range(3)).null_is_untrained  # seven of ten classes were never seen either
    table = LabelEmbedding(0, 128)
    table.reset()
    assert not table.null_is_untrained
