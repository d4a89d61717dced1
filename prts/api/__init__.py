"""The Python interface: train, predict and evaluate as functions of plain arguments. The command line calls nothing else."""
