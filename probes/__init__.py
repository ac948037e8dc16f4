"""A model in, labelled numbers out."""

from .compress import compress
from .decode import decode
from .items import Item, Task
from .kernels import Readout, compare_logits, compare_states
from .load import load
from .measure import measure
from .memory import remember
from .model import Model
from .neurons import selectivity
from .patch import patch
from .recipe import Recipe
from .recover import Training, recover
from .repair import repair, restored
from .save import save
from .score import generate, score
from .tasks import load_tasks
from .twins import twin

__all__ = [
    "Item",
    "Model",
    "Readout",
    "Recipe",
    "Task",
    "Training",
    "compare_logits",
    "compare_states",
    "compress",
    "decode",
    "generate",
    "load",
    "load_tasks",
    "measure",
    "patch",
    "recover",
    "remember",
    "repair",
    "restored",
    "save",
    "score",
    "selectivity",
    "twin",
]
