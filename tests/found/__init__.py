"""Models as people write them: the block structure of well-known networks, narrow and with random weights.

Nothing here is written for this library: in-place activations, views that take sizes from ``x.shape``, registries of
activations, configuration objects, dicts as outputs, lists built in loops. Each file is a family.
"""

from importlib import import_module
from pkgutil import iter_modules

from tests.found.registry import NETS, Found

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["NETS", "Found"]
