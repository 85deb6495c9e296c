"""Training: `Trainer(model, TrainConfig(...), train_data, eval_data, tokenizer=tok).train()`."""

from lowrank.train.callbacks import Callback as Callback
from lowrank.train.config import TrainConfig as TrainConfig
from lowrank.train.distributed import process_group as process_group
from lowrank.train.held_out import held_out_loss as held_out_loss
from lowrank.train.presets import PRESETS as PRESETS
from lowrank.train.presets import Preset as Preset
from lowrank.train.presets import preset as preset
from lowrank.train.record import TrainResult as TrainResult
from lowrank.train.run import check_output_dir as check_output_dir
from lowrank.train.schedule import lr_multiplier as lr_multiplier
from lowrank.train.sharding import gathered as gathered
from lowrank.train.sharding import shard as shard
from lowrank.train.sweep import sweep as sweep
from lowrank.train.sweep_result import SweepResult as SweepResult
from lowrank.train.sweep_result import Trial as Trial
from lowrank.train.trainer import Trainer as Trainer
