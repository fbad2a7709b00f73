"""The former place of `zest_fast.plan`, `plan_profile` and `planned_peak`, which a message named."""

from zest_fast.planning.plan import plan, plan_profile, planned_peak

__all__ = ["plan", "plan_profile", "planned_peak"]
