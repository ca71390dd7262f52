"""Number formats: section 1 of ``docs/numerics.md``."""

from __future__ import annotations

import pytest

from qatlib.errors import QConfigError
from qatlib.qtype import QType


@pytest.mark.parametrize("dtype", ["int4", "uint8", "float16", ""])
def test_an_unknown_dtype(dtype: str) -> None:
    with pytest.raises(QConfigError, match=f"QAT141 dtype: '{dtype}' is unknown. Use one of int8, int16, int32"):
        QType(dtype, 0.5)  # type: ignore[arg-type]
