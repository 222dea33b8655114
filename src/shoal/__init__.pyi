from shoal.artifacts.evaluation import Scores as Scores
from shoal.artifacts.importance import Importance as Importance
from shoal.artifacts.plan import Plan as Plan
from shoal.artifacts.training import Training as Training
from shoal.errors import UserError as UserError
from shoal.launch.api.compressing import choose_layers as choose_layers
from shoal.launch.api.compressing import cut_model as cut_model
from shoal.launch.api.compressing import measure_importance as measure_importance
from shoal.launch.api.evaluating import Comparison as Comparison
from shoal.launch.api.evaluating import compare as compare
from shoal.launch.api.evaluating import evaluate as evaluate
from shoal.launch.api.running import Run as Run
from shoal.launch.api.running import push_to_hub as push_to_hub
from shoal.launch.api.running import run as run
from shoal.launch.api.training import distill as distill
from shoal.train.distillation_trainer import DistillationTrainer as DistillationTrainer
from shoal.train.engine.distillation_config import DistillationConfig as DistillationConfig

__version__: str
__all__: list[str]
PLACES: dict[str, str]
