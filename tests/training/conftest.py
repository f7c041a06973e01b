from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture
def image_tree(tmp_path):
    """Real images, scikit-learn's digits, as TREE/train/<class>/<nn>.png and TREE/val/..., 32 x 32."""
    from sklearn.datasets import load_digits

    digits = load_digits()

    def build(per_class=4, classes=10):
        for digit in range(classes):
            mine = digits.images[digits.target == digit]
            for split, images in (("train", mine[:per_class]), ("val", mine[per_class : 2 * per_class])):
                folder = tmp_path / "tree" / split / str(digit)
                folder.mkdir(parents=True)
                for number, image in enumerate(images):
                    pixels = (image * (255 / 16)).astype("uint8")
                    Image.fromarray(pixels).convert("RGB").resize((32, 32)).save(folder / f"{number:02}.png")
        return tmp_path / "tree"

    return build


@pytest.fixture
def config(tmp_path, image_tree, monkeypatch):
    """A config of few real images for the tiny ViT, configs/few/vit.yaml; the run is made in a new directory."""
    tree = image_tree(per_class=4)
    path = tmp_path / "configs" / "few" / "vit.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(
        f"""
_BASE_: {ROOT / "configs/digits/vit_tiny_fastminkx0.9.yaml"}
DATASET: imagenet
TRAIN: {{PATH: {tree}/train}}
VAL: {{PATH: {tree}/val}}
DATALOADER: {{CACHE: false, ON_DEVICE: false}}
SOLVER: {{BATCH_SIZE: 20, MAX_EPOCHS: 3, WARMUP_EPOCHS: 0}}
"""
    )
    monkeypatch.chdir(tmp_path)
    return str(path)
