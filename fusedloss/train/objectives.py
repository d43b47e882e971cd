"""The losses that a recipe can name: a new one is one function with ``@objective`` here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fusedloss
from fusedloss.longtail import (
    DeferredReweighting,
    effective_number_weights,
    inverse_frequency_weights,
    ldam_margins,
    log_prior,
)
from fusedloss.terms import AdditiveMargin, ClassTemperature, Prior, Term
from fusedloss.train.auxiliary import ContrastiveLoss
from fusedloss.train.data import TrainingData
from fusedloss.train.recipe import Recipe


@dataclass(frozen=True)
class Objective:
    """A loss called with ``(logits, labels)``, and the temperatures ``(K,)`` that inference needs too.

    ``features`` says that the loss also takes what the last layer reads; ``schedule`` gives it the class weights of an
    epoch; ``auxiliary`` is added to it, from what the last layer reads.
    """

    loss: nn.Module
    temperature: Tensor | None = None
    features: bool = False
    schedule: DeferredReweighting | None = None
    auxiliary: ContrastiveLoss | None = None

    def begin_epoch(self, epoch: int) -> None:
        """Put the class weights of an epoch, from 0, into the loss."""
        if self.schedule is not None:
            self.schedule.apply_to(self.loss, epoch)


Build = Callable[[Recipe, TrainingData], Objective]
OBJECTIVES: dict[str, Build] = {}


def objective(name: str) -> Callable[[Build], Build]:
    """Register the function that builds a loss under the name that recipes use."""

    def register(build: Build) -> Build:
        OBJECTIVES[name] = build
        return build

    return register


def build_objective(recipe: Recipe, data: TrainingData) -> Objective:
    """The loss of a recipe, with its class weights, prior and statistics taken from the training rows."""
    built = OBJECTIVES[checked_loss(recipe.loss)](recipe, data)
    if recipe.supcon:
        auxiliary = ContrastiveLoss(recipe.hidden[-1], len(data.counts), recipe).to(data.features.device)
        built = replace(built, auxiliary=auxiliary)
    if not (recipe.reweight_epoch or recipe.reweight_ramp):
        return built
    power = recipe.power if recipe.class_weights == "inverse" else None
    schedule = DeferredReweighting(
        data.counts, recipe.reweight_epoch, ramp_epochs=recipe.reweight_ramp, beta=recipe.beta, power=power
    )
    return replace(built, schedule=schedule)


def checked_loss(name: str) -> str:
    """The name, if a loss is registered under it."""
    if name not in OBJECTIVES:
        raise ValueError(f"loss must be one of {', '.join(OBJECTIVES)}; got {name!r}")
    return name


def class_weights(recipe: Recipe, counts: Tensor) -> Tensor | None:
    """Weights per class ``(K,)`` float32, 0 for a class without training samples, or None."""
    if recipe.class_weights == "effective":
        return effective_number_weights(counts, recipe.beta)
    if recipe.class_weights == "inverse":
        return inverse_frequency_weights(counts, recipe.power)
    return None


@objective("ce")
def cross_entropy(recipe: Recipe, data: TrainingData) -> Objective:
    return Objective(_cross_entropy(recipe, data))


@objective("focal")
def focal(recipe: Recipe, data: TrainingData) -> Objective:
    return Objective(_cross_entropy(recipe, data, focal_gamma=recipe.focal_gamma))


@objective("balanced")
def balanced(recipe: Recipe, data: TrainingData) -> Objective:
    return Objective(_cross_entropy(recipe, data))


@objective("ldam")
def ldam(recipe: Recipe, data: TrainingData) -> Objective:
    # The cosine head's logits carry its scale already, so the margins are scaled too.
    margins = recipe.cosine_scale * ldam_margins(data.counts, recipe.max_margin)
    return Objective(_cross_entropy(recipe, data, AdditiveMargin(margins)))


@objective("mbls")
def mbls(recipe: Recipe, data: TrainingData) -> Objective:
    penalty = fusedloss.MarginPenalty(recipe.margin, recipe.penalty)
    return Objective(_cross_entropy(recipe, data, margin_penalty=penalty))


@objective("fedlas")
def fedlas(recipe: Recipe, data: TrainingData) -> Objective:
    loss = fusedloss.FeDLaSLoss(
        len(data.counts),
        recipe.fedlas_base,
        recipe.fedlas_strength,
        margin=recipe.margin if recipe.fedlas_base == "margin" else None,
        gate=recipe.fedlas_gate,
        weight=class_weights(recipe, data.counts),
        terms=_prior(recipe, data.counts),
    )
    return Objective(loss.to(data.features.device), features=True)


@objective("vace")
def vace(recipe: Recipe, data: TrainingData) -> Objective:
    num_classes = len(data.counts)
    loss = fusedloss.VACELoss(
        data.features.shape[1],
        num_classes,
        a=recipe.a,
        strength=recipe.strength,
        tau_min=recipe.tau_min,
        tau_max=recipe.tau_max,
        weight=class_weights(recipe, data.counts),
        label_smoothing=recipe.label_smoothing,
        terms=_prior(recipe, data.counts),
    ).to(data.features.device)
    loss.fit_statistics(data.features, data.labels)
    temperature = loss.temperature.detach().clone()
    if not recipe.uniform:
        return Objective(loss, temperature)
    temperature = torch.full_like(temperature, float(temperature.double().mean()))
    return Objective(_cross_entropy(recipe, data, ClassTemperature(temperature)), temperature)


def _cross_entropy(recipe: Recipe, data: TrainingData, *terms: Term, **options: Any) -> nn.Module:
    loss = fusedloss.CrossEntropyLoss(
        weight=class_weights(recipe, data.counts),
        label_smoothing=recipe.label_smoothing,
        terms=(*terms, *_prior(recipe, data.counts)),
        **options,
    )
    return loss.to(data.features.device)


def _prior(recipe: Recipe, counts: Tensor) -> tuple[Prior, ...]:
    if recipe.added_prior == 0.0:
        return ()
    # A finite floor keeps label smoothing finite on classes without training samples.
    return (Prior(log_prior(counts, floor=1.0).to(counts.device), recipe.added_prior),)
