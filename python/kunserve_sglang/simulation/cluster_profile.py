"""What a simulation must know of a machine and a model: one typed TOML or JSON file.

`docs/simulator.md` describes every field; `simulation/profiles/` has one of a measured CPU and one
of a GPU made of published figures, which are also known by their names.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import msgspec

from kunserve_sglang.core.cost_model import CostModel
from kunserve_sglang.core.errors import ConfigurationError
from kunserve_sglang.core.layout import MemoryProfile
from kunserve_sglang.core.sizes import parse_size

_SHIPPED = files("kunserve_sglang.simulation") / "profiles"


class StepCost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a step costs its owner besides the decoder layers, in milliseconds.

    Scheduling, launching and sampling; `request_ms` each request in the batch (head and sampling),
    `token_ms` each token (embedding). `stage_ms` is what a member of a group pays for each
    micro-batch that it receives and passes on: unpacking, tables, packing. `delayed`: a first token
    leaves when the step after its own is through. SGLang's overlap scheduling does that where
    launching a step is computing it, on a CPU.
    """

    fixed_ms: float = 0.0
    request_ms: float = 0.0
    token_ms: float = 0.0
    stage_ms: float = 0.0
    delayed: bool = False


class Links(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How fast instances exchange data, in bytes a second of one instance in one direction.

    `hop_ms` is what a micro-batch needs to reach the next stage besides its bytes,
    `transition_ms` what a drop or restore stalls its members besides the bytes.
    """

    exchange_bytes_per_s: float
    parameters_bytes_per_s: float
    activations_bytes_per_s: float
    hop_ms: float = 0.0
    transition_ms: float = 0.0


class HostCost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One host whose `cores` all instances share, with the processes around them.

    `request_ms` and `token_ms` are what router, tokenizers and clients compute for a request and
    for each token of its answer. `contention` is the part by which a step gets longer when all
    cores compute, because they share memory. 0 cores: nobody takes anything from an instance.
    """

    cores: int = 0
    request_ms: float = 0.0
    token_ms: float = 0.0
    contention: float = 0.0


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of instance. Sizes are bytes; `memory_budget` holds parameters and KV.

    `frontend_ms` is the way of a request to the scheduler and of its tokens back.

    `resident_bytes` is what is never dropped (embedding, head), `layer_bytes` the parameters of one
    decoder layer, `kv_bytes_per_token` K and V of one token in all layers.
    """

    name: str
    source: str
    layers: int
    memory_budget: str
    resident_bytes: int
    layer_bytes: int
    kv_bytes_per_token: int
    activation_bytes_per_token: int
    cost: CostModel
    links: Links
    step: StepCost = StepCost()
    host: HostCost = HostCost()
    page_bytes: int = 2 << 20
    frontend_ms: float = 0.0
    chunked_prefill_size: int = 8192
    max_prefill_tokens: int = 16_384
    max_running_requests: int = 4096

    def __post_init__(self) -> None:
        if len(self.cost.prefill) != 6 or len(self.cost.decode) != 3:
            raise ConfigurationError(
                "cost.prefill takes 6 coefficients and cost.decode 3 (docs/cost-model.md)"
            )
        if min(*self.cost.prefill, *self.cost.decode) < 0:
            raise ConfigurationError("coefficients of cost must not be negative")
        positive = {
            "layers": self.layers,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "page_bytes": self.page_bytes,
            "chunked_prefill_size": self.chunked_prefill_size,
            "max_running_requests": self.max_running_requests,
            "links.exchange_bytes_per_s": self.links.exchange_bytes_per_s,
            "links.parameters_bytes_per_s": self.links.parameters_bytes_per_s,
            "links.activations_bytes_per_s": self.links.activations_bytes_per_s,
        }
        for field, value in positive.items():
            if value <= 0:
                raise ConfigurationError(f"{field} must be above 0")
        if self.step.fixed_ms + self.layers * self.cost.decode_fixed_ms <= 0:
            raise ConfigurationError("a decode step must take some time: see cost and step")

    def memory(self, owners: int) -> MemoryProfile:
        """The geometry of an instance that may join groups of `owners`.

        Raises `ConfigurationError` if the parameters leave no room for KV.
        """
        pages = max(0, parse_size(self.memory_budget) - self.resident_bytes) // self.page_bytes
        row = self.kv_bytes_per_token // (2 * self.layers)
        fewest = max(1, self.layers // owners)
        profile = MemoryProfile(
            page_bytes=self.page_bytes,
            pages=pages,
            layer_pages=(-(-self.layer_bytes // self.page_bytes),) * self.layers,
            key_row_bytes=row,
            value_row_bytes=row,
            stride=pages * self.page_bytes // (fewest * 2 * row) + 1,
            owners=owners,
        )
        if pages <= sum(profile.layer_pages):
            raise ConfigurationError(
                f"memory_budget {self.memory_budget} leaves no room for KV beside the parameters"
            )
        return profile


def load_profile(path: Path) -> Profile:
    """Read a profile, or one of the package's by its name.

    Raises `ConfigurationError` that names the file and the field.
    """
    try:
        shipped = _SHIPPED / f"{path}.toml"
        by_name = len(path.parts) == 1 and not path.exists() and shipped.is_file()
        data = shipped.read_bytes() if by_name else path.read_bytes()
        if path.suffix == ".json":
            return msgspec.json.decode(data, type=Profile)
        return msgspec.toml.decode(data, type=Profile)
    except (OSError, msgspec.DecodeError, ConfigurationError) as error:
        raise ConfigurationError(f"{path}: {error}") from error
