"""Select the experts of each layer that matter most for a task (ESFT, arXiv 2407.01906), and write them to a
file. A run with trainer.train_only=FILE trains only these.

Every rank holds the whole model. The ranks share the sample, and the result does not depend on their number.
"""

import sys
from collections.abc import Mapping
from functools import partial
from math import prod
from pathlib import Path

from olmoe_train.checkpoint.convert.stored_model import load_whole
from olmoe_train.cli.app import run_verb
from olmoe_train.cli.help import description
from olmoe_train.cli.ranks import on_ranks
from olmoe_train.cli.routing_sample import all_ranks, count_sample, open_checked, sample_facts, source_facts
from olmoe_train.config.expert_file import experts_text
from olmoe_train.config.surgery import ExpertsConfig
from olmoe_train.distributed.collectives import on_rank_0
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.hf.directory import parameter_shapes
from olmoe_train.model.roles import ParameterRole, role_of
from olmoe_train.reporting.expert_selection import relevance, smallest_sets
from olmoe_train.reporting.router_analysis import Array
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import write_out
from olmoe_train.utils.tables import aligned


def main(cfg: ExpertsConfig) -> None:
    """Count the routing, select the experts, write the file, and print a table.

    Raises:
        UserError: The model, the data or an option is wrong; the message names the key and the fix.
    """
    if not 0 < cfg.p <= 1:
        raise UserError(f"p={cfg.p}: must be above 0 and at most 1")
    out = Path(cfg.out).expanduser()
    with all_ranks() as device:
        stored = open_checked(cfg)
        on_rank_0(lambda: check_out(out))
        config = stored.config
        if cfg.precision is not None:
            config.dtype = cfg.precision.dtype
        counts = count_sample(load_whole(stored, device), cfg, device)
        relevance_LE = relevance(counts, cfg.select)
        sets = smallest_sets(relevance_LE, cfg.p)

        def write_and_print() -> None:
            facts = {
                "source": source_facts(cfg.source, stored),
                "sample": sample_facts(cfg, counts),
                "select": cfg.select.value,
                "p": cfg.p,
                "num_experts": config.num_experts,
            }
            write_out(out, experts_file(facts, sets, relevance_LE))
            print("\n".join(table(config, sets, relevance_LE)))
            print(f"written to {out}. To train only these: trainer.train_only={out} optimizer.weight_decay=0")

        on_rank_0(write_and_print)


def check_out(out: Path) -> None:
    """Refuse to replace a file, which a run may have been started with."""
    if out.exists():
        raise UserError(f"out={out}: exists already, and a run may need it; give another name, or delete it")


def experts_file(facts: Mapping[str, object], sets: list[list[int]], relevance_LE: Array) -> str:
    """The text of the file: `facts`, the experts of each layer, and their relevance to four digits."""
    relevances = {
        layer: [f"{relevance_LE[layer, expert]:.4f}" for expert in experts]
        for layer, experts in enumerate(sets)
    }
    return experts_text(facts, dict(enumerate(sets)), relevance=relevances)


def table(config: OlmoeConfig, sets: list[list[int]], relevance_LE: Array) -> list[str]:
    """Lines with the number of experts of each layer, the sum of their relevance, and their numbers; then the
    shares of the parameters."""
    rows = [("layer", "experts", "relevance", "selected, the most relevant first")]
    for layer, experts in enumerate(sets):
        total = relevance_LE[layer, experts].sum()
        rows.append((str(layer), f"{len(experts)}", f"{total:.3f}", ", ".join(map(str, experts))))
    selected, every = sum(map(len, sets)), config.num_hidden_layers * config.num_experts
    shapes = parameter_shapes(OlmoeForCausalLM, config)
    elements = sum(map(prod, shapes.values()))
    of_experts = sum(
        prod(shape) for name, shape in shapes.items() if role_of(name) is ParameterRole.expert_matrix
    )
    trained = of_experts * selected // every
    shares = (
        f"{selected} of {every} experts: {trained:,} parameters, {trained / of_experts:.1%} of those of all "
        f"experts and {trained / elements:.1%} of the model's"
    )
    return [*aligned(rows, left=(3,)), shares]


def run() -> int:
    """Run `olmoe experts` with the command line; returns the exit code."""
    return on_ranks(
        "olmoe_train.cli.experts",
        partial(run_verb, "experts", ExpertsConfig, main, description("experts", __doc__)),
    )


if __name__ == "__main__":
    sys.exit(run())
