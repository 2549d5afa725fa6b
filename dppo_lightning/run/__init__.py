"""A run from outside: the command line, the files and the screen of a run, and the programs that start and stop it."""
