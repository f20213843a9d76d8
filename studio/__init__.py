"""A page on which a video goes on without end and does what is typed, and the server behind it."""

from utils.interrupts import before_a_module_runs

before_a_module_runs()
