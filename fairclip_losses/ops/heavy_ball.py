"""The heavy ball that suits a measure against itself (Polyak 1964).

The symmetric update of the potential has derivative -Q with eigenvalues in [-1, 0], so its equation
has a map with eigenvalues in [m, L] = [1, 2]: the step is ``4 / (sqrt L + sqrt m)^2``, the memory
the square of ``(sqrt L - sqrt m) / (sqrt L + sqrt m)``, by which a round contracts.
"""

import math

STEP = 4.0 / (math.sqrt(2.0) + 1.0) ** 2
MEMORY = ((math.sqrt(2.0) - 1.0) / (math.sqrt(2.0) + 1.0)) ** 2
