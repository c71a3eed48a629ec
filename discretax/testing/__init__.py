"""The laws that every sequence mixer and every stream obeys, for anybody's mixer and model.

Not imported with `discretax`: `import discretax.testing`, or import the names. No test framework is
needed.
"""

from discretax.testing._check import check_mixer as check_mixer, mixer_laws as mixer_laws
from discretax.testing._law import MixerLaw as MixerLaw
from discretax.testing._streaming import check_streaming as check_streaming
