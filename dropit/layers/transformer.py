"""nn.TransformerEncoderLayer and its decoder twin: they call their activation as a function, which no swap reaches."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dropit.layers.activation import dropit_activation
from dropit.layers.layer import DropITLayer
from dropit.layers.relu import dropit_relu
from dropit.layers.table import register


class _DropITFeedForward(DropITLayer):
    def _ff_block(self: Any, x: Tensor) -> Tensor:
        hidden = self.linear1(x)
        saver = getattr(self.linear1, "_dropit_saver", None)
        if self.activation is F.relu and self.saves(hidden):
            hidden = dropit_relu(hidden, self._dropit_memo)
        elif self.activation is F.gelu and saver is not None and saver.bits is not None and self.saves(hidden):
            hidden = dropit_activation(hidden, "gelu", saver)
        else:
            hidden = self.activation(hidden)
        return self._dropout_after(self.linear2(self.dropout(hidden)))  # type: ignore[no-any-return]


@register
class DropITTransformerEncoderLayer(_DropITFeedForward, nn.TransformerEncoderLayer):
    """nn.TransformerEncoderLayer whose ReLU saves a bit per element; its other parts are layers of their own."""

    plain = nn.TransformerEncoderLayer

    def _dropout_after(self, x: Tensor) -> Tensor:
        return self.dropout2(x)  # type: ignore[no-any-return]


@register
class DropITTransformerDecoderLayer(_DropITFeedForward, nn.TransformerDecoderLayer):
    """nn.TransformerDecoderLayer whose ReLU saves a bit per element; its other parts are layers of their own."""

    plain = nn.TransformerDecoderLayer

    def _dropout_after(self, x: Tensor) -> Tensor:
        return self.dropout3(x)  # type: ignore[no-any-return]
