"""A discrete-event simulation of a cluster: the product's policies against its cost model.

`SimulatedCluster(profile, config).run(rows)` is all there is to it; nothing here knows a clock, a
socket or SGLang.
"""

from kunserve_sglang.simulation.cluster import SimulatedCluster
from kunserve_sglang.simulation.cluster_profile import Profile, load_profile
from kunserve_sglang.simulation.result import SimulationResult

__all__ = ["Profile", "SimulatedCluster", "SimulationResult", "load_profile"]
