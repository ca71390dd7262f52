from __future__ import annotations

import pytest
import torch

from examples.classes import RELATIVE, Agreement, against
from qatlib.errors import DataError


def test_agreement_is_the_share_of_equal_classes() -> None:
    outputs = torch.tensor([[0.0, 9, 0], [0, 1, 2], [0, 0, 1], [1, 1, 0]])
    others = torch.tensor([[1.0, 2, 0], [3, 0, 0], [0, 0, 5], [0, 1, 0]])
    scored = Agreement()
    for rows in (slice(0, 3), slice(3, 4)):
        scored.update(outputs[rows], against(torch.zeros(4)[rows], others[rows]))
    # Of equal scores the lower class ranks first, so the last row is class 0 against 1.
    assert scored.compute() == 2 / 4


def test_agreement_on_nothing_is_an_error() -> None:
    (kind,) = RELATIVE
    with pytest.raises(DataError, match="QAT110"):
        kind().compute()
