"""Optimizers whose state is small, or lies elsewhere: ordinary ones of torch's kind."""

from lowrank.optim.resident import AdamW as AdamW
from lowrank.optim.resident import AdamW8bit as AdamW8bit
from lowrank.optim.resident import Lion as Lion
from lowrank.optim.resident import Lion8bit as Lion8bit
