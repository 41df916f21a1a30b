"""Memory of the optimizer on one rank, in bytes: its state, and what its update allocates."""

from collections.abc import Mapping

from olmoe_train.config.choices import Precision
from olmoe_train.config.optimizer import (
    ADAMW_STATE,
    MUON_ELEMENTS,
    ROW_MOMENT,
    UPDATE_ELEMENTS,
    OptimizerConfig,
    OrthogonalizingConfig,
)
from olmoe_train.model import OlmoeConfig
from olmoe_train.model.roles import ParameterRole
from olmoe_train.planning.layout import FP32, ParallelLayout


def state_bytes(config: OlmoeConfig, roles: Mapping[ParameterRole, int], optimizer: OptimizerConfig) -> int:
    """Bytes of the optimizer's state. roles: trained elements on the rank, by role."""
    query, key, hidden, width = (
        config.query_width,
        config.key_value_width,
        config.hidden_size,
        config.intermediate_size,
    )
    shared = config.shared_width
    # Rows and elements of a layer's q, k, v and o and shared experts; and of gate, up and down of an expert.
    rows_in = {
        ParameterRole.matrix: (
            query + 2 * key + hidden + (2 * shared + hidden if shared else 0),
            2 * hidden * (query + key) + 3 * shared * hidden,
        ),
        ParameterRole.expert_matrix: (2 * width + hidden, 3 * width * hidden),
    }
    total, element = 0, FP32 if optimizer.state_dtype is Precision.fp32 else FP32 // 2
    for role, elements in roles.items():
        for name in optimizer.state_of(role) or ADAMW_STATE:
            rows, of_elements = rows_in[role] if name == ROW_MOMENT else (1, 1)
            total += element * -(-elements * rows // of_elements)
    return total


def update_bytes(config: OlmoeConfig, layout: ParallelLayout, optimizer: OptimizerConfig) -> int:
    """Most bytes that the update allocates at a time; 0 where it is in place.

    With moments in bf16: at most six fp32 values for each of the elements that are updated at a time. Muon
    and NorMuon: at most six fp32 tensors as large as the matrices that a rank orthogonalizes at once: parts
    of updates, whole matrices, their normalized values, those of the next iteration, and two square ones in
    between.
    """
    experts = -(-config.num_experts // (layout.expert_parallel_size * layout.expert_shard_size))
    expert = 2 * config.intermediate_size * config.hidden_size  # gate and up
    if optimizer.state_dtype is Precision.bf16:
        embedding = -(-config.vocab_size // layout.shard_size) * config.hidden_size
        return 6 * FP32 * min(UPDATE_ELEMENTS, max(embedding, experts * expert))
    if not isinstance(optimizer, OrthogonalizingConfig):
        return 0
    dense = config.query_width * config.hidden_size  # q, k, v and o, of all layers
    matrices = -(-4 * config.num_hidden_layers // layout.shard_size)
    shared = max(1, config.shared_width * config.hidden_size)  # gate and up, of all layers
    shared_matrices = -(-2 * config.num_hidden_layers // layout.shard_size)
    at_once = (
        elements * min(number, max(1, MUON_ELEMENTS // elements))
        for elements, number in ((dense, matrices), (expert, experts), (shared, shared_matrices))
    )
    return 6 * FP32 * max(at_once)
