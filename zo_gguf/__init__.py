"""Fine-tune quantized GGUF models with forward passes only, on stock llama.cpp.

The public names are imported on first use, so that `import zo_gguf` is fast and needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from zo_gguf.config import DataCheckConfig as DataCheckConfig
    from zo_gguf.config import EvalConfig as EvalConfig
    from zo_gguf.config import ExportConfig as ExportConfig
    from zo_gguf.config import MergeConfig as MergeConfig
    from zo_gguf.config import ReplayConfig as ReplayConfig
    from zo_gguf.config import TuneConfig as TuneConfig
    from zo_gguf.data.dataset import Example as Example
    from zo_gguf.data.dataset import load_examples as load_examples
    from zo_gguf.engine.attach import attach as attach
    from zo_gguf.engine.attach import detach as detach
    from zo_gguf.engine.batch import Scores as Scores
    from zo_gguf.engine.engine import Engine as Engine
    from zo_gguf.engine.evaluation import EvalResult as EvalResult
    from zo_gguf.errors import ZoError as ZoError
    from zo_gguf.libzo import Probe as Probe
    from zo_gguf.merging.result import MergeResult as MergeResult
    from zo_gguf.params.delta import Delta as Delta
    from zo_gguf.params.mask import Mask as Mask
    from zo_gguf.tuning.report import TuneResult as TuneResult
    from zo_gguf.tuning.trajectory import Trajectory as Trajectory
    from zo_gguf.verbs.data_check import DataCheck as DataCheck
    from zo_gguf.verbs.data_check import data_check as data_check
    from zo_gguf.verbs.evaluate import evaluate as evaluate
    from zo_gguf.verbs.export import ExportResult as ExportResult
    from zo_gguf.verbs.export import export as export
    from zo_gguf.verbs.merge import merge as merge
    from zo_gguf.verbs.plan import PlanResult as PlanResult
    from zo_gguf.verbs.plan import plan as plan
    from zo_gguf.verbs.replay import ReplayResult as ReplayResult
    from zo_gguf.verbs.replay import replay as replay
    from zo_gguf.verbs.tune import resume as resume
    from zo_gguf.verbs.tune import tune as tune

_MODULES = {
    "DataCheck": "verbs.data_check",
    "DataCheckConfig": "config",
    "Delta": "params.delta",
    "Engine": "engine.engine",
    "EvalConfig": "config",
    "EvalResult": "engine.evaluation",
    "Example": "data.dataset",
    "ExportConfig": "config",
    "ExportResult": "verbs.export",
    "Mask": "params.mask",
    "MergeConfig": "config",
    "MergeResult": "merging.result",
    "PlanResult": "verbs.plan",
    "Probe": "libzo",
    "ReplayConfig": "config",
    "ReplayResult": "verbs.replay",
    "Scores": "engine.batch",
    "Trajectory": "tuning.trajectory",
    "TuneConfig": "config",
    "TuneResult": "tuning.report",
    "ZoError": "errors",
    "attach": "engine.attach",
    "data_check": "verbs.data_check",
    "detach": "engine.attach",
    "evaluate": "verbs.evaluate",
    "export": "verbs.export",
    "load_examples": "data.dataset",
    "merge": "verbs.merge",
    "plan": "verbs.plan",
    "replay": "verbs.replay",
    "resume": "verbs.tune",
    "tune": "verbs.tune",
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
