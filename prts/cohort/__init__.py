"""Many slides: their table, the state of each, claims that workers share, the work, and its summary.

Workers share nothing but the cohort folder. Any number of them may work on the same list, on one machine or on many with a shared file
system: each takes the next slide that is neither finished nor claimed. What starts them is Hydra's launchers, or SLURM.
"""
