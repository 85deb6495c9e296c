"""Optimizers whose state is small, or lies elsewhere: ordinary ones of torch's kind."""

from lowrank.optim.budget import Budget as Budget
from lowrank.optim.paged import PagedAdamW as PagedAdamW
from lowrank.optim.paged import PagedAdamW8bit as PagedAdamW8bit
from lowrank.optim.paged import PagedLion as PagedLion
from lowrank.optim.paged import PagedLion8bit as PagedLion8bit
from lowrank.optim.resident import AdamW as AdamW
from lowrank.optim.resident import AdamW8bit as AdamW8bit
from lowrank.optim.resident import Lion as Lion
from lowrank.optim.resident import Lion8bit as Lion8bit
