"""The Python API: training, prediction and evaluation as functions of plain arguments. The command line calls these too."""
