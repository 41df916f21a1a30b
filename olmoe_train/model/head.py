"""The output projection.

Shapes: T tokens, D hidden, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.cross_entropy import cross_entropy_sum, target_log_probs


class OlmoeHead(nn.Linear):
    """Output projection, or, if labels are given, the summed cross-entropy without [T, V] logits in memory.

    `log_probs` is an attribute so that distributed/compile.py can replace the function by a compiled one.
    """

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        self.log_probs = target_log_probs

    def forward(self, x: Tensor, labels_T: Tensor | None = None) -> Tensor:
        """Return the logits [..., V] of x [..., D], or the loss of x [T, D] as an fp32 scalar.

        Args:
            x: Output of the final norm.
            labels_T: int64, -100 at positions without a target; None returns the logits.
        """
        if labels_T is None:
            return F.linear(x, self.weight)
        return cross_entropy_sum(x, self.weight, labels_T, self.log_probs)
