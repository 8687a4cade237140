"""Optimizers over the ops: Fira, GaLore and an APOLLO-like form, and the choice of what they project."""

from pyelastic.optim._checkpoint import to_official_state_dict
from pyelastic.optim.fira import Apollo, Fira, GaLore
from pyelastic.optim.params import Coverage, divide_params
from pyelastic.optim.projectors import captured_energy

__all__ = ["Apollo", "Coverage", "Fira", "GaLore", "captured_energy", "divide_params", "to_official_state_dict"]
