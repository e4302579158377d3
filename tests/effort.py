"""How hard tests try: where slow ones are left out, a law is tried on a third of its examples."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

_LEAST = 5  # examples, of any law


def load_profile(*, quick: bool) -> None:
    """Choose how many examples a law is tried on; called before the tests are imported."""
    settings.register_profile("all", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("quick", settings.get_profile("all"), max_examples=34)
    settings.load_profile("quick" if quick else "all")


def tries(count: int) -> settings:
    """A decorator: try a law on so many examples, or on a third of them in a quick run."""
    share = settings().max_examples / settings.get_profile("all").max_examples
    return settings(max_examples=max(_LEAST, round(count * share)))
