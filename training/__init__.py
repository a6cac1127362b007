"""Training of every network of DiffPortrait3D: data preparation, one script per stage, and the miniature recipe.

The scripts are run from the repository root as `python -m training.<stage> --config FILE`; see
`training.engine.loop` for what they share. The core package `diffportrait3d` never imports anything from here.
"""

import os

from diffportrait3d.command import begin_package

# Threads that wait for each other must not spin: beside any other load that makes small networks ten times slower.
# OpenMP reads this when torch is first imported, hence here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
begin_package(__name__)
