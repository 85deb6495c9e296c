"""How much memory a training run takes, before anything is loaded."""

from .advice import Advice as Advice
from .advice import Remedy as Remedy
from .advice import advise as advise
from .cards import Card as Card
from .cards import find_card as find_card
from .memory import MemoryPlan as MemoryPlan
from .memory import Planner as Planner
from .memory import Settings as Settings
from .memory import plan_memory as plan_memory
