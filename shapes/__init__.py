"""A small trained member of the model family, and everything that makes it: a world, training, evaluation."""

from utils.interrupts import before_a_module_runs

before_a_module_runs()
