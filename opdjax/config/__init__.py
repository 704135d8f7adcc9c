"""Every setting of a run. Experiment files import from here."""

from opdjax.config.api import RULE_JUDGE, ApiConfig, JudgeConfig
from opdjax.config.audit import AuditConfig
from opdjax.config.data import JUDGED_FIELDS, TEACHER_FIELDS, DataConfig, TeachConfig
from opdjax.config.estimator import ROPD_CODE, ROPD_PAPER, EstimatorConfig
from opdjax.config.fleet import FleetConfig
from opdjax.config.model import MINI_PAIR, MINI_STUDENT, MINI_TEACHER, PACKAGE, STUDENT, ModelConfig
from opdjax.config.near_policy import NearPolicyConfig
from opdjax.config.rubrics import RubricsConfig
from opdjax.config.run import Config
from opdjax.config.sampling import EvaluationConfig, SamplingConfig
from opdjax.config.train import (
    CheckpointConfig,
    FrozenWeights,
    LogConfig,
    LoraConfig,
    LoraTarget,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from opdjax.config.validation import ConfigError
