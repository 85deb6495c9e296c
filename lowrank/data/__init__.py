"""Data for training: examples from files, their tokens and labels, and deterministic batches."""

from lowrank.data.batches import Batch as Batch
from lowrank.data.batches import collate as collate
from lowrank.data.examples import Examples as Examples
from lowrank.data.examples import load_examples as load_examples
from lowrank.data.sampler import Sampler as Sampler
from lowrank.data.sampler import epoch_order as epoch_order
from lowrank.data.tokens import TokenizedExamples as TokenizedExamples
from lowrank.data.tokens import tokenize as tokenize
from lowrank.data.tokens import tokenize_all as tokenize_all
from lowrank.data.windows import windows as windows
