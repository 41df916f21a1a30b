"""`olmoe VERB [hydra overrides]`, the same as `python -m olmoe_train VERB [hydra overrides]`."""

import sys
from importlib import import_module

from olmoe_train.utils.console import quietly

VERBS = {
    "prepare": "turn a corpus into tokens on disk",
    "plan": "memory, traffic, layouts and duration of a training run, without running it",
    "doctor": "check the machines of a training run before it starts",
    "train": "pretrain or fine-tune",
    "launch": "render a training as a SLURM job or as Kubernetes objects",
    "logprobs": "log-probabilities of the reference, for preference tuning",
    "report": "one HTML file about a run, or its live form",
    "evaluate": "validation loss and perplexity",
    "explain": "documents of one optimizer step, with their shares of loss and gradient",
    "analyze": "router analyses: saturation, co-activation, domains, vocabulary, importance",
    "experts": "select the experts that matter for a task, to train only these",
    "prune": "keep some experts of each layer, and remove the others",
    "upcycle": "make an OLMoE from a dense model",
    "merge": "average checkpoints or models",
    "export": "write a run's checkpoint as a Hugging Face directory",
    "generate": "continue a prompt",
    "dashboard": "make the W&B workspace of a run, or of several runs to compare",
}


def main() -> int:
    return quietly(_main)


def _main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: olmoe VERB [key=value ...]      olmoe VERB --help lists a verb's keys\n")
        print("\n".join(f"  {verb:<10} {meaning}" for verb, meaning in VERBS.items()))
        return 0 if len(sys.argv) > 1 else 2
    verb = sys.argv[1]
    if verb not in VERBS:
        print(f"error: no verb {verb!r}; there are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    del sys.argv[1]
    # Imported here: the list of verbs does without Hydra, and a verb without what the others need.
    from olmoe_train.cli.help import module_of, verb_help

    if verb != "launch" and ("-h" in sys.argv or "--help" in sys.argv):
        print(verb_help(verb))
        return 0
    return import_module(module_of(verb)).run()


if __name__ == "__main__":
    sys.exit(main())
