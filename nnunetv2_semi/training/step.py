"""One training step: the gradients of a method's terms, the optimisers, and what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from math import inf, isfinite

import numpy as np
import torch
from torch import nn

from nnunetv2_semi.distributed import all_agree, average_gradients, shares_of_patches
from nnunetv2_semi.methods.base import Method
from nnunetv2_semi.methods.contract import Batch, Term
from nnunetv2_semi.methods.optimization import Optimization


class TrainingStep:
    """Runs a method's steps; every step is a function of weights, batch, seed, rank and step number.

    optimizations: the method's optimisers with what goes with them. grad_scaler: nnU-Net's, None without mixed
    precision. max_skipped_steps: so many incomplete steps in a row raise RuntimeError.
    """

    def __init__(self, method: Method, optimizations: Sequence[Optimization],
                 grad_scaler: torch.amp.GradScaler | None, device: torch.device, *, seed: int, rank: int,
                 max_skipped_steps: int) -> None:
        self.method, self.optimizations, self.grad_scaler, self.device = method, optimizations, grad_scaler, device
        self.seed, self.rank, self.max_skipped_steps = seed, rank, max_skipped_steps
        self._skipped_in_a_row = 0

    def run(self, batch: Batch, step: int, progress: float) -> tuple[list[Term], dict[str, torch.Tensor | float]]:
        """Do step number ``step``; ``progress``: fraction of all steps done before it.

        Returns the loss terms, detached, and further values to log. An unlabelled term that is not finite is left out
        of the gradient; a gradient that is not finite never reaches the weights.
        """
        torch.manual_seed(_step_seed(self.seed, self.rank, step))
        self.method.progress = progress
        self.method.metrics = {}
        for optimization in self.optimizations:
            optimization.optimizer.zero_grad(set_to_none=True)
        terms, complete = self._differentiate(batch)
        complete = self._update_weights() and complete
        for optimization in self.optimizations:
            if optimization.scheduled_every == "step":
                optimization.schedule.step(step + 1)
        self.method.after_step()
        self._count_skipped(complete, terms)
        values: dict[str, torch.Tensor | float] = {"skipped_steps": float(not complete)}
        if self.method.uses_unlabelled:
            values["unlabelled_voxels_used"] = float(complete)
        if complete:
            values.update(self.method.metrics)
        return terms, values

    def _differentiate(self, batch: Batch) -> tuple[list[Term], bool]:
        """Accumulate the gradients of all terms; whether no unlabelled one had to be left out."""
        groups, seen, joined, complete = self.method.loss(batch), [], [], True
        while True:
            with self.autocast():
                group = next(groups, None)
            if group is None:
                break
            seen += [replace(term, value=term.value.detach()) for term in group]
            # Whether a term applies may differ between processes: what is exchanged must not depend on it.
            supervised = [term for term in group if term.supervised]
            unlabelled = [term for term in group if not term.supervised and term.weight != 0]
            if unlabelled and not self._finite_everywhere([term for term in unlabelled if term.applies]):
                unlabelled, complete = [], False
            losses = [term.weight * share * term.value.float()
                      for term, share in self._with_shares([*supervised, *unlabelled])
                      if term.supervised or term.applies]
            if self.method.context.arrangement.one_pass:
                joined += losses
            else:
                self._backward(losses)
        self._backward(joined)
        return seen, complete

    def _with_shares(self, terms: list[Term]) -> list[tuple[Term, torch.Tensor | float]]:
        """The terms, each with what it is multiplied by so that each patch of all processes counts alike."""
        numbers = [term.patches for term in terms if term.patches is not None]
        shares = iter(shares_of_patches(numbers, self.device) if numbers else [])
        return [(term, 1.0 if term.patches is None else next(shares)) for term in terms]

    def _finite_everywhere(self, terms: list[Term]) -> bool:
        """Whether the terms are finite on every process: all must skip together."""
        values = [term.value.detach().float() for term in terms]
        return all_agree(not values or bool(torch.isfinite(torch.stack(values)).all()), self.device)

    def autocast(self) -> AbstractContextManager:
        """As nnU-Net: mixed precision on CUDA only."""
        return torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()

    def _backward(self, losses: list[torch.Tensor]) -> None:
        if losses:
            total = torch.stack(losses).sum()
            (total if self.grad_scaler is None else self.grad_scaler.scale(total)).backward()

    def _update_weights(self) -> bool:
        """Step every optimiser; False if a gradient was not finite, in which case its optimiser did not step."""
        finite, scaled = True, False
        for optimization in self.optimizations:
            optimizer, parameters = optimization.optimizer, optimization.parameters()
            average_gradients(parameters)
            if all(p.grad is None for p in parameters):
                continue
            if self.grad_scaler is not None:
                scaled = True
                self.grad_scaler.unscale_(optimizer)
            clip = inf if optimization.gradient_clip is None else optimization.gradient_clip
            norm = nn.utils.clip_grad_norm_(parameters, clip)
            of_this = isfinite(float(norm))
            finite = finite and of_this
            if self.grad_scaler is not None:
                self.grad_scaler.step(optimizer)  # leaves the step out by itself, and lowers its scale
            elif of_this:
                optimizer.step()
        if self.grad_scaler is not None and scaled:  # a step may have no gradient at all
            self.grad_scaler.update()
        return finite

    def _count_skipped(self, complete: bool, terms: list[Term]) -> None:
        self._skipped_in_a_row = 0 if complete else self._skipped_in_a_row + 1
        if self._skipped_in_a_row >= self.max_skipped_steps:
            last = ", ".join(f"{term.name} = {float(term.value):.4g}" for term in terms)
            raise RuntimeError(
                f"Training stopped: the loss or its gradient was not finite in {self._skipped_in_a_row} steps in a row "
                f"(last: {last}). The weights are those from before. Check the images with 'nnunetv2_semi doctor -d "
                'ID\', or lower "initial_lr" or "unlabelled_weight" in the plans file\'s "semi".')


def _step_seed(seed: int, rank: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))
