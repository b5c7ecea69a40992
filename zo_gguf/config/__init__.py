"""Options of every verb: the mechanism (`option`), and the only place where defaults stand."""

from zo_gguf.config.option import build as build
from zo_gguf.config.option import config_hash as config_hash
from zo_gguf.config.option import load_config as load_config
from zo_gguf.config.option import save_config as save_config
from zo_gguf.config.option import takes as takes
from zo_gguf.config.option import to_dict as to_dict
from zo_gguf.config.tune import MASK_SUFFIX as MASK_SUFFIX
from zo_gguf.config.tune import TuneConfig as TuneConfig
from zo_gguf.config.verbs import DataCheckConfig as DataCheckConfig
from zo_gguf.config.verbs import EnvConfig as EnvConfig
from zo_gguf.config.verbs import EvalConfig as EvalConfig
from zo_gguf.config.verbs import ExportConfig as ExportConfig
from zo_gguf.config.verbs import InfoConfig as InfoConfig
from zo_gguf.config.verbs import MergeConfig as MergeConfig
from zo_gguf.config.verbs import ReplayConfig as ReplayConfig
