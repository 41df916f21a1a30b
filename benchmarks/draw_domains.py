"""Draws the domain specialization of OLMoE-1B-7B-0924 from the expert counts that its authors published.

    python -m benchmarks.draw_domains docs/images/domains_olmoe_0924.svg

The picture is that of `olmoe analyze` (domains.svg). The counts are of layers 0, 7 and 15.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from olmoe_train.reporting.analysis_pictures import draw_domains
from olmoe_train.reporting.router_analysis import domain_specialization

COUNTS = Path(__file__).parents[1] / "tests/support/olmoe_0924_expert_counts.json"
LAYERS, EXPERTS = 16, 64
DOMAINS = ("github", "arxiv", "wikipedia", "book", "c4")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    published = json.loads(COUNTS.read_text(encoding="utf-8"))
    top_k = published["top_k"]
    counts_NLE = np.zeros((len(DOMAINS), LAYERS, EXPERTS))
    for number, domain in enumerate(DOMAINS):
        for layer, counts_E in published["counts"][domain].items():
            counts_NLE[number, int(layer)] = counts_E
    shares_NLE = domain_specialization(counts_NLE, counts_NLE[:, 0].sum(-1) / top_k)
    entries = [
        {"source": 0, "k": top_k, "domain": domain, "uniform": top_k / EXPERTS, "by_layer": shares.tolist()}
        for domain, shares in zip(DOMAINS, shares_NLE, strict=True)
    ]
    record = {"layers": LAYERS, "experts": EXPERTS, "reference": 0, "domains": entries}
    options.out.write_text(draw_domains(record, top_k), encoding="utf-8")


if __name__ == "__main__":
    main()
