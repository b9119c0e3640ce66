"""Stands in for SGLang's CUDA kernel package: every name imports, and every call raises.

SGLang uses its own torch fallbacks on a CPU, so no kernel is called; one that were called could not return numbers
unnoticed.
"""

import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

__version__ = "0.0.0+cpu.stub"

_SUBMODULES = (
    "allreduce",
    "elementwise",
    "flash_attn",
    "kvcacheio",
    "mamba",
    "quantization",
    "spatial",
    "top_k",
    "utils",
)


def _kernel(qualified_name: str) -> Callable[..., NoReturn]:
    def call(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{qualified_name} is a CUDA kernel and has no CPU version")

    return call


def _resolver(module: str) -> Callable[[str], Callable[..., NoReturn]]:
    def resolve(name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _kernel(f"{module}.{name}")

    return resolve


__getattr__ = _resolver(__name__)
for _name in _SUBMODULES:
    _module = types.ModuleType(f"{__name__}.{_name}")
    _module.__getattr__ = _resolver(_module.__name__)  # type: ignore[method-assign]
    sys.modules[_module.__name__] = _module
    globals()[_name] = _module
