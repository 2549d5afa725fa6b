"""``dppo doctor``: whether this machine can run, and whether a recipe fits its GPUs.

command   options and the printed report
machine   checks of the machine
recipe    what a recipe asks for, and what to switch on when it does not fit
memory    the estimate, in bytes
"""
