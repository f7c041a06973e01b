import pytest

from dropit.training.config.keys import KEYS, defaults, flatten


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_a_key_is_described_and_its_default_is_allowed(key):
    assert len(key.about.split()) > 1
    assert key.allowed.fits(key.default)


def test_a_key_is_declared_once_and_the_defaults_hold_each():
    assert flatten(defaults()) == {name: key.default for name, key in KEYS.items()}


def test_changing_the_defaults_changes_no_key():
    defaults().SOLVER.MILESTONES.append(3)
    assert defaults().SOLVER.MILESTONES == []


def test_the_contracts_keys_are_there():
    contract = """DATASET TRAIN.PATH VAL.PATH MODEL.ARCH MODEL.NUM_CLASSES MODEL.PRETRAINED MODEL.DROPIT DROPIT.STRATEGY
    DROPIT.GAMMA DROPIT.D DROPIT.COMPRESS DATALOADER.NUM_WORKERS
    SOLVER.BATCH_SIZE SOLVER.LR SOLVER.WEIGHT_DECAY SOLVER.GAMMA
    SOLVER.MILESTONES SOLVER.WARMUP_EPOCHS SOLVER.MAX_EPOCHS NUM_GPUS CHECK_VAL_EVERY_N_EPOCH CKPT OUTPUT_DIR SEED
    ACCELERATOR"""
    assert set(contract.split()) <= KEYS.keys()
