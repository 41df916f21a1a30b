"""The output projection.

Shapes: T tokens, P positions with a target, D hidden, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.cross_entropy import cross_entropy_sum, target_log_probs, target_log_probs_of


class OlmoeHead(nn.Linear):
    """Output projection; with labels or targets, cross-entropy or log-probabilities without [T, V] logits.

    `log_probs` is an attribute so that distributed/compile.py can replace the function by a compiled one.
    """

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        self.log_probs = target_log_probs

    def forward(self, x: Tensor, labels_T: Tensor | None = None, targets_P: Tensor | None = None) -> Tensor:
        """Return the logits [..., V] of x [..., D]; the loss of x [T, D], an fp32 scalar; or
        log-probabilities.

        Args:
            x: Output of the final norm.
            labels_T: int64, -100 at positions without a target; given to get the summed cross-entropy.
            targets_P: int64; given to get the log-probability of each target for x [P, D], fp32 [P].
        """
        if targets_P is not None:
            return target_log_probs_of(x, self.weight, targets_P, self.log_probs)
        if labels_T is None:
            return F.linear(x, self.weight)
        return cross_entropy_sum(x, self.weight, labels_T, self.log_probs)
