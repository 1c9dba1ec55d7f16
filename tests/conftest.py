"""How Hypothesis tests here: a busy machine's slow example is no finding.

Whatever else its own profile says stays, such as the fixed examples that it takes where CI is set.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("precis", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("precis")
