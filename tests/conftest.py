import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when first imported, which PyTorch itself may do


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
