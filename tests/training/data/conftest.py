import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def photo():
    """48 x 32 with a different value in each pixel."""
    values = np.arange(48 * 32 * 3, dtype=np.uint32) * 7 % 256
    return Image.fromarray(values.astype(np.uint8).reshape(32, 48, 3))


@pytest.fixture
def square(photo):
    return photo.crop((0, 0, 32, 32))
