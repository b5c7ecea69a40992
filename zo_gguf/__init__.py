"""Fine-tune quantized GGUF models with forward passes only, on stock llama.cpp.

The public names are imported on first use, so that `import zo_gguf` is fast and needs no torch.
The verbs are functions named like their modules: `zo_gguf.tune` is the function, and code that
wants more of the module writes `from zo_gguf.tune import ...`.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from zo_gguf.attach import attach as attach
    from zo_gguf.attach import detach as detach
    from zo_gguf.config import DataCheckConfig as DataCheckConfig
    from zo_gguf.config import EvalConfig as EvalConfig
    from zo_gguf.config import ExportConfig as ExportConfig
    from zo_gguf.config import MergeConfig as MergeConfig
    from zo_gguf.config import ReplayConfig as ReplayConfig
    from zo_gguf.config import TuneConfig as TuneConfig
    from zo_gguf.dataset import Example as Example
    from zo_gguf.dataset import load_examples as load_examples
    from zo_gguf.delta import Delta as Delta
    from zo_gguf.engine import Engine as Engine
    from zo_gguf.engine import Probe as Probe
    from zo_gguf.errors import ZoError as ZoError
    from zo_gguf.evaluate import evaluate as evaluate
    from zo_gguf.export import export as export
    from zo_gguf.mask import Mask as Mask
    from zo_gguf.merge import merge as merge
    from zo_gguf.noise import choose_eps as choose_eps
    from zo_gguf.trajectory import Trajectory as Trajectory
    from zo_gguf.tune import tune as tune

_MODULES = {
    "DataCheckConfig": "config",
    "Delta": "delta",
    "Engine": "engine",
    "EvalConfig": "config",
    "Example": "dataset",
    "ExportConfig": "config",
    "Mask": "mask",
    "MergeConfig": "config",
    "Probe": "engine",
    "ReplayConfig": "config",
    "Trajectory": "trajectory",
    "TuneConfig": "config",
    "ZoError": "errors",
    "attach": "attach",
    "choose_eps": "noise",
    "detach": "attach",
    "evaluate": "evaluate",
    "export": "export",
    "load_examples": "dataset",
    "merge": "merge",
    "tune": "tune",
}
__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `zo_gguf.tune` the function: importing a submodule binds the module to its name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _MODULES:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
