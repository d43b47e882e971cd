"""The reference trainer: classification heads on frozen features."""

from fusedloss.train.fit import fit
from fusedloss.train.predictor import Predictor
from fusedloss.train.recipe import Recipe
from fusedloss.train.result import Result
from fusedloss.train.split import Split, split_rows

__all__ = ["Predictor", "Recipe", "Result", "Split", "fit", "split_rows"]
