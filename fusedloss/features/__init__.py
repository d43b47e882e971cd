"""Frozen features: the bank that holds them, and their extraction with timm and transformers backbones."""

from fusedloss.features.backbone import Backbone
from fusedloss.features.bank import FeatureBank
from fusedloss.features.extraction import compute_features, extract
from fusedloss.features.inputs import Inputs
from fusedloss.features.loading import backbone_of, load_backbone
from fusedloss.features.manifest import BankError, FeatureSource, IncompleteBankError, Manifest
from fusedloss.features.reading import read_inputs

__all__ = [
    "Backbone",
    "BankError",
    "FeatureBank",
    "FeatureSource",
    "IncompleteBankError",
    "Inputs",
    "Manifest",
    "backbone_of",
    "compute_features",
    "extract",
    "load_backbone",
    "read_inputs",
]
