"""A discrete-event simulation of a cluster: the product's policies against its cost model.

`Cluster(profile, config).run(rows)` is all there is to it; nothing here knows a clock, a socket or
SGLang.
"""

from kunserve_sglang.simulation.cluster import Cluster
from kunserve_sglang.simulation.cluster_profile import Profile, load_profile
from kunserve_sglang.simulation.outcome import Outcome

__all__ = ["Cluster", "Outcome", "Profile", "load_profile"]
