"""The laws that every sequence mixer obeys, for anybody's mixer.

Not imported with `discretax`: `import discretax.testing`, or import the names. No test framework is
needed.
"""

from discretax.testing._check import check_mixer as check_mixer, mixer_laws as mixer_laws
from discretax.testing._law import MixerLaw as MixerLaw
