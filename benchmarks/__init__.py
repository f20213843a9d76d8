from utils.interrupts import before_a_module_runs

before_a_module_runs()
